"""The ledger: no sample lost, none trained twice, every attempt kept. Run: pytest tests/test_ledger.py"""

import json
from pathlib import Path

import pytest

from posttrain.ledger import Counts, Ledger

IDS = ["a", "b", "c", "d"]


def invariant(counts: Counts) -> bool:
    ends = counts.trained + counts.filtered + counts.failed + counts.abandoned
    return counts.planned == ends + counts.lost + counts.in_flight


def test_a_clean_stage_adds_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    stage = ledger.begin("rl")
    stage.planned(IDS)
    stage.generation_failed(["a"], "actor-0", "died")
    stage.generated(IDS)
    stage.scored(IDS)
    stage.trained(["a", "b"])
    stage.filtered(["c"], "no signal")
    stage.failed(["d"], "reward raised")
    stage.trained([])  # nothing happened, nothing written
    ledger.committed("rl", stage.attempt)
    assert ledger.counts() == Counts(planned=4, trained=2, filtered=1, failed=1)
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == [
        "attempt",
        "planned",
        "generation_failed",
        "generated",
        "scored",
        "trained",
        "filtered",
        "failed",
        "committed",
    ]
    assert {k: rows[2][k] for k in ("stage", "attempt", "ids", "actor", "error")} == {
        "stage": "rl",
        "attempt": 1,
        "ids": ["a"],
        "actor": "actor-0",
        "error": "died",
    }
    assert rows[6]["reason"] == "no signal"


def test_an_injected_loss_and_an_injected_duplicate_are_both_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    stage = ledger.begin("rl")
    stage.planned(IDS)
    stage.trained(["a", "b", "d"])  # c is lost
    stage.trained(["d"])  # d is trained twice
    ledger.committed("rl", stage.attempt)
    counts = ledger.counts()
    assert counts == Counts(planned=4, trained=3, lost=1, duplicated=1)
    assert invariant(counts)


def test_planned_twice_is_a_duplicate_and_unplanned_is_told_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    stage = ledger.begin("rl")
    stage.planned(["a"])
    stage.planned(["a"])
    stage.trained(["a", "ghost"])
    counts = ledger.counts()
    assert counts == Counts(planned=1, trained=1, duplicated=1, unplanned=1)
    assert invariant(counts)


def test_going_back_to_a_snapshot_abandons_what_came_after_it(tmp_path: Path) -> None:
    """Steps of one sample: a, b are in the snapshot of step 2, c and d come after it; the driver dies with d open."""
    ledger = Ledger(tmp_path)
    stage = ledger.begin("rl")
    for name in "abcd":
        if name == "c":
            stage.snapshot(2)
        stage.planned([name])
        if name != "d":
            stage.trained([name])
    again = Ledger(tmp_path).resume("rl", stage.attempt, 2)
    for name in "cd":
        again.planned([name])
        again.trained([name])
    ledger = Ledger(tmp_path)
    ledger.committed("rl", again.attempt)
    counts = ledger.counts()
    assert counts == Counts(planned=6, trained=4, abandoned=2, abandoned_trained=1)
    assert invariant(counts)


def test_a_sample_of_before_the_snapshot_trained_again_after_it_is_a_duplicate(tmp_path: Path) -> None:
    stage = Ledger(tmp_path).begin("rl")
    stage.planned(["a"])
    stage.trained(["a"])
    stage.snapshot(1)
    again = Ledger(tmp_path).resume("rl", 1, 1)
    again.planned(["a"])
    again.trained(["a"])
    assert Ledger(tmp_path).counts() == Counts(planned=1, trained=1, duplicated=1)


def test_snapshots_are_gone_back_to_again_and_again(tmp_path: Path) -> None:
    """Twice back to step 1, whose snapshot is then followed by a second one of step 2."""
    stage = Ledger(tmp_path).begin("rl")
    stage.planned(["a"])
    stage.trained(["a"])
    stage.snapshot(1)
    for _ in range(2):
        stage.planned(["b"])
        stage.trained(["b"])
        stage.snapshot(2)
        stage = Ledger(tmp_path).resume("rl", 1, 1)
    counts = Ledger(tmp_path).counts()
    assert counts == Counts(planned=3, trained=1, abandoned=2, abandoned_trained=2)
    Ledger(tmp_path).resume("rl", 1, 7)
    with pytest.raises(ValueError, match="a snapshot of step 7 that was never taken"):
        Ledger(tmp_path).counts()


