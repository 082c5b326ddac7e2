"""GRPO: one domain makes a specialist, several the mixed stage; the same function with other settings.

The loop: choose tasks, generate groups, score, refill groups without a signal, update, publish weights.
Rollouts are on-policy; with updates_per_step > 1 the later updates of a step are not.
Next: ../generation.py, ../learner.py, ../loss.py.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain import config, generation, graph, packing, rollout_file
from posttrain.advantage import advantages, overlong_penalty
from posttrain.cluster import RemoteLearner
from posttrain.domains import Domain, open_domains, passed
from posttrain.gaps import gap_figures
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.mixture import TaskOrder
from posttrain.model.checkpoint import attention_of
from posttrain.rewards.scorer import score_all
from posttrain.rollout_file import Row
from posttrain.rollouts.pool import Pool
from posttrain.schema import Batch, Group, Sample, Score, Task
from posttrain.stages import evaluate

_NO_SIGNAL = "filtered: no signal"
_UNSCORABLE = "failed: unscorable"
_SKIPPED = "failed: step skipped"


def run(stage: config.Rl, job: Job) -> Result:
    """Train the policy on the stage's domains and write its checkpoint."""
    domains = open_domains(job.cfg, stage.mix)
    setup = _setup(stage, job)
    order = TaskOrder(
        domains,
        stage.mix,
        seed=job.seed,
        group_size=stage.group_size,
        specialists=_specialists(stage, job),
        follow_gap=stage.follow_gap,
    )
    with (
        job.cluster.learner(setup) as learner,
        job.cluster.pool(generation.pool_setup(setup.checkpoint, job.cfg.rollouts)) as pool,
    ):
        log = _Log()
        before = job.snapshots.restore(learner)
        if before is not None:
            order.restore(before["order"])
            log = _Log(**before["log"])
            pool.load(job.snapshots.first_step, learner.publish)
        for step in range(job.snapshots.first_step, stage.steps):
            if job.snapshots.due(step):
                job.snapshots.take(step, learner, {"order": order.state(), "log": asdict(log)})
            figures, skipped = _step(stage, job, step, order, learner, pool)
            figures["quarantined"] = float(sum(len(d.rewards.quarantined) for d in domains.values()))
            job.metrics.log(step, figures | ({"skipped_ids": " ".join(skipped)} if skipped else {}))
            _warn(stage, job, step, figures)
            log.add(figures)
        job.snapshots.settle()
        saved = learner.call("finish", job.out)
    figures = log.summary() | {f"gap/{name}": gap for name, gap in order.gaps().items()}
    return Result(steps=stage.steps, tokens=log.tokens, figures=figures | saved | {"restarts": pool.restarts})


_KEPT = ("reward", "signal", "mean_tokens", "generate_s", "score_s", "train_s", "engine/gap_mean")
"""What _Log.summary is made of."""


@dataclass(slots=True)
class _Log:
    """What the stage's own figures are made of."""

    tokens: int = 0
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _KEPT})
    """Of every step; engine/gap_mean of those with an update that is finite."""

    def add(self, figures: Mapping[str, float]) -> None:
        self.tokens += int(figures["tokens"])
        for name in _KEPT:
            if math.isfinite(figures.get(name, math.nan)):
                self.figures[name].append(figures[name])

    def summary(self) -> dict[str, Any]:
        """First and last rewards (means of five steps), the engine's distance from the learner, time shares."""
        log = self.figures
        ends = {"reward_first": log["reward"][:5], "reward_last": log["reward"][-5:]}
        means = {name: log[name] for name in ("signal", "mean_tokens", "generate_s", "score_s", "train_s")}
        figures = {name: float(np.mean(values)) for name, values in (ends | means).items()}
        if log["engine/gap_mean"]:
            figures["engine/gap_mean"] = float(np.mean(log["engine/gap_mean"]))
        return figures


def _setup(stage: config.Rl, job: Job) -> Setup:
    source = job.source(stage.source)
    if attention_of(source) == "dense":
        raise ValueError(
            f"{stage.name}: {stage.source!r} is a dense checkpoint without indexers; rl trains and rolls out with "
            "sparse attention: convert it first (a stage of kind convert, then warmup and sparse)"
        )
    train_indexer = stage.indexer == "train"
    return Setup(
        checkpoint=source,
        attention="sparse",
        optimizer=stage.optimizer,
        total_steps=stage.steps * stage.updates_per_step,
        train=frozenset({"model", "indexer"} if train_indexer else {"model"}),
        indexer_loss="sparse" if train_indexer else "none",
        balance_speed=stage.balance_speed,
        lora=stage.lora,
        mopd=stage.mopd,
        teachers=tuple(job.source(name) for name in graph.teachers(stage)),
        reference=stage.loss.kl != "none" and any(part.kl_coef > 0 for part in stage.mix.values()),
        seed=job.seed,
    )


