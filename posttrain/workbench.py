"""`posttrain reward`: what a reward says of saved rollouts, and what a change to it changes. No torch, no GPU.

Every reward is called as in a run, in its worker and under its deadline, so that what would be unscorable or blamed there is
so here. Next: rollout_file.py, ../rewards/scorer.py.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config import Reward
from posttrain.rewards.scorer import Scorer
from posttrain.rollout_file import Saved
from posttrain.schema import Score, Task
from posttrain.table import columns
from posttrain.tasks import load_tasks

SAVED = "saved"
"""Name of the reward that a file holds already."""
BINS = 10
BAR = 40
_EXCERPT = 160
_EQUAL = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What one reward says of every rollout, in order."""

    name: str
    scores: tuple[Score, ...]
    seconds: tuple[float, ...]
    """Per rollout; the time of its group, shared out."""


def attach(saved: Sequence[Saved], uris: Iterable[str], *, seed: int) -> list[tuple[Task, Saved]]:
    """The rollouts with their tasks, those of a task together; sources are read only as far as needed.

    Raises ValueError if no rollout belongs to a task of the sources.
    """
    by_hash: dict[str, list[Saved]] = defaultdict(list)
    for one in saved:
        by_hash[one.rollout.task_id.rpartition("/")[2]].append(one)
    found: list[tuple[Task, Saved]] = []
    wanted = dict(by_hash)
    for uri in uris:
        for task in load_tasks(uri, domain="any", seed=seed):
            for one in wanted.pop(task.id.rpartition("/")[2], ()):
                found.append((replace(task, id=one.rollout.task_id, domain=one.domain), one))
            if not wanted:
                break
    if not found:
        raise ValueError(
            f"none of the {len(saved)} rollouts belongs to a task of {', '.join(uris)}; "
            "give the source and the seed of the run that made them"
        )
    return found


def judge(reward: Reward, pairs: Sequence[tuple[Task, Saved]]) -> Judged:
    """Call a reward on every group; raises ValueError if it does not load."""
    scorer = Scorer([reward])
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (task, one) in enumerate(pairs):
        groups[f"{task.id} {one.rollout.policy_version}"].append(i)

    def score(places: Sequence[int]) -> tuple[tuple[Score, ...], float]:
        began = time.perf_counter()
        scores = scorer.score(pairs[places[0]][0], [pairs[i][1].rollout for i in places])
        return scores, (time.perf_counter() - began) / len(places)

    scores: dict[int, Score] = {}
    seconds: dict[int, float] = {}
    with ThreadPoolExecutor(scorer.width) as threads:
        for places, (found, each) in zip(groups.values(), threads.map(score, groups.values()), strict=True):
            scores |= zip(places, found, strict=True)
            seconds |= dict.fromkeys(places, each)
    order = range(len(pairs))
    name = reward.name or reward.fn.partition(":")[2]
    return Judged(name=name, scores=tuple(scores[i] for i in order), seconds=tuple(seconds[i] for i in order))


def saved_scores(pairs: Sequence[tuple[Task, Saved]]) -> Judged:
    """The scores that the file holds."""
    return Judged(name=SAVED, scores=tuple(one.score for _, one in pairs), seconds=(0.0,) * len(pairs))


def report(
    pairs: Sequence[tuple[Task, Saved]],
    rewards: Sequence[Judged],
    *,
    num_rollouts: int,
    other: Judged | None,
    show: int,
) -> str:
    """Tables, histograms, reasons and, against another reward, the rollouts whose value changed."""
    num_groups = len({task.id for task, _ in pairs})
    head = f"{len(pairs)} rollouts of {num_groups} tasks"
    if num_rollouts > len(pairs):
        head += f"; {num_rollouts - len(pairs)} rollouts left out, since their tasks are not in the sources"
    parts = [head, _table(pairs, [*rewards, *([other] if other else [])])]
    parts += [text for reward in rewards for text in (_histogram(reward), _reasons(reward)) if text]
    if other is not None:
        parts.append(_changes(pairs, rewards[0], other, show))
    return "\n\n".join(parts)


