"""Ray: start or join a cluster, hold the learner and the rollout actors, wait with a deadline.

Actors live as long as the run and get one stage after another: starting a process and importing
torch costs seconds, a stage of the demo costs ten. Everything that waits has a deadline and says
who did not answer. Left out: placement over several nodes and sharded learners.
Next: rollouts/pool.py, learner.py.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import psutil
import ray

from posttrain import config, process
from posttrain.learner import Learner, Setup
from posttrain.rollouts.pool import Pool, PoolSetup, wait
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
        self._learner_actor: Any = None
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
        """A fresh learner, in the run's one learner actor; close it before asking for the next."""
        self._start()
        if self._learner_actor is None:
            options = self._actor_options()
            self._learner_actor = ray.remote(_LearnerActor).options(**options).remote(self.threads)
        cluster = self.cfg.cluster
        setup = replace(setup, device=self.device, dtype=cluster.dtype)
        setup = replace(setup, backend=cluster.backend, deterministic=cluster.deterministic)
        self._note("learner", self.wait(self._learner_actor.start.remote(setup), "learner.start"))
        return RemoteLearner(self, self._learner_actor)

    def pool(self, setup: PoolSetup) -> Pool:
        """The rollout actors, with a checkpoint loaded; close it before asking for the next."""
        self._start()
        if self._pool is None:
            self._pool = Pool(self.cfg.cluster, self._actor_options())
        cluster = self.cfg.cluster
        setup = replace(setup, device=self.device, dtype=cluster.dtype, threads=self.threads)
        self._pool.start(replace(setup, backend=cluster.backend))
        self._note("rollouts", self._pool.backend)
        return self._pool

    def wait(self, reference: Any, what: str) -> Any:
        """The value of a Ray reference of the learner, within the deadline.

        Raises TimeoutError or ChildProcessError, both with what was asked for.
        """
        try:
            return wait(reference, what, self.cfg.cluster.step_timeout_s)
        except ray.exceptions.RayActorError as error:
            raise ChildProcessError(
                f"{what}: the process died (killed, or out of memory); run the same command again"
            ) from error

    def _note(self, who: str, backend: str) -> None:
        if self._told.get(who) != backend:
            self._say(f"{who}: kernels by {backend}")
        self._told[who] = self.backends[who] = backend

    def _actor_options(self) -> dict[str, Any]:
        share = 1 / (1 + self.cfg.cluster.rollout_actors) if self.device == "cuda" else 0
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
    """The learner in its Ray actor, called like the class itself; close() frees its memory."""

    def __init__(self, cluster: Cluster, actor: Any) -> None:
        self._cluster, self._actor = cluster, actor
        self._pending: Any = None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of Learner and wait for its result."""
        reference = self._actor.call.remote(method, args, kwargs)
        return self._cluster.wait(reference, f"learner.{method}")

    def lm_step_soon(self, batches: Sequence[Batch]) -> dict[str, float] | None:
        """Start an LM step; returns the figures of the one before. Batches are made meanwhile."""
        before = self.settle()
        self._pending = self._actor.call.remote("lm_step", (batches,), {})
        return before

    def settle(self) -> dict[str, float] | None:
        """Wait for the step started last."""
        if self._pending is None:
            return None
        figures: dict[str, float] = self._cluster.wait(self._pending, "learner.lm_step")
        self._pending = None
        return figures

    def publish(self) -> Any:
        """A reference to the weights in the object store, to be handed to Pool.load."""
        return self._actor.call.remote("weights", (), {})

    def close(self) -> None:
        """End the stage's learner; the actor stays for the next one."""
        self._actor.stop.remote()

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

    def start(self, setup: Setup) -> str:
        """A new learner; returns which kernels it runs."""
        import torch

        self._learner = None  # the old model goes before the next one comes
        torch.use_deterministic_algorithms(setup.deterministic)  # what is not ours: index_add, SDPA, ...
        # Its other effect would be a pass over every new buffer.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._learner = Learner(setup)
        return str(self._learner.backend)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function: Callable[..., Any] = getattr(self._learner, method)
        return function(*args, **kwargs)

    def stop(self) -> None:
        self._learner = None
