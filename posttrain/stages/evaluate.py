"""pass@1 of a checkpoint on the held-out tasks of every domain, sampled and greedy, of a specialist also as rollouts are.

The same tasks and the same seeds for every checkpoint, so that differences are paired.
Next: ../generation.py, ../report.py.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from posttrain import disk, generation
from posttrain.domains import Domain, open_domains
from posttrain.intervals import mean_interval, wilson
from posttrain.job import Job, Result
from posttrain.rollouts.pool import Pool
from posttrain.rollouts.request import Sampling
from posttrain.schema import Group
from posttrain.units import EvaluateUnit

FILE = "eval.json"


def run(unit: EvaluateUnit, job: Job) -> Result:
    """Write eval.json: {"sampled": {domain: {"pass@1", "ci95", "n", ...}}, "greedy": ..., "rollouts": ...}."""
    domains = list(open_domains(job.cfg).values())
    settings = job.cfg.evaluation
    modes = {"sampled": (Sampling(), settings.samples_per_task)}
    if settings.greedy:
        modes["greedy"] = (Sampling(temperature=0.0), 1)
    if unit.as_rollouts:
        modes["rollouts"] = (generation.sampling(job.cfg.rollouts), settings.samples_per_task)
    job.metrics.expect(len(modes))
    table: dict[str, dict[str, Any]] = {}
    tokens = 0
    setup = generation.pool_setup(job.source(unit.source), job.cfg.rollouts)
    with job.cluster.pool(setup) as pool:
        for step, (mode, (sampling, samples)) in enumerate(modes.items()):
            table[mode], spent = _measure(job, pool, domains, sampling, samples)
            mean = statistics.mean(row["pass@1"] for row in table[mode].values())
            job.metrics.log(step, {"mode": mode, "pass@1": mean, "tokens": spent})
            tokens += spent
    disk.write_json(job.out / FILE, table)
    figures = {name: {"pass@1": row["pass@1"]} for name, row in table["sampled"].items()}
    return Result(steps=len(modes), tokens=tokens, figures=figures)


def _measure(
    job: Job, pool: Pool, domains: Sequence[Domain], sampling: Sampling, samples: int
) -> tuple[dict[str, Any], int]:
    """Figures by domain, and the tokens sampled. All domains decode together."""
    plans = [
        generation.plan(domain, task, samples, seed=job.cfg.seed)
        for domain in domains
        for task in domain.evaluation
    ]
    groups = generation.generate(pool, plans, sampling, None)
    table = {}
    for domain in domains:
        mine = [g for p, g in zip(plans, groups, strict=True) if p.domain is domain]
        table[domain.name] = _figures(domain, mine)
    return table, sum(r.num_sampled for group in groups for r in group.rollouts)


def _figures(domain: Domain, groups: Sequence[Group]) -> dict[str, Any]:
    """pass@1 with its 95 % interval over tasks; a task with an unscorable sample does not count."""
    shares: list[float] = []
    unscorable = 0
    for verdicts in domain.passed(groups):
        known = [verdict for verdict in verdicts if verdict is not None]
        unscorable += len(verdicts) - len(known)
        if len(known) == len(verdicts):
            shares.append(sum(known) / len(known))
    if not shares:
        raise ValueError(f"domain {domain.name!r}: not one held-out task could be scored")
    single = all(len(group.rollouts) == 1 for group in groups)
    interval = wilson(round(sum(shares)), len(shares)) if single else mean_interval(shares)
    lengths = [len(r.tokens) for group in groups for r in group.rollouts]
    return {
        "pass@1": statistics.mean(shares),
        "ci95": list(interval),
        "n": len(shares),
        "unscorable": unscorable,
        "mean_tokens": statistics.mean(lengths),
        "median_tokens": statistics.median(lengths),
    }
