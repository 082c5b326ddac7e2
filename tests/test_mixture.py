"""Shares of the domains, the curriculum and the gap to the specialists."""

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from posttrain import config, units
from posttrain.check import check
from posttrain.domains import Domain, open_domains, passed
from posttrain.mixture import TaskOrder
from posttrain.pass_rates import Key, PassRates, signal_chance
from posttrain.rollouts.fake_engine import FakeEngine
from posttrain.rollouts.request import Sampling
from posttrain.schema import Group, Rollout, Score, Task
from posttrain.stages import evaluate, rl
from posttrain.toy import tokenizer

NAMES = ("a", "b", "c")


def _run(num_tasks: int = 50, names: tuple[str, ...] = NAMES, **fields: Any) -> config.Run:
    domain = {
        "tasks": f"py://posttrain.toy.sorting:tasks?n={num_tasks}",
        "rewards": [{"fn": "posttrain.rewards.answer:exact"}],
        "num_eval": 2,
    }
    stages = [{"name": "x", "kind": "export", "source": "./x"}]
    return config.Run.model_validate(
        {"name": "t", "domains": [domain | {"name": n} for n in names], "stages": stages} | fields
    )


def _order(mix: dict[str, Any], *, num_tasks: int = 50, **options: Any) -> TaskOrder:
    parts = {name: config.Mix.model_validate(part) for name, part in mix.items()}
    return TaskOrder(open_domains(_run(num_tasks), mix), parts, seed=7, **options)


def _counts(step: list[tuple[Domain, Task, int]]) -> list[int]:
    counts = Counter(domain.name for domain, _, _ in step)
    return [counts[name] for name in NAMES]


def is_down(task: Task) -> str:
    """A level: which way to sort."""
    return "down" if "down" in task.question else "up"


def broken(task: Task) -> str:
    """A level that reads what no task has."""
    return str(task.meta["no such key"])


def _observe(order: TaskOrder, step: list[tuple[Domain, Task, int]]) -> None:
    """Down always passes, up passes half of the time."""
    order.observe([(task, [True, is_down(task) == "down"] * 4) for _, task, _ in step])


def test_quotas_are_those_of_the_largest_remainder_and_what_is_owed_is_paid() -> None:
    """Of 7 tasks 3.5, 2.1 and 1.4: 4, 2, 1 since .5 is the largest rest. Then 3.0, 2.2, 1.8 are due: 3, 2, 2."""
    order = _order({"a": {"weight": 5}, "b": {"weight": 3}, "c": {"weight": 2}})
    steps = [_counts(order.step(7)) for _ in range(10)]
    assert steps[:2] == [[4, 2, 1], [3, 2, 2]]
    assert [sum(column) for column in zip(*steps, strict=True)] == [35, 21, 14]


def test_without_a_curriculum_nothing_that_is_seen_changes_the_order() -> None:
    """The hash is that of the order before there was any curriculum."""
    orders = [_order({"a": {"weight": 2}, "b": {}, "c": {}}) for _ in range(2)]
    seen: list[list[str]] = [[], []]
    for _ in range(40):
        for order, ids in zip(orders, seen, strict=True):
            step = order.step(9)
            ids += [f"{task.id}#{epoch}" for _, task, epoch in step]
        _observe(orders[1], step)
    assert seen[0] == seen[1]
    assert hashlib.sha256(" ".join(seen[0]).encode()).hexdigest()[:16] == "e2535cf6e8eef59b"
    assert orders[0].figures() == {} and not orders[0].measures("a")


def _keys(level: str, task: str) -> list[Key]:
    return [("domain", "d"), ("level", f"d {level}"), ("task", task)]


