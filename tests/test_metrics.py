"""Metrics: the file, the plain lines and the live line. Run: pytest tests/test_metrics.py"""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from posttrain.metrics import Metrics
from posttrain.progress import Progress, compact, duration, headline


def plain(out: io.StringIO, every_s: float = 5.0) -> Progress:
    return Progress(Console(file=out, soft_wrap=True, highlight=False), every_s=every_s)


def test_rows_are_flat_and_name_stage_and_attempt(tmp_path: Path) -> None:
    with (
        Metrics(tmp_path, plain(io.StringIO())) as metrics,
        metrics.stage("rl", "rl", 2, total_steps=3),
    ):
        metrics.log(0, {"reward": 0.5, "tokens": np.int64(7), "loss": np.float32(0.25)})
        metrics.log(1, {"reward": float("nan"), "note": "x"})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("time") > 1e9
    assert rows == [
        {"stage": "rl", "attempt": 2, "step": 0, "reward": 0.5, "tokens": 7, "loss": 0.25},
        {"stage": "rl", "attempt": 2, "step": 1, "reward": None, "note": "x"},
    ]


def test_a_torn_row_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a"}\n{"sta')
    with Metrics(tmp_path, plain(io.StringIO())) as metrics, metrics.stage("b", "sft", 1):
        metrics.log(1, {})
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_misuse_is_an_assertion(tmp_path: Path) -> None:
    with Metrics(tmp_path, plain(io.StringIO())) as metrics:
        with pytest.raises(AssertionError, match=r"belongs inside metrics\.stage"):
            metrics.log(0, {})
        with metrics.stage("rl", "rl", 1), pytest.raises(AssertionError, match="called step"):
            metrics.log(0, {"step": 1})


def test_without_a_terminal_there_are_few_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    with Metrics(tmp_path, plain(out)) as metrics:
        with metrics.stage("warm", "warmup", 1, total_steps=1000):
            for step in range(1000):  # far less than five seconds
                metrics.log(step, {"loss": 1.5})
        with pytest.raises(ValueError), metrics.stage("rl", "rl", 1):
            raise ValueError
        metrics.say("bye")
    lines = out.getvalue().splitlines()
    assert lines[0] == "warm: start (warmup, 1000 steps)"
    assert lines[1].startswith("warm: done in ") and lines[1].endswith("  loss 1.500")
    assert lines[2] == "rl: start (rl)"
    assert lines[3].startswith("rl: failed in ")
    assert lines[4:] == ["bye"]


def test_a_plain_line_says_where_the_stage_is(tmp_path: Path) -> None:
    out = io.StringIO()
    with Metrics(tmp_path, plain(out, every_s=0)) as metrics, metrics.stage("rl", "rl", 1, total_steps=4):
        metrics.log(0, {"reward": 0.25, "kl": 0.01, "tokens": 5000, "grad_norm": 2.0})
        metrics.log(1, {"reward": 0.5, "kl": 0.01, "tokens": 5000, "grad_norm": 2.0})
        metrics.expect(2)
        metrics.result({"math": {"pass@1": 0.75, "n": 200}, "steps": 2})
    lines = out.getvalue().splitlines()
    assert lines[2].startswith("rl: 2/4  ") and " tok/s  reward 0.500  kl 0.010  ETA " in lines[2]
    assert lines[3].endswith("  math pass@1 0.750")


def test_steps_may_count_from_one(tmp_path: Path) -> None:
    out = io.StringIO()
    with Metrics(tmp_path, plain(out, every_s=0)) as metrics, metrics.stage("a", "sft", 1, 2):
        metrics.log(1, {})
        metrics.log(2, {})
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()[1:3]] == ["a: 1/2", "a: 2/2"]


def test_with_a_terminal_the_line_is_live_and_the_finished_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Metrics(tmp_path, Progress(terminal)) as metrics, metrics.stage("rl", "rl", 1, 4):
        metrics.log(0, {"reward": 0.5})
        time.sleep(1.0)  # the line is drawn twice a second
        metrics.say("a word in between")
    text = out.getvalue()
    assert "1/4" in text and "reward 0.500" in text and "a word in between" in text
    assert "rl: done in 1." in text
    assert "\x1b[?25h" in text  # the cursor is shown again


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_no_live_line_where_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Metrics(tmp_path, Progress(terminal)) as metrics, metrics.stage("rl", "rl", 1, 4):
        metrics.log(0, {"reward": 0.5})
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().startswith("rl: start")


def test_words_for_numbers() -> None:
    assert [compact(n) for n in (12, 3456, 7_890_000, 2e9)] == ["12", "3.46k", "7.89M", "2G"]
    assert [duration(s) for s in (1.24, 65, 3723)] == ["1.2 s", "1:05", "1:02:03"]
    assert headline({"zeta": 1.0, "loss": 2, "reward": 0.5, "ok": True, "kl": float("inf")}) == [
        "reward 0.500",
        "loss 2.000",
    ]
