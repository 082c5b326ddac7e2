"""GRPO: one domain makes a specialist, several the mixed stage; the same function with other settings.

The loop: choose tasks, generate groups, score, keep groups with a signal, update, publish weights.
Rollouts are on-policy; with updates_per_step > 1 the later updates of a step are not.
Next: ../generation.py, ../learner.py, ../loss.py.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain import config, generation, packing, rollout_file
from posttrain.advantage import advantages
from posttrain.cluster import RemoteLearner
from posttrain.domains import open_domains
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.rewards.scorer import score_all
from posttrain.rollout_file import Row
from posttrain.rollouts.pool import Pool
from posttrain.schema import Group, Sample, Score

_NO_SIGNAL = "filtered: no signal"
_UNSCORABLE = "failed: unscorable"


def run(stage: config.Rl, job: Job) -> Result:
    """Train the policy on the stage's domains and write its checkpoint."""
    domains = open_domains(job.cfg, stage.mix)
    source = job.source(stage.source)
    order = generation.TaskOrder(domains, stage.mix, seed=job.seed)
    tokens, log = 0, defaultdict[str, list[float]](list)
    with (
        job.cluster.learner(_setup(stage, job)) as learner,
        job.cluster.pool(generation.pool_setup(source, job.cfg.rollouts)) as pool,
    ):
        for step in range(stage.steps):
            figures = _step(stage, job, step, order, learner, pool)
            tokens += int(figures["tokens"])
            job.metrics.log(step, figures)
            _warn(stage, job, step, figures)
            for name, value in figures.items():
                log[name].append(value)
        learner.call("save", job.out)
    return Result(steps=stage.steps, tokens=tokens, figures=_summary(log) | {"restarts": pool.restarts})


def _setup(stage: config.Rl, job: Job) -> Setup:
    train_indexer = stage.indexer == "train"
    return Setup(
        checkpoint=job.source(stage.source),
        attention="sparse",
        optimizer=stage.optimizer,
        total_steps=stage.steps * stage.updates_per_step,
        train=frozenset({"model", "indexer"} if train_indexer else {"model"}),
        indexer_loss="sparse" if train_indexer else "none",
        balance_speed=stage.balance_speed,
        reference=any(part.kl_coef > 0 for part in stage.mix.values()),
        seed=job.seed,
    )


def _step(
    stage: config.Rl,
    job: Job,
    step: int,
    order: generation.TaskOrder,
    learner: RemoteLearner,
    pool: Pool,
) -> dict[str, float]:
    plans = [
        generation.plan(domain, task, stage.group_size, seed=job.seed, epoch=epoch)
        for domain, task, epoch in order.step(stage.tasks_per_step)
    ]
    job.ledger.planned([id for plan in plans for id in plan.ids])
    began = time.monotonic()
    groups = generation.generate(pool, plans, generation.sampling(job.cfg.rollouts), job.ledger)
    generated = time.monotonic()
    scores = score_all([(p.domain.rewards, g.task, g.rollouts) for p, g in zip(plans, groups, strict=True)])
    groups_rows = [_judge(*found) for found in zip(plans, groups, scores, strict=True)]
    rows = [row for group in groups_rows for row in group]
    job.ledger.scored([row.id for row in rows])
    _check_scores(stage, step, rows)
    scored = time.monotonic()
    figures = _train(stage, job, groups_rows, learner)
    for reason in (_NO_SIGNAL, _UNSCORABLE):
        ids = [row.id for row in rows if row.fate == reason]
        end = job.ledger.filtered if reason.startswith("filtered") else job.ledger.failed
        if ids:
            end(ids, reason.partition(": ")[2])
    pool.load(step + 1, learner.publish())
    rollout_file.write(job.out / "rollouts" / f"step-{step:05d}.parquet", rows)
    figures |= _rollout_figures(groups_rows)
    scorers = [plan.domain.rewards for plan in {plan.domain.name: plan for plan in plans}.values()]
    return figures | {
        "quarantined": float(sum(len(scorer.quarantined) for scorer in scorers)),
        "generate_s": generated - began,
        "score_s": scored - generated,
        "train_s": time.monotonic() - scored,
        "tokens": float(sum(len(row.rollout.tokens) for row in rows)),
    }


def _judge(plan: generation.GroupPlan, group: Group, scores: Sequence[Score]) -> list[Row]:
    """Decide what happens to each completion of a group."""
    rows = [
        Row(id=id, task=group.task, rollout=rollout, score=score)
        for id, rollout, score in zip(plan.ids, group.rollouts, scores, strict=True)
    ]
    judged = [(row, row.score.value) for row in rows if row.score.value is not None]
    found = advantages([value for _, value in judged])
    for row in rows:
        row.fate = _UNSCORABLE if row.score.value is None else _NO_SIGNAL
    if found is not None:
        for (row, _), advantage in zip(judged, found, strict=True):
            row.advantage, row.fate = advantage, "trained"
    return rows


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
) -> dict[str, float]:
    """The step's updates; figures are those of the first one, which is on-policy."""
    first: dict[str, float] = {}
    share = -(-len(groups) // stage.updates_per_step)
    for start in range(0, len(groups), share):
        part = groups[start : start + share]
        kept = [[row for row in group if row.fate == "trained"] for group in part]
        by_id = {row.id: row for group in kept for row in group}
        samples = [_sample(row, len(group), stage) for group in kept for row in group]
        if not samples:
            continue
        weights = packing.token_weights(samples, stage.loss.norm, num_groups=len(part))
        limit = job.cfg.learner.tokens_per_microbatch
        batches = packing.pack(samples, weights, tokens_per_batch=limit)
        temperature = job.cfg.rollouts.temperature
        figures, logprobs = learner.call("grpo_step", batches, stage.loss, temperature)
        for batch, logp_M in zip(batches, logprobs, strict=True):
            counts = [by_id[id].rollout.num_sampled for id in batch.ids]
            pieces = np.split(logp_M, np.cumsum(counts)[:-1])
            for id, piece in zip(batch.ids, pieces, strict=True):
                by_id[id].learner_logprobs = piece
        job.ledger.trained(by_id)
        first = first or figures
    return first


def _sample(row: Row, group_size: int, stage: config.Rl) -> Sample:
    assert row.advantage is not None, f"{row.id} takes part without an advantage"
    part = stage.mix[row.task.domain]
    return Sample(
        id=row.id,
        tokens=row.rollout.tokens,
        mask=row.rollout.sampled,
        logprobs=row.rollout.logprobs,
        advantage=row.advantage,
        group_size=group_size,
        weight=part.loss_weight,
        kl_coef=part.kl_coef,
        domain=row.task.domain,
    )


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
        "signal": float(np.mean([any(r.fate == "trained" for r in g) for g in groups])),
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
    if figures["unscorable"]:
        job.metrics.say(
            f"{stage.name}: step {step}: {figures['unscorable']:.0f} completions could not be scored, "
            f"{figures['quarantined']:.0f} tasks are quarantined; the notes are in rollouts/"
        )


def _summary(log: dict[str, list[float]]) -> dict[str, Any]:
    """First and last rewards (means of five steps), the engine's distance from the learner, time shares."""
    ends = {"reward_first": log["reward"][:5], "reward_last": log["reward"][-5:]}
    means = {name: log[name] for name in ("signal", "mean_tokens", "generate_s", "score_s", "train_s")}
    figures = {name: float(np.mean(values)) for name, values in (ends | means).items()}
    if log["logprob_gap"]:
        figures["logprob_gap"] = float(np.mean(log["logprob_gap"]))
        figures["logprob_gap_max"] = max(log["logprob_gap"])
    return figures
