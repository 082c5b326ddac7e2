"""From tasks to groups: make the requests, generate, put the rollouts of a task together.

Shared by RL, distillation and evaluation. A sample's seed comes from (seed, epoch, task, index) alone,
so that it does not depend on batches, actors or restarts. Which tasks a step takes is mixture.py's to say.
Next: rollouts/pool.py, stages/rl.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import Keep, Rollouts
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
        sleep=cfg.sleep,
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
