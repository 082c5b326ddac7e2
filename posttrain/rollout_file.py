"""rollouts/*.parquet: every token, both log-probs, every reward component, and what became of the sample.

One file per step, one row per completion. Next: stages/rl.py; workbench.py, which reads them.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A completion as it is read back; its task is known by id."""

    domain: str
    rollout: Rollout
    score: Score


def read(path: Path) -> list[Saved]:
    """The completions in a file, or in all files below a folder, in the order of their names.

    Raises ValueError if there are none or a file is something else.
    """
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    found = [saved for file in files for saved in _read(file)]
    if not found:
        raise ValueError(
            f"{path}: no rollouts there; name a rollouts/*.parquet file or the folder of a stage"
        )
    return found


def _read(path: Path) -> list[Saved]:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None
    missing = sorted(set(SCHEMA.names) - set(table.column_names))
    if missing:
        raise ValueError(f"{path}: not a file of rollouts (no column {', '.join(missing)})")
    arrays = ("tokens", "sampled", "engine_logprobs")
    columns = {name: table[name] for name in arrays}
    rows = table.drop_columns([*arrays, "learner_logprobs"]).to_pylist()
    return [
        Saved(
            domain=row["domain"],
            rollout=Rollout(
                task_id=row["task_id"],
                index=row["index"],
                tokens=columns["tokens"][i].values.to_numpy(zero_copy_only=False),
                sampled=columns["sampled"][i].values.to_numpy(zero_copy_only=False),
                logprobs=columns["engine_logprobs"][i].values.to_numpy(zero_copy_only=False),
                text=row["text"],
                messages=tuple(json.loads(row["messages"])),
                stop=row["stop"],
                outcome=json.loads(row["outcome"]),
                policy_version=row["policy_version"],
            ),
            score=Score(value=row["reward"], parts=json.loads(row["parts"]), note=row["note"]),
        )
        for i, row in enumerate(rows)
    ]


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
