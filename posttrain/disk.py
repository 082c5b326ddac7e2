"""Files that survive a kill: fsync, whole files by rename, one clear line when the disk is full.

Next: jsonl.py for files that grow, store.py for folders.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Libraries written in Rust or C++ drop the errno and keep only the text.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
_NOTHING_LEFT = 1 << 20


class DiskFull(OSError):
    """No room to write; the message is one line naming the folder and the free bytes."""


def free(folder: Path) -> int:
    """Bytes that may still be written into the folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or one that caused it, means that the disk of the folder is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFull) or (isinstance(seen, OSError) and seen.errno in _FULL):
            return True
        if any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    # torch reports a full disk as a RuntimeError that says only "file write failed".
    return isinstance(error, RuntimeError) and free(folder) < _NOTHING_LEFT


def full(folder: Path, need: int | None = None) -> DiskFull:
    """The error to raise when the disk of the folder is full."""
    wanted = "" if need is None else f", {need} needed"
    return DiskFull(
        f"no disk space in {folder} ({free(folder)} bytes free{wanted}); "
        "make room there or choose another folder with --out, then run the same command again"
    )


@contextmanager
def explain_full(folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into DiskFull."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if not is_full(error, folder):
            raise
        raise full(folder) from error


def sync_files(folder: Path, *, skip: str) -> None:
    """Make every file below a folder durable, but those in folders called skip."""
    for parent, folders, names in os.walk(folder):
        if skip in folders:
            folders.remove(skip)
        for name in names:
            sync_folder(Path(parent, name))  # a file is synced in the same way
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (fsync of the files does not cover them)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(plain(value), indent=2) + "\n"
    aside = path.with_name(f".{path.name}.partial")
    with explain_full(path.parent):
        try:
            with aside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync_folder(path.parent)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numpy as Python numbers, paths as text, NaN and inf as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy, without importing it
        return plain(value.tolist())
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")
