"""`posttrain check`: is this recipe fit to run? No torch and no GPU, seconds instead of hours.

Loads every function the recipe names and calls each reward once, on an empty answer and on the
reference answer of a first task. Left out: rewards that ask a stage's checkpoint, which may take minutes to load, and
pretrain.tokenizer, which needs transformers; that they are there is checked. Next: pipeline.py.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from posttrain import config, graph, levels
from posttrain.config import Convert, Domain, Pretrain, Reward, Rl, Run
from posttrain.fit import check_engines
from posttrain.model.entry import need_index_dtype
from posttrain.rewards.base import Verdict, judge, load_object, load_reward, reference_rollout
from posttrain.schema import Task
from posttrain.table import columns
from posttrain.tasks import load_tasks
from posttrain.units import check_outside, expand


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLine:
    """One stage of the graph."""

    name: str
    kind: str
    sources: tuple[str, ...]
    steps: int | None
    domains: tuple[str, ...]
    evaluate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardLine:
    """What one reward function says about the two sample answers; None = unscorable."""

    domain: str
    fn: str
    use: str
    """"reward" or "passes"."""
    empty: float | None
    """For the empty answer."""
    reference: float | None
    """For the task's reference answer as the whole text; None where the task has none."""
    asks: tuple[str, ...] = ()
    """Stages whose checkpoints it asks: it was found, not called, since a judge may be as large as the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What check found."""

    cfg: Run
    stages: tuple[StageLine, ...]
    rewards: tuple[RewardLine, ...] = ()


def check(cfg: Run, *, config_only: bool = False) -> Report:
    """Raise ValueError for the first thing that cannot work."""
    stages = tuple(_stage_line(stage) for stage in cfg.stages)
    for stage in cfg.stages:
        if isinstance(stage, Convert):
            _need_convertible(stage)
    check_engines(cfg)
    if config_only:
        return Report(cfg=cfg, stages=stages)
    check_outside(cfg, expand(cfg))
    for stage in cfg.stages:
        if isinstance(stage, Pretrain):
            _find_module(stage)
    rewards = [line for domain in cfg.domains for line in _domain(domain, cfg)]
    return Report(cfg=cfg, stages=stages, rewards=tuple(rewards))


def _need_convertible(stage: Convert) -> None:
    try:  # the latents are those of a checkpoint that need not be here
        need_index_dtype(stage.index_dtype, index=stage.index_head_dim, latent=0)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from None


def as_json(report: Report) -> dict[str, Any]:
    """The report with the resolved recipe, for machines."""
    return {
        "config": report.cfg.model_dump(mode="json"),
        "stages": [asdict(line) for line in report.stages],
        "rewards": [asdict(line) for line in report.rewards],
    }


def as_text(report: Report) -> str:
    """The report for people."""
    head = ("stage", "kind", "source", "steps", "domains", "evaluated")
    rows = [
        (
            s.name,
            s.kind,
            ", ".join(s.sources) or "-",
            "-" if s.steps is None else str(s.steps),
            ", ".join(s.domains) or "-",
            "yes" if s.evaluate and report.cfg.domains else "no",
        )
        for s in report.stages
    ]
    parts = [f"{report.cfg.name}: the recipe is valid", columns([head, *rows])]
    if report.rewards:
        scores = [(r.domain, r.use, r.fn, *_scores(r)) for r in report.rewards]
        title = ("domain", "use", "function", "empty answer", "reference answer")
        parts.append(columns([title, *scores]))
    return "\n\n".join(parts)


def _stage_line(stage: config.Stage) -> StageLine:
    domains: Mapping[str, Any] = getattr(stage, "mix", None) or getattr(stage, "specialists", {})
    return StageLine(
        name=stage.name,
        kind=stage.kind,
        sources=tuple(graph.sources(stage)),
        steps=getattr(stage, "steps", None),
        domains=tuple(domains),
        evaluate=stage.evaluate,
    )


def _domain(domain: Domain, cfg: Run) -> list[RewardLine]:
    where = f"domain {domain.name!r}"
    for name in ("tool", "environment", "demonstrate"):
        path = getattr(domain, name)
        if path is not None:
            load_object(path, f"{where}: {name}")
    tasks = load_tasks(domain.tasks, domain=domain.name, seed=cfg.seed, where=domain.where)
    task = next(iter(tasks), None)
    if task is None:
        raise ValueError(f"{where}: {domain.tasks} has no task (where = {domain.where})")
    for stage in cfg.stages:
        if isinstance(stage, Rl) and domain.name in stage.mix:
            levels.load(domain.name, stage.mix[domain.name].level)(task)
    rewards = [("reward", reward) for reward in domain.rewards]
    rewards += [("passes", reward) for reward in domain.passes]
    return [_try(reward, task, use=use) for use, reward in rewards]


def _try(reward: Reward, task: Task, *, use: str) -> RewardLine:
    """Call a reward on a group of two answers: nothing, and the reference."""
    if asks := tuple(reward.stages):
        load_object(reward.fn, "reward")
        return RewardLine(domain=task.domain, fn=reward.fn, use=use, empty=None, reference=None, asks=asks)
    function = load_reward(reward.fn, reward.args)
    nothing = replace(reference_rollout(task), text="", messages=({"role": "assistant", "content": ""},))
    rollouts = [nothing] if task.answer is None else [nothing, reference_rollout(task, 1)]
    found: dict[int, Verdict] = {}
    judge(function, task, rollouts, found.__setitem__)
    for i, rollout in enumerate(rollouts):
        if found[i].kind != "judged":
            raise ValueError(
                f"reward {reward.fn!r} {found[i].why} (on task {task.id!r}, answer {rollout.text!r}); "
                "it must give one finite number, or None, per rollout"
            )
    scores = [found[i].value for i in range(len(rollouts))]
    return RewardLine(
        domain=task.domain,
        fn=reward.fn,
        use=use,
        empty=scores[0],
        reference=scores[1] if len(scores) > 1 else None,
    )


def _find_module(stage: Pretrain) -> None:
    module, colon, _ = stage.tokenizer.partition(":")
    try:
        found = bool(colon) and importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        raise ValueError(
            f"stage {stage.name!r}: tokenizer {stage.tokenizer!r} does not load; "
            "write it as package.module:function"
        )


def _scores(line: RewardLine) -> tuple[str, str]:
    if line.asks:
        return f"asks {', '.join(line.asks)}", "-"
    empty, reference = ("-" if value is None else json.dumps(value) for value in (line.empty, line.reference))
    return empty, reference
