"""Waiting for several learner actors: the first error counts at once, and a silent one has a deadline."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from posttrain import config
from posttrain.cluster import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Any]]:
    """A cluster and three actors, of a class that is sent to them: they cannot import this module."""

    class _Rank:
        """Answers, fails or says nothing."""

        def answer(self, value: int) -> int:
            """Itself."""
            return value

        def fail(self) -> None:
            """As a rank with a bad batch."""
            raise ValueError("a batch of 1 tokens")

        def hang(self) -> None:
            """As a rank that waits for another one."""
            time.sleep(60)

    stage = {"name": "x", "kind": "export", "source": "./x"}
    cfg = config.Run.model_validate(
        {"name": "t", "stages": [stage], "cluster": {"device": "cpu", "step_timeout_s": 3, "threads": 1}}
    )
    with Cluster(cfg) as cluster:
        cluster._start()
        made = ray.remote(_Rank).options(num_cpus=0)
        yield [cluster, *(made.remote() for _ in range(3))]


def test_the_first_ranks_answer_counts_when_all_are_there(ranks: list[Any]) -> None:
    cluster, *actors = ranks
    assert cluster.wait([actor.answer.remote(i) for i, actor in enumerate(actors)], "x") == 0


def test_an_error_of_any_rank_is_raised_while_others_wait_for_it(ranks: list[Any]) -> None:
    cluster, *actors = ranks
    began = time.monotonic()
    with pytest.raises(ValueError, match="a batch of 1 tokens"):
        cluster.wait([actors[0].hang.remote(), actors[1].fail.remote()], "learner.lm_step")
    assert time.monotonic() - began < 2


def test_a_rank_that_does_not_answer_is_told_after_the_deadline(ranks: list[Any]) -> None:
    cluster, *actors = ranks
    with pytest.raises(TimeoutError, match=r"learner\.lm_step did not answer within 3 s"):
        cluster.wait([actors[2].answer.remote(1), actors[0].hang.remote()], "learner.lm_step")
