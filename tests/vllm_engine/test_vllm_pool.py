"""Engines in vLLM as actors: the learner's weights arrive, and a killed one's requests give the same rollouts elsewhere."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from posttrain import config
from posttrain.cluster import Cluster
from posttrain.model import checkpoint
from posttrain.model.transport import Audience, Sender
from posttrain.rollouts.pool import PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.toy import sorting, tokenizer

pytestmark = pytest.mark.slow


def test_actors_take_weights_and_a_killed_one_is_replaced_with_the_same_rollouts(folder: Path) -> None:
    stage = {"name": "x", "kind": "export", "source": "./x"}
    cluster_cfg = {"device": "cpu", "step_timeout_s": 90, "threads": 1, "max_actor_restarts": 1}
    cfg = config.Run.model_validate({"name": "t", "stages": [stage], "cluster": cluster_cfg})
    model = checkpoint.load(folder)
    with torch.no_grad():
        model.lm_head.weight *= -1
    requests = [
        Request(task=task, index=0, seed=i, max_new_tokens=90)
        for i, task in enumerate(sorting.tasks(seed=5, n=40))
    ]
    settings = Sampling(ignore_eos=True)
    wanted = TorchEngine(model, tokenizer.build()).generate(requests, settings)
    died: list[str] = []
    with Cluster(cfg) as cluster:
        setup = PoolSetup(
            checkpoint=folder, attention="sparse", engine="vllm", max_rows=4, cache_bytes=8 << 20
        )
        with cluster.pool(setup) as pool:
            assert pool.backend.endswith("in vLLM")
            sender = Sender(torch.device("cpu"), host="127.0.0.1", folder=None, timeout_s=30)
            audience = Audience(engines=("",), ranks=("",))
            offer = sender.offer(model.state_dict(), model.state_dict().items(), audience, rank=0)
            pool.load(3, lambda *_: [ray.put(offer)])
            (pid,) = pool.pids()
            killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
            killer.start()

            found = pool.generate(
                requests, settings, lambda lost, who, why: died.append(f"{len(lost)} {who} {why}")
            )
            killer.cancel()
            assert len(died) == pool.restarts == 1 and died[0].startswith("40 rollout actor 0")
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.policy_version == 3
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
