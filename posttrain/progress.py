"""What a person sees while a run goes on: a live line with a bar, or plain lines if no terminal.

Finished stages stay on the screen as lines with their time and figures. Next: metrics.py.
"""

import math
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HEADLINES = (
    "reward",
    "pass@1",
    "loss",
    "lm_loss",
    "kl",
    "indexer_kl",
    "recall",
    "mean_tokens",
)
"""Figures shown first, where they exist."""
_SHOWN = 4
_WINDOW = 16
"""Steps that tokens/s and the time left are estimated from."""


class Progress:
    """The display of one run: one stage at a time."""

    def __init__(self, console: Console | None = None, *, every_s: float = 5.0) -> None:
        """Without a terminal at most one line every_s seconds is printed, plus start and end."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._every_s = every_s
        self._live: Live | None = None
        self._stage: _Stage | None = None
        if _is_live(self._console):
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()

    def start(self, name: str, kind: str, total: int, *, done: int = 0) -> None:
        """A stage begins, or goes on after `done` steps; total = 0 where the number of steps is not known."""
        self._stage = _Stage(name, kind, total, done)
        if self._live is None:
            steps = f", {total} steps" if total else ""
            self.say(f"{name}: {'going on' if done else 'start'} ({kind}{steps})")

    def expect(self, total: int) -> None:
        """The number of steps has become known."""
        if self._stage is not None:
            self._stage.total = total

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """A step is done; "tokens" among its values makes the tokens per second."""
        stage = self._stage
        if stage is None:
            return
        stage.update(step, values)
        if self._live is None and time.monotonic() - stage.printed >= self._every_s:
            stage.printed = time.monotonic()
            self.say("  ".join([f"{stage.name}: {stage.position}", *stage.facts()]))

    def finish(self, *, ok: bool, figures: Mapping[str, Any]) -> None:
        """The stage has ended; its line stays."""
        stage, self._stage = self._stage, None
        if stage is None:
            return
        word = "done" if ok else "failed"
        facts = headline(figures) or headline(stage.values)
        took = duration(time.monotonic() - stage.began)
        self.say("  ".join([f"{stage.name}: {word} in {took}", *facts]))

    def say(self, text: str) -> None:
        """Print a line (above the live one)."""
        self._console.print(Text(text))
        self._console.file.flush()

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Table | Text:
        stage = self._stage
        if stage is None:
            return Text("")
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(
            total=float(stage.total) if stage.total else None,
            completed=float(stage.done),
            width=24,
            pulse=not stage.total,
        )
        facts = [Text(fact) for fact in stage.facts()]
        row.add_row(Text(stage.name, style="bold"), bar, Text(stage.position), *facts)
        return row


class _Stage:
    """What is known of the stage at work."""

    def __init__(self, name: str, kind: str, total: int, done: int) -> None:
        self.name = name
        self.kind = kind
        self.total = total
        self.done = done
        self.values: Mapping[str, Any] = {}
        self.began = time.monotonic()
        self.printed = self.began
        self._recent: deque[tuple[float, int, float]] = deque([(self.began, done, 0.0)], _WINDOW)
        self._tokens = 0.0
        self._from_zero = done > 0  # only such stages can go on

    @property
    def position(self) -> str:
        return f"{self.done}/{self.total}" if self.total else str(self.done)

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        if step == 0:  # a loop over range(steps) logs 0 .. steps - 1
            self._from_zero = True
        self.done = step + self._from_zero
        self.values = values
        self._tokens += float(values.get("tokens", 0))
        self._recent.append((time.monotonic(), self.done, self._tokens))

    def facts(self) -> list[str]:
        """Tokens per second, headline figures, time left or time taken."""
        (then, done, tokens), (now, done_now, tokens_now) = self._recent[0], self._recent[-1]
        seconds = now - then
        facts = []
        if seconds > 0 and tokens_now > tokens:
            facts.append(f"{compact((tokens_now - tokens) / seconds)} tok/s")
        facts += headline(self.values)
        left = self.total - self.done
        if left > 0 and done_now > done and seconds > 0:
            facts.append(f"ETA {duration(left * seconds / (done_now - done))}")
        else:
            facts.append(duration(time.monotonic() - self.began))
        return facts


def headline(figures: Mapping[str, Any]) -> list[str]:
    """The few figures worth a place on one line, for instance ["reward 0.531", "loss 1.204"].

    Of nested figures (per domain) the first headline of each is taken.
    """
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            inner = [(f"{name} {h}", value[h]) for h in HEADLINES if _is_number(value.get(h))]
            flat |= dict(inner[:1])
        elif _is_number(value):
            flat[name] = value
    known = [name for name in HEADLINES if name in flat]
    nested = [name for name in flat if name not in known and " " in name]
    chosen = (known + nested)[:_SHOWN]
    return [f"{name} {flat[name]:.3f}" for name in chosen]


def compact(number: float) -> str:
    """1234567 as 1.23M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_live(console: Console) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("CI"):
        return False
    return console.is_terminal and not console.is_dumb_terminal


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