def as_json(pairs: Sequence[tuple[Task, Saved]], rewards: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row per rollout and reward, for machines."""
    return [
        {
            "task_id": task.id,
            "index": one.rollout.index,
            "domain": task.domain,
            "reward": reward.name,
            "value": score.value,
            "note": score.note,
            "seconds": seconds,
        }
        for reward in rewards
        for (task, one), score, seconds in zip(pairs, reward.scores, reward.seconds, strict=True)
    ]


def _table(pairs: Sequence[tuple[Task, Saved]], rewards: Sequence[Judged]) -> str:
    title = (
        "domain",
        "reward",
        "n",
        "mean",
        "std",
        "min",
        "max",
        "zero",
        "full",
        "none",
        "blamed",
        "signal",
        "ms",
    )
    rows: list[tuple[str, ...]] = [title]
    for domain in sorted({task.domain for task, _ in pairs}):
        places = [i for i, (task, _) in enumerate(pairs) if task.domain == domain]
        rows += [_row(domain, reward, places, pairs) for reward in rewards]
    legend = (
        "zero, full: share of 0 and of 1; none: unscorable; blamed: 0 for breaking the reward; "
        "signal: share of groups with two different values; ms: per rollout"
    )
    return f"{columns(rows)}\n{legend}"


def _row(
    domain: str, reward: Judged, places: Sequence[int], pairs: Sequence[tuple[Task, Saved]]
) -> tuple[str, ...]:
    known = [value for i in places if (value := reward.scores[i].value) is not None]
    groups: dict[str, set[float]] = defaultdict(set)
    for i in places:
        value = reward.scores[i].value
        if value is not None:
            groups[pairs[i][0].id].add(value)
    counts = (str(len(places) - len(known)), str(sum(reward.scores[i].blamed for i in places)))
    if not known:
        return (domain, reward.name, str(len(places)), *["-"] * 6, *counts, "-", _ms(reward, places))
    figures = (statistics.mean(known), statistics.pstdev(known), min(known), max(known))
    shares = (
        sum(abs(v) < _EQUAL for v in known) / len(known),
        sum(abs(v - 1) < _EQUAL for v in known) / len(known),
    )
    signal = sum(len(values) > 1 for values in groups.values()) / len(groups)
    return (
        domain,
        reward.name,
        str(len(places)),
        *(f"{figure:.3f}" for figure in figures),
        *(f"{share:.0%}" for share in shares),
        *counts,
        f"{signal:.0%}",
        _ms(reward, places),
    )


def _ms(reward: Judged, places: Sequence[int]) -> str:
    mean = statistics.mean(reward.seconds[i] for i in places)
    return "-" if reward.name == SAVED else f"{1000 * mean:.2f}"


def _histogram(reward: Judged) -> str:
    """A bar per value where there are few, else per tenth of the range."""
    known = [score.value for score in reward.scores if score.value is not None]
    if not known:
        return ""
    counts = Counter(known)
    title = "values"
    if len(counts) > BINS:
        low, width = min(known), (max(known) - min(known)) / BINS
        places = Counter(min(BINS - 1, int((value - low) / width)) for value in known)
        counts = Counter({low + i * width: places[i] for i in range(BINS)})
        title = "values from"
    most = max(counts.values())
    rows = [(f"{value:.3f}", str(n), "#" * -(-BAR * n // most)) for value, n in sorted(counts.items())]
    return f"{reward.name}, {title}\n{columns(rows)}"


def _reasons(reward: Judged) -> str:
    """Why rollouts are unscorable or blamed, the commonest first; the task's id is left out, or all would differ."""
    notes = Counter(
        ("unscorable" if score.value is None else "blamed", score.note.partition(" (task ")[0])
        for score in reward.scores
        if score.value is None or score.blamed
    )
    lines = [
        f"{count:6}  {kind}: {note or 'no reason given'}" for (kind, note), count in notes.most_common(10)
    ]
    return "\n".join([f"{reward.name}, not judged on their merits:", *lines]) if lines else ""


def _changes(pairs: Sequence[tuple[Task, Saved]], new: Judged, old: Judged, show: int) -> str:
    """The rollouts that two rewards value differently, the largest change first."""
    changed = [
        (_gap(a.value, b.value), i)
        for i, (a, b) in enumerate(zip(new.scores, old.scores, strict=True))
        if _gap(a.value, b.value) > _EQUAL
    ]
    changed.sort(key=lambda pair: (-pair[0], pair[1]))
    ups = sum((new.scores[i].value or 0) > (old.scores[i].value or 0) for _, i in changed)
    lines = [
        f"{old.name} -> {new.name}: {len(changed)} of {len(pairs)} rollouts change, {ups} of them upwards"
    ]
    for _, i in changed[:show]:
        task, one = pairs[i]
        values = f"{_number(old.scores[i].value)} -> {_number(new.scores[i].value)}"
        lines.append(
            f"\n{task.id} [{one.rollout.index}]  {values}  reference: {_excerpt(task.answer or '-')}"
        )
        lines.append(f"    asked: {_excerpt(task.question)}")
        lines.append(f"    wrote: {_excerpt(one.rollout.text)}")
        if new.scores[i].note:
            lines.append(f"    note:  {_excerpt(new.scores[i].note)}")
    if len(changed) > show:
        lines.append(f"\n... and {len(changed) - show} more (--show)")
    return "\n".join(lines)


def _gap(a: float | None, b: float | None) -> float:
    """How far two values are apart; None is farther from a number than numbers are."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _excerpt(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= _EXCERPT else f"{line[: _EXCERPT // 2]} ... {line[-_EXCERPT // 2 :]}"
