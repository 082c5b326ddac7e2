"""Right or wrong against the reference answer: as text, or as mathematics. Next: math_worker.py."""

import re
from fractions import Fraction

from posttrain.rewards.base import bounded, final_answer, per_rollout
from posttrain.rewards.math_worker import shared_worker
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 512
"""Longer answers score 0: nobody needs more, and parsing time grows quickly."""
MAX_DEPTH = 30
"""So do answers with more brackets inside each other."""
_NUMBER = re.compile(r"([+-]?)(\d{1,40})(?:\.(\d{1,40}))?(?:/(\d{1,40}))?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d{1,40})\}\{(\d{1,40})\}")
_CLOSE = Fraction(1, 1000)


@bounded
@per_rollout
def exact(task: Task, rollout: Rollout) -> float:
    """1 if the final answer equals the reference, blanks evened out."""
    answer = final_answer(rollout.text)
    return float(bool(answer) and _same(answer, _reference(task)))


@per_rollout
def math(task: Task, rollout: Rollout) -> float:
    """1 if the final answer means the same number or expression as the reference.

    Plain numbers and fractions are compared exactly, everything else by math-verify in a process of its own; an
    answer that breaks or outlasts it scores 0. Raises ChildProcessError if that process cannot live.
    """
    reference = _reference(task)
    answer = final_answer(rollout.text)
    if not answer or len(answer) > MAX_CHARACTERS or _depth(answer) > MAX_DEPTH:
        return 0.0
    verdict = _same_number(answer, reference)
    return float(
        _same(answer, reference)
        or (shared_worker().verify(reference, answer) if verdict is None else verdict)
    )


math.prepare = lambda: shared_worker().start()  # type: ignore[attr-defined]


def number(text: str) -> Fraction | None:
    """The exact value of a plain number: 12, -3.50, 1,000, 2/4, \\frac{1}{2}, dollar signs apart; else None."""
    plain = text.strip().strip("$").strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    if found := _FRACTION.fullmatch(plain):
        sign, above, below = found.groups()
        whole, decimals = above, None
    elif found := _NUMBER.fullmatch(plain):
        sign, whole, decimals, below = found.groups()
    else:
        return None
    if below is not None and int(below) == 0:
        return None
    value = Fraction(f"{whole}.{decimals or 0}") / int(below or 1)
    return -value if sign == "-" else value


def _same_number(answer: str, reference: str) -> bool | None:
    """Whether two plain numbers are equal; None where that is not plain to see (1/3 and 0.333)."""
    found, wanted = number(answer), number(reference)
    if found is None or wanted is None:
        return None
    if found == wanted:
        return True
    both_whole = found.denominator == wanted.denominator == 1
    return False if both_whole or abs(found - wanted) > _CLOSE * max(Fraction(1), abs(wanted)) else None


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _reference(task: Task) -> str:
    if task.answer is None:
        raise ValueError(f"task {task.id} has no reference answer")
    return task.answer


def _same(answer: str, reference: str) -> bool:
    return " ".join(answer.split()) == " ".join(reference.split())
