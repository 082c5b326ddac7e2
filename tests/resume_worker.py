"""A driver that kills itself: a small recipe of an LM stage and a mixed rl stage, learner and engine in this process.

    python tests/resume_worker.py OUT SOURCE [--kill POINT] [--forget-rng] [--set key=value ...]

POINT is a moment of KILLS. Everything but the actors is the product's own: pipeline, store, ledger, snapshots.
"""

import argparse
import os
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain import config, mixture, pipeline, snapshots
from posttrain.learner import Learner, Setup
from posttrain.ledger import Ledger
from posttrain.model import checkpoint
from posttrain.model.weights import pack
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Rollout, Task

STEPS, EVERY = 7, 2


def recipe(out: Path, source: Path) -> dict[str, Any]:
    """Two stages, a snapshot after every second step."""
    domains = [
        {
            "name": name,
            "tasks": f"py://posttrain.toy.{module}:tasks?n=40",
            "rewards": [{"fn": "resume_worker:variety"}],
            "max_new_tokens": 12,
            "num_eval": 1,
            "demonstrate": f"posttrain.toy.{module}:demonstrate",
        }
        for name, module in (("logic", "sorting"), ("align", "phrases"))
    ]
    common = {"steps": STEPS, "evaluate": False}
    sparse = {"name": "sparse", "kind": "sparse", "source": str(source), "heldout_tokens": 9}
    sparse |= {"data": {"sequences_per_step": 6}, "optimizer": {"kind": "muon", "lr": 1e-3}}
    mixed = {
        "name": "mixed",
        "kind": "rl",
        "source": "sparse",
        "mix": {"logic": {"curriculum": 0.75}, "align": {"kl_coef": 0.1}},
    }
    mixed |= {
        "tasks_per_step": 3,
        "group_size": 4,
        "optimizer": {"lr": 1e-3, "spike_factor": 50, "decay_from": 0},
    }
    return {
        "name": "r",
        "out": str(out),
        "cluster": {"device": "cpu", "deterministic": True, "reward_workers": 1},
        "snapshots": {"every_steps": EVERY},
        "domains": domains,
        "stages": [sparse | common, mixed | common],
    }


def variety(task: Task, rollouts: list[Rollout]) -> list[float]:
    """A reward that even a random model has a signal in."""
    return [len({*rollout.tokens.tolist()}) / len(rollout.tokens) for rollout in rollouts]


class LocalLearner:
    """As RemoteLearner."""

    def __init__(self, setup: Setup) -> None:
        self._learner = Learner(setup)
        self._before: Any = None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of Learner."""
        return getattr(self._learner, method)(*args, **kwargs)

    def lm_step_soon(self, batches: Any) -> Any:
        """The figures of the step before."""
        before, self._before = self._before, self._learner.lm_step(batches)
        return before

    def settle(self) -> Any:
        """The figures of the last step."""
        before, self._before = self._before, None
        return before

    def publish(self, *_: Any) -> Any:
        """The weights and their checksum; the engine copies them."""
        return pack(self._learner.weights())


class LocalPool:
    """As Pool."""

    restarts = 0

    def __init__(self, path: Path) -> None:
        self._engine = TorchEngine(checkpoint.load(path), checkpoint.load_tokenizer(path), "sparse")

    def load(self, version: int, publish: Any) -> None:
        """Take new weights."""
        self._engine.load(version, publish())

    def generate(self, requests: Any, settings: Any, _: Any) -> list[Rollout]:
        """One rollout per request."""
        return self._engine.generate(requests, settings)


class LocalCluster:
    """As Cluster, in this process."""

    def __init__(self, cfg: config.Run) -> None:
        self._cfg = cfg
        self.backends: dict[str, str] = {}

    def learner(self, setup: Setup) -> Any:
        """A fresh learner."""
        return nullcontext(LocalLearner(replace(setup, deterministic=self._cfg.cluster.deterministic)))

    def pool(self, setup: Any) -> Any:
        """A fresh engine."""
        return nullcontext(LocalPool(setup.checkpoint))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_event(stage: str, event: str, number: int) -> None:
    """Die when a ledger has written the event of the stage for the number-th time."""
    append, seen = Ledger.append, [0]

    def watched(ledger: Ledger, row: Any) -> None:
        append(ledger, row)
        seen[0] += row["stage"] == stage and row["event"] == event
        if seen[0] == number:
            _die()

    Ledger.append = watched  # type: ignore[method-assign]


def _at_seal(number: int, *, after: bool) -> None:
    """Die before or after the manifest of the number-th snapshot is written; it has no name yet."""
    seal, seen = snapshots.seal, [0]

    def watched(*args: Any) -> None:
        seen[0] += 1
        if seen[0] == number and not after:
            _die()
        seal(*args)
        if seen[0] == number:
            _die()

    snapshots.seal = watched


KILLS: dict[str, Callable[[], None]] = {
    "generated, after 3 rl steps": lambda: _at_event("mixed", "generated", 4),
    "trained, after 4 LM steps": lambda: _at_event("sparse", "trained", 5),
    "trained, before the first rl snapshot": lambda: _at_event("mixed", "trained", 1),
    "the 2nd rl snapshot written, no manifest": lambda: _at_seal(5, after=False),
    "the 3rd rl snapshot with a manifest, not named": lambda: _at_seal(6, after=True),
    "planned, in the last rl step": lambda: _at_event("mixed", "planned", STEPS),
}
"""The LM stage takes snapshots 1 to 3, the rl stage 4 to 6."""


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kill", choices=KILLS)
    parser.add_argument("--forget-rng", action="store_true")
    parser.add_argument("--asynchronous", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.kill:
        KILLS[args.kill]()
    if args.forget_rng:
        restore = mixture._Epochs.restore
        fresh = random.Random(0).getstate()
        mixture._Epochs.restore = lambda self, state: restore(self, {**state, "rng": fresh})  # type: ignore[method-assign]
    pipeline._cluster = lambda cfg, say: nullcontext(LocalCluster(cfg))  # type: ignore[assignment,return-value]
    run = config.Run.model_validate(recipe(args.out, args.source))
    if args.asynchronous:
        run = run.model_copy(update={"snapshots": config.Snapshots(every_steps=EVERY, asynchronous=True)})
    pipeline.run(run)


if __name__ == "__main__":
    main()
