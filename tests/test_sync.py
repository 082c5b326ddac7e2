"""A learner and its rollout actors in processes of their own: weights by every way, also to one that was replaced."""

import os
import signal
from pathlib import Path
from typing import Literal

import pytest
import ray
import tiny

from posttrain import config
from posttrain.cluster import Cluster
from posttrain.learner import Setup
from posttrain.model import checkpoint
from posttrain.rollouts.pool import PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.toy import sorting, tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sync", ["auto", "broadcast", "disk"])
def test_actors_and_their_replacements_get_the_learners_weights(
    tmp_path: Path, sync: Literal["auto", "broadcast", "disk"]
) -> None:
    first, trained = tiny.model(seed=1), tiny.model(seed=2)
    for name, model in (("first", first), ("trained", trained)):
        checkpoint.save(model, tmp_path / name, tokenizer.build())
    cfg = config.Run.model_validate(
        {
            "name": "t",
            "out": tmp_path / "runs",
            "stages": [{"name": "x", "kind": "export", "source": "./x"}],
            "rollouts": {"sync": sync},
            "cluster": {"device": "cpu", "step_timeout_s": 60, "threads": 1, "rollout_actors": 2},
        }
    )
    requests = [
        Request(task=task, index=0, seed=i, max_new_tokens=9)
        for i, task in enumerate(sorting.tasks(seed=5, n=6))
    ]
    wanted = TorchEngine(trained, tokenizer.build()).generate(requests, Sampling())
    learning = Setup(
        checkpoint=tmp_path / "trained",
        attention="sparse",
        optimizer=config.Optimizer(lr=1e-3),
        total_steps=1,
        train=frozenset({"model"}),
    )
    serving = PoolSetup(checkpoint=tmp_path / "first", attention="sparse")
    with Cluster(cfg) as cluster, cluster.learner(learning) as learner, cluster.pool(serving) as pool:
        for version in (1, 2):
            pool.load(version, learner.publish)
            found = pool.generate(requests, Sampling())
            assert [r.tokens.tolist() for r in found] == [r.tokens.tolist() for r in wanted]
            assert {r.policy_version for r in found} == {version}
            pool.sleep()
        pool.load(2, learner.publish)
        os.kill(pool.pids()[1], signal.SIGKILL)
        found = pool.generate(requests, Sampling())
        assert pool.restarts == 1 and {r.policy_version for r in found} == {2}
        assert [r.tokens.tolist() for r in found] == [r.tokens.tolist() for r in wanted]
        os.kill(pool.pids()[0], signal.SIGKILL)
        pool.load(3, learner.publish)
        assert pool.restarts == 2
        found = pool.generate(requests, Sampling())
        assert [r.tokens.tolist() for r in found] == [r.tokens.tolist() for r in wanted]
        assert {r.policy_version for r in found} == {3}
    assert not ray.is_initialized()
