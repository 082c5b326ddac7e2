"""The reward workbench and the task preview: figures by hand, what changed, why not judged, no torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_rewards import rollout
from test_tasks import _jsonl

from posttrain import rollout_file, workbench
from posttrain.cli import main
from posttrain.envs import shop
from posttrain.rewards.base import per_rollout
from posttrain.rollout_file import Row
from posttrain.rollouts.environment import play
from posttrain.schema import Rollout, Score, Task
from posttrain.tasks import load_tasks

EXACT, MATH = "posttrain.rewards.answer:exact", "posttrain.rewards.answer:math"
TEXTS = (("answer 4", "answer 4.0", "answer 5"), ("answer 7", "7", "answer 7"))


@per_rollout
def moody(task: Task, given: Rollout) -> float | None:
    """Breaks on one text, has no opinion on another."""
    if given.text == "answer 5":
        raise KeyError("five")
    return None if given.text == "7" else 0.25


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, str]:
    """A task file and a folder with the rollouts of one step."""
    rows = [
        {"question": "2 + 2 =", "answer": "4"},
        {"question": "3 + 4 =", "answer": "7"},
        {"question": "no"},
    ]
    uri = str(_jsonl(tmp_path / "t.jsonl", *rows))
    tasks = list(load_tasks(uri, domain="math", seed=0))
    lines = [
        Row(
            id=f"{task.id}#0.{i}",
            task=task,
            rollout=replace(rollout(text), task_id=task.id, index=i),
            score=Score(value=0.5, parts={"exact": 0.5}),
        )
        for task, texts in zip(tasks, TEXTS, strict=False)
        for i, text in enumerate(texts)
    ]
    rollout_file.write(tmp_path / "stage" / "rollouts" / "step-00000.parquet", lines)
    return uri, str(tmp_path / "stage")


def _reward(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["reward", *arguments]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def _cells(out: str, reward: str) -> list[str]:
    return next(line.split() for line in out.splitlines() if line.split()[1:2] == [reward])


def test_figures_by_hand(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks, rollouts = saved
    out = _reward(capsys, EXACT, MATH, "--tasks", tasks, "--rollouts", rollouts)
    assert out.startswith("6 rollouts of 2 tasks\n")
    # exact: 1 0 0 and 1 1 1; math knows that 4.0 is 4. Half of the groups differ.
    assert _cells(out, "exact")[:12] == [
        "math",
        "exact",
        "6",
        "0.667",
        "0.471",
        "0.000",
        "1.000",
        "33%",
        "67%",
        "0",
        "0",
        "50%",
    ]
    assert _cells(out, "math")[:5] == ["math", "math", "6", "0.833", "0.373"]
    assert float(_cells(out, "exact")[12]) < 1000, "milliseconds per rollout"
    histogram = out[out.index("exact, values") :].splitlines()
    assert histogram[1].split() == ["0.000", "2", "####################"]
    assert histogram[2].split() == ["1.000", "4", "#" * 40]


def test_many_values_are_shown_in_ten_bins() -> None:
    values = [i / 20 for i in range(21)]
    judged = workbench.Judged(name="r", scores=tuple(Score(value=v) for v in values), seconds=(0.0,) * 21)
    lines = workbench._histogram(judged).splitlines()
    assert lines[0] == "r, values from" and len(lines) == 11
    assert [line.split()[:2] for line in lines[1:3]] == [["0.000", "2"], ["0.100", "2"]]
    assert lines[10].split() == ["0.900", "3", "#" * 40], "the largest value belongs to the last bin"


def test_what_another_reward_changes(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks, rollouts = saved
    out = _reward(capsys, MATH, "--tasks", tasks, "--rollouts", rollouts, "--diff", EXACT)
    assert f"{EXACT} -> math: 1 of 6 rollouts change, 1 of them upwards" in out
    assert "[1]  0.000 -> 1.000  reference: 4" in out
    assert "    asked: 2 + 2 =" in out and "    wrote: answer 4.0" in out
    out = _reward(capsys, EXACT, "--tasks", tasks, "--rollouts", rollouts, "--diff", "saved", "--show", "2")
    assert "saved -> exact: 6 of 6 rollouts change, 4 of them upwards" in out
    assert "... and 4 more (--show)" in out


def test_reasons_for_what_is_not_judged(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks, rollouts = saved
    out = _reward(capsys, "test_workbench:moody", "--tasks", tasks, "--rollouts", rollouts, "--diff", "saved")
    assert _cells(out, "moody")[9:11] == ["1", "1"]
    assert "1  blamed: moody raised KeyError: 'five'" in out
    assert "1  unscorable: moody gave no score" in out
    changes = [line.split("  ")[1] for line in out.splitlines() if line.startswith("math/")]
    assert changes[:2] == ["0.500 -> none", "0.500 -> 0.000"], "the largest change first"


def test_values_for_machines(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks, rollouts = saved
    rows = json.loads(_reward(capsys, EXACT, "--tasks", tasks, "--rollouts", rollouts, "--json"))
    assert [row["value"] for row in rows] == [1, 0, 0, 1, 1, 1]
    assert rows[0].keys() == {"task_id", "index", "domain", "reward", "value", "note", "seconds"}


def test_args_make_the_reward(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks, rollouts = saved
    made = ["posttrain.rewards.style:length_penalty", "--args", '{"target": 1, "limit": 5}']
    out = _reward(capsys, *made, "--tasks", tasks, "--rollouts", rollouts)
    assert "length_penalty, values\n-0.500  6  ####" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fn": "no.such:thing"}, "reward 'no.such:thing' does not load"),
        ({"--tasks": "{other}"}, "none of the 6 rollouts belongs to a task of"),
        ({"--rollouts": "{empty}"}, "no rollouts there"),
        ({"--rollouts": "{foreign}"}, "not a file of rollouts (no column advantage"),
        ({"--rollouts": "{other}"}, "not a readable parquet file"),
        ({"--args": "{no"}, "not valid JSON"),
        ({"--args": "[1]"}, "expected a JSON object"),
    ],
)
def test_bad_input_is_one_line(
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    places = {
        "other": _jsonl(tmp_path / "other.jsonl", {"question": "else"}),
        "empty": tmp_path / "empty",
        "foreign": tmp_path / "foreign.parquet",
    }
    places["empty"].mkdir()
    pq.write_table(pa.table({"a": [1]}), places["foreign"])
    given = {"fn": EXACT, "--tasks": saved[0], "--rollouts": saved[1], "--args": "{}"} | change
    filled = {k: str(places[v[1:-1]]) if v[1:-1] in places else v for k, v in given.items()}
    arguments = [filled.pop("fn"), *(text for pair in filled.items() for text in pair)]
    error = _reward(capsys, *arguments, code=2)
    assert message in error and len(error.splitlines()) == 1


def test_rollouts_come_back_as_they_were_written(tmp_path: Path) -> None:
    task = next(shop.tasks(seed=1, n=1))
    task = Task(
        **({name: getattr(task, name) for name in Task.__slots__} | {"id": "shop/1", "domain": "shop"})
    )
    given = play(shop.start, task, shop.solver(task), seed=0, max_turns=9)
    rollout_file.write(
        tmp_path / "r.parquet", [Row(id="a", task=task, rollout=given, score=Score(value=None, note="n"))]
    )
    (back,) = rollout_file.read(tmp_path / "r.parquet")
    assert back.rollout.outcome == given.outcome and back.rollout.messages == given.messages
    assert back.domain == "shop" and back.score == Score(value=None, note="n")


def test_it_answers_at_once_and_without_torch(saved: tuple[str, str]) -> None:
    code = "import sys; from posttrain.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = ["reward", EXACT, "--tasks", saved[0], "--rollouts", saved[1]]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "6 rollouts of 2 tasks" in done.stdout


# ---- posttrain tasks ----


def test_a_source_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"q{i % 3}\x1b[31m", "answer": i % 2, "level": "easy"} for i in range(5)]
    assert main(["tasks", str(_jsonl(tmp_path / "t.jsonl", *rows)), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "5 tasks, 2 duplicates" in out
    assert "answer: 5 tasks, 2 different, the commonest '0' is right for 60.0%" in out
    assert "meta: level (5)" in out and "\x1b" not in out
    assert main(["tasks", "py://posttrain.envs.shop:tasks?n=9", "--limit", "4", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 tasks or more (--limit)" in out and "tools: query, cancel_order" in out


def test_a_source_without_tasks_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", str(_jsonl(tmp_path / "t.jsonl"))]) == 2
    assert "has no task" in capsys.readouterr().err
