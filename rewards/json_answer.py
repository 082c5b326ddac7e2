"""Answers in JSON: of the form that task.meta["schema"] (JSON Schema) wants, or equal to the reference.

The answer is the last fenced block after the thinking, or the final answer. Numbers that JSON does not know (NaN)
and objects with a key twice are refused: two readers would read two things.
"""

import json
from typing import Any

from posttrain.rewards.base import final_answer, per_rollout
from posttrain.rewards.program import program_in, same
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 65536
_NONE = object()


@per_rollout
def valid(task: Task, rollout: Rollout) -> float:
    """1 if the answer fulfils the schema."""
    return float(_fulfils(task, _answer(rollout.text)))


@per_rollout
def equal(task: Task, rollout: Rollout) -> float:
    """1 if the answer has the value of the reference (and fulfils the schema, where there is one)."""
    if task.answer is None:
        raise ValueError(f"task {task.id} has no reference answer")
    answer = _answer(rollout.text)
    right = answer is not _NONE and same(answer, _answer(task.answer))
    return float(right and ("schema" not in task.meta or _fulfils(task, answer)))


def _answer(text: str) -> Any:
    """The value, or _NONE."""
    if len(text) > MAX_CHARACTERS:
        return _NONE
    source = program_in(text) if "```" in text else final_answer(text)
    try:
        return json.loads(source, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return _NONE


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _fulfils(task: Task, answer: Any) -> bool:
    import jsonschema  # 0.2 s: only where it is used

    schema = task.meta.get("schema")
    if not isinstance(schema, dict):
        raise ValueError(f"task {task.id} has no schema (an object in meta)")
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"task {task.id}: schema: {error.message}") from None
    return answer is not _NONE and bool(kind(schema).is_valid(answer))
