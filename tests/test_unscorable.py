"""What an RL stage does with completions that cannot be scored and tasks that are quarantined."""

from dataclasses import replace

import pytest
from test_rewards import rollout, task

from posttrain import config
from posttrain.domains import Domain
from posttrain.mixture import TaskOrder
from posttrain.rewards.base import bounded, per_rollout
from posttrain.rewards.scorer import Scorer
from posttrain.rollout_file import Row
from posttrain.schema import Rollout, Score, Task
from posttrain.stages import rl
from posttrain.tasks import Split


@bounded
@per_rollout
def broken(task: Task, rollout: Rollout) -> float:
    raise KeyError("oops")


def _row(value: float | None) -> Row:
    return Row(
        id="d/1#0.0", task=task(), rollout=rollout("a"), score=Score(value=value, note="the judge is away")
    )


def test_a_step_that_cannot_be_scored_stops_the_stage() -> None:
    given = {"name": "rl-math", "kind": "rl", "source": "./x", "mix": {"math": {}}, "steps": 1}
    stage = config.Rl(**given, optimizer=config.Optimizer(lr=1e-3), max_unscorable=0.5)  # type: ignore[arg-type]
    rl._check_scores(stage, 3, [_row(None), _row(1.0)])
    with pytest.raises(ValueError, match=r"rl-math: step 3: 2 of 3 .*\(max_unscorable 50%\).*judge is away"):
        rl._check_scores(stage, 3, [_row(None), _row(None), _row(1.0)])


def test_a_quarantined_task_is_not_drawn_again() -> None:
    tasks = [replace(task(answer="1"), id=f"d/{n}") for n in range(3)]
    reward = config.Reward(fn="test_unscorable:broken")
    cfg = config.Domain(name="d", tasks="x.jsonl", rewards=[reward])
    rewards = Scorer([reward])
    split = Split(train=tasks, heldout=[], duplicates=0)
    domain = Domain(cfg=cfg, split=split, rewards=rewards, passes=rewards, environment=None, demonstrate=None)
    order = TaskOrder({"d": domain}, {"d": config.Mix()}, seed=0)
    rewards.score(tasks[1], [rollout("a")])
    drawn = [chosen.id for _, chosen, _ in order.step(9)]
    assert sorted(set(drawn)) == ["d/0", "d/2"]
    rewards.score(tasks[0], [rollout("a")])
    rewards.score(tasks[2], [rollout("a")])
    with pytest.raises(ValueError, match="every task is quarantined: broken raised KeyError"):
        order.step(9)
