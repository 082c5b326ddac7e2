"""The outcome of a task with tool calls: an answer, or the state that the calls have left behind."""

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


@bounded
@per_rollout
def state(task: Task, rollout: Rollout) -> float:
    """1 if the episode ended by itself in the state meta["goal"], which its environment reports as "state"."""
    if "goal" not in task.meta:
        raise ValueError(f"task {task.id} has no goal (the wanted state in meta)")
    return float(rollout.stop == "eos" and rollout.outcome.get("state") == task.meta["goal"])
