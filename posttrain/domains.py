"""A domain with everything its config names loaded: tasks, rewards, environment, demonstrations.

Next: generation.py for rollouts of these tasks, data.py for language-model samples.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from posttrain import config
from posttrain.rewards.base import load_object
from posttrain.rewards.scorer import Scorer, score_all
from posttrain.rewards.workers import shared_workers
from posttrain.rollouts.environment import Environment, Stateless, single_turn
from posttrain.schema import Group, Message, Task
from posttrain.tasks import Split, load_split

Demonstrate = Callable[[Task, Random], list[Message]]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One task family, ready for use."""

    cfg: config.Domain
    split: Split
    rewards: Scorer
    passes: Scorer
    environment: Environment
    demonstrate: Demonstrate | None

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.cfg.name

    @property
    def evaluation(self) -> list[Task]:
        """The held-out tasks that every checkpoint is measured on."""
        return self.split.heldout[: self.cfg.num_eval]

    def passed(self, groups: Sequence[Group]) -> list[list[bool | None]]:
        """For each group, whether each rollout counts as solved; None = cannot be said."""
        scores = score_all([(self.passes, group.task, group.rollouts) for group in groups])
        return [[self.passes.passed(score) for score in of_group] for of_group in scores]


def passed(judged: Sequence[tuple[Domain, Group]]) -> list[list[bool | None]]:
    """Whether each completion counts as solved; the groups have the scores of the domain's rewards.

    Those of `passes` are asked only where a domain has any of its own.
    """
    asked = [(domain.passes, group.task, group.rollouts) for domain, group in judged if domain.cfg.passes]
    answers = iter(score_all(asked))
    scores = [next(answers) if domain.cfg.passes else group.scores for domain, group in judged]
    return [
        [domain.passes.passed(score) for score in of_group]
        for (domain, _), of_group in zip(judged, scores, strict=True)
    ]


def open_domains(cfg: config.Run, names: Iterable[str] | None = None) -> dict[str, Domain]:
    """The named domains (default: all) by name, in the recipe's order.

    Raises ValueError for anything that does not load.
    """
    wanted = None if names is None else set(names)
    return {
        domain.name: _open(_resolved(domain, cfg).model_dump_json(), cfg.seed, cfg.cluster.reward_workers)
        for domain in cfg.domains
        if wanted is None or domain.name in wanted
    }


def _resolved(domain: config.Domain, cfg: config.Run) -> config.Domain:
    """The domain with the folders of the stages that its rewards ask."""
    parts = {name: [r.resolved(cfg.path) for r in getattr(domain, name)] for name in ("rewards", "passes")}
    return domain.model_copy(update=parts)


@functools.cache  # the stages of a run share it: making 40,000 tasks takes seconds
def _open(domain_json: str, seed: int, reward_workers: int) -> Domain:
    cfg = config.Domain.model_validate_json(domain_json)
    workers = shared_workers(reward_workers)
    where = f"domain {cfg.name!r}"
    return Domain(
        cfg=cfg,
        split=load_split(cfg, seed),
        rewards=Scorer(cfg.rewards, workers),
        passes=Scorer(cfg.passes or cfg.rewards, workers),
        environment=_environment(cfg, where),
        demonstrate=load_object(cfg.demonstrate, f"{where}: demonstrate") if cfg.demonstrate else None,
    )


def _environment(cfg: config.Domain, where: str) -> Environment:
    if cfg.tool is not None:
        return Stateless(load_object(cfg.tool, f"{where}: tool"))
    if cfg.environment is None:
        return single_turn
    environment: Environment = load_object(cfg.environment, f"{where}: environment")
    return environment
