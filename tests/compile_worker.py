"""Compiles the kernels of launches.py for an H100 or H200 on any machine; prints what each of them needs, as JSON.

Run by test_compile.py in a process of its own, because Triton decides at import whether it interprets.
Usage: python tests/compile_worker.py [NAME ...] (default: every row).
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from launches import LAUNCHES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Absent:
    """A driver for a GPU that is not there: enough to compile for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def main(names: list[str]) -> None:
    """One JSON line per row and kernel."""
    driver.set_active(Absent())
    torch.cuda.get_device_capability = lambda device=None: (TARGET.arch // 10, TARGET.arch % 10)
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for name in names or LAUNCHES:
        start = time.perf_counter()
        compiled.clear()
        LAUNCHES[name].call()
        seconds = time.perf_counter() - start
        first = {kernel.hash for kernel in compiled}
        LAUNCHES[name].again()
        for kernel in {k.hash: k for k in compiled}.values():
            row = {"triton": triton.__version__, "row": name, "kernel": kernel.name}
            row |= {
                "allowed": LAUNCHES[name].spill,
                "shared": kernel.metadata.shared,
                "too_often": kernel.hash not in first,
                "seconds": seconds,
                **_usage(kernel.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes per thread on the stack: what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "spill": int(found[2])}


if __name__ == "__main__":
    main(sys.argv[1:])
