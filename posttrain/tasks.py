"""Tasks are data: read them from a file, a generator or a hub set, and split them by prompt hash.

A task's id and its side of the split come from its question alone, never from its position. Held-out and
training tasks are disjoint after deduplication. Next: rewards/base.py.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from posttrain import table_file
from posttrain.config import Domain
from posttrain.rewards.base import load_object
from posttrain.schema import Message, Task

_HELDOUT_ONE_IN = 10
_KNOWN = {"messages", "question", "system", "answer", "thinking", "meta"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The tasks of a domain."""

    train: list[Task]
    heldout: list[Task]
    duplicates: int
    """Tasks dropped because another one asks the same."""


def load_split(domain: Domain, seed: int) -> Split:
    """All tasks of a domain, deduplicated and split.

    Raises ValueError if there are no training tasks or fewer held-out ones than num_eval.
    """
    train: list[Task] = []
    heldout: list[Task] = []
    seen: set[str] = set()
    total = 0
    for task in load_tasks(domain.tasks, domain=domain.name, seed=seed, where=domain.where):
        total += 1
        if task.id in seen:
            continue
        seen.add(task.id)
        (heldout if is_heldout(task) else train).append(task)
    where = f"domain {domain.name!r} ({domain.tasks})"
    if total == 0:
        raise ValueError(f"{where} has no task (where = {domain.where})")
    if not train:
        raise ValueError(f"{where} has no training task: all {len(heldout)} are held out; add tasks")
    if len(heldout) < domain.num_eval:
        raise ValueError(
            f"{where} has {len(heldout)} held-out tasks, num_eval = {domain.num_eval} wanted; "
            "lower num_eval or add tasks (one in ten is held out)"
        )
    return Split(train=train, heldout=heldout, duplicates=total - len(seen))


def load_tasks(uri: str, *, domain: str, seed: int, where: str | None = None) -> Iterator[Task]:
    """The tasks of a source, one at a time, duplicates included.

    uri: a .jsonl or .parquet file; rg://dataset?size=..&level=..&option=.. (reasoning-gym, level 0 is easy);
    hf://name?split=..&config=..&revision=..&question=..&answer=.. (a hub set or a local folder);
    py://module:function?n=.. (called with seed and the options). where: import path of a predicate.
    Raises ValueError that names the file and line of whatever cannot be read.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme == "rg":
        found = _gym(uri, domain, seed)
    elif scheme == "py":
        found = _python(uri, seed)
    elif scheme in ("", "hf"):
        found = (_task(row, at) for at, row in table_file.rows(uri))
    else:
        raise ValueError(f"tasks {uri!r}: unknown scheme {scheme!r}; known: rg, py, hf, or a file")
    keep = load_object(where, f"domain {domain!r}: where") if where else None
    for task in found:
        task = replace(task, id=f"{domain}/{question_hash(task)[:12]}", domain=domain)
        if keep is None or keep(task):
            yield task


def question_hash(task: Task) -> str:
    """sha256 of the question, blanks and case evened out: what identity and split are made of."""
    return hashlib.sha256(" ".join(task.question.lower().split()).encode()).hexdigest()


def is_heldout(task: Task) -> bool:
    """Whether a task is kept for evaluation."""
    return int(question_hash(task), 16) % _HELDOUT_ONE_IN == 0


def _task(row: Mapping[str, Any], where: str) -> Task:
    """A task from a row; columns with no meaning here go to meta."""
    messages = row.get("messages")
    if messages is None:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: no question (text) and no messages")
        messages = [{"role": "user", "content": question}]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": str(row["system"])})
    if not _are_messages(messages):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: answer must be text, got {type(answer).__name__}")
    meta = row.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise ValueError(f"{where}: meta must be an object, got {type(meta).__name__}")
    others = {k: v for k, v in row.items() if k not in _KNOWN}
    return Task(
        id=where,
        domain="",
        messages=tuple(dict(m) for m in messages),
        answer=None if answer is None else str(answer),
        thinking=bool(row.get("thinking", True)),
        meta={**others, **meta},
    )


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _gym(uri: str, domain: str, seed: int) -> Iterator[Task]:
    from posttrain.rewards import gym  # its allow-list

    parts = urlsplit(uri)
    name = parts.netloc
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"tasks {uri!r}: reasoning-gym is missing; pip install 'posttrain[tasks]'")
    gym.check_allowed(name)
    options = {"seed": seed, **{key: table_file.option(text) for key, text in parse_qsl(parts.query)}}
    try:
        entries: Iterable[Any] = _gym_dataset(name, options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"tasks {uri!r}: {error}") from None
    for entry in entries:
        messages: tuple[Message, ...] = ({"role": "user", "content": entry["question"]},)
        yield Task(
            id="",
            domain=domain,
            messages=messages,
            answer=None if entry["answer"] is None else str(entry["answer"]),
            meta={"dataset": name, "entry": entry},
        )


def _gym_dataset(name: str, options: dict[str, Any]) -> Iterable[Any]:
    from reasoning_gym.factory import CURRICULA, create_curriculum, create_dataset  # heavy: only here

    level = options.pop("level", None)
    if level is not None:
        if name not in CURRICULA:
            raise ValueError("this dataset has no level; set its own options")
        curriculum = create_curriculum(name)
        curriculum.set_global_level(int(level))
        options = {**vars(curriculum.generate_configuration({})), **options}
    found: Iterable[Any] = create_dataset(name, **options)
    return found


def _python(uri: str, seed: int) -> Iterator[Task]:
    for number, task in enumerate(table_file.call(uri, "tasks", seed=seed), start=1):
        if not isinstance(task, Task):
            raise ValueError(f"tasks {uri!r}: item {number} is {type(task).__name__}, not a Task")
        yield task
