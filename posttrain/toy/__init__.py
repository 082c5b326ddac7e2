"""A small world that a 0.6 M-parameter model can learn in two minutes: four task families with demonstrations.

The demonstrations are flawed on purpose, each family in its own way, so that reinforcement learning
has something to correct; every flaw and its rate is a constant in the family's module. Used by
configs/demo.toml, configs/forgetting.toml and the tests; nothing else depends on it.

lookup.py is the demo's agent. records.py, an agent that writes SQL and is judged by the final state, is ready to
take its place (with its WORDS in the vocabulary) but does not
fit yet. Measured on 2026-11-25 with seed 0, everything else as in configs/demo.toml: it is learned (pass@1 51.0 % in the
sparse base, 97.0 % after rl-agent), but mathematics, whose numbers it shares, falls to 10.0 % in the base and 19.0 % after rl-math.
An agent that searched and opened pages left mathematics alone (36.0 and 88.5 %) but was not learned: 3.0 % in the base, 6.5 %
after rl-agent.
"""
