"""What an actor's process needs from its start, and does once before its first model. Next: cluster.py."""

import gc
import importlib

ENVIRONMENT = {
    # glibc asks for huge pages (as NumPy does for its own arrays), which Linux grants where it is set to "madvise".
    # A step streams through more weights than the tables of small pages reach: 10 % of a step on two cores.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Read when the process starts; a variable that is set already stays."""


def prepare() -> None:
    """Import the model's code and take all that is loaded so far out of the garbage collector's sight.

    torch and transformers are half a million objects; every full collection would walk them (4 % of the
    time of generating with the demo's model).
    """
    importlib.import_module("posttrain.model.checkpoint")
    gc.collect()
    gc.freeze()
