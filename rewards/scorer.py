"""The rewards of a domain, added up; and what it means when one of them fails.

A failure that the candidate's text can cause (an exception, no finite number, no answer in time, a dead
worker) is put to the test: the same reward judges the task's reference answer. If it can, the candidate is
to blame and scores 0, so that no policy drops its bad samples by breaking the scorer. If it cannot, or says
itself that it is not to blame, it is asked again, and then the value is None: unscorable, counted, kept out of
the group's mean. A task whose reference answer fails twice is quarantined. Next: workers.py.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from posttrain.config import Reward
from posttrain.rewards.base import PerRollout, Verdict, is_bounded, judge, load_reward, reference_rollout
from posttrain.rewards.workers import Workers, shared_workers
from posttrain.schema import RewardFn, Rollout, Score, Task

TRIES = 2
_PASSED = 1.0 - 1e-6


@dataclass(frozen=True)
class _Part:
    """One reward, loaded."""

    name: str
    cfg: Reward
    function: RewardFn


class Scorer:
    """The rewards of a domain: parts by name and their weighted sum. Safe to use from several threads."""

    def __init__(self, rewards: Sequence[Reward], workers: Workers | None = None) -> None:
        """Load every function; raises ValueError as load_reward does."""
        names = [reward.name or reward.fn.partition(":")[2] for reward in rewards]
        self._parts = [
            _Part(reward.fn if names.count(name) > 1 else name, reward, load_reward(reward.fn, reward.args))
            for name, reward in zip(names, rewards, strict=True)
        ]
        self._workers = workers or shared_workers(0)
        self.quarantined: dict[str, str] = {}
        """Task id -> why it is not judged any more."""
        self.retried = 0
        """How many verdicts were asked for a second time."""

    def score(self, task: Task, rollouts: Sequence[Rollout]) -> tuple[Score, ...]:
        """One score per rollout; its value is None if any part is.

        No reward is asked about a rollout whose environment failed: unavailable makes it unscorable, broken by
        the policy is worth 0.
        """
        judged = [i for i, rollout in enumerate(rollouts) if rollout.stop not in ("error", "crash")]
        given = [rollouts[i] for i in judged]
        columns = {part.name: self._judge(part, task, given) if given else [] for part in self._parts}
        scores = {i: self._environment(task, rollouts[i]) for i in range(len(rollouts)) if i not in judged}
        for place, i in enumerate(judged):
            scores[i] = self._sum(task, {name: column[place] for name, column in columns.items()})
        return tuple(scores[i] for i in range(len(rollouts)))

    @property
    def width(self) -> int:
        """How many groups it can judge at the same time."""
        return self._workers.size if any(not is_bounded(p.function, None) for p in self._parts) else 1

    def passed(self, score: Score) -> bool | None:
        """Whether every part gives full marks (1); None if the score is None."""
        if score.value is None:
            return None
        return all(part is not None and part >= _PASSED for part in score.parts.values())

    def _judge(self, part: _Part, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """A verdict per rollout, failures resolved to 0 or None."""
        if task.id in self.quarantined:
            verdict = Verdict(None, "unscorable", f"is not asked: {task.id} is quarantined")
            return [verdict] * len(rollouts)
        verdicts: dict[int, Verdict] = {}
        waiting = list(range(len(rollouts)))
        reference: Verdict | None = None
        for last in (False, True):
            self.retried += len(waiting) if last else 0
            found = self._ask(part, task, [rollouts[i] for i in waiting])
            verdicts |= zip(waiting, found, strict=True)
            # A worker may die of something else; only its second death is suspicious.
            suspects = [i for i in waiting if _suspicious(verdicts[i], last=last)]
            if suspects:
                reference = self._reference(part, task, len(rollouts), verdicts)
                if reference.kind == "judged":
                    verdicts |= {i: Verdict(0.0, "blamed", verdicts[i].why) for i in suspects}
            waiting = [i for i in waiting if verdicts[i].kind not in ("judged", "blamed")]
            if not waiting:
                break
        if waiting and reference is not None and reference.kind != "judged":
            self.quarantined[task.id] = f"{part.name} {reference.why} (on the reference answer)"
        return [verdicts[i] for i in range(len(rollouts))]

    def _reference(self, part: _Part, task: Task, size: int, verdicts: Mapping[int, Verdict]) -> Verdict:
        """What the reward says of the reference answer; without one, of a neighbour that it could judge."""
        if task.answer is None:
            for verdict in verdicts.values():
                if verdict.kind == "judged":
                    return verdict
        copies = 1 if isinstance(part.function, PerRollout) else size
        return self._ask(part, task, [reference_rollout(task, i) for i in range(copies)])[0]

    def _ask(self, part: _Part, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
        if not is_bounded(part.function, task):
            return self._workers.judge(part.cfg, task, rollouts)
        found: dict[int, Verdict] = {}
        judge(part.function, task, rollouts, found.__setitem__)
        return [found[i] for i in range(len(rollouts))]

    def _environment(self, task: Task, rollout: Rollout) -> Score:
        """The score of a rollout that its environment has ended."""
        why = rollout.outcome.get(rollout.stop, "")
        if rollout.stop == "crash":
            note = f"the rollout broke its environment: {why}"
            return Score(value=0.0, parts={part.name: 0.0 for part in self._parts}, note=note, blamed=True)
        note = f"its environment was unavailable: {why} (task {task.id})"
        return Score(value=None, parts={part.name: None for part in self._parts}, note=note)

    def _sum(self, task: Task, verdicts: Mapping[str, Verdict]) -> Score:
        parts = {name: verdict.value for name, verdict in verdicts.items()}
        note = "; ".join(f"{name} {verdict.why}" for name, verdict in verdicts.items() if verdict.why)
        missing = [name for name, value in parts.items() if value is None]
        if missing:
            note = note or f"{', '.join(missing)} gave no score"
            return Score(value=None, parts=parts, note=f"{note} (task {task.id})")
        value = sum(part.cfg.weight * (parts[part.name] or 0.0) for part in self._parts)
        blamed = any(verdict.kind == "blamed" for verdict in verdicts.values())
        return Score(value=value, parts=parts, note=note, blamed=blamed)


def score_all(jobs: Sequence[tuple[Scorer, Task, Sequence[Rollout]]]) -> list[tuple[Score, ...]]:
    """The scores of many groups, in order; as many at the same time as there are workers."""
    width = max((scorer.width for scorer, _, _ in jobs), default=1)
    if width == 1:
        return [scorer.score(task, rollouts) for scorer, task, rollouts in jobs]
    with ThreadPoolExecutor(width) as threads:
        return list(threads.map(lambda job: job[0].score(job[1], job[2]), jobs))


def _suspicious(verdict: Verdict, *, last: bool) -> bool:
    return verdict.kind == "failed" or (verdict.kind == "died" and last)