def test_a_new_attempt_abandons_the_old_one(tmp_path: Path) -> None:
    first = Ledger(tmp_path).begin("rl")
    first.planned(IDS)
    first.trained(["a", "b"])
    # The driver is killed here; the next one starts the stage again with the same ids.
    ledger = Ledger(tmp_path)
    assert ledger.counts(running=True).in_flight == 2
    assert ledger.counts().lost == 2
    second = ledger.begin("rl")
    assert second.attempt == 2
    second.planned(IDS)
    second.trained(IDS)
    ledger.committed("rl", 2)
    counts = ledger.counts()
    assert counts == Counts(planned=8, trained=4, abandoned=4, abandoned_trained=2)
    assert invariant(counts)


def test_a_committed_stage_has_nothing_in_flight(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    stage = ledger.begin("rl")
    stage.planned(["a"])
    ledger.committed("rl", 1)
    assert ledger.counts(running=True).lost == 1


def test_stages_are_counted_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for name in ("math", "agent"):
        stage = ledger.begin(name)
        assert stage.attempt == 1
        stage.planned(["a"])
        stage.trained(["a"])
    assert ledger.counts() == Counts(planned=2, trained=2)


def test_committed_is_written_once_and_can_return_to_an_earlier_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("rl").trained(["x"])
    ledger.committed("rl", 1)
    size = (tmp_path / "ledger.jsonl").stat().st_size
    Ledger(tmp_path).committed("rl", 1)
    assert (tmp_path / "ledger.jsonl").stat().st_size == size
    # A config is changed, its run killed, and the config changed back: attempt 1 counts again.
    ledger.begin("rl").planned(["y"])
    assert ledger.counts().lost == 1
    ledger.committed("rl", 1)
    assert (ledger.counts().abandoned, ledger.counts().lost) == (1, 0)
    assert ledger.begin("rl").attempt == 3


@pytest.mark.parametrize("tail", ['{"event": "trained", "sta', '{"event": 1}\x00\x00\n', "\x00" * 9])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tail: str) -> None:
    stage = Ledger(tmp_path).begin("rl")
    stage.planned(["a", "b"])
    path = tmp_path / "ledger.jsonl"
    whole = path.read_text()
    path.write_text(whole + tail)
    assert Ledger(tmp_path).counts().planned == 2
    assert path.read_text() == whole + tail  # a reader changes nothing
    Ledger(tmp_path).begin("rl").planned(["a"])
    assert path.read_text().startswith(whole + '{"event": "attempt", "stage": "rl", "attempt": 2')
    assert Ledger(tmp_path).counts() == Counts(planned=3, abandoned=2, lost=1)


def test_a_torn_line_elsewhere_is_an_error_with_its_place(tmp_path: Path) -> None:
    Ledger(tmp_path).begin("rl").planned(["a"])
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"event"\n' + lines[1])
    with pytest.raises(ValueError) as error:
        Ledger(tmp_path).counts()
    assert str(error.value).startswith(f"{path}:2: broken line (every line must be one JSON object)")


def test_no_ledger_counts_nothing(tmp_path: Path) -> None:
    assert Ledger(tmp_path).counts() == Counts()
    assert list(tmp_path.iterdir()) == []


def test_a_last_line_longer_than_a_block_is_found(tmp_path: Path) -> None:
    ids = [f"math/{i:08x}" for i in range(20_000)]
    stage = Ledger(tmp_path).begin("rl")
    stage.planned(ids)
    stage.trained(ids)
    path = tmp_path / "ledger.jsonl"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)  # only the newline is missing
    Ledger(tmp_path).begin("other")
    assert Ledger(tmp_path).counts() == Counts(planned=20_000, lost=20_000)
