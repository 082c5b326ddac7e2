"""Chunks of work on two CUDA streams in turn, so that one chunk's small or late kernels run beside the next one's.

A lane does its chunks one after another; nothing else is ordered between the lanes. On the CPU there is one order of
things. And what is sent to a GPU without waiting for it. Next: index_topk_triton.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of host memory on a device, in the order of its current stream; the host does not wait for that."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Lanes:
    """`with lanes.lane(n % count): ...` for every chunk, each lane with a buffer of its own, then `join()`.

    Buffers are allocated before, on the current stream, and freed after the join.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._streams = [torch.cuda.Stream(device) for _ in range(count)]
        for stream in self._streams:
            stream.wait_stream(self._main)

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        """What is launched inside runs on this lane."""
        if not self._streams:
            yield
            return
        with torch.cuda.stream(self._streams[number]):
            yield

    def join(self) -> None:
        """The current stream goes on when every lane is done."""
        for stream in self._streams:
            self._main.wait_stream(stream)
