"""A small world that a 0.6 M-parameter model can learn in two minutes: four task families with demonstrations.

The demonstrations are flawed on purpose, each family in its own way, so that reinforcement learning
has something to correct; every flaw and its rate is a constant in the family's module. Used by
configs/demo.toml, configs/forgetting.toml and the tests; nothing else depends on it.

lookup.py is the demo's agent. records.py (SQL, judged by the final state) and pages.py (search and open) could take its place
but do not yet. Measured on 2026-11-25 with seed 0, everything else as in configs/demo.toml: the SQL agent is learned (pass@1
51.0 % in the sparse base, 97.0 % after rl-agent), but mathematics, whose numbers it shares, falls to 10.0 % in the base (35.5 % after
pretraining beside pages.py) and to 19.0 % after rl-math; the search agent stands at 3.0 % after pretraining.
"""
