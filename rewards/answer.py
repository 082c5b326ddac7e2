"""Right or wrong against the reference answer: as text, or as mathematics. Next: math_worker.py."""

from collections.abc import Sequence

from posttrain.rewards.base import bounded, final_answer, per_rollout
from posttrain.rewards.math_worker import shared_worker
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 512
"""Longer answers score 0: nobody needs more, and parsing time grows quickly."""


@bounded
@per_rollout
def exact(task: Task, rollout: Rollout) -> float:
    """1 if the final answer equals the reference, blanks evened out."""
    answer = final_answer(rollout.text)
    return float(bool(answer) and _same(answer, _reference(task)))


def math(task: Task, rollouts: Sequence[Rollout]) -> list[float | None]:
    """1 if the final answer means the same number or expression as the reference (math-verify).

    Parsing runs in another process with a time limit; an answer that breaks or outlasts it scores 0.
    """
    reference = _reference(task)
    return [_math(final_answer(rollout.text), reference) for rollout in rollouts]


def _math(answer: str, reference: str) -> float | None:
    if not answer or len(answer) > MAX_CHARACTERS:
        return 0.0
    if _same(answer, reference):
        return 1.0
    verdict = shared_worker().verify(reference, answer)
    return None if verdict is None else float(verdict)


def _reference(task: Task) -> str:
    if task.answer is None:
        raise ValueError(f"task {task.id} has no reference answer")
    return task.answer


def _same(answer: str, reference: str) -> bool:
    return " ".join(answer.split()) == " ".join(reference.split())
