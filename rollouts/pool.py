"""Rollout actors behind one object: spread requests, collect in order, replace actors that die or hang.

A request carries its own seed, so that a request repeated on another actor gives the same sample, and
nothing is lost or doubled when an actor is killed in the middle of a step. Next: torch_engine.py.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import ray

from posttrain import config, process
from posttrain.rollouts.request import Request, Sampling
from posttrain.schema import Rollout

Publish = Callable[[Sequence[str], int, int | None], Sequence[Any]]
"""Makes a learner offer its weights: given the engines' GPUs, a number that grows when one is replaced, and the one engine
that comes (None: all); returns Ray references to what each of its ranks offers (model/transport.py)."""
OnFailure = Callable[[Sequence[Request], str, str], None]
"""Told of requests whose actor died: requests, actor, error. They are generated again elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSetup:
    """What the actors of a pool are made of."""

    checkpoint: Path
    attention: Literal["dense", "sparse"]
    engine: Literal["torch", "vllm", "fake"] = "torch"
    max_rows: int = 256
    cache_bytes: int = 256 << 20
    batched_tokens: int = 2048
    stock: bool = False
    """vLLM's own sparse attention, for sparse checkpoints."""
    sleep: bool = False
    """Whether sleep() will be asked for."""
    deterministic: bool = False
    """In vLLM: a request's bits do not depend on its batch."""
    device: str = "cpu"
    dtype: str = "float32"
    backend: Literal["auto", "triton", "torch"] = "auto"
    threads: int = 1
    sync_timeout_s: float = 900
    """For weights to arrive."""


class Pool:
    """Several rollout actors used as one engine; they outlive the stage that uses them."""

    def __init__(self, cluster: config.Cluster, actor_options: Mapping[str, Any]) -> None:
        self._cluster, self._options = cluster, actor_options
        self._setup: PoolSetup | None = None
        self._weights: tuple[int, Publish] | None = None
        self._gpus: list[str] = []
        self.restarts = 0
        self.backend = ""
        """Which kernels the actors run, and why."""
        self._actors = [self._new_actor() for _ in range(cluster.rollout_actors)]

    def start(self, setup: PoolSetup) -> Self:
        """Load a checkpoint into every actor; what an earlier stage had loaded is forgotten."""
        self._setup, self._weights, self.restarts = setup, None, 0
        starts = [(i, actor.start.remote(setup, i)) for i, actor in enumerate(self._actors)]
        for i, reference in starts:
            try:
                self._get(reference, f"rollout actor {i} (start)")
            except ray.exceptions.RayActorError:
                self._replace(i)
        self._gpus = [
            str(self._get(a.gpu.remote(), f"rollout actor {i}")) for i, a in enumerate(self._actors)
        ]
        self.backend = str(self._get(self._actors[0].backend.remote(), "rollout actor 0"))
        return self

    def load(self, version: int, publish: Publish) -> None:
        """Give all actors the learner's weights; those that died or got nothing in time are given them once more."""
        self._weights = None
        for i, actor in enumerate(self._actors):  # a broadcast would wait for one that is dead
            try:
                self._get(actor.gpu.remote(), f"rollout actor {i}")
            except (ray.exceptions.RayActorError, TimeoutError):
                ray.kill(actor)
                self._replace(i)
        self._weights = (version, publish)
        offers = publish(self._gpus, self.restarts, None)
        waiting = [(i, actor.load.remote(version, *offers)) for i, actor in enumerate(self._actors)]
        again = []
        for i, reference in waiting:
            try:
                self._get(reference, f"rollout actor {i} (load)")
            except ray.exceptions.RayActorError:
                self._replace(i)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, TimeoutError):
                    raise
                again.append(i)  # the transport was cut, perhaps by another one's death
            except TimeoutError:
                ray.kill(self._actors[i])
                self._replace(i)
        for i in again:
            self._load_one(i)

    def generate(
        self, requests: Sequence[Request], settings: Sampling, on_failure: OnFailure | None = None
    ) -> list[Rollout]:
        """One rollout per request, in order. Requests of one task stay on one actor."""
        parts = _split(requests, len(self._actors))
        done: dict[int, list[Rollout]] = {}
        while len(done) < len(parts):
            waiting = [
                (i, self._actors[i].generate.remote(parts[i], settings))
                for i in range(len(parts))
                if i not in done
            ]
            for i, reference in waiting:
                try:
                    done[i] = self._get(reference, f"rollout actor {i}")
                except (ray.exceptions.RayActorError, TimeoutError) as error:
                    ray.kill(self._actors[i])  # it may only hang
                    if on_failure is not None:
                        on_failure(parts[i], f"rollout actor {i}", type(error).__name__)
                    self._replace(i)
        return [rollout for i in range(len(parts)) for rollout in done[i]]

    def sleep(self) -> None:
        """Make all actors give up their weights and caches; load() wakes them."""
        for i, actor in enumerate(self._actors):
            try:
                self._get(actor.sleep.remote(), f"rollout actor {i} (sleep)")
            except ray.exceptions.RayActorError:
                continue  # nothing of it is left; load() replaces it

    def pids(self) -> list[int]:
        """Process ids of the actors."""
        return [int(self._get(a.pid.remote(), "rollout actor")) for a in self._actors]

    def close(self) -> None:
        """Free the models; the actors stay for the next stage."""
        for actor in self._actors:
            actor.stop.remote()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _new_actor(self) -> Any:
        return ray.remote(_RolloutActor).options(**self._options).remote()

    def _replace(self, i: int) -> None:
        self.restarts += 1
        allowed = self._cluster.max_actor_restarts
        if self.restarts > allowed:
            raise ChildProcessError(
                f"rollout actors died or hung {self.restarts} times; cluster.max_actor_restarts allows {allowed}"
            )
        self._actors[i] = self._new_actor()
        self._get(self._actors[i].start.remote(self._setup, i), f"rollout actor {i}")
        if self._gpus:  # it may be on another one
            self._gpus[i] = str(self._get(self._actors[i].gpu.remote(), f"rollout actor {i}"))
        self._load_one(i)

    def _load_one(self, i: int) -> None:
        """A fresh actor has the checkpoint's weights, not the learner's."""
        if self._weights is not None:
            version, publish = self._weights
            offers = publish(self._gpus, self.restarts, i)
            self._get(self._actors[i].load.remote(version, *offers), f"rollout actor {i} (load)")

    def _get(self, reference: Any, who: str) -> Any:
        return wait(reference, who, self._cluster.step_timeout_s)


