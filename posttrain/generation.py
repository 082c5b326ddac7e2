"""From tasks to groups: make the requests, generate, put the rollouts of a task together.

Shared by RL, distillation and evaluation. A sample's seed comes from (seed, epoch, task, index) alone,
so that it does not depend on batches, actors or restarts. Next: rollouts/pool.py, stages/rl.py.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from posttrain.config import Keep, Mix, Rollouts
from posttrain.domains import Domain
from posttrain.ledger import StageLedger
from posttrain.model.checkpoint import attention_of
from posttrain.rollouts.pool import Pool, PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.schema import Group, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """All completions wanted of one task."""

    domain: Domain
    task: Task
    epoch: int
    """How often the task was used before in this stage."""
    requests: tuple[Request, ...]

    @property
    def ids(self) -> list[str]:
        """Ledger ids of the completions."""
        return [f"{self.task.id}#{self.epoch}.{r.index}" for r in self.requests]


def plan(
    domain: Domain, task: Task, count: int, *, seed: int, epoch: int = 0, budget: int | None = None
) -> GroupPlan:
    """`count` completions of a task, of at most `budget` tokens; None = the domain's own budget."""
    requests = tuple(
        Request(
            task=task,
            index=i,
            seed=sample_seed(seed, epoch, task.id, i),
            max_new_tokens=budget or domain.cfg.max_new_tokens,
            max_turns=domain.cfg.max_turns,
            environment=domain.environment,
        )
        for i in range(count)
    )
    return GroupPlan(domain=domain, task=task, epoch=epoch, requests=requests)


def sample_seed(seed: int, epoch: int, task_id: str, index: int) -> int:
    """63 bits that identify one sample of a stage."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{task_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def pool_setup(checkpoint: Path, cfg: Rollouts) -> PoolSetup:
    """Engines for a checkpoint, dense or sparse as it is."""
    attention = attention_of(checkpoint)
    return PoolSetup(
        checkpoint=checkpoint,
        attention=attention,
        engine=cfg.engine,
        max_rows=cfg.max_rows,
        cache_bytes=cfg.cache_mib << 20,
        batched_tokens=cfg.batched_tokens,
        stock=cfg.attention == "stock" and attention == "sparse",
    )


def sampling(cfg: Rollouts, keep: Keep | None = None) -> Sampling:
    """How training and distillation sample; with keep, the engine records what the learner is to take over."""
    return Sampling(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        record_kept=keep is not None and keep.topk,
        record_experts=keep is not None and keep.routing,
        record_mask=keep is not None and keep.sampling_mask and (cfg.top_p < 1 or cfg.top_k > 0),
    )


class TaskOrder:
    """Which tasks each step uses: every domain in shuffled epochs, domains by their weights."""

    def __init__(self, domains: dict[str, Domain], mix: dict[str, Mix], *, seed: int) -> None:
        total = sum(part.weight for part in mix.values())
        self._share = {name: mix[name].weight / total for name in domains}
        self._credit = dict.fromkeys(domains, 0.0)
        self._streams = {name: _Epochs(domain, seed) for name, domain in domains.items()}

    def step(self, num_tasks: int) -> list[tuple[Domain, Task, int]]:
        """Domain, task and epoch of the next tasks, domains together."""
        for name, share in self._share.items():
            self._credit[name] += share * num_tasks
        counts = dict.fromkeys(self._share, 0)
        for _ in range(num_tasks):  # always the domain that is most behind
            name = max(self._credit, key=lambda n: self._credit[n])
            self._credit[name] -= 1
            counts[name] += 1
        return self.more([name for name, count in counts.items() for _ in range(count)])

    def more(self, domains: Sequence[str]) -> list[tuple[Domain, Task, int]]:
        """Domain, task and epoch of the next task of each domain named."""
        return [next(self._streams[name]) for name in domains]

    def state(self) -> dict[str, Any]:
        """Where the order stands, as JSON; quarantined tasks are a part of it, since they are passed over."""
        return {
            "credit": self._credit,
            "streams": {name: stream.state() for name, stream in self._streams.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was asked for."""
        self._credit = dict(state["credit"])
        for name, stream in self._streams.items():
            stream.restore(state["streams"][name])


def generate(
    pool: Pool, plans: Sequence[GroupPlan], settings: Sampling, ledger: StageLedger | None
) -> list[Group]:
    """The groups of all plans, in order; rollouts carry their engine's log-probs."""
    ids = {(p.task.id, r.seed): id for p in plans for r, id in zip(p.requests, p.ids, strict=True)}

    def note(requests: Sequence[Request], actor: str, error: str) -> None:
        if ledger is not None:
            ledger.generation_failed([ids[r.task.id, r.seed] for r in requests], actor, error)

    rollouts = iter(pool.generate([r for p in plans for r in p.requests], settings, note))
    groups = [Group(task=p.task, rollouts=tuple(next(rollouts) for _ in p.requests)) for p in plans]
    if ledger is not None:
        ledger.generated([id for p in plans for id in p.ids])
    return groups


class _Epochs(Iterator[tuple[Domain, Task, int]]):
    """The tasks of a domain without end, shuffled anew each epoch."""

    def __init__(self, domain: Domain, seed: int) -> None:
        self._domain, self._rng = domain, Random(f"{seed}/{domain.name}")
        self._shuffled_by = self._rng.getstate()
        self._epoch, self._next = -1, 0
        self._order: list[Task] = []

    def __next__(self) -> tuple[Domain, Task, int]:
        quarantined = self._domain.rewards.quarantined
        while True:
            if self._next == len(self._order):
                self._shuffle()
            task = self._order[self._next]
            self._next += 1
            if task.id not in quarantined:
                return self._domain, task, self._epoch

    def state(self) -> dict[str, Any]:
        return {
            "rng": self._shuffled_by,
            "epoch": self._epoch,
            "next": self._next,
            "quarantined": self._domain.rewards.quarantined,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._domain.rewards.quarantined.update(state["quarantined"])
        if state["epoch"] >= 0:
            self._shuffle()
        self._epoch, self._next = state["epoch"], state["next"]

    def _shuffle(self) -> None:
        tasks, quarantined = self._domain.split.train, self._domain.rewards.quarantined
        if len(quarantined) >= len(tasks):
            raise ValueError(
                f"domain {self._domain.name!r}: every task is quarantined: {list(quarantined.values())[-1]}"
            )
        self._shuffled_by = self._rng.getstate()
        self._order = self._rng.sample(tasks, len(tasks))
        self._epoch, self._next = self._epoch + 1, 0
