"""One flat dict per step: appended to metrics.jsonl and shown as live progress.

A row is {"stage", "attempt", "step", "time", ...}. A stage that is run again writes rows with a
higher attempt: readers take the last attempt of a stage. One that goes on from a snapshot keeps its attempt and may
write a step again: readers take the last row of a step. Next: progress.py for the display.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from posttrain.jsonl import JsonLines
from posttrain.progress import Progress

FILE = "metrics.jsonl"


class Metrics:
    """The figures of one run; use it as a context, so that the terminal is left in order."""

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        """Append to the metrics of a run folder; without a progress, one for stdout is made."""
        self._lines = JsonLines(path / FILE, durable=False)
        self._progress = progress or Progress()
        self._stage: tuple[str, int] | None = None
        self._figures: Mapping[str, Any] = {}

    @contextmanager
    def stage(
        self, name: str, kind: str, attempt: int, total_steps: int = 0, *, done: int = 0
    ) -> Iterator[None]:
        """Everything logged in the block belongs to this stage; total_steps = 0 means not known.

        done: steps that an interrupted run has made of it.
        """
        assert self._stage is None, f"stage {name}: {self._stage} has not ended"
        self._stage = (name, attempt)
        self._figures = {}
        self._progress.start(name, kind, total_steps, done=done)
        ok = False
        try:
            yield
            ok = True
        finally:
            self._stage = None
            self._progress.finish(ok=ok, figures=self._figures)

    def expect(self, total_steps: int) -> None:
        """Tell the display how many steps this stage will log."""
        self._progress.expect(total_steps)

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """One step is done. Steps count up, from 0 or 1.

        Shown live where they exist: tokens (of this step; they make the tokens per second), reward,
        loss and the other names in progress.HEADLINES.
        """
        assert self._stage is not None, "metrics.log belongs inside metrics.stage"
        name, attempt = self._stage
        row = {"stage": name, "attempt": attempt, "step": step, "time": round(time.time(), 3)}
        clash = row.keys() & values.keys()
        assert not clash, f"stage {name}: metrics may not be called {', '.join(sorted(clash))}"
        self._lines.append(row | dict(values))
        self._progress.update(step, values)

    def result(self, figures: Mapping[str, Any]) -> None:
        """The figures that the line of the finished stage shows instead of the last step's."""
        self._figures = figures

    def say(self, text: str) -> None:
        """Print a line without disturbing the live display."""
        self._progress.say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._lines.close()
