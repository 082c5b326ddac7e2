"""Starting vLLM for our engine: what must be in the environment before vLLM is imported. Imports no vLLM by itself.

Next: engine.py.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    # The engine lives in the actor's own process: weights, caches and records are reached without messages.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The other runner keeps its sampler and its batch on the device, where the seeds of a request cannot be ours.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # Otherwise the first sample of a process waits 10 to 20 s for a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Would put another function in the place of torch.bmm, which kernels/invariant.py then could not see.
    "VLLM_BATCH_INVARIANT": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
"""Read when vLLM is imported, by the process that holds the engine."""


def prepare() -> None:
    """Set it for this process and import vLLM; ValueError if it is missing or was imported without it."""
    wrong = {name: value for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
    if wrong and "vllm" in sys.modules:
        raise ValueError(
            f"vLLM is imported already; set before: {' '.join(f'{n}={v}' for n, v in wrong.items())}"
        )
    os.environ.update(wrong)
    with _nothing_collected():
        try:
            import vllm  # noqa: F401  # 5 s
        except ImportError as error:
            raise ValueError(
                f'rollouts.engine = "vllm": vLLM cannot be imported ({error}); install posttrain[vllm], on a machine '
                "without a GPU .ci/install-vllm"
            ) from None
        from posttrain.rollouts.vllm import engine  # noqa: F401  # 5 s


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection, and none of what is there by the end later.

    Modules stay, a million objects; the collector looks through them again and again, vLLM asks it to on purpose, and a
    start takes a third longer.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
