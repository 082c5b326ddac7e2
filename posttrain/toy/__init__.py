"""A small world that a 0.6 M-parameter model can learn in two minutes: four task families with demonstrations.

The demonstrations are flawed on purpose, each family in its own way, so that reinforcement learning
has something to correct; every flaw and its rate is a constant in the family's module. Used by
configs/demo.toml, configs/forgetting.toml and the tests; nothing else depends on it.
"""
