"""`posttrain tasks`: what a task source holds, and how its tasks look. No torch. Next: tasks.py."""

import itertools
import json
import statistics
from collections import Counter
from typing import Any

from posttrain.schema import Task
from posttrain.tasks import is_heldout, load_tasks

_META = 300


def preview(uri: str, *, seed: int, where: str | None, limit: int, show: int) -> str:
    """Figures over the first `limit` tasks of a source and the first `show` of them in full.

    Raises ValueError as load_tasks does, and if there is no task.
    """
    found = list(itertools.islice(load_tasks(uri, domain="preview", seed=seed, where=where), limit))
    if not found:
        raise ValueError(f"{uri} has no task (where = {where})")
    different = {task.id: task for task in found}
    lengths = sorted(len(task.question) for task in found)
    answers = Counter(task.answer for task in found if task.answer is not None)
    meta = Counter(key for task in found for key in task.meta)
    lines = [
        f"{uri}: {len(found)} tasks{' or more (--limit)' if len(found) == limit else ''}, "
        f"{len(found) - len(different)} duplicates, {sum(map(is_heldout, different.values()))} held out",
        f"  question: {lengths[0]} to {lengths[-1]} characters, median {statistics.median(lengths):g}",
        f"  answer: {sum(answers.values())} tasks, {len(answers)} different, {_commonest(answers, len(found))}",
        f"  thinking: {sum(task.thinking for task in found)} tasks; tools: {sum(map(_num_tools, found))} in all",
        f"  meta: {', '.join(f'{key} ({count})' for key, count in sorted(meta.items())) or 'nothing'}",
    ]
    return "\n".join([*lines, *(_full(task) for task in found[:show])])


def _commonest(answers: Counter[str], total: int) -> str:
    """The best score that a blind guess gets."""
    if not answers:
        return "nothing to guess"
    answer, count = answers.most_common(1)[0]
    return f"the commonest {answer[:40]!r} is right for {count / total:.1%}"


def _num_tools(task: Task) -> int:
    return sum(len(message.get("tools") or ()) for message in task.messages)


def _full(task: Task) -> str:
    lines = [f"\n{task.id.replace('preview/', '')}{' (held out)' if is_heldout(task) else ''}"]
    for message in task.messages:
        names = [tool["function"]["name"] for tool in message.get("tools") or ()]
        lines.append(f"  {message['role']}: {_safe(message['content'])}")
        lines += [f"  tools: {', '.join(names)}"] if names else []
    lines.append(f"  answer: {_safe(task.answer or '-')}")
    meta = json.dumps(task.meta, ensure_ascii=False, default=_name)
    lines.append(f"  meta: {meta if len(meta) <= _META else meta[:_META] + ' ...'}")
    return "\n".join(lines)


def _safe(text: Any) -> str:
    """The text without what could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text))


def _name(value: object) -> str:
    return f"<{type(value).__name__}>"