def test_pass_rates_by_hand() -> None:
    """The example of the docstring; then a second group fades the first by 1 - 1/64 and 1 - 1/4."""
    rates = PassRates()
    assert rates.domain("d") is None and rates.expected(_keys("", "t")) == 0.5
    for task, verdicts in (("u", [True] * 30 + [False] * 2), ("t", [False] * 8)):
        rates.add(_keys(task, task), verdicts, weight=1.0)
    faded = 1 - 1 / 64
    assert rates.domain("d") == pytest.approx(30 * faded / (32 * faded + 8))
    whole = (30 * faded + 4 * 0.5) / (32 * faded + 8 + 4)
    level = (0 + 4 * whole) / 12
    assert rates.expected(_keys("t", "t")) == pytest.approx((0 + 4 * level) / 12)
    rates.add(_keys("t", "t"), [True, None, True], weight=3.0)
    level = (3 * 2 + 4 * rates.expected(_keys("other", "other"))) / (8 * faded + 3 * 2 + 4)
    assert rates.expected(_keys("t", "t")) == pytest.approx((2 + 4 * level) / (8 * 0.75 + 2 + 4))
    rates.add(_keys("t", "t"), [None], weight=1.0)
    assert rates.expected(_keys("t", "t")) == pytest.approx((2 + 4 * level) / (8 * 0.75 + 2 + 4))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_chance_of_a_signal_is_that_of_all_outcomes(size: int) -> None:
    for rate in (0.0, 0.3, 1.0):
        total = sum(
            rate ** sum(passes) * (1 - rate) ** (size - sum(passes))
            for passes in product((0, 1), repeat=size)
            if len(set(passes)) == 2
        )
        assert signal_chance(rate, size) == pytest.approx(total)


@pytest.mark.parametrize("level", [None, "test_mixture:is_down"])
def test_a_curriculum_passes_over_what_gives_no_signal(level: str | None) -> None:
    """With levels already in the first epoch; without them once the tasks were seen."""
    part = {"curriculum": 0.75, "level": level}
    order = _order({"a": part}, num_tasks=402)
    rates: list[float] = []
    epochs: dict[int, Counter[str]] = {0: Counter(), 1: Counter(), 2: Counter()}
    while True:
        step = order.step(8)
        if step[-1][2] > 2:
            break
        for _, task, epoch in step:
            epochs[epoch][is_down(task)] += 1
        _observe(order, step)
        rates.append(order.figures()["pass/a"])
    ratio = [epochs[epoch]["down"] / epochs[epoch]["up"] for epoch in epochs]
    assert ratio[0] > 0.8 if level is None else ratio[0] < 0.4
    assert ratio[2] < 0.7 if level is None else ratio[2] < 0.4
    given = sum(sum(counts.values()) for counts in epochs.values())
    num_tasks = len(step[0][0].split.train)
    assert order.figures()["passed_over"] == pytest.approx(3 * num_tasks - given, abs=8)
    # Down passes always and up half of the time: of all tasks 3/4, though far more of the chosen ones are up.
    assert sum(rates) / len(rates) == pytest.approx(0.75, abs=0.05)


def test_the_gap_moves_the_shares() -> None:
    """a is 0.4 behind, b is 0.1 ahead, c has no specialist: weights 1 exp(0.8), 2 exp(-0.2), 1."""
    mix: dict[str, Any] = {"a": {}, "b": {"weight": 2}, "c": {}}
    order = _order(mix, specialists={"a": 0.9, "b": 0.4}, follow_gap=2.0)
    assert [order.measures(name) for name in NAMES] == [True, True, False]
    assert order.gaps() == {} and order.shares() == {"a": 0.25, "b": 0.5, "c": 0.25}
    tasks = {domain.name: task for domain, task, _ in order.step(4)}
    order.observe([(tasks["a"], [True, False]), (tasks["b"], [False, True])])
    assert order.gaps() == pytest.approx({"a": 0.4, "b": -0.1})
    figures = order.figures()
    total = 2.225541 + 2 * 0.818731 + 1
    wanted = {"a": 2.225541 / total, "b": 1.637462 / total, "c": 1 / total}
    assert {n: figures[f"share/{n}"] for n in NAMES} == pytest.approx(wanted, rel=1e-6)
    assert (figures["pass/a"], figures["gap/a"]) == pytest.approx((0.5, 0.4))
    assert _counts(order.step(10)) == [5, 3, 2], "4.58, 3.37, 2.06 are due"


def test_an_order_goes_on_from_its_state() -> None:
    part = {"curriculum": 0.7, "level": "test_mixture:is_down"}
    options: dict[str, Any] = {"specialists": {"b": 0.9}, "follow_gap": 1.0}
    orders = [_order({"a": part, "b": {}, "c": {"curriculum": 0.5}}, **options) for _ in range(2)]
    for _ in range(9):
        _observe(orders[0], orders[0].step(5))
    orders[1].restore(json.loads(json.dumps(orders[0].state())))
    for _ in range(9):
        steps = [order.step(5) for order in orders]
        assert [(t.id, e) for _, t, e in steps[0]] == [(t.id, e) for _, t, e in steps[1]]
        for order, step in zip(orders, steps, strict=True):
            _observe(order, step)
    assert orders[0].state() == orders[1].state()


