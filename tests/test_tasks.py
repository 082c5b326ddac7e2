"""Tasks from files and generators, their identity, and the split."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from test_rewards import rollout

from posttrain import config
from posttrain.domains import open_domains
from posttrain.rewards.scorer import Scorer
from posttrain.rollouts.environment import play
from posttrain.schema import Rollout, Task
from posttrain.tasks import load_split, load_tasks
from posttrain.toy import records

DEMO = tiny.demo()


def _load(uri: Path | str, **options: Any) -> list[Task]:
    return list(load_tasks(str(uri), domain="d", seed=0, **options))


def _jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_rows_become_tasks(tmp_path: Path) -> None:
    file = _jsonl(
        tmp_path / "t.jsonl",
        {"question": "1 + 1", "answer": 2, "level": "easy", "system": "be brief"},
        {"messages": [{"role": "user", "content": "hi"}], "thinking": False, "meta": {"a": 1}},
    )
    first, second = _load(file)
    assert [m["role"] for m in first.messages] == ["system", "user"]
    assert first.answer == "2" and first.meta == {"level": "easy"} and first.thinking
    assert second.messages == ({"role": "user", "content": "hi"},)
    assert second.meta == {"a": 1} and not second.thinking and second.answer is None


def test_parquet_and_a_local_hub_set_give_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "solution": str(i)} for i in range(3)]
    folder = tmp_path / "set"
    folder.mkdir()
    _jsonl(folder / "train.jsonl", *rows)
    hub = _load(f"hf://{folder}?split=train&question=prompt&answer=solution")
    pq.write_table(
        pa.Table.from_pylist([{"question": r["prompt"], "answer": r["solution"]} for r in rows]),
        tmp_path / "t.parquet",
    )
    parquet = _load(tmp_path / "t.parquet")
    assert [(t.id, t.answer) for t in hub] == [(t.id, t.answer) for t in parquet]
    assert len(hub) == 3


def test_identity_is_the_question_alone(tmp_path: Path) -> None:
    a = _jsonl(tmp_path / "a.jsonl", {"question": "What  is 1?"}, {"question": "two"})
    b = _jsonl(tmp_path / "b.jsonl", {"question": "two"}, {"question": "what is 1?", "answer": "1"})
    assert [t.id for t in _load(a)] == [t.id for t in _load(b)][::-1]
    assert _load(a)[1].id == "d/3fc4ccfe7458"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"t.jsonl:2: not valid JSON"),
        ("[1]", r"t.jsonl:2: expected a JSON object, got list"),
        ({"answer": "1"}, r"t.jsonl:2: no question \(text\) and no messages"),
        ({"question": "  "}, r"t.jsonl:2: no question"),
        ({"messages": [{"role": "user"}]}, r"t.jsonl:2: messages must be a list"),
        ({"question": "q", "answer": [1]}, r"t.jsonl:2: answer must be text, got list"),
        ({"question": "q", "meta": 3}, r"t.jsonl:2: meta must be an object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    file = _jsonl(tmp_path / "t.jsonl", {"question": "fine"}, line)
    with pytest.raises(ValueError, match=message) as error:
        _load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("missing.jsonl", "missing.jsonl: No such file"),
        ("tasks.csv", "expected a .jsonl or .parquet file"),
        ("ftp://x", "unknown scheme 'ftp'"),
        ("rg://coin_flip?size=3", "not on the list"),
        ("rg://chain_sum?bananas=3", "bananas"),
        ("py://posttrain.toy.sorting:nope", "has no attribute 'nope'"),
        ("py://posttrain.toy.sorting:tasks?m=3", "unexpected keyword argument 'm'"),
        ("hf:///no/such/folder", "cannot be loaded"),
    ],
)
def test_a_bad_source_is_one_line(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        _load(uri)
    assert "\n" not in str(error.value)


def _domain(tasks: Path | str, **fields: Any) -> config.Domain:
    given = {"name": "d", "tasks": str(tasks), "rewards": [{"fn": "posttrain.rewards.answer:exact"}]}
    return config.Domain.model_validate(given | fields)


def test_split_is_disjoint_stable_and_without_duplicates(tmp_path: Path) -> None:
    questions = [f"question {i % 300}" for i in range(400)]
    file = _jsonl(tmp_path / "t.jsonl", *({"question": q} for q in questions))
    split = load_split(_domain(file, num_eval=10), seed=0)
    train, heldout = ({t.question for t in part} for part in (split.train, split.heldout))
    assert not train & heldout
    assert len(train) + len(heldout) == 300 and split.duplicates == 100
    assert 15 <= len(heldout) <= 45
    more = _jsonl(tmp_path / "more.jsonl", *({"question": f"question {i}"} for i in range(600)))
    again = load_split(_domain(more, num_eval=10), seed=7)
    assert heldout <= {t.question for t in again.heldout}, "new tasks move old ones to the other side"


def test_too_few_tasks_are_refused(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "t.jsonl", *({"question": f"question {i}"} for i in range(50)))
    with pytest.raises(ValueError, match=r"has \d held-out tasks, num_eval = 200 wanted"):
        load_split(_domain(file), seed=0)
    empty = _jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="has no task"):
        load_split(_domain(empty), seed=0)
    with pytest.raises(ValueError, match="has no task"):
        load_split(_domain(file, where="test_tasks:never"), seed=0)


def never(task: Task) -> bool:
    return False


@pytest.mark.parametrize("name", [d.name for d in DEMO.domains])
def test_the_demo_has_room_and_its_answers_are_right(name: str) -> None:
    domain = open_domains(DEMO, [name])[name]
    train = {t.question for t in domain.split.train}
    assert not train & {t.question for t in domain.split.heldout}
    assert len(train) > 3000 and len(domain.evaluation) == 200
    scorer = Scorer(domain.cfg.passes or domain.cfg.rewards)
    for task in domain.evaluation:
        if name == "agent":
            gold, junk = (_played(task, turns) for turns in (records.solution(task), [records.DONE]))
            assert [scorer.passed(s) for s in scorer.score(task, [gold, junk])] == [True, False]
            continue
        assert task.answer is not None
        (right,) = scorer.score(task, [_answered(task, task.answer)])
        (wrong,) = scorer.score(task, [_answered(task, task.answer + " x")])
        assert scorer.passed(right) is True and scorer.passed(wrong) is False, task.question


def _played(task: Task, turns: list[str]) -> Rollout:
    script = iter(turns)
    return play(records.start, task, lambda _: next(script), seed=0, max_turns=9)


def _answered(task: Task, answer: str) -> Rollout:
    return rollout(answer if task.domain == "align" else f"answer {answer}")