def _specialists(stage: config.Rl, job: Job) -> dict[str, float]:
    """pass@1 of each domain's specialist on the held-out tasks, sampled as this stage samples."""
    found, mode = {}, "sampled" if job.cfg.rollouts.plain else "rollouts"
    for domain, name in graph.measured_specialists(job.cfg, stage).items():
        table = json.loads((job.cfg.path / f"{name}.eval" / evaluate.FILE).read_bytes())
        found[domain] = float(table[mode][domain]["pass@1"])
    return found


def _step(
    stage: config.Rl,
    job: Job,
    step: int,
    order: TaskOrder,
    learner: RemoteLearner,
    pool: Pool,
) -> tuple[dict[str, float], list[str]]:
    """Figures of one step, and the ids of samples whose update was skipped."""
    times = {"generate_s": 0.0, "score_s": 0.0}
    groups = _groups(stage, job, order, order.step(stage.tasks_per_step), pool, times)
    fresh = groups
    for _ in range(stage.refill_rounds):  # DAPO 3.2: each group without a signal makes place for another
        empty = [group[0].task.domain for group in fresh if not _has_signal(group)]
        if not empty:
            break
        fresh = _groups(stage, job, order, order.more(empty), pool, times)
        groups = groups + fresh
    if job.cfg.rollouts.sleep:
        pool.sleep()
    rows = [row for group in groups for row in group]
    _check_scores(stage, step, rows)
    began = time.monotonic()
    best = sorted(groups, key=lambda group: not _has_signal(group))[: stage.tasks_per_step]
    figures, skipped = _train(stage, job, best, learner)
    for reason in (_NO_SIGNAL, _UNSCORABLE, _SKIPPED):
        ids = [row.id for row in rows if row.fate == reason]
        end = job.ledger.filtered if reason.startswith("filtered") else job.ledger.failed
        if ids:
            end(ids, reason.partition(": ")[2])
    pool.load(step + 1, learner.publish)
    rollout_file.write(job.out / "rollouts" / f"step-{step:05d}.parquet", rows)
    figures |= _rollout_figures(groups) | order.figures() | times
    return figures | {
        "refilled": float(len(groups) - stage.tasks_per_step),
        "train_s": time.monotonic() - began,
        "tokens": float(sum(len(row.rollout.tokens) for row in rows)),
    }, skipped


def _groups(
    stage: config.Rl,
    job: Job,
    order: TaskOrder,
    tasks: Sequence[tuple[Domain, Task, int]],
    pool: Pool,
    times: dict[str, float],
) -> list[list[Row]]:
    """Generate and judge one group per task; adds the seconds to times."""
    plans = [
        generation.plan(
            domain,
            task,
            stage.group_size,
            seed=job.seed,
            epoch=epoch,
            budget=stage.mix[domain.name].max_new_tokens,
        )
        for domain, task, epoch in tasks
    ]
    job.ledger.planned([id for plan in plans for id in plan.ids])
    began = time.monotonic()
    settings = generation.sampling(job.cfg.rollouts, stage.keep)
    groups = generation.generate(pool, plans, settings, job.ledger)
    generated = time.monotonic()
    scores = score_all([(p.domain.rewards, g.task, g.rollouts) for p, g in zip(plans, groups, strict=True)])
    judged = [_judge(stage, *found) for found in zip(plans, groups, scores, strict=True)]
    measured = [
        (plan.domain, replace(group, scores=of_group))
        for plan, group, of_group in zip(plans, groups, scores, strict=True)
        if order.measures(plan.domain.name)
    ]
    order.observe([(g.task, v) for (_, g), v in zip(measured, passed(measured), strict=True)])
    job.ledger.scored([row.id for rows in judged for row in rows])
    times["generate_s"] += generated - began
    times["score_s"] += time.monotonic() - generated
    return judged