@pytest.mark.parametrize("part", ["rates", "passed_over"])
def test_a_snapshot_that_remembers_less_is_refused_in_one_line(part: str) -> None:
    order = _order({"a": {}})
    order.step(3)
    state = json.loads(json.dumps(order.state()))
    (state if part == "rates" else state["streams"]["a"]).pop(part)
    with pytest.raises(ValueError, match=f"the snapshot says nothing of '{part}': another version"):
        _order({"a": {}}).restore(state)


@pytest.mark.parametrize(("curriculum", "kinds"), [(0.0, ["domain"]), (0.5, ["domain", "level", "task"])])
def test_levels_and_tasks_are_counted_for_a_curriculum_only(curriculum: float, kinds: list[str]) -> None:
    order = _order({"a": {"curriculum": curriculum}}, specialists={"a": 0.9})
    _observe(order, order.step(3))
    assert [kind for kind, counts in order.state()["rates"].items() if counts] == kinds


def test_no_group_counts_more_than_four_times() -> None:
    """A task of which all is known to pass: let through with a chance of 1/4 + 3/4 of that of a signal."""
    order = _order({"a": {"curriculum": 0.75}}, num_tasks=400)
    for _ in range(40):
        step = order.step(4)
        order.observe([(task, [True] * 8) for _, task, _ in step])
    assert 3.5 < 1 / order._chance(step[0][1]) <= 4.0


def test_a_level_that_fails_is_named_with_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = _order({"a": {"curriculum": 0.5, "level": "test_mixture:broken"}})
    with pytest.raises(
        ValueError, match=r"mix\.a\.level: test_mixture:broken fails on task '.+': KeyError: 'no such"
    ):
        order.step(1)
    with pytest.raises(ValueError, match=r"mix\.a\.level 'test_mixture:nothing' does not load"):
        _order({"a": {"curriculum": 0.5, "level": "test_mixture:nothing"}})
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"test_mixture:broken fails on task"):
        check(_recipe({"a": {"curriculum": 0.5, "level": "test_mixture:broken"}}))


def test_verdicts_are_those_of_passes_where_a_domain_has_them() -> None:
    """The reward is 0.5 + exact; full marks are only asked of `passes`."""
    cfg = _run(names=("own", "same"))
    own = cfg.domain("own").model_copy(
        update={"rewards": [config.Reward(fn="test_mixture:half")], "passes": cfg.domain("own").rewards}
    )
    domains = open_domains(cfg.model_copy(update={"domains": [own, cfg.domain("same")]}))
    judged = []
    for domain in domains.values():
        task = domain.split.train[0]
        texts = [task.answer or "", "nonsense"]
        rollouts = tuple(
            Rollout(task_id=task.id, index=i, tokens=None, sampled=None, logprobs=None, text=text)  # type: ignore[arg-type]
            for i, text in enumerate(texts)
        )
        scores = tuple(domain.rewards.score(task, rollouts))
        judged.append((domain, Group(task=task, rollouts=rollouts, scores=scores)))
    assert [[score.value for score in group.scores] for _, group in judged] == [[0.5, 0.5], [1.0, 0.0]]
    assert passed(judged) == [[True, False], [True, False]]
    unscored = Group(task=judged[1][1].task, rollouts=judged[1][1].rollouts, scores=(Score(value=None),) * 2)
    assert passed([(judged[1][0], unscored)]) == [[None, None]]


def half(task: Task, rollouts: list[Rollout]) -> list[float]:
    """A reward without full marks."""
    return [0.5 for _ in rollouts]


def _recipe(mix: dict[str, Any], **fields: Any) -> config.Run:
    common = {"kind": "rl", "steps": 1, "optimizer": {"lr": 1e-4}}
    special = common | {"name": "special", "source": "./base", "mix": {"a": {}}}
    silent = special | {"name": "silent", "evaluate": False}
    mixed = common | {"name": "mixed", "source": "./base", "mix": mix} | fields
    return _run(stages=[special, silent, mixed])


