"""Pass rates as rollouts measure them: of a domain, of a level of difficulty, of a task; the latest count most.

A task that was seen seldom is taken for one of its level, and that for one of its domain. Next: mixture.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Key = tuple[str, str]
""""domain", "level" or "task", and which."""
_MEMORY = {"domain": 64.0, "level": 64.0, "task": 4.0}
"""Groups after which a count has faded to 1/e: the policy moves, and a task comes back once an epoch."""
_PRIOR = 4.0
"""Completions that the rate of the whole is worth against those seen of a part."""


class PassRates:
    """Fading counts by domain, level and task."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, list[float]]] = {kind: {} for kind in _MEMORY}

    def add(self, keys: Sequence[Key], verdicts: Sequence[bool | None], *, weight: float) -> None:
        """Count a group under all of the keys; None, what could not be judged, does not count.

        weight: 1 / the chance with which the task was let through, so that rates of domain and level are those of all
        tasks and not of the chosen ones. At most 4 (config.Mix.curriculum), so that no group sways a rate.
        """
        known = [verdict for verdict in verdicts if verdict is not None]
        if not known:
            return
        for kind, key in keys:
            count = self._counts[kind].setdefault(key, [0.0, 0.0])
            factor = 1.0 if kind == "task" else weight
            for i, new in enumerate((sum(known), len(known))):
                count[i] = count[i] * (1 - 1 / _MEMORY[kind]) + factor * new

    def domain(self, name: str) -> float | None:
        """The domain's pass rate; None before anything was seen of it."""
        passed, total = self._counts["domain"].get(name, (0.0, 0.0))
        return passed / total if total else None

    def expected(self, keys: Sequence[Key]) -> float:
        """What to expect of a task with these keys, from the whole to the part.

        Example: of the domain 30 of 40 passed, of the level nothing was seen, of the task 0 of 8:
        domain (30 + 4 / 2) / 44, level the same, task (0 + 4 * 0.727) / 12 = 0.24.
        """
        rate = 0.5
        for kind, key in keys:
            passed, total = self._counts[kind].get(key, (0.0, 0.0))
            rate = (passed + _PRIOR * rate) / (total + _PRIOR)
        return rate

    def state(self) -> dict[str, Any]:
        """All counts, as JSON."""
        return self._counts

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was asked for."""
        self._counts = {kind: {key: list(c) for key, c in state[kind].items()} for kind in _MEMORY}


def signal_chance(rate: float, group_size: int) -> float:
    """The chance that the completions of a group do not all pass and do not all fail: 1 - p^G - (1 - p)^G."""
    return 1.0 - rate**group_size - (1.0 - rate) ** group_size
