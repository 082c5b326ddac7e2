"""The main loop: run the units of a recipe in order, skip what is complete, commit each one whole.

A killed run is continued by the same command. Left out: running independent stages side by side.
Next: units.py for what makes a unit be done again, store.py for how it is committed.
"""

import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk
from posttrain.config import Distill, Run
from posttrain.fit import check_engines
from posttrain.job import Job, Result, stage_seed
from posttrain.ledger import Ledger
from posttrain.memory import PeakMemory
from posttrain.metrics import Metrics
from posttrain.snapshots import Snapshots, newest
from posttrain.stages import STAGES, StageFailed
from posttrain.store import Origin, Store
from posttrain.table import columns
from posttrain.units import (
    EvaluateUnit,
    Unit,
    ancestors,
    changed,
    check_outside,
    config_hash,
    depends_on,
    expand,
    parents,
    select,
    stage_sources,
)

if TYPE_CHECKING:  # imported in _cluster
    from posttrain.cluster import Cluster

SUMMARY = "summary.json"
_SPARE_BYTES = 16 << 20  # for metrics, ledger, report and a stage's small files


@dataclass(frozen=True, kw_only=True, slots=True)
class _Driver:
    """What the whole run shares."""

    cfg: Run
    store: Store
    metrics: Metrics
    ledger: Ledger


def run(cfg: Run, *, only: str | None = None, until: str | None = None, dry_run: bool = False) -> None:
    """Run the recipe, or the part that `only` or `until` name; with dry_run print what would run.

    Raises ValueError for a request that does not fit, StageFailed when a stage cannot go on;
    anything else is a bug and passes through.
    """
    # Absolute, because actors may work in other directories.
    cfg = cfg.model_copy(update={"out": cfg.out.resolve()})
    every = expand(cfg)
    units = select(every, only=only, until=until)
    check_outside(cfg, units)
    check_engines(cfg)
    store = Store(cfg.path)
    if dry_run:
        above = ancestors(cfg, every, units[0]) if only is not None else []
        print(_table(_plan(cfg, [*above, *units], store), units))
        return
    with (
        store.lock(),
        Metrics(cfg.path) as metrics,
        closing(Ledger(cfg.path)) as ledger,
    ):
        driver = _Driver(cfg=cfg, store=store, metrics=metrics, ledger=ledger)
        if only is not None:
            _need_sources(driver, every, units[0])
        disk.write_json(cfg.path / "config.json", cfg.model_dump(mode="json"))
        try:
            _run_units(driver, units)
        except BaseException:
            _report_after_failure(driver)
            raise
        _report(cfg.path)


def _run_units(driver: _Driver, units: Sequence[Unit]) -> None:
    with ExitStack() as stack:
        cluster: Cluster | None = None
        for unit in units:
            why = _why(driver.cfg, unit, driver.store)
            if why is None:
                # A driver killed between the commit and its ledger line left the line to us.
                attempt = driver.store.manifest(unit.name).attempt
                driver.ledger.committed(unit.name, attempt)
                driver.metrics.say(f"{unit.name}: complete, skipped")
                continue
            if (driver.store.path / unit.name).exists() or driver.store.is_partial(unit.name):
                driver.metrics.say(f"{unit.name}: running again: {why}")
            driver.store.require_space(_space(driver, unit))
            if cluster is None:
                cluster = stack.enter_context(_cluster(driver.cfg, driver.metrics.say))
            _run_unit(driver, unit, cluster)


def _run_unit(driver: _Driver, unit: Unit, cluster: "Cluster") -> None:
    cfg, store, metrics = driver.cfg, driver.store, driver.metrics
    cluster.backends.clear()
    origin = Origin(
        stage=unit.name,
        kind=unit.kind,
        config_hash=config_hash(cfg, unit),
        parents=parents(cfg, unit, store),
    )
    last = newest(store.partial_path(unit.name), origin, metrics.say)
    if last is None:
        ledger, out = driver.ledger.begin(unit.name), store.partial(unit.name)
    else:
        metrics.say(f"{unit.name}: going on after step {last.step}, from its snapshot")
        ledger, out = (
            driver.ledger.resume(unit.name, last.attempt, last.step),
            store.partial_path(unit.name),
        )
    snapshots = Snapshots(cfg.snapshots, out, origin, ledger, last)
    job = Job(
        cfg=cfg,
        name=unit.name,
        out=out,
        cluster=cluster,
        metrics=metrics,
        ledger=ledger,
        snapshots=snapshots,
        seed=stage_seed(cfg.seed, unit.name),
    )
    try:
        steps = getattr(unit, "steps", 0)
        with metrics.stage(unit.name, unit.kind, ledger.attempt, steps, done=snapshots.first_step):
            began, load = time.monotonic(), os.getloadavg()[0]
            with PeakMemory() as peak:
                result = _function(unit.kind)(unit, job)
            metrics.result(result.figures)
            wall_s = time.monotonic() - began
            summary = _summary(unit, result, wall_s=wall_s, load_start=load, peak=peak.bytes)
            notes: dict[str, Any] = {"first_step": snapshots.first_step}
            notes |= {"backends": dict(cluster.backends), "config": depends_on(cfg, unit)}
            disk.write_json(out / SUMMARY, summary | notes)
            store.commit(origin, ledger.attempt)
    except BaseException as error:
        line = _explain(error, store.path)
        if not snapshots.exist:
            store.discard(unit.name)
        if line is None:
            raise
        raise StageFailed(f"stage {unit.name} failed: {line}") from error
    driver.ledger.committed(unit.name, ledger.attempt)


