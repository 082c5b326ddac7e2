"""The outcome of a task with tool calls."""

from posttrain.rewards.base import bounded, final_answer, per_rollout
from posttrain.schema import Rollout, Task


@bounded
@per_rollout
def outcome(task: Task, rollout: Rollout) -> float:
    """1 if the last turn gives the reference answer after at least meta["min_calls"] tool results.

    Guessing does not count, and neither does an answer that was cut off.
    """
    turns = [m for m in rollout.messages if m["role"] == "assistant"]
    calls = sum(m["role"] == "tool" for m in rollout.messages)
    if rollout.stop != "eos" or not turns or calls < task.meta.get("min_calls", 0):
        return 0.0
    answer = final_answer(turns[-1]["content"])
    return float(bool(answer) and task.answer is not None and answer == task.answer.strip())
