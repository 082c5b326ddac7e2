"""Ray: start or join a cluster, hold the learner and the rollout actors, wait with a deadline.

Actors live as long as the run and get one stage after another: starting a process and importing
torch costs seconds, a stage of the demo costs ten. Everything that waits has a deadline and says
who did not answer. With several ranks (cluster.sharding) every call goes to all learner actors at once. Left out:
placement that knows which GPUs are near each other.
Next: rollouts/pool.py, learner.py.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import psutil
import ray

from posttrain import config, process
from posttrain.group import Group, Place
from posttrain.learner import Learner, Setup
from posttrain.model.transport import Audience
from posttrain.rollouts.pool import Pool, PoolSetup, no_answer
from posttrain.rollouts.vllm import launch
from posttrain.schema import Batch


class Cluster:
    """The Ray cluster of a run, started when the first actor is needed."""

    def __init__(self, cfg: config.Run, say: Callable[[str], None] = print) -> None:
        """say is told which kernels learner and engines run, when that becomes known or changes."""
        self.cfg, self._say = cfg, say
        self._told: dict[str, str] = {}
        self.backends: dict[str, str] = {}
        """Which kernels run in learner and rollouts, and why, of those started since it was cleared."""
        self._started = False
        self._learner_actors: list[Any] = []
        self._pool: Pool | None = None
        self._threads = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            ray.shutdown()
            self._started = False

    @property
    def device(self) -> str:
        """Device of learner and engines."""
        if self.cfg.cluster.device != "auto":
            return self.cfg.cluster.device
        import torch  # only the driver of a real run comes here

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def threads(self) -> int:
        """torch threads per actor: learner and engines take turns, so each may use every idle core."""
        if self._threads == 0:
            self._threads = self.cfg.cluster.threads or _idle_cores()
        return self._threads

    def learner(self, setup: Setup) -> "RemoteLearner":
        """A fresh learner, in the run's learner actors; close it before asking for the next."""
        self._start()
        actors = self._learners()
        cluster = self.cfg.cluster
        setup = replace(setup, device=self.device, dtype=cluster.dtype, sharding=cluster.sharding)
        setup = replace(setup, backend=cluster.backend, deterministic=cluster.deterministic)
        setup = replace(setup, sync_folder=self.cfg.path / ".sync", timeout_s=cluster.step_timeout_s / 2)
        backend = self.wait([actor.start.remote(setup) for actor in actors], "learner.start")
        self._note("learner", backend)
        return RemoteLearner(self, actors)

    def pool(self, setup: PoolSetup) -> Pool:
        """The rollout actors, with a checkpoint loaded; close it before asking for the next."""
        self._start()
        if self._pool is None:
            if self.cfg.cluster.sharding.ranks > 1:
                self._learners()  # they choose their GPUs first: one each, as NCCL wants it
            self._pool = Pool(self.cfg.cluster, self._actor_options("engine"))
        cluster = self.cfg.cluster
        setup = replace(setup, device=self.device, dtype=cluster.dtype, threads=self.threads)
        setup = replace(setup, backend=cluster.backend, sync_timeout_s=cluster.step_timeout_s / 2)
        setup = replace(setup, deterministic=cluster.deterministic)
        self._pool.start(setup)
        self._note("rollouts", self._pool.backend)
        return self._pool

    def wait(self, references: Sequence[Any], what: str) -> Any:
        """The value of the first of the references, one per learner actor, when all are there, within the deadline.

        Raises TimeoutError or ChildProcessError, both with what was asked for, or what an actor raised: at once,
        because the others may be waiting for that one.
        """
        limit_s = self.cfg.cluster.step_timeout_s
        until, waiting = time.monotonic() + limit_s, list(references)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
                if not done:
                    raise no_answer(what, limit_s)
                ray.get(done)
            return ray.get(references[0])
        except ray.exceptions.RayActorError as error:
            raise ChildProcessError(
                f"{what}: the process died (killed, or out of memory); run the same command again"
            ) from error

    def _note(self, who: str, backend: str) -> None:
        if self._told.get(who) != backend:
            self._say(f"{who}: kernels by {backend}")
        self._told[who] = self.backends[who] = backend

    def _learners(self) -> list[Any]:
        """The learner actors of the run; those with shards have met."""
        if not self._learner_actors:
            cluster, size = self.cfg.cluster, self.cfg.cluster.sharding.ranks
            made = ray.remote(_LearnerActor).options(**self._actor_options("learner"))
            actors = [made.remote(max(1, self.threads // size)) for _ in range(size)]
            if cluster.sharding.wrapped:
                address = self.wait([actors[0].address.remote()], "learner.address")
                places = [Place(rank=rank, size=size, address=address) for rank in range(size)]
                joined = [
                    actor.join.remote(place, self.device, cluster.step_timeout_s, cluster.sharding.context)
                    for actor, place in zip(actors, places, strict=True)
                ]
                self.wait(joined, "learner.join")
            self._learner_actors = actors
        return self._learner_actors

    def _actor_options(self, who: Literal["learner", "engine"]) -> dict[str, Any]:
        cluster = self.cfg.cluster
        share = 0.0
        if self.device == "cuda":
            ranks = cluster.sharding.ranks
            per_gpu = -(-cluster.rollout_actors // ranks)
            # Of several learner actors no two fit on one GPU.
            mine = 0.6 if ranks > 1 else 1 / (1 + per_gpu)
            share = mine if who == "learner" else (1 - mine) / per_gpu
        return {"num_cpus": 0, "num_gpus": share}

    def _start(self) -> None:
        if self._started:
            return
        for name, value in process.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if self.cfg.rollouts.engine == "vllm":
            os.environ.update(launch.ENVIRONMENT)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray gives its workers the lowest priority but four; our actors are the work, not a guest of it.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if self.cfg.cluster.deterministic:  # cuBLAS reads it when the actor's first product is made
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Rewards and tools beside the recipe must load in the actors too; last, to shadow nothing.
        paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), os.getcwd()]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        address = self.cfg.cluster.ray_address
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else {"object_store_memory": 256 << 20}),
        )
        self._started = True