def _judge(stage: config.Rl, plan: generation.GroupPlan, group: Group, scores: Sequence[Score]) -> list[Row]:
    """Decide what happens to each completion of a group."""
    rows = [
        Row(id=id, task=group.task, rollout=rollout, score=score)
        for id, rollout, score in zip(plan.ids, group.rollouts, scores, strict=True)
    ]
    buffer = stage.mix[plan.domain.name].overlong_buffer
    judged = []
    for row, request in zip(rows, plan.requests, strict=True):
        if row.score.value is not None:
            tokens, sampled = row.rollout.tokens, row.rollout.sampled
            used = len(tokens) - int(sampled.argmax())  # tool results count in the budget
            penalty = overlong_penalty(used, budget=request.max_new_tokens, buffer=buffer)
            judged.append((row, row.score.value + penalty))
    found = advantages([value for _, value in judged], divide_by_std=stage.loss.divide_by_std)
    mopd = stage.mopd if stage.mix[plan.domain.name].specialist is not None else None
    if mopd is not None and (found is None or not mopd.rewards):
        found = [0.0] * len(judged)  # the teacher has something to say on every completion
    for row in rows:
        row.fate = _UNSCORABLE if row.score.value is None else _NO_SIGNAL
    if found is not None:
        for (row, _), advantage in zip(judged, found, strict=True):
            row.advantage, row.fate = advantage, "trained"
    return rows


def _has_signal(group: Sequence[Row]) -> bool:
    return any(row.advantage is not None for row in group)


def _check_scores(stage: config.Rl, step: int, rows: Sequence[Row]) -> None:
    """ValueError if too much cannot be scored to go on."""
    unscorable = [row for row in rows if row.score.value is None]
    if len(unscorable) > stage.max_unscorable * len(rows):
        raise ValueError(
            f"{stage.name}: step {step}: {len(unscorable)} of {len(rows)} completions could not be scored "
            f"(max_unscorable {stage.max_unscorable:.0%}); one of them: {unscorable[0].score.note}"
        )


def _train(
    stage: config.Rl, job: Job, groups: Sequence[list[Row]], learner: RemoteLearner
) -> tuple[dict[str, float], list[str]]:
    """The step's updates; figures are those of the first one, which is on-policy. Also the ids of skipped ones.

    Every update takes groups from all along the step, so that each has all domains.
    """
    first: dict[str, float] = {}
    skips = dict.fromkeys(("skipped", "nonfinite", "spike"), 0.0)
    skipped: list[str] = []
    num_updates, temperature = stage.updates_per_step, job.cfg.rollouts.temperature
    by_id = {row.id: row for group in groups for row in group}
    updates = [_batches(stage, job, groups[i::num_updates]) for i in range(num_updates)]
    if stage.loss.old_policy == "recomputed" and num_updates > 1:
        updates = [_with_old(batches, learner, temperature) for batches in updates]
    for batches in updates:
        if not batches:
            continue
        ids = [id for batch in batches for id in batch.ids]
        figures, logprobs = learner.call("grpo_step", batches, stage.loss, temperature)
        for batch, logp_M in zip(batches, logprobs, strict=True):
            counts = [by_id[id].rollout.num_sampled for id in batch.ids]
            for id, piece in zip(batch.ids, np.split(logp_M, np.cumsum(counts)[:-1]), strict=True):
                by_id[id].learner_logprobs = piece
        if "ties" in figures:
            figures["engine/ties"] = figures.pop("ties")  # with equal scores, a rule chooses a key
        if not first:
            figures |= _engine_figures([by_id[id] for id in ids])
        if "skipped" in figures:
            skipped += ids
            for id in ids:
                by_id[id].fate = _SKIPPED
        else:
            job.ledger.trained(ids)
        for name in skips:
            skips[name] += figures.get(name, 0.0)
        first = first or figures
    return first | {name: count for name, count in skips.items() if count}, skipped


def _engine_figures(rows: Sequence[Row]) -> dict[str, float]:
    """How far the engine that sampled these rows is from the learner, before it moved."""
    logs = [
        r.rollout.logprobs[r.rollout.sampled] - r.learner_logprobs
        for r in rows
        if r.learner_logprobs is not None
    ]
    return {f"engine/{name}": value for name, value in gap_figures(np.concatenate(logs)).items()}


