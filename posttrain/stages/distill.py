"""Specialists write the data: sample, verify, deduplicate, balance, keep the provenance of every row.

Leaves data.parquet (what sft reads) and dataset/, the same rows as a Hugging Face dataset.
Left out: near-duplicates. Next: sft.py.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import config, generation
from posttrain.domains import Domain, open_domains
from posttrain.job import Job, Result
from posttrain.rewards.scorer import score_all
from posttrain.schema import Group, Rollout, Score
from posttrain.store import MANIFEST, file_hash

DATA = "data.parquet"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("task_id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("tokens", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("answer", pa.string()),
        ("thinking", pa.bool_()),
        ("reward", pa.float64()),
        ("parts", pa.string()),
        ("specialist", pa.string()),
        ("checkpoint_sha256", pa.string()),
        ("sample_seed", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
    ]
)
"""checkpoint_sha256 is that of the specialist's manifest; parts is JSON."""


def run(stage: config.Distill, job: Job) -> Result:
    """Write the data set."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    tokens = 0
    domains = open_domains(job.cfg, stage.specialists)
    for step, (name, specialist) in enumerate(stage.specialists.items()):
        kept, counts = _domain(stage, job, domains[name], specialist)
        tokens += counts.pop("tokens")
        job.metrics.log(step, {"domain": name, **counts})
        figures |= {f"{what}/{name}": n for what, n in counts.items()}
        rows += kept
    if not rows:
        raise ValueError(f"stage {stage.name!r}: no sample of any specialist was verified")
    _write(job.out, rows)
    return Result(steps=len(stage.specialists), tokens=tokens, figures={"rows": len(rows), **figures})


def _domain(
    stage: config.Distill, job: Job, domain: Domain, specialist: str
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of one domain and how many samples met which fate."""
    source = job.source(specialist)
    tasks = domain.split.train
    chosen = Random(job.seed).sample(tasks, min(stage.tasks_per_domain, len(tasks)))
    plans = [generation.plan(domain, task, stage.samples_per_task, seed=job.seed) for task in chosen]
    job.ledger.planned([id for plan in plans for id in plan.ids])
    settings = generation.sampling(job.cfg.rollouts)
    with job.cluster.pool(generation.pool_setup(source, job.cfg.rollouts)) as pool:
        groups = generation.generate(pool, plans, settings, job.ledger)
    provenance = {
        "specialist": specialist,
        "checkpoint_sha256": _hash(source),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    fates: dict[str, list[str]] = {"failed": [], "wrong": [], "duplicate": [], "surplus": []}
    verified: list[dict[str, Any]] = []
    scores = score_all([(domain.passes, group.task, group.rollouts) for group in groups])
    for plan, group, of_group in zip(plans, groups, scores, strict=True):
        verified += _verified(plan, group, of_group, provenance, fates)
    # One sample of every task before the second of any: variety first.
    verified.sort(key=lambda row: row.pop("turn"))
    fates["surplus"] = [row["id"] for row in verified[stage.keep_per_domain :]]
    kept = verified[: stage.keep_per_domain]
    job.ledger.failed(fates.pop("failed"), "unscorable")
    for reason, ids in fates.items():
        job.ledger.filtered(ids, reason)
    job.ledger.trained([row["id"] for row in kept])
    counts = Counter({reason: len(ids) for reason, ids in fates.items()})
    counts["kept"] = len(kept)
    counts["tokens"] = sum(len(r.tokens) for group in groups for r in group.rollouts)
    return kept, counts


def _verified(
    plan: generation.GroupPlan,
    group: Group,
    scores: Sequence[Score],
    provenance: dict[str, Any],
    fates: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """Rows for the samples of a task that pass and differ; the ids of the others go to their fate."""
    seen: set[bytes] = set()
    rows = []
    for id, request, rollout, score in zip(plan.ids, plan.requests, group.rollouts, scores, strict=True):
        passed = plan.domain.passes.passed(score)
        if passed is None:
            fates["failed"].append(id)
        elif not passed or rollout.stop == "length":
            fates["wrong"].append(id)
        elif rollout.tokens.tobytes() in seen:
            fates["duplicate"].append(id)
        else:
            row = _row(id, group, rollout)
            row |= {"reward": score.value, "parts": json.dumps(score.parts)}
            row |= {"sample_seed": request.seed, "turn": len(seen), **provenance}
            rows.append(row)
            seen.add(rollout.tokens.tobytes())
    return rows


def _row(id: str, group: Group, rollout: Rollout) -> dict[str, Any]:
    task = group.task
    return {
        "id": id,
        "domain": task.domain,
        "task_id": task.id,
        "messages": [
            {"role": m["role"], "content": m["content"]} for m in (*task.messages, *rollout.messages)
        ],
        "tokens": rollout.tokens,
        "sampled": rollout.sampled,
        "answer": task.answer,
        "thinking": task.thinking,
    }


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    import datasets  # heavy: only here

    datasets.disable_progress_bars()  # the run has its own
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, out / DATA, compression="zstd")
    # The file's own hash: the library would pickle the table for one, which Python 3.12 refuses.
    fingerprint = file_hash(out / DATA)[:16]
    datasets.Dataset(table, fingerprint=fingerprint).save_to_disk(str(out / "dataset"))


def _hash(source: Path) -> str | None:
    manifest = source / MANIFEST
    return file_hash(manifest) if manifest.is_file() else None
