"""rollouts/*.parquet: every token, both log-probs, every reward component, and what became of the sample.

One file per step, one row per completion. Next: stages/rl.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from posttrain.schema import Rollout, Score, Task

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task_id", pa.string()),
        ("domain", pa.string()),
        ("index", pa.int32()),
        ("policy_version", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("engine_logprobs", pa.list_(pa.float32())),
        ("learner_logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("stop", pa.string()),
        ("outcome", pa.string()),
        ("reward", pa.float64()),
        ("parts", pa.string()),
        ("note", pa.string()),
        ("advantage", pa.float64()),
        ("fate", pa.string()),
    ]
)
"""learner_logprobs is null where the sample was not trained on; messages, outcome and parts are JSON."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One completion and its fate."""

    id: str
    task: Task
    rollout: Rollout
    score: Score
    advantage: float | None = None
    fate: str = ""
    """"trained", "filtered: <reason>" or "failed: <reason>"."""
    learner_logprobs: NDArray[np.float32] | None = None
    """[num_sampled] under the weights before the update, at the sampled tokens."""


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of one step."""
    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def _plain(row: Row) -> dict[str, object]:
    rollout = row.rollout
    learner = None
    if row.learner_logprobs is not None:
        learner = np.zeros(len(rollout.tokens), np.float32)
        learner[rollout.sampled] = row.learner_logprobs
    return {
        "id": row.id,
        "task_id": row.task.id,
        "domain": row.task.domain,
        "index": rollout.index,
        "policy_version": rollout.policy_version,
        "tokens": rollout.tokens,
        "sampled": rollout.sampled,
        "engine_logprobs": rollout.logprobs,
        "learner_logprobs": learner,
        "text": rollout.text,
        "messages": json.dumps(rollout.messages),
        "stop": rollout.stop,
        "outcome": json.dumps(rollout.outcome),
        "reward": row.score.value,
        "parts": json.dumps(row.score.parts),
        "note": row.score.note,
        "advantage": row.advantage,
        "fate": row.fate,
    }
