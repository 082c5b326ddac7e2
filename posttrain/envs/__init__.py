"""Agent environments: each file holds a generator of tasks, the tools and state of an episode, and a solver.

shop.py         a shop's database (database.py) behind tools; success is the state that is left behind
wiki.py         search and open over a corpus (corpus.py); questions over several pages
interpreter.py  a Python interpreter in the sandbox; questions that want computing
repair.py       a small broken package (packages.py); hidden tests decide

What is common is in ../rollouts/environment.py and ../rollouts/toolbox.py; docs/environments.md shows how to write one.
"""