def _with_old(batches: Sequence[Batch], learner: RemoteLearner, temperature: float) -> list[Batch]:
    """The learner's log-probs before the first update, as the old policy's."""
    found: list[NDArray[np.float32]] = learner.call("logprobs", batches, temperature)
    return [packing.with_old_logprobs(*pair) for pair in zip(batches, found, strict=True)]


def _batches(stage: config.Rl, job: Job, groups: Sequence[list[Row]]) -> list[Batch]:
    """The packed samples of one update; empty if no group has a signal."""
    kept = [[row for row in group if row.fate == "trained"] for group in groups]
    samples = [_sample(row, len(group), stage, job.cfg) for group in kept for row in group]
    if not samples:
        return []
    weights = packing.token_weights(samples, stage.loss.norm, num_groups=len(groups))
    return packing.pack(samples, weights, tokens_per_batch=job.cfg.learner.tokens_per_microbatch)


def _sample(row: Row, group_size: int, stage: config.Rl, cfg: config.Run) -> Sample:
    assert row.advantage is not None, f"{row.id} takes part without an advantage"
    part, rollout, teachers = stage.mix[row.task.domain], row.rollout, graph.teachers(stage)
    asked = generation.sampling(cfg.rollouts, stage.keep)
    for wanted, recorded, name in (
        (asked.record_experts, rollout.experts, "routing"),
        (asked.record_kept, rollout.kept, "topk"),
        (asked.record_mask, rollout.sampling_mask, "sampling_mask"),
    ):
        if wanted and recorded is None:
            raise ValueError(
                f"{stage.name}: keep.{name}: engine {cfg.rollouts.engine!r} has recorded nothing for this model; "
                f"set keep.{name} = false"
            )
    return Sample(
        id=row.id,
        tokens=rollout.tokens,
        mask=rollout.sampled,
        logprobs=rollout.logprobs,
        advantage=row.advantage,
        group_size=group_size,
        weight=part.loss_weight,
        kl_coef=part.kl_coef,
        clip=_clip(stage, part),
        length_budget=part.max_new_tokens or cfg.domain(row.task.domain).max_new_tokens,
        domain=row.task.domain,
        teacher=teachers.index(part.specialist) if part.specialist in teachers else None,
        kept=rollout.kept,
        experts=rollout.experts,
        sampling_mask=rollout.sampling_mask,
    )


def _clip(stage: config.Rl, part: config.Mix) -> tuple[float, float]:
    """The domain's clip below and above 1: its own bounds before those of the stage's loss."""
    low = part.clip or stage.loss.clip
    above = part.clip_high or part.clip or stage.loss.clip_high
    return low, above or low


def _rollout_figures(groups: Sequence[list[Row]]) -> dict[str, float]:
    """Rewards by domain, lengths, and the share of groups with something to learn from."""
    rows = [row for group in groups for row in group]
    by_domain: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.score.value is not None:
            by_domain[row.task.domain].append(row.score.value)
    figures = {f"reward/{name}": float(np.mean(values)) for name, values in by_domain.items()}
    values = [value for part in by_domain.values() for value in part]
    return figures | {
        "reward": float(np.mean(values)) if values else 0.0,
        "signal": float(np.mean([_has_signal(group) for group in groups])),
        "mean_tokens": float(np.mean([row.rollout.num_sampled for row in rows])),
        "cut_short": float(np.mean([row.rollout.stop == "length" for row in rows])),
        "unscorable": float(sum(row.score.value is None for row in rows)),
        "blamed": float(sum(row.score.blamed for row in rows)),
    }


def _warn(stage: config.Rl, job: Job, step: int, figures: dict[str, float]) -> None:
    if figures["signal"] < stage.min_signal:
        job.metrics.say(
            f"{stage.name}: step {step}: only {figures['signal']:.0%} of the groups have two different "
            f"rewards (min_signal {stage.min_signal:.0%}): the tasks are too easy or too hard"
        )
    if "skipped" in figures:
        job.metrics.say(
            f"{stage.name}: step {step}: updates skipped: {figures.get('nonfinite', 0):.0f} not finite, "
            f"{figures.get('spike', 0):.0f} gradient spikes; their samples are in metrics.jsonl"
        )
    if figures["unscorable"]:
        job.metrics.say(
            f"{stage.name}: step {step}: {figures['unscorable']:.0f} completions could not be scored, "
            f"{figures['quarantined']:.0f} tasks are quarantined; the notes are in rollouts/"
        )
