"""Rewards on right, wrong, empty and hostile texts."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import config
from posttrain.rewards import answer, gym, rubric, style, tools
from posttrain.rewards.base import final_answer, load_object, load_reward, per_rollout
from posttrain.rewards.math_worker import MathWorker
from posttrain.rewards.scorer import Scorer
from posttrain.schema import Message, Rollout, Task

HOSTILE = [
    "__import__('os').system('touch {file}')",
    "answer __import__('os').system('touch {file}')",
    "\\boxed{{__import__('os').system('touch {file}')}}",
    "answer 9**9**9**9",
    "\\boxed{" * 200,
    "\\frac{" * 300 + "}",
    "answer \x00\x00",
    "answer " + "1" * 1_000_000,
    "(" * 5000,
    "answer 1e999999999",
]


def task(**fields: Any) -> Task:
    given: dict[str, Any] = {"id": "d/1", "domain": "d", "messages": ({"role": "user", "content": "q"},)}
    return Task(**(given | fields))


def rollout(text: str, *, stop: Any = "eos", sampled: int = 3, messages: tuple[Message, ...] = ()) -> Rollout:
    return Rollout(
        task_id="d/1",
        index=0,
        tokens=np.zeros(sampled, np.int32),
        sampled=np.ones(sampled, np.bool_),
        logprobs=np.zeros(sampled, np.float32),
        text=text,
        messages=messages or ({"role": "assistant", "content": text},),
        stop=stop,
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think> 2 + 2 = 4 </think> answer 4", "4"),
        ("Answer: 12", "12"),
        ("the answer is 7", "7"),
        ("answer 1 no answer 2", "2"),
        ("so \\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("answer 3, that is \\boxed{4}", "4"),
        ("<think> answer 5 </think> 6", "6"),
        ("\\boxed{never closed", ""),
        ("7", "7"),
        ("", ""),
    ],
)
def test_final_answer(text: str, wanted: str) -> None:
    assert final_answer(text) == wanted


def test_exact() -> None:
    texts = ["answer a b", "answer  a   b ", "answer a c", "", "a b"]
    given = [rollout(text) for text in texts]
    assert answer.exact(task(answer="a b"), given) == [1, 1, 0, 0, 1]


def test_math_knows_equal_forms() -> None:
    texts = ["answer \\frac{1}{2}", "\\boxed{0.5}", "answer 2/4", "answer 0.51", "", "x" * 600]
    assert answer.math(task(answer="1/2"), [rollout(t) for t in texts]) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_score_nothing_and_run_nothing(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    text = text.replace("{file}", str(mark)).replace("{{", "{").replace("}}", "}")
    entry = {"question": "1 + 1", "answer": "2", "metadata": {}}
    given = task(answer="2", meta={"dataset": "chain_sum", "entry": entry, "min_calls": 0})
    started = time.monotonic()
    for reward in (answer.exact, answer.math, gym.score, tools.outcome, style.format_ok):
        (value,) = reward(given, [rollout(text)])
        assert value in (0.0, 1.0)
        assert value == 0.0 or reward is style.format_ok
    assert time.monotonic() - started < 20
    assert not mark.exists(), "the model's text was run"


def test_an_answer_that_hangs_scores_nothing_and_the_next_one_is_judged() -> None:
    worker = MathWorker(timeout_s=0.0001)
    assert worker.verify("2", "1+1") is False
    assert worker.timeouts == 1
    worker._timeout_s = 30
    assert worker.verify("2", "1+1") is True
    assert worker._process is not None
    os.kill(worker._process.pid, 9)
    assert worker.verify("3", "1+1") is False, "a dead worker is replaced"
    worker.close()


def test_a_worker_that_cannot_live_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rewards.math_worker.sys.executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="does not start"):
        MathWorker().verify("2", "3")


def test_gym_scores_by_the_dataset_and_drops_partial_credit() -> None:
    entry = {"question": "1 + 1 =", "answer": "12", "metadata": {}}
    given = task(answer="12", meta={"dataset": "chain_sum", "entry": entry})
    texts = ["answer 12", "answer +12.0", "answer 13", "answer 12 or so", ""]
    assert gym.score(given, [rollout(text) for text in texts]) == [1, 1, 0, 0, 0]


def test_datasets_with_a_scorer_that_pays_for_junk_are_refused() -> None:
    for name in ("game_of_life_halting", "coin_flip", "rectangle_count", "no_such"):
        with pytest.raises(ValueError, match=f"rg://{name}: not on the list"):
            gym.check_allowed(name)


def test_every_listed_dataset_exists() -> None:
    from reasoning_gym.factory import DATASETS

    assert DATASETS.keys() >= gym.ALLOWED


def _turns(*contents: str) -> tuple[Message, ...]:
    roles = ["assistant", "tool"] * len(contents)
    return tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))


def test_outcome_wants_the_answer_after_enough_calls() -> None:
    given = task(answer="bob", meta={"min_calls": 1})
    assert tools.outcome(given, [rollout("", messages=_turns("<call> x", "bob", "answer bob"))]) == [1]
    assert tools.outcome(given, [rollout("", messages=_turns("answer bob"))]) == [0], "a guess"
    wrong = rollout("", messages=_turns("<call> x", "bob", "answer tom"))
    cut = rollout("", messages=_turns("<call> x", "bob", "answer bob"), stop="length")
    assert tools.outcome(given, [wrong, cut]) == [0, 0]


def test_format() -> None:
    texts = ["<think> a </think> b", "b", "<think> a b", "<think> a </think>", "</think> a <think> b", ""]
    assert style.format_ok(task(), [rollout(t) for t in texts]) == [1, 1, 0, 0, 0, 0]
    assert style.format_ok(task(thinking=False), [rollout(t) for t in texts]) == [0, 1, 0, 0, 0, 0]
    assert style.format_ok(task(), [rollout("b", stop="length")]) == [0]


def test_length_penalty_by_hand() -> None:
    penalty = style.length_penalty(target=10, limit=20)
    values = penalty(task(), [rollout("a", sampled=n) for n in (0, 10, 15, 20, 99)])
    assert values == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="target=5, limit=5"):
        style.length_penalty(target=5, limit=5)


def test_language_is_a_share_of_words() -> None:
    french = task(meta={"lexicon": ["Rouge", "chat"]})
    assert style.language(french, [rollout("rouge chat red , <think> red </think>")]) == [
        pytest.approx(2 / 3)
    ]
    russian = task(meta={"script": "cyrillic"})
    assert style.language(russian, [rollout("это is кот"), rollout("")]) == [pytest.approx(2 / 3), 0]
    assert style.language(task(), [rollout("any")]) == [None]
    with pytest.raises(ValueError, match="unknown script 'elvish'"):
        style.language(task(meta={"script": "elvish"}), [rollout("a")])


def test_rubric() -> None:
    items = [
        {"kind": "count", "text": "red cat", "times": 2, "ignore_case": True},
        {"kind": "case", "case": "lower"},
        {"kind": "not_contains", "text": "<think>"},
        {"kind": "equals", "text": "red cat , red cat"},
    ]
    given = task(meta={"rubric": items})
    texts = ["red cat , red cat", "RED CAT , RED CAT", "red cat", "", "x" * 5000]
    assert rubric.mean(given, [rollout(t) for t in texts]) == [1, 0.5, 0.5, 0, 0]
    assert rubric.strict(given, [rollout(t) for t in texts]) == [1, 0, 0, 0, 0]
    words = [{"kind": "min_words", "words": 2}, {"kind": "max_words", "words": 3}]
    words += [{"kind": "regex", "pattern": "^a"}, {"kind": "contains", "text": "b"}]
    assert rubric.mean(task(meta={"rubric": words}), [rollout("a b"), rollout("c")]) == [1, 0.25]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "has no rubric"),
        ({"rubric": [{"kind": "vibes"}]}, "unknown rubric kind 'vibes'"),
        ({"rubric": [{"kind": "count", "text": "a"}]}, "'times'"),
        ({"rubric": [{"kind": "regex", "pattern": "("}]}, "rubric item"),
    ],
)
def test_a_bad_rubric_is_the_authors_fault(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rubric.mean(task(meta=meta), [rollout("a")])


# ---- loading and adding up ----


@per_rollout
def half(task: Task, rollout: Rollout) -> float:
    return 0.5


def broken(task: Task, rollouts: list[Rollout]) -> list[float | None]:
    raise KeyError("oops")


def short(task: Task, rollouts: list[Rollout]) -> list[float | None]:
    return []


def infinite(task: Task, rollouts: list[Rollout]) -> list[float | None]:
    return [float("inf") for _ in rollouts]


def _scorer(*names: str, weight: float = 1.0) -> Scorer:
    rewards = [config.Reward(fn=n if ":" in n else f"test_rewards:{n}", weight=weight) for n in names]
    return Scorer(rewards)


def test_scores_are_weighted_sums_with_parts_by_name() -> None:
    scorer = _scorer("half", "posttrain.rewards.answer:exact", weight=2.0)
    (score,) = scorer.score(task(answer="1"), [rollout("answer 1")])
    assert score.value == 3.0 and score.parts == {"half": 0.5, "exact": 1.0}
    assert scorer.passed(score) is False
    exact = _scorer("posttrain.rewards.answer:exact")
    assert exact.passed(exact.score(task(answer="1"), [rollout("answer 1")])[0]) is True


@pytest.mark.parametrize(
    ("name", "note"),
    [("broken", "broken raised KeyError: 'oops' (task d/1)"), ("short", "no list of 1"), ("infinite", "inf")],
)
def test_a_broken_reward_is_no_score_and_says_why(name: str, note: str) -> None:
    scorer = _scorer("half", name)
    (score,) = scorer.score(task(), [rollout("a")])
    assert score.value is None and note in score.note
    assert scorer.passed(score) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "write it as package.module:function"),
        ("no_such_module:f", "does not load: No module named 'no_such_module'"),
        ("posttrain.rewards.answer:nope", "has no attribute 'nope'"),
        ("posttrain.rewards.answer:MAX_CHARACTERS", "is int, not a function"),
    ],
)
def test_a_reward_that_does_not_load_is_one_line(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_reward(path)
    assert "\n" not in str(error.value)


def test_args_make_the_reward() -> None:
    reward = load_reward("posttrain.rewards.style:length_penalty", {"target": 1, "limit": 3})
    assert reward(task(), [rollout("a", sampled=2)]) == [-0.5]
    with pytest.raises(ValueError, match="unexpected keyword argument 'goal'"):
        load_reward("posttrain.rewards.style:length_penalty", {"goal": 1})
    assert load_object("posttrain.schema:Task", "x") is Task