def test_the_gap_reads_the_evaluation_of_the_specialist(tmp_path: Path) -> None:
    cfg = _recipe({"a": {"specialist": "special"}, "b": {}}).model_copy(update={"out": tmp_path})
    stage = cfg.stages[-1]
    assert isinstance(stage, config.Rl)
    assert units.stage_sources(cfg, stage) == ["special.eval"]
    names = [unit.name for unit in units.ancestors(cfg, units.expand(cfg), stage)]
    assert names == ["special", "special.eval"]
    (cfg.path / "special.eval").mkdir(parents=True)
    table = {"sampled": {"a": {"pass@1": 0.75}, "b": {"pass@1": 0.1}}, "greedy": {"a": {"pass@1": 0.9}}}
    (cfg.path / "special.eval" / "eval.json").write_text(json.dumps(table))
    job: Any = SimpleNamespace(cfg=cfg)
    assert rl._specialists(stage, job) == {"a": 0.75}


def test_a_specialist_that_is_followed_is_evaluated_as_rollouts_are_sampled(tmp_path: Path) -> None:
    """Else the gap would be the difference between ways to sample."""
    plain = _recipe({"a": {"specialist": "special"}, "b": {}})
    assert not any(u.as_rollouts for u in units.expand(plain) if isinstance(u, units.EvaluateUnit))
    cfg = plain.model_copy(update={"rollouts": config.Rollouts(top_p=0.9), "out": tmp_path})
    evaluated = {u.name: u for u in units.expand(cfg) if isinstance(u, units.EvaluateUnit)}
    assert {name: unit.as_rollouts for name, unit in evaluated.items()} == {
        "special.eval": True,
        "mixed.eval": False,
    }
    (cfg.path / "special.eval").mkdir(parents=True)
    table = {"sampled": {"a": {"pass@1": 0.75}}, "rollouts": {"a": {"pass@1": 0.85}}}
    (cfg.path / "special.eval" / "eval.json").write_text(json.dumps(table))
    job: Any = SimpleNamespace(cfg=cfg)
    stage = cfg.stages[-1]
    assert isinstance(stage, config.Rl) and rl._specialists(stage, job) == {"a": 0.85}


def test_an_evaluation_as_rollouts_samples_as_training_does(tmp_path: Path) -> None:
    cfg = _recipe({"a": {"specialist": "special"}}).model_copy(
        update={"rollouts": config.Rollouts(engine="fake", temperature=0.7, top_k=5)}
    )
    asked: list[Sampling] = []

    def generate(requests: Any, settings: Sampling, _: Any) -> list[Rollout]:
        asked.append(settings)
        return FakeEngine(tokenizer.build()).generate(requests, settings)

    job: Any = SimpleNamespace(
        cfg=cfg,
        out=tmp_path,
        source=lambda _: tiny.sparse_checkpoint(tmp_path / "base"),
        metrics=SimpleNamespace(expect=lambda _: None, log=lambda *_: None),
        cluster=SimpleNamespace(pool=lambda _: nullcontext(SimpleNamespace(generate=generate))),
    )
    (unit, *_) = [u for u in units.expand(cfg) if isinstance(u, units.EvaluateUnit)]
    evaluate.run(unit, job)
    table = json.loads((tmp_path / evaluate.FILE).read_text())
    assert list(table) == ["sampled", "greedy", "rollouts"] and set(table["rollouts"]) == set(NAMES)
    assert [(s.temperature, s.top_k) for s in asked] == [(1.0, 0), (0.0, 0), (0.7, 5)]


@pytest.mark.parametrize(
    ("mix", "fields", "message"),
    [
        ({"a": {"specialist": "silent"}}, {}, "specialist='silent' is not evaluated in this run"),
        ({"a": {"specialist": "./there"}}, {}, "specialist='./there' is not evaluated in this run"),
        ({"a": {"specialist": "nobody"}}, {}, "source 'nobody' is no stage"),
        ({"a": {}}, {"follow_gap": 1.0}, "follow_gap=1.0 without an evaluated specialist; set mix.DOMAIN"),
        ({"a": {"curriculum": 0.8}}, {}, "less than or equal to 0.75"),
        ({"a": {"level": "test_mixture:is_down"}}, {}, "level without a curriculum"),
    ],
)
def test_settings_that_nothing_could_follow_are_refused(mix: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _recipe(mix, **fields)
