"""A second CUDA stream that works on the chunks that the first has finished, out of two buffers.

What one kernel is bound by (products) then hides what another is bound by (memory), and the ends of launches, where a
GPU runs empty. On the CPU there is one order of things. Next: index_topk_triton.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """`for n, chunk in enumerate(chunks): wait_for_buffer(n % 2); fill it; with follow(n % 2): use it`, then `join()`."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._busy: dict[int, torch.cuda.Event] = {}

    def wait_for_buffer(self, number: int) -> None:
        """Before the first stream writes to a buffer: whoever read it is done."""
        event = self._busy.pop(number, None)
        if event is not None and self._main is not None:
            self._main.wait_event(event)

    @contextmanager
    def follow(self, number: int) -> Iterator[None]:
        """Work on a buffer, after what the first stream has done up to here."""
        if self._stream is None or self._main is None:
            yield
            return
        self._stream.wait_stream(self._main)
        with torch.cuda.stream(self._stream):
            yield
            self._busy[number] = self._stream.record_event()

    def join(self) -> None:
        """The first stream goes on when the second is done."""
        if self._main is not None and self._stream is not None:
            self._main.wait_stream(self._stream)
