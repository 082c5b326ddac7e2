"""Append-only files of JSON lines: one writer, any number of readers, whole lines only.

A killed writer leaves at most one torn line at the end: readers pass over it, the next writer cuts
it off. Left out: locks (store.py keeps a second driver out). Next: ledger.py, metrics.py.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain import disk

_BLOCK = 1 << 16


class JsonLines:
    """One growing file, opened (and its torn tail cut) at the first append."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        """With durable=True every line is fsynced before append returns."""
        self.path = path
        self._durable = durable
        self._descriptor: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line; on a full disk nothing of it stays."""
        line = json.dumps(disk.plain(row)).encode() + b"\n"
        with disk.explain_full(self.path.parent):
            if self._descriptor is None:
                self._descriptor = _open(self.path)
            size = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(line):  # a nearly full disk takes a part of the line first
                    written += os.write(self._descriptor, line[written:])
                if self._durable:
                    os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole line, in order; never changes the file."""
        return read(self.path)

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a file that may still be growing; a missing file has none.

    Raises ValueError with file and line number for a broken line that is not the last one.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        broken = 0
        for number, line in enumerate(file, start=1):
            if broken:
                raise ValueError(_broken(path, broken))
            row = _parse(line)
            if row is None:
                broken = number  # fine if it is the last one
            else:
                yield row


def _broken(path: Path, number: int) -> str:
    return (
        f"{path}:{number}: broken line (every line must be one JSON object); "
        "only the last line may be torn, so the file was changed: restore it or move it away"
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    if new:
        disk.sync_folder(path.parent)
    start = _last_line(descriptor)
    size = os.fstat(descriptor).st_size
    if start < size and _parse(os.pread(descriptor, size - start, start)) is None:
        os.ftruncate(descriptor, start)
    return descriptor


def _last_line(descriptor: int) -> int:
    """Offset at which the last line starts."""
    end = os.fstat(descriptor).st_size - 1  # the last byte may be the newline of the last line
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
