"""Rollout actors: one that hangs is replaced, and its requests are generated again with the same seeds."""

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
import tiny

from posttrain import config
from posttrain.rollouts import environment
from posttrain.rollouts.pool import Pool, PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.schema import Task
from posttrain.toy import sorting


def _hangs_once(marker: Path, task: Task, seed: int) -> environment.Episode:
    if not marker.exists():
        marker.touch()
        time.sleep(600)
    return environment.single_turn(task, seed)


@pytest.mark.slow
def test_an_actor_that_hangs_is_replaced_and_its_requests_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.sparse_checkpoint(tmp_path / "checkpoint")
    start = functools.partial(_hangs_once, tmp_path / "hung")
    requests = [
        Request(task=task, index=0, seed=i, max_new_tokens=9, environment=start)
        for i, task in enumerate(sorting.tasks(seed=5, n=3))
    ]
    told: list[tuple[int, str, str]] = []

    def note(failed: Sequence[Request], actor: str, error: str) -> None:
        told.append((len(failed), actor, error))

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        pool = Pool(config.Cluster(step_timeout_s=25), {"num_cpus": 0})
        pool.start(PoolSetup(checkpoint=folder, attention="sparse", engine="fake"))
        hung = pool.pids()
        rollouts = pool.generate(requests, Sampling(), note)
        assert [r.task_id for r in rollouts] == [r.task.id for r in requests]
        assert told == [(3, "rollout actor 0", "TimeoutError")]
        assert pool.restarts == 1 and pool.pids() != hung
    finally:
        ray.shutdown()