def _summary(unit: Unit, result: Result, *, wall_s: float, load_start: float, peak: int) -> dict[str, Any]:
    return {
        "name": unit.name,
        "kind": unit.kind,
        "wall_s": round(wall_s, 3),
        "steps": result.steps,
        "tokens": result.tokens,
        "figures": result.figures,
        "load_start": round(load_start, 2),
        "load_end": round(os.getloadavg()[0], 2),
        "peak_rss_bytes": peak,
    }


def _explain(error: BaseException, folder: Path) -> str | None:
    """What the user is told instead of a traceback; None for a bug, which keeps its traceback."""
    if disk.is_full(error, folder):
        return str(error) if isinstance(error, disk.DiskFull) else str(disk.full(folder))
    # Ray wraps the error of an actor and prints a whole traceback as its text; the error is inside.
    told = getattr(error, "cause", None) or error
    if not isinstance(told, ValueError | OSError | FloatingPointError):
        return None
    note = folder / "traceback.txt"
    with suppress(OSError):
        note.write_text("".join(traceback.format_exception(error)))
    return f"{told} (traceback in {note})"


def _why(cfg: Run, unit: Unit, store: Store) -> str | None:
    """Why a unit has to run; None if it is complete. Its sources must be complete."""
    why = store.why_redo(unit.name, config_hash(cfg, unit), parents(cfg, unit, store))
    if why != "its config changed":
        return why
    try:
        old = json.loads((store.path / unit.name / SUMMARY).read_bytes())["config"]
    except (OSError, ValueError, KeyError):
        return why
    return f"{why}: {changed(old, depends_on(cfg, unit))}"


def _plan(cfg: Run, units: Sequence[Unit], store: Store) -> dict[str, str | None]:
    """Each unit's name and why it would run, in order; None = complete."""
    plan: dict[str, str | None] = {}
    for unit in units:
        stale = [source for source in stage_sources(cfg, unit) if plan[source] is not None]
        plan[unit.name] = f"source {stale[0]} is to do" if stale else _why(cfg, unit, store)
    return plan


def _table(plan: dict[str, str | None], units: Sequence[Unit]) -> str:
    rows = [("unit", "kind", "state", "why")]
    for unit in units:
        why = plan[unit.name]
        rows.append((unit.name, unit.kind, "done" if why is None else "to do", why or ""))
    return columns(rows)


def _need_sources(driver: _Driver, every: Sequence[Unit], unit: Unit) -> None:
    plan = _plan(driver.cfg, ancestors(driver.cfg, every, unit), driver.store)
    for source in stage_sources(driver.cfg, unit):
        if plan[source] is not None:
            raise ValueError(
                f"--only {unit.name}: its source {source!r} is not complete ({plan[source]}); "
                f"run with --until {source} first"
            )


def _space(driver: _Driver, unit: Unit) -> int:
    """Bytes a unit needs at the least: most stages write a checkpoint like the one they read."""
    names = stage_sources(driver.cfg, unit)
    if isinstance(unit, EvaluateUnit | Distill) or not names:
        return _SPARE_BYTES
    return _SPARE_BYTES + sum(f.size for f in driver.store.manifest(names[0]).files)


def _function(kind: str) -> Callable[[Unit, Job], Result]:
    module, _, name = STAGES[kind].partition(":")
    function: Callable[[Unit, Job], Result] = getattr(importlib.import_module(module), name)
    return function


def _cluster(cfg: Run, say: Callable[[str], None]) -> "AbstractContextManager[Cluster]":
    # Heavy: it imports Ray, and a run that is complete does without.
    from posttrain.cluster import Cluster

    return Cluster(cfg, say)


def _report(path: Path, *, show: bool = True) -> None:
    from posttrain import report  # last: a run spends its time elsewhere

    written = report.write(path)
    if show:
        print(f"\n{report.text(written)}\nreport: {path / 'report.html'}", flush=True)


def _report_after_failure(driver: _Driver) -> None:
    try:
        _report(driver.cfg.path, show=False)
    except Exception as error:  # the failure that brought us here is the one to show
        driver.metrics.say(f"no report could be written: {type(error).__name__}: {error}")