def _idle_cores() -> int:
    """Cores that nobody uses right now, at least one.

    With a thread on a busy core the others wait for it at every operation: two threads of which one
    shares its core were measured at a third of the speed of one thread.
    """
    cores = len(os.sched_getaffinity(0))
    busy = float(psutil.cpu_percent(interval=1.0)) / 100 * (os.cpu_count() or 1)
    return max(1, cores - round(busy))


class RemoteLearner:
    """The learner in its Ray actors, called like the class itself; close() frees its memory."""

    def __init__(self, cluster: Cluster, actors: Sequence[Any]) -> None:
        self._cluster, self._actors = cluster, actors
        self._pending: list[Any] | None = None
        self._gpus: list[str] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of Learner and wait for its result, which is that of the first rank."""
        return self._cluster.wait(self._call(method, args, kwargs), f"learner.{method}")

    def lm_step_soon(self, batches: Sequence[Batch]) -> dict[str, float] | None:
        """Start an LM step; returns the figures of the one before. Batches are made meanwhile."""
        before = self.settle()
        self._pending = self._call("lm_step", (batches,), {})
        return before

    def settle(self) -> dict[str, float] | None:
        """Wait for the step started last."""
        if self._pending is None:
            return None
        figures: dict[str, float] = self._cluster.wait(self._pending, "learner.lm_step")
        self._pending = None
        return figures

    def publish(self, engines: Sequence[str], generation: int, only: int | None) -> list[Any]:
        """References to what each rank offers the engines: for Pool.load."""
        if not self._gpus:
            self._gpus = [
                str(self._cluster.wait([actor.gpu.remote()], "learner.gpu")) for actor in self._actors
            ]
        audience = Audience(
            engines=tuple(engines),
            ranks=tuple(self._gpus),
            generation=generation,
            choice=self._cluster.cfg.rollouts.sync,
            sleeping=self._cluster.cfg.rollouts.sleep,
            only=only,
        )
        audience.routes()  # an impossible choice is an error here, not in every actor
        return self._call("offer", (audience,), {})

    def close(self) -> None:
        """End the stage's learner; the actors stay for the next one."""
        for actor in self._actors:
            actor.stop.remote()

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(self._actors) > 1:
            args = tuple(ray.put(arg) for arg in args)  # sent once, not once for each
        return [actor.call.remote(method, kwargs, *args) for actor in self._actors]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _LearnerActor:
    """Runs in the actor's process: one learner after another."""

    def __init__(self, threads: int) -> None:
        import torch

        process.prepare()
        torch.set_num_threads(threads)
        self._learner: Learner | None = None
        self._group: Group | None = None

    def address(self) -> str:
        """Where ranks can meet: this machine, at a port that is free now."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, place: Place, device: str, timeout_s: float, context: int) -> None:
        """Become a rank."""
        self._group = Group(place, device=device, timeout_s=timeout_s, context=context)

    def start(self, setup: Setup) -> str:
        """A new learner; returns which kernels it runs."""
        import torch

        self._learner = None  # the old model goes before the next one comes
        torch.use_deterministic_algorithms(setup.deterministic)  # what is not ours: index_add, SDPA, ...
        # Its other effect would be a pass over every new buffer.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._learner = Learner(replace(setup, host=ray.util.get_node_ip_address()), self._group)
        return str(self._learner.backend)

    def call(self, method: str, kwargs: dict[str, Any], *args: Any) -> Any:
        """Arguments that were put in the object store are here again: Ray resolves them at this level alone."""
        function: Callable[..., Any] = getattr(self._learner, method)
        return function(*args, **kwargs)

    def gpu(self) -> str:
        assert self._learner is not None, "started before"
        return self._learner.publisher.gpu

    def stop(self) -> None:
        if self._learner is not None:
            self._learner.publisher.close()
        self._learner = None
