"""Rubrics by rule: task.meta["rubric"] lists what an answer must fulfil, each item checked by code.

Items: {"kind": "equals" | "contains" | "not_contains", "text"}, {"kind": "count", "text", "times"},
{"kind": "case", "case": "upper" | "lower"}, {"kind": "max_words" | "min_words", "words"},
{"kind": "regex", "pattern"}. "ignore_case": true works wherever there is a text or pattern. A pattern is
written by the task's author, who answers for its running time.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.rewards.base import bounded_if, per_rollout
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 4096
Item = Mapping[str, Any]


def _no_pattern(task: Task) -> bool:
    """A regular expression may run for hours; every other item is a glance."""
    return all(item.get("kind") != "regex" for item in _items(task))


@bounded_if(_no_pattern)
@per_rollout
def mean(task: Task, rollout: Rollout) -> float:
    """Share of the items fulfilled; 0 for an empty or overlong text."""
    items = _items(task)
    return sum(_fulfilled(task, item, rollout.text) for item in items) / len(items)


@bounded_if(_no_pattern)
@per_rollout
def strict(task: Task, rollout: Rollout) -> float:
    """1 if every item is fulfilled, else 0."""
    return float(all(_fulfilled(task, item, rollout.text) for item in _items(task)))


def _items(task: Task) -> list[Item]:
    items = task.meta.get("rubric")
    if not isinstance(items, list) or not items:
        raise ValueError(f"task {task.id} has no rubric (a list of items in meta)")
    return items


def _fulfilled(task: Task, item: Item, text: str) -> bool:
    check = _CHECKS.get(str(item.get("kind")))
    if check is None:
        raise ValueError(
            f"task {task.id}: unknown rubric kind {item.get('kind')!r}; known: {', '.join(_CHECKS)}"
        )
    if not text.strip() or len(text) > MAX_CHARACTERS:
        return False
    try:
        return check(item, text)
    except (KeyError, re.error) as error:
        raise ValueError(f"task {task.id}: rubric item {dict(item)}: {error!r}") from None


def _pair(item: Item, text: str) -> tuple[str, str]:
    wanted = str(item["text"])
    return (wanted.lower(), text.lower()) if item.get("ignore_case") else (wanted, text)


def _equals(item: Item, text: str) -> bool:
    wanted, text = _pair(item, text)
    return text.strip() == wanted.strip()


def _contains(item: Item, text: str) -> bool:
    wanted, text = _pair(item, text)
    return wanted in text


def _not_contains(item: Item, text: str) -> bool:
    return not _contains(item, text)


def _count(item: Item, text: str) -> bool:
    wanted, text = _pair(item, text)
    found = re.findall(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)
    return len(found) == int(item["times"])


def _case(item: Item, text: str) -> bool:
    return text == {"upper": text.upper(), "lower": text.lower()}[item["case"]]


def _max_words(item: Item, text: str) -> bool:
    return len(text.split()) <= int(item["words"])


def _min_words(item: Item, text: str) -> bool:
    return len(text.split()) >= int(item["words"])


def _regex(item: Item, text: str) -> bool:
    flags = re.IGNORECASE if item.get("ignore_case") else 0
    return re.search(str(item["pattern"]), text, flags) is not None


_CHECKS: dict[str, Callable[[Item, str], bool]] = {
    "equals": _equals,
    "contains": _contains,
    "not_contains": _not_contains,
    "count": _count,
    "case": _case,
    "max_words": _max_words,
    "min_words": _min_words,
    "regex": _regex,
}
