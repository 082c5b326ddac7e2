"""Snapshots of a training stage: what a killed stage goes on from, to the bit.

A snapshot is a folder in the stage's partial folder: the learner's state (training_state.py), what the stage itself
remembers (state.json: which tasks come next, what was counted) and a manifest, written last, after which the folder
gets its name. It is used only if every file verifies, else the one before is, and that is said. A snapshot is taken
between two steps, when no sample is under way. Next: stages/rl.py, stages/lm.py, which take them.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain import config, disk
from posttrain.ledger import StageLedger
from posttrain.store import SNAPSHOTS, Origin, damage, read_manifest, seal

_STATE = "state.json"
_STEP = "step-"
_UNFINISHED = "unfinished"


class _Learner(Protocol):
    def call(self, method: str, *args: Any) -> Any:
        """Run a method of Learner."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One that verified."""

    folder: Path
    step: int
    """Steps that are done; the next one has this number."""
    attempt: int
    state: dict[str, Any]
    """What the stage had to remember; only the stage knows what is in it."""


def newest(partial: Path, origin: Origin, say: Callable[[str], None]) -> Snapshot | None:
    """The last snapshot in a stage's partial folder that is whole and of this origin."""
    for folder in sorted((partial / SNAPSHOTS).glob(f"{_STEP}*"), reverse=True):
        try:
            manifest = read_manifest(folder)
            wrong = damage(folder, manifest)
        except ValueError as error:
            wrong = str(error)
        else:
            if Origin(**manifest.model_dump(include=set(Origin.model_fields))) != origin:
                return None  # its config or a source has changed since: none here fits
        step = int(folder.name.removeprefix(_STEP))
        if wrong is None:
            state = json.loads((folder / _STATE).read_bytes())
            return Snapshot(folder=folder, step=step, attempt=manifest.attempt, state=state)
        say(f"{origin.stage}: the snapshot of step {step} is refused, {wrong}; looking for the one before")
    return None


class Snapshots:
    """Takes the snapshots of one attempt of a stage."""

    def __init__(
        self,
        cfg: config.Snapshots,
        partial: Path,
        origin: Origin,
        ledger: StageLedger,
        last: Snapshot | None = None,
    ) -> None:
        """last: the snapshot that the stage goes on from."""
        self.last = last
        self._cfg, self._origin, self._ledger = cfg, origin, ledger
        self._partial, self._folder = partial, partial / SNAPSHOTS
        self._when = time.monotonic()
        self._learner: _Learner | None = None
        self._step = 0
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future[None] | None = None

    @property
    def first_step(self) -> int:
        """Where the stage begins: 0, or after the snapshot."""
        return 0 if self.last is None else self.last.step

    @property
    def exist(self) -> bool:
        """Whether there is one to go on from, whole or not."""
        return any(self._folder.glob(f"{_STEP}*"))

    def restore(self, learner: _Learner) -> dict[str, Any] | None:
        """Bring the learner to where the snapshot was taken; what the stage has to remember, None without one."""
        if self.last is None:
            return None
        learner.call("restore", self.last.folder)
        return self.last.state

    def due(self, step: int) -> bool:
        """Whether to take one now that `step` steps are done; to be asked after every step."""
        if self._learner is not None and self._sealing is None and self._learner.call("snapshot_written"):
            self._sealing = self._threads.submit(self._seal)
        if step == self.first_step:
            return False
        every_steps = self._cfg.every_steps and step % self._cfg.every_steps == 0
        return bool(every_steps) or time.monotonic() - self._when > self._cfg.every_s

    def take(self, step: int, learner: _Learner, state: Mapping[str, Any]) -> None:
        """Save everything after `step` steps; returns when it is safe, or when it is copied (asynchronous)."""
        self.settle()
        folder = self._folder / _UNFINISHED
        shutil.rmtree(folder, ignore_errors=True)
        with disk.explain_full(self._partial):
            folder.mkdir(parents=True)
        disk.write_json(folder / _STATE, state)
        self._ledger.snapshot(step)
        learner.call("snapshot", folder)
        self._learner, self._step, self._when = learner, step, time.monotonic()
        if not self._cfg.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the snapshot under way; raises what went wrong with it."""
        if self._learner is None:
            return
        if self._sealing is None:
            self._learner.call("snapshot_finish")
            self._seal()
        else:
            self._sealing.result()
        self._learner = self._sealing = None

    def _seal(self) -> None:
        """Make the written folder a snapshot, and remove those that are too many, or later and thus were refused."""
        # What the stage has written up to here must be there as well.
        disk.sync_files(self._partial, skip=SNAPSHOTS)
        folder = self._folder / _UNFINISHED
        with disk.explain_full(self._folder):
            seal(folder, self._origin, self._ledger.attempt)
            named = self._folder / f"{_STEP}{self._step:08d}"
            shutil.rmtree(named, ignore_errors=True)  # one that was refused
            folder.rename(named)
            disk.sync_folder(self._folder)
        every = sorted(self._folder.glob(f"{_STEP}*"))
        kept = [other for other in every if other <= named][-self._cfg.keep :]
        for other in every:
            if other not in kept:
                shutil.rmtree(other)
