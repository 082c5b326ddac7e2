"""What an actor's process does once, before its first model. Next: cluster.py."""

import gc
import importlib


def prepare() -> None:
    """Import the model's code and take all that is loaded so far out of the garbage collector's sight.

    torch and transformers are half a million objects; every full collection would walk them (4 % of the
    time of generating with the demo's model).
    """
    importlib.import_module("posttrain.model.checkpoint")
    gc.collect()
    gc.freeze()
