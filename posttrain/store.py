"""The run's folder: one folder per stage, there completely and verified, or not there at all.

A stage writes under .partial-<stage>; commit makes every file durable, writes manifest.json last
(size and sha256 of each file, hash of the config, hash of the parents' manifests) and renames the
folder. A manifest in a partial folder is therefore a decision: if the driver dies before the
rename, the next one finishes it. What a stage needs to go on after a kill lies in the partial folder's SNAPSHOTS
(snapshots.py) and ends with it. Next: units.py for what the hashes are made of, then pipeline.py.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain import disk

MANIFEST = "manifest.json"
SNAPSHOTS = ".snapshots"
"""Folder in a stage's partial folder that is no part of its output."""
_PARTIAL = ".partial-"
_LOCK = ".lock"
_LOCK_TRIES_S = 1.0


class File(BaseModel):
    """One file of a stage."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative to the stage's folder."""
    size: int
    sha256: str


class Origin(BaseModel):
    """What a stage is made from: with another origin its output would be another."""

    model_config = ConfigDict(frozen=True)

    stage: str
    kind: str
    config_hash: str
    parents: dict[str, str]
    """Name of each source -> sha256 of its manifest (of its contents, if it is no stage)."""


class Manifest(Origin):
    """What a committed stage, or a snapshot of one, consists of."""

    attempt: int
    files: tuple[File, ...]
    created: str


class Store:
    """The folder of one run. Creating the object touches nothing."""

    _held: ClassVar[set[Path]] = set()
    """Folders locked by this process: closing any handle of a lock file would give its lock up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other drivers out while the block runs, and finish what a killed one had decided.

        Raises ValueError if another driver is at work here.
        """
        key = self.path.resolve()
        if key in self._held:
            raise ValueError(_taken(self.path, os.getpid()))
        with disk.explain_full(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("a+") as file:
            _acquire(file.fileno(), self.path)
            self._held.add(key)
            try:
                with disk.explain_full(self.path):
                    file.truncate(0)
                    file.write(f"{os.getpid()}\n")
                    file.flush()
                    for partial in self.path.glob(f"{_PARTIAL}*"):
                        self._finish_decided(partial)
                yield
            finally:
                self._held.discard(key)

    def is_locked(self) -> bool:
        """Whether a driver is at work here."""
        if self.path.resolve() in self._held:
            return True
        try:
            with (self.path / _LOCK).open("rb") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def is_complete(self, stage: str, config_hash: str, parents: Mapping[str, str]) -> bool:
        """Whether the stage's folder is whole and was made from this config and these parents."""
        return self.why_redo(stage, config_hash, parents) is None

    def why_redo(self, stage: str, config_hash: str, parents: Mapping[str, str]) -> str | None:
        """The reason, in a few words, why a stage has to be run; None if it is complete."""
        folder = self.path / stage
        if not folder.exists():
            return "stopped in the middle" if self.is_partial(stage) else "not run yet"
        try:
            manifest = self.manifest(stage)
        except ValueError as error:
            return str(error)
        if manifest.config_hash != config_hash:
            return "its config changed"
        for name in sorted(manifest.parents.keys() | parents.keys()):
            if manifest.parents.get(name) != parents.get(name):
                return f"source {name} changed"
        return damage(folder, manifest)

    def is_partial(self, stage: str) -> bool:
        """Whether an unfinished folder of the stage lies here."""
        return self.partial_path(stage).exists()

    def partial_path(self, stage: str) -> Path:
        """Where a stage writes until it is committed."""
        return self.path / f"{_PARTIAL}{stage}"

    def manifest(self, stage: str) -> Manifest:
        """The manifest of a committed stage; ValueError if it is missing or broken."""
        return read_manifest(self.path / stage)

    def manifest_hash(self, stage: str) -> str:
        """sha256 of a committed stage's manifest, and through it of everything it came from."""
        return hashlib.sha256((self.path / stage / MANIFEST).read_bytes()).hexdigest()

    def partial(self, stage: str) -> Path:
        """An empty folder for a stage to write in; what a killed run left there is removed."""
        self.discard(stage)
        folder = self.partial_path(stage)
        with disk.explain_full(self.path):
            folder.mkdir(parents=True)
        return folder

    def discard(self, stage: str) -> None:
        """Remove what a stage has written and not committed."""
        shutil.rmtree(self.partial_path(stage), ignore_errors=True)

    def commit(self, origin: Origin, attempt: int) -> None:
        """Make the stage's partial folder its output; an older output is replaced only then."""
        with disk.explain_full(self.path):
            seal(self.partial_path(origin.stage), origin, attempt)
            self._finish(origin.stage)

    def require_space(self, num_bytes: int) -> None:
        """Raise DiskFull unless that many bytes are free."""
        if disk.free(self.path) < num_bytes:
            raise disk.full(self.path, need=num_bytes)

    def _finish_decided(self, partial: Path) -> None:
        try:
            manifest = Manifest.model_validate_json((partial / MANIFEST).read_bytes())
        except (OSError, ValidationError):
            return
        stage = partial.name.removeprefix(_PARTIAL)
        # A stage may have copied its source's manifest, so the name and the files must fit as well.
        if manifest.stage == stage and damage(partial, manifest) is None:
            self._finish(stage)

    def _finish(self, stage: str) -> None:
        folder, partial = self.path / stage, self.partial_path(stage)
        shutil.rmtree(partial / SNAPSHOTS, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        disk.sync_folder(self.path)


def seal(folder: Path, origin: Origin, attempt: int) -> None:
    """Make every file of a folder durable and write its manifest last."""
    manifest = Manifest(
        **origin.model_dump(),
        attempt=attempt,
        files=tuple(_durable_files(folder)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    disk.write_json(folder / MANIFEST, manifest.model_dump())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; ValueError if it is missing or broken."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except ValidationError:
        raise ValueError(f"{MANIFEST} is broken") from None


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files of a folder, sizes first because they cost nothing; None if they are whole."""
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            return f"{file.path} is missing"
        if path.stat().st_size != file.size:
            return f"{file.path} has {path.stat().st_size} bytes instead of {file.size}"
    for file in manifest.files:
        if file_hash(folder / file.path) != file.sha256:
            return f"{file.path} was changed (sha256 differs)"
    return None


def file_hash(path: Path, *, sync: bool = False) -> str:
    """sha256 of a file; with sync=True its bytes are durable afterwards."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _acquire(descriptor: int, path: Path) -> None:
    # A record lock, not flock: a forked child that outlives a killed driver would keep a flock.
    # Tried for a moment, because is_locked of another process holds the lock while it asks.
    until = time.monotonic() + _LOCK_TRIES_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > until:
                break
        time.sleep(0.05)
    raise ValueError(_taken(path, (path / _LOCK).read_text().strip() or "unknown"))


def _taken(path: Path, pid: int | str) -> str:
    return (
        f"another driver (process {pid}) is at work in {path}; "
        "wait for it, stop it, or choose another folder with --out"
    )


def _durable_files(folder: Path) -> Iterator[File]:
    for parent, folders, names in os.walk(folder):
        if SNAPSHOTS in folders:
            folders.remove(SNAPSHOTS)
        for name in sorted(names):
            path = Path(parent, name)
            assert path.is_file() and not path.is_symlink(), f"{path}: a stage may write files only"
            yield File(
                path=path.relative_to(folder).as_posix(),
                size=path.stat().st_size,
                sha256=file_hash(path, sync=True),
            )
        disk.sync_folder(Path(parent))
        folders.sort()
