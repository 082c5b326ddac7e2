"""The account of every sample: planned, then trained, filtered or failed; never lost or doubled.

ledger.jsonl holds one event per line with the ids it is about:
{"event": "trained", "stage": "rl-math", "attempt": 1, "ids": [...], "time": ...}. A sample is
(stage, attempt, id): a stage that is run again starts a new attempt, and what an earlier one did is
abandoned together with its learner. An attempt that goes on from a snapshot keeps its number; abandoned is what it
did after that snapshot. An id stands for one planned use of a row, so where a row is
used in several epochs the epoch is a part of the id. Next: store.py, which commits the attempt.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.jsonl import JsonLines


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Samples by fate: planned = trained + filtered + failed + abandoned + lost + in_flight."""

    planned: int = 0
    trained: int = 0
    filtered: int = 0
    """Dropped on purpose: no learning signal, not verified, a duplicate."""
    failed: int = 0
    """Given up after an error."""
    abandoned: int = 0
    """In attempts that a later attempt replaced, or after a snapshot that was gone back to, whatever had become of
    them there."""
    lost: int = 0
    """Planned and never heard of again: must be 0 in a finished run."""
    duplicated: int = 0
    """Trained or planned more than once in the attempt that counts: must be 0."""
    abandoned_trained: int = 0
    """The part of abandoned that had been trained: work done again."""
    in_flight: int = 0
    """Planned and still on their way, in a run that goes on."""
    unplanned: int = 0
    """Trained, filtered or failed without having been planned: must be 0; in no other figure."""


@dataclass(slots=True)
class _Sample:
    planned: int = 0
    trained: int = 0
    filtered: bool = False
    failed: bool = False

    def plus(self, other: "_Sample") -> "_Sample":
        return _Sample(
            planned=self.planned + other.planned,
            trained=self.trained + other.trained,
            filtered=self.filtered or other.filtered,
            failed=self.failed or other.failed,
        )


@dataclass(slots=True)
class _Account:
    """The samples of one attempt, cut at its snapshots."""

    parts: list[tuple[int | None, dict[str, _Sample]]] = field(default_factory=lambda: [(None, {})])
    """Step of the snapshot a part begins at (None: the attempt's beginning), and its samples by id."""
    abandoned: Counts = field(default_factory=Counts)

    def samples(self) -> list[_Sample]:
        """Those that count. An id in two parts was planned twice, unless the later one only ends it."""
        merged: dict[str, _Sample] = {}
        for _, part in self.parts:
            for id, sample in part.items():
                merged[id] = merged[id].plus(sample) if id in merged else sample
        return list(merged.values())

    def back_to(self, step: int) -> None:
        """Abandon what came after the last snapshot of that step."""
        at = max((i for i, (begin, _) in enumerate(self.parts) if begin == step), default=None)
        if at is None:
            raise ValueError(f"ledger.jsonl: resumed from a snapshot of step {step} that was never taken")
        dropped = [sample for _, part in self.parts[at:] for sample in part.values()]
        self.abandoned = _add(self.abandoned, _abandoned(dropped))
        self.parts[at:] = [(step, {})]


@dataclass(slots=True)
class _Attempt:
    number: int
    committed: bool = False


@dataclass(slots=True)
class _State:
    """What the events so far add up to."""

    newest: dict[str, int] = field(default_factory=dict)
    current: dict[str, _Attempt] = field(default_factory=dict)
    """The attempt of each stage that counts: the last one begun or committed."""


