"""What a reward's failure means: the candidate's doing, or nobody's; deadlines, workers, quarantine."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from test_rewards import rollout, task

from posttrain import config
from posttrain.rewards.base import Unscorable, bounded, per_rollout
from posttrain.rewards.scorer import Scorer, score_all
from posttrain.rewards.workers import Workers
from posttrain.schema import RewardFn, Rollout, Task

GOLD = "the reference"


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    pool = Workers(2)
    yield pool
    pool.close()
    assert not pool.pids()


def scorer(name: str, workers: Workers, timeout_s: float = 30.0, **args: object) -> Scorer:
    cfg = config.Reward(fn=f"test_scorer:{name}", timeout_s=timeout_s, args=args)
    return Scorer([cfg], workers)


def values(found: Scorer, *texts: str, answer: str | None = GOLD) -> list[float | None]:
    scores = found.score(task(answer=answer), [rollout(text) for text in texts])
    return [score.value for score in scores]


# ---- rewards of every shape ----


@per_rollout
def one(task: Task, rollout: Rollout) -> float:
    return float(len(rollout.text))


@per_rollout
async def one_async(task: Task, rollout: Rollout) -> float:
    await asyncio.sleep(0.5)
    return float(len(rollout.text))


def group(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
    longest = max(len(r.text) for r in rollouts)
    return [float(len(r.text) == longest) for r in rollouts]


async def group_async(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
    await asyncio.sleep(0)
    return group(task, rollouts)


def made(*, factor: float) -> RewardFn:
    @bounded
    @per_rollout
    def times(task: Task, rollout: Rollout) -> float:
        return factor * len(rollout.text)

    return times


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("one", [1, 2, 0]), ("one_async", [1, 2, 0]), ("group", [0, 1, 0]), ("group_async", [0, 1, 0])],
)
def test_every_shape_of_reward(workers: Workers, name: str, wanted: list[float]) -> None:
    began = time.monotonic()
    assert values(scorer(name, workers), "a", "bb", "") == wanted
    assert time.monotonic() - began < 20


def test_args_make_a_reward(workers: Workers) -> None:
    assert values(scorer("made", workers, factor=1.5), "aa") == [3]


def test_components_have_names_and_weights(workers: Workers) -> None:
    rewards = [
        config.Reward(fn="test_scorer:one", name="length", weight=2),
        config.Reward(fn="test_scorer:group", weight=-1),
    ]
    scores = Scorer(rewards, workers).score(task(answer=GOLD), [rollout("a"), rollout("bb")])
    assert [s.parts for s in scores] == [{"length": 1, "group": 0}, {"length": 2, "group": 1}]
    assert [s.value for s in scores] == [2, 3]


# ---- the candidate's doing: 0, with the reason, and the neighbours untouched ----


@per_rollout
def fragile(task: Task, rollout: Rollout) -> float:
    match rollout.text:
        case "raise":
            raise RecursionError("too deep")
        case "nan":
            return float("nan")
        case "hang":
            time.sleep(1000)
        case "spin":
            while True:
                pass
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(0)
    return 1.0


@bounded
@per_rollout
def fragile_here(task: Task, rollout: Rollout) -> float:
    return 1 / (len(rollout.text) - 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise", "raised RecursionError: too deep"),
        ("nan", "returned nan"),
        ("die", "ended its process: SIGSEGV"),
        ("exit", "ended its process: exit code 0"),
        ("hang", "gave no answer within 0.5 s"),
        ("spin", "gave no answer within 0.5 s"),
    ],
)
def test_a_candidate_that_breaks_the_reward_scores_zero(workers: Workers, text: str, why: str) -> None:
    found = scorer("fragile", workers, timeout_s=0.5)
    scores = found.score(task(answer=GOLD), [rollout(t) for t in ("a", text, "b", text, "c")])
    assert [s.value for s in scores] == [1, 0, 1, 0, 1]
    assert [s.blamed for s in scores] == [False, True, False, True, False]
    assert scores[1].note == f"fragile {why}" and not scores[0].note
    assert not found.quarantined


def test_a_bounded_reward_is_judged_by_the_same_rule(workers: Workers) -> None:
    found = scorer("fragile_here", workers)
    assert values(found, "abc", "abcd") == [0, 1]


def fragile_group(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
    if any(r.text == "hang" for r in rollouts):
        time.sleep(1000)
    return [1.0 for _ in rollouts]


def test_a_group_reward_is_blamed_as_a_whole(workers: Workers) -> None:
    found = scorer("fragile_group", workers, timeout_s=0.5)
    assert values(found, "a", "hang") == [0, 0]
    assert values(found, "a", "b") == [1, 1]


def test_without_a_reference_a_neighbour_proves_that_the_reward_works(workers: Workers) -> None:
    @bounded
    @per_rollout
    def needs_text(task: Task, rollout: Rollout) -> float:
        return 1 / len(rollout.text)

    found = scorer("one", workers)
    object.__setattr__(found._parts[0], "function", needs_text)
    assert values(found, "a", "", answer=None) == [1, 0]
    assert values(found, "", "", answer=None) == [None, None]
    assert list(found.quarantined) == ["d/1"]


# ---- nobody's doing: None, asked twice, and quarantined if the reference fails too ----


@per_rollout
def unreachable(task: Task, rollout: Rollout) -> float:
    raise Unscorable("the judge does not answer")


@per_rollout
def unreachable_once(task: Task, rollout: Rollout) -> float:
    mark = Path(task.meta["mark"])
    if not mark.exists():
        mark.touch()
        raise Unscorable("try again")
    return 1.0


@per_rollout
def kills_a_worker_once(task: Task, rollout: Rollout) -> float:
    mark = Path(task.meta["mark"])
    if not mark.exists():
        mark.touch()
        os._exit(3)
    return 1.0


@per_rollout
def broken(task: Task, rollout: Rollout) -> float:
    raise KeyError("oops")


@per_rollout
def wrong_type(task: Task, rollout: Rollout) -> float:
    return "1"  # type: ignore[return-value]


def wrong_length(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
    return [1.0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("unreachable", "the judge does not answer"),
        ("wrong_type", "returned str, not a number"),
        ("wrong_length", "returned no list of 2 numbers"),
    ],
)
def test_infrastructure_failures_are_unscorable_and_no_task_is_to_blame(
    workers: Workers, name: str, why: str
) -> None:
    found = scorer(name, workers)
    scores = found.score(task(answer=GOLD), [rollout("a"), rollout("b")])
    assert [s.value for s in scores] == [None, None]
    assert scores[0].note == f"{name} {why} (task d/1)"
    assert found.retried == 2 and not found.quarantined


@pytest.mark.parametrize("name", ["unreachable_once", "kills_a_worker_once"])
def test_a_failure_that_passes_leaves_no_trace(workers: Workers, name: str, tmp_path: Path) -> None:
    found = scorer(name, workers)
    given = task(answer=GOLD, meta={"mark": str(tmp_path / "mark")})
    (score,) = found.score(given, [rollout("a")])
    assert score.value == 1 and not score.note and found.retried == 1


def test_a_reward_that_fails_on_the_reference_too_quarantines_the_task(workers: Workers) -> None:
    found = scorer("broken", workers)
    (score,) = found.score(task(answer=GOLD), [rollout("a")])
    assert score.value is None and not score.blamed
    assert found.quarantined == {"d/1": "broken raised KeyError: 'oops' (on the reference answer)"}
    (score,) = found.score(task(answer=GOLD), [rollout("a")])
    assert score.value is None and "d/1 is quarantined" in score.note
    assert found.retried == 1, "a quarantined task is not asked again"


@pytest.mark.slow
def test_a_reward_that_hangs_delays_nobody_beyond_its_deadline(workers: Workers) -> None:
    found = scorer("fragile", workers, timeout_s=2)
    began = time.monotonic()
    values(found, "die")
    restart_s = time.monotonic() - began  # two starts at least; long on a busy machine
    hanging = (found, task(answer=GOLD), [rollout("hang")])
    quick = [(found, task(answer=GOLD), [rollout("a")] * 8) for _ in range(50)]
    began = time.monotonic()
    scores = score_all([hanging, *quick, hanging])
    assert time.monotonic() - began < 2 * 2 + 2 * restart_s, "two hangs, two workers"
    assert [s.value for of_group in scores for s in of_group] == [0, *[1] * 400, 0]


@per_rollout
def starts_a_child_and_hangs(task: Task, rollout: Rollout) -> float:
    if rollout.text == GOLD:
        return 1.0
    child = subprocess.Popen(["sleep", "1000"])
    Path(task.meta["mark"]).write_text(str(child.pid))
    return float(child.wait())


def test_killed_workers_leave_no_process_behind(workers: Workers, tmp_path: Path) -> None:
    given = task(answer=GOLD, meta={"mark": str(tmp_path / "pid")})
    (score,) = scorer("starts_a_child_and_hangs", workers, timeout_s=2).score(given, [rollout("a")])
    assert score.value == 0 and score.blamed
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_task_that_cannot_travel_is_one_line(workers: Workers) -> None:
    given = task(answer=GOLD, meta={"f": lambda: 1})
    with pytest.raises(ValueError, match=r"task d/1 cannot be sent .*mark the reward @bounded"):
        scorer("one", workers).score(given, [rollout("a")])