def wait(reference: Any, who: str, timeout_s: float) -> Any:
    """The value of a Ray reference; TimeoutError names who did not answer."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise no_answer(who, timeout_s) from None


def no_answer(who: str, timeout_s: float) -> TimeoutError:
    """The error for who did not answer in time."""
    return TimeoutError(f"{who} did not answer within {timeout_s:.0f} s (cluster.step_timeout_s)")


class _RolloutActor:
    """Runs in the actor's process: one engine after another."""

    def __init__(self) -> None:
        process.prepare()
        self._engine: Any = None
        self._receiver: Any = None
        self._max_rows = 1

    def start(self, setup: PoolSetup, index: int) -> None:
        import torch

        from posttrain.model import checkpoint
        from posttrain.model.transport import Receiver
        from posttrain.rollouts.fake_engine import FakeEngine
        from posttrain.rollouts.torch_engine import TorchEngine

        torch.set_num_threads(setup.threads)
        self.stop()
        self._max_rows = setup.max_rows
        self._receiver = Receiver(torch.device(setup.device), index=index, timeout_s=setup.sync_timeout_s)
        if setup.engine == "fake":
            self._engine = FakeEngine(checkpoint.load_tokenizer(setup.checkpoint))
            return
        if setup.engine == "vllm":
            self._engine = _vllm_engine(setup)
            return
        self._engine = TorchEngine.open(
            setup.checkpoint,
            setup.attention,
            dtype=getattr(torch, setup.dtype),
            device=setup.device,
            backend=setup.backend,
        )

    def backend(self) -> str:
        return str(self._engine.backend)

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._receiver is not None:
            self._receiver.close()
        self._engine, self._receiver = None, None

    def gpu(self) -> str:
        return str(self._receiver.gpu)

    def load(self, version: int, *offers: Any) -> None:
        self._engine.load(version, self._receiver.accept(offers))

    def sleep(self) -> None:
        self._engine.sleep()

    def generate(self, requests: Sequence[Request], settings: Sampling) -> list[Rollout]:
        rollouts: list[Rollout] = self._engine.generate(requests, settings, max_rows=self._max_rows)
        return rollouts

    def pid(self) -> int:
        return os.getpid()


def _vllm_engine(setup: PoolSetup) -> Any:
    from posttrain.model import checkpoint
    from posttrain.rollouts.vllm import launch

    launch.prepare()
    from posttrain.rollouts.vllm.engine import Limits, VllmEngine  # imports vLLM, an extra

    limits = Limits(
        max_rows=setup.max_rows,
        max_batched_tokens=setup.batched_tokens,
        cache_bytes=setup.cache_bytes,
        eager=setup.device == "cpu" or setup.attention == "dense",
        stock=setup.stock,
        sleep=setup.sleep,
        deterministic=setup.deterministic,
    )
    tokenizer = checkpoint.load_tokenizer(setup.checkpoint)
    return VllmEngine(setup.checkpoint, tokenizer, dtype=setup.dtype, backend=setup.backend, limits=limits)


def _split(requests: Sequence[Request], parts: int) -> list[list[Request]]:
    """Cut into runs of about equal size without tearing a task's group apart; empty parts are left out."""
    groups: list[list[Request]] = []
    for request in requests:
        if groups and groups[-1][0].task.id == request.task.id:
            groups[-1].append(request)
        else:
            groups.append([request])
    share = max(1, -(-len(groups) // parts))
    chunks = [groups[i : i + share] for i in range(0, len(groups), share)]
    return [[request for group in chunk for request in group] for chunk in chunks]