class Ledger:
    """The ledger of a run folder. Reading never changes the file; one driver writes it."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path / "ledger.jsonl", durable=True)
        self._state: _State | None = None

    def begin(self, stage: str) -> "StageLedger":
        """Start the next attempt of a stage; everything of the earlier ones is abandoned."""
        attempt = self._now().newest.get(stage, 0) + 1
        self.append({"event": "attempt", "stage": stage, "attempt": attempt})
        return StageLedger(self, stage, attempt)

    def resume(self, stage: str, attempt: int, step: int) -> "StageLedger":
        """Go on with an attempt after its snapshot of a step; what came after that is abandoned."""
        self.append({"event": "resumed", "stage": stage, "attempt": attempt, "step": step})
        return StageLedger(self, stage, attempt)

    def committed(self, stage: str, attempt: int) -> None:
        """Record, once, that the stage's output comes from this attempt."""
        if self._now().current.get(stage) != _Attempt(attempt, True):
            self.append({"event": "committed", "stage": stage, "attempt": attempt})

    def counts(self, *, running: bool = False) -> Counts:
        """Count the samples; with running=True those under way are in flight instead of lost."""
        state = _State()
        attempts: dict[tuple[str, int], _Account] = defaultdict(_Account)
        for row in self._lines.rows():
            _follow(state, row)
            _count(attempts[row["stage"], row["attempt"]], row)
        total = Counts()
        for (stage, number), account in attempts.items():
            total = _add(total, account.abandoned)
            current = state.current.get(stage)
            if current is None or number != current.number:
                total = _add(total, _abandoned(account.samples()))
            else:
                open_ones = running and not current.committed
                total = _add(total, _finished(account.samples(), in_flight=open_ones))
        return total

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event, durably."""
        self._lines.append({**event, "time": round(time.time(), 3)})
        _follow(self._now(), event)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _now(self) -> _State:
        if self._state is None:
            self._state = _State()
            for row in self._lines.rows():
                _follow(self._state, row)
        return self._state


class StageLedger:
    """The ledger as one attempt of one stage writes it."""

    def __init__(self, ledger: Ledger, stage: str, attempt: int) -> None:
        self._ledger = ledger
        self.stage = stage
        self.attempt = attempt

    def planned(self, ids: Iterable[str]) -> None:
        """These samples are to be made; from here on each must come to an end."""
        self._write("planned", ids)

    def generated(self, ids: Iterable[str]) -> None:
        """An engine has completed them."""
        self._write("generated", ids)

    def scored(self, ids: Iterable[str]) -> None:
        """The rewards have judged them."""
        self._write("scored", ids)

    def trained(self, ids: Iterable[str]) -> None:
        """Their gradients are in a finished optimizer step (or their rows in the data set)."""
        self._write("trained", ids)

    def filtered(self, ids: Iterable[str], reason: str = "") -> None:
        """Dropped on purpose."""
        self._write("filtered", ids, reason=reason)

    def failed(self, ids: Iterable[str], reason: str = "") -> None:
        """Given up."""
        self._write("failed", ids, reason=reason)

    def snapshot(self, step: int) -> None:
        """Everything so far is in the snapshot of this step (if that is completed: see resume)."""
        self._ledger.append({"event": "snapshot", "stage": self.stage, "attempt": self.attempt, "step": step})

    def generation_failed(self, ids: Iterable[str], actor: str, error: str) -> None:
        """An actor died or timed out with these; they stay planned, another one takes over."""
        self._write("generation_failed", ids, actor=actor, error=error)

    def _write(self, event: str, ids: Iterable[str], **details: str) -> None:
        row = {"event": event, "stage": self.stage, "attempt": self.attempt, "ids": list(ids)}
        if row["ids"]:
            self._ledger.append(row | {key: text for key, text in details.items() if text})


def _follow(state: _State, row: Mapping[str, Any]) -> None:
    stage, attempt = row["stage"], row["attempt"]
    if row["event"] in ("attempt", "resumed"):
        state.newest[stage] = max(attempt, state.newest.get(stage, 0))
        state.current[stage] = _Attempt(attempt)
    elif row["event"] == "committed":
        state.current[stage] = _Attempt(attempt, True)


def _count(account: _Account, row: Mapping[str, Any]) -> None:
    event = row["event"]
    if event == "snapshot":
        account.parts.append((row["step"], {}))
    elif event == "resumed":
        account.back_to(row["step"])
    elif event in ("planned", "trained", "filtered", "failed"):
        for name in row["ids"]:
            _note(account.parts[-1][1].setdefault(name, _Sample()), event)


def _note(sample: _Sample, event: str) -> None:
    if event == "planned":
        sample.planned += 1
    elif event == "trained":
        sample.trained += 1
    elif event == "filtered":
        sample.filtered = True
    else:
        sample.failed = True


def _abandoned(samples: Iterable[_Sample]) -> Counts:
    planned = [s for s in samples if s.planned]
    trained = sum(1 for s in planned if s.trained)
    return Counts(planned=len(planned), abandoned=len(planned), abandoned_trained=trained)


def _finished(samples: Iterable[_Sample], *, in_flight: bool) -> Counts:
    every = list(samples)
    planned = [s for s in every if s.planned]
    trained = sum(1 for s in planned if s.trained)
    filtered = sum(1 for s in planned if s.filtered and not s.trained)
    failed = sum(1 for s in planned if s.failed and not s.trained and not s.filtered)
    missing = len(planned) - trained - filtered - failed
    return Counts(
        planned=len(planned),
        trained=trained,
        filtered=filtered,
        failed=failed,
        lost=0 if in_flight else missing,
        in_flight=missing if in_flight else 0,
        duplicated=sum(1 for s in every if s.planned > 1 or s.trained > 1),
        unplanned=len(every) - len(planned),
    )


def _add(a: Counts, b: Counts) -> Counts:
    return Counts(**{name: getattr(a, name) + getattr(b, name) for name in asdict(a)})
