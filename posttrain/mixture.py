"""Which tasks each step of an RL stage takes: shares of the domains, curriculum, the gap to the specialists.

Every domain goes through its tasks in shuffled epochs. Shares are whole numbers of tasks by largest remainder, and
what a domain got too little of it gets in the next step. What rollouts have shown (pass_rates.py) may shift both:
`curriculum` passes over tasks whose group would have no signal, `follow_gap` gives more to domains that are behind their
specialist. Without either nothing depends on the rollouts. Next: stages/rl.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from posttrain import levels
from posttrain.config import Mix
from posttrain.domains import Domain
from posttrain.generation import sample_seed
from posttrain.pass_rates import Key, PassRates, signal_chance
from posttrain.schema import Task

Verdicts = Sequence[bool | None]
"""Whether each completion of a group passed; None = cannot be said."""


class TaskOrder:
    """The tasks of a stage, step by step."""

    def __init__(
        self,
        domains: dict[str, Domain],
        mix: Mapping[str, Mix],
        *,
        seed: int,
        group_size: int = 8,
        specialists: Mapping[str, float] | None = None,
        follow_gap: float = 0.0,
    ) -> None:
        """specialists: pass@1 of each domain's, where it is known. Raises ValueError for a level that does not load."""
        self._mix, self._group_size = mix, group_size
        self._specialists, self._follow_gap = specialists or {}, follow_gap
        self._rates = PassRates()
        self._credit = dict.fromkeys(domains, 0.0)
        self._levels = {name: levels.load(name, mix[name].level) for name in domains}
        self._streams = {
            name: _Epochs(domain, seed, lambda task, epoch: self._lets_through(task, epoch, seed))
            for name, domain in domains.items()
        }

    def step(self, num_tasks: int) -> list[tuple[Domain, Task, int]]:
        """Domain, task and epoch of the next tasks, domains together."""
        shares = self.shares()
        for name in self._credit:
            self._credit[name] += shares[name] * num_tasks
        counts = dict.fromkeys(self._credit, 0)
        for _ in range(num_tasks):  # always the domain that is most behind
            name = max(self._credit, key=lambda n: self._credit[n])
            self._credit[name] -= 1
            counts[name] += 1
        return self.more([name for name, count in counts.items() for _ in range(count)])

    def more(self, domains: Sequence[str]) -> list[tuple[Domain, Task, int]]:
        """Domain, task and epoch of the next task of each domain named."""
        return [next(self._streams[name]) for name in domains]

    def measures(self, domain: str) -> bool:
        """Whether anything depends on the domain's pass rates, so that `observe` wants its verdicts."""
        return domain in self._specialists or self._mix[domain].curriculum > 0

    def observe(self, seen: Sequence[tuple[Task, Verdicts]]) -> None:
        """Take notice of groups, all of them given out since this was last called."""
        weights = [1 / self._chance(task) for task, _ in seen]  # before any of them changes a rate
        for (task, verdicts), weight in zip(seen, weights, strict=True):
            domain, *parts = self._keys(task)
            curriculum = self._mix[task.domain].curriculum > 0  # alone asks for levels and tasks
            self._rates.add([domain, *parts] if curriculum else [domain], verdicts, weight=weight)

    def gaps(self) -> dict[str, float]:
        """How far each domain is behind its specialist: pass@1 of that one less the pass rate measured here."""
        rates = {name: self._rates.domain(name) for name in self._specialists}
        return {name: self._specialists[name] - rate for name, rate in rates.items() if rate is not None}

    def shares(self) -> dict[str, float]:
        """Share of each domain in the next step: its weight, times exp(follow_gap * gap), over the sum."""
        gaps = self.gaps()
        pull = {
            name: part.weight * math.exp(self._follow_gap * gaps.get(name, 0.0))
            for name, part in self._mix.items()
        }
        total = sum(pull.values())
        return {name: pull[name] / total for name in self._credit}

    def figures(self) -> dict[str, float]:
        """pass/, gap/ and, where it moves, share/ by domain; tasks passed over since the stage began."""
        rates = {name: self._rates.domain(name) for name in self._mix if self.measures(name)}
        figures = {f"pass/{name}": rate for name, rate in rates.items() if rate is not None}
        figures |= {f"gap/{name}": gap for name, gap in self.gaps().items()}
        if self._follow_gap:
            figures |= {f"share/{name}": share for name, share in self.shares().items()}
        if any(part.curriculum for part in self._mix.values()):
            figures["passed_over"] = float(sum(stream.passed_over for stream in self._streams.values()))
        return figures

    def state(self) -> dict[str, Any]:
        """Where the order stands, as JSON; quarantined tasks are a part of it, since they are passed over."""
        return {
            "credit": self._credit,
            "streams": {name: stream.state() for name, stream in self._streams.items()},
            "rates": self._rates.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was asked for; ValueError for that of a version which remembered less."""
        try:
            self._credit = dict(state["credit"])
            self._rates.restore(state["rates"])
            for name, stream in self._streams.items():
                stream.restore(state["streams"][name])
        except KeyError as missing:
            raise ValueError(
                f"the snapshot says nothing of {missing}: another version of posttrain wrote it; to begin the "
                "stage anew, remove its folder .partial-<stage> in the run's folder"
            ) from None

    def _lets_through(self, task: Task, epoch: int, seed: int) -> bool:
        """By a draw of the task's own, so that no generator has to be remembered."""
        if self._mix[task.domain].curriculum == 0:
            return True
        return sample_seed(seed, epoch, task.id, -1) / 2**63 < self._chance(task)

    def _chance(self, task: Task) -> float:
        strength = self._mix[task.domain].curriculum
        if strength == 0:
            return 1.0
        rate = self._rates.expected(self._keys(task))
        return 1.0 - strength * (1.0 - signal_chance(rate, self._group_size))

    def _keys(self, task: Task) -> list[Key]:
        level = self._levels[task.domain](task)
        return [("domain", task.domain), ("level", f"{task.domain} {level}"), ("task", task.id)]


class _Epochs(Iterator[tuple[Domain, Task, int]]):
    """The tasks of a domain without end, shuffled anew each epoch."""

    def __init__(self, domain: Domain, seed: int, lets_through: Callable[[Task, int], bool]) -> None:
        self._domain, self._rng = domain, Random(f"{seed}/{domain.name}")
        self._lets_through = lets_through
        self._shuffled_by = self._rng.getstate()
        self._epoch, self._next = -1, 0
        self._order: list[Task] = []
        self.passed_over = 0

    def __next__(self) -> tuple[Domain, Task, int]:
        quarantined = self._domain.rewards.quarantined
        while True:
            if self._next == len(self._order):
                self._shuffle()
            task = self._order[self._next]
            self._next += 1
            if task.id in quarantined:
                continue
            if self._lets_through(task, self._epoch):
                return self._domain, task, self._epoch
            self.passed_over += 1

    def state(self) -> dict[str, Any]:
        return {
            "rng": self._shuffled_by,
            "epoch": self._epoch,
            "next": self._next,
            "passed_over": self.passed_over,
            "quarantined": self._domain.rewards.quarantined,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._domain.rewards.quarantined.update(state["quarantined"])
        if state["epoch"] >= 0:
            self._shuffle()
        self._epoch, self._next = state["epoch"], state["next"]
        self.passed_over = state["passed_over"]

    def _shuffle(self) -> None:
        tasks, quarantined = self._domain.split.train, self._domain.rewards.quarantined
        if len(quarantined) >= len(tasks):
            raise ValueError(
                f"domain {self._domain.name!r}: every task is quarantined: {list(quarantined.values())[-1]}"
            )
        self._shuffled_by = self._rng.getstate()
        self._order = self._rng.sample(tasks, len(tasks))
        self._epoch, self._next = self._epoch + 1, 0
