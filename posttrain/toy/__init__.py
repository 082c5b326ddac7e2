"""A small world that a 0.6 M-parameter model can learn in three minutes: four task families with demonstrations, and a judge.

The demonstrations are flawed on purpose, each family in its own way, so that reinforcement learning
has something to correct; every flaw and its rate is a constant in the family's module. Used by
configs/demo.toml, configs/forgetting.toml and the tests; nothing else depends on it.

Families share as few tokens as they can. Measured on 2026-11-25, seed 0: an agent whose rows were numbers pulled mathematics
down to 10 % in the sparse base and 19 % after rl-math. An agent that searched and opened pages was not learned: 3 %, and 6.5 %
after rl-agent.
"""
