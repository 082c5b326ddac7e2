"""Peak memory of this process and everything it has started, sampled while a block runs.

Resident memory is added up over processes, so shared pages count more than once: an upper bound.
"""

import threading
from typing import Self

import psutil

_EVERY_S = 0.5


class PeakMemory:
    """Use as a context; `bytes` is the largest sum seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._ended.wait(_EVERY_S):
            self.bytes = max(self.bytes, _resident(driver))


def _resident(driver: psutil.Process) -> int:
    total = 0
    for process in [driver, *driver.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended while we were looking
            continue
    return total
