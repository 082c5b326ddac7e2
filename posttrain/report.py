"""report.json: what a run gave, gathered from its folder alone; report.html shows the same.

Works at any time, for a run that is half done or has failed too. Shares are 0..1; only names that
end in _points are hundredths. Next: report_page.py.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain import disk, forgetting, jsonl, report_page
from posttrain.config import Rl, Run, Sparse
from posttrain.intervals import Z95
from posttrain.ledger import Ledger
from posttrain.metrics import FILE
from posttrain.progress import compact, duration
from posttrain.store import Store
from posttrain.table import columns
from posttrain.units import EvaluateUnit, Unit, config_hash, expand, stage_sources

Table = dict[str, dict[str, Any]]
"""Domain -> {"pass@1", "ci95", "n", ...}."""


def write(path: Path) -> dict[str, Any]:
    """Write report.json and report.html into a run folder; returns the report."""
    report = build(path)
    disk.write_json(path / "report.json", report)
    page = report_page.page(report, list(_rows(path)))
    with disk.explain_full(path):
        aside = path / ".report.html.partial"
        aside.write_text(page, encoding="utf-8")
        aside.replace(path / "report.html")
    return report


def build(path: Path) -> dict[str, Any]:
    """The report of a run folder; one without a recipe has no stages."""
    recipe = path / "config.json"
    cfg = Run.model_validate_json(recipe.read_bytes()) if recipe.is_file() else None
    units = [] if cfg is None else _units(cfg, path)
    state = {unit["name"]: unit["state"] for unit in units}
    stages: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Table]] = {"sampled": {}, "greedy": {}}
    for unit in [] if cfg is None else expand(cfg):
        summary = _read(path / unit.name / "summary.json")
        if summary is None:
            continue
        stages.append(_stage(unit, summary, outdated=state[unit.name] == "outdated"))
        if isinstance(unit, EvaluateUnit):
            found = _read(path / unit.name / "eval.json") or {}
            for mode in tables.keys() & found.keys():
                tables[mode][unit.source] = found[mode]
    report: dict[str, Any] = {
        "run": path.name if cfg is None else cfg.name,
        "seed": None if cfg is None else cfg.seed,
        "note": "" if cfg is None else cfg.note,
        "wall_s": round(sum(stage["wall_s"] for stage in stages), 3),
        "complete": cfg is not None and all(s == "done" for s in state.values()),
        "unfinished": _unfinished(units),
        "units": units,
        "stages": stages,
        "domains": list(dict.fromkeys(d for t in tables["sampled"].values() for d in t)),
        "eval": tables["sampled"],
        "eval_greedy": tables["greedy"],
        "eval_mean": _means(tables["sampled"]),
        "eval_greedy_mean": _means(tables["greedy"]),
        # Running, because samples of a stage that was stopped are not lost: it will be run again.
        "ledger": asdict(Ledger(path).counts(running=True)),
        "peak_rss_bytes": max((s.get("peak_rss_bytes") or 0 for s in stages), default=0),
        "load": [s["load_start"] for s in stages if s.get("load_start") is not None],
    }
    report["summary"] = {} if cfg is None else _summary(cfg, report)
    both = None if cfg is None else forgetting.compare(cfg, report["eval_mean"])
    if both is not None:
        report["forgetting"] = both
    return report


def text(report: dict[str, Any]) -> str:
    """The final table for the terminal: pass@1 in percent."""
    domains = report["domains"]
    stages = [stage for stage in report["stages"] if stage["kind"] != "evaluate"]
    rows = [["stage", "kind", "time", "steps", "tokens", *domains, "mean"]]
    for stage in stages:
        table = report["eval"].get(stage["name"], {})
        numbers = [duration(stage["wall_s"]), str(stage["steps"]), compact(stage["tokens"])]
        cells = [_percent(mean_pass(table, [domain])) for domain in domains]
        means = [report[mode].get(stage["name"]) for mode in ("eval_mean", "eval_greedy_mean")]
        mean = "/".join(_percent(m["mean"]) for m in means if m is not None)
        rows.append([stage["name"], stage["kind"], *numbers, *cells, mean or "-"])
    lines = [_aligned(rows)]
    sizes = [row["n"] for t in report["eval"].values() for row in t.values() if "n" in row]
    if sizes:
        n = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        mode = "sampled at T = 1, mean also greedy" if report["eval_greedy"] else "sampled at T = 1"
        lines.append(f"pass@1 in %, {mode}, on {n} held-out tasks per domain")
    gave = [(f"  {stage['name']}", stage["gave"]) for stage in stages if stage["gave"]]
    lines += ["", columns(gave), ""] if gave else [""]
    lines += [f"{name}: {value}" for name, value in _words(report["summary"]).items()]
    if report["unfinished"]:
        lines.append(f"not finished: {report['unfinished']}")
    lines.append("samples: " + ", ".join(f"{k} {v}" for k, v in report["ledger"].items()))
    load = report["load"] or [0.0]
    lines.append(
        f"time: {duration(report['wall_s'])}; peak memory of all processes: "
        f"{report['peak_rss_bytes'] / 2**30:.2f} GiB; load at the start of the stages: "
        f"{min(load):.1f} to {max(load):.1f}"
    )
    return "\n".join(lines)


def mean_pass(table: Table, domains: Sequence[str] | None = None) -> float | None:
    """Mean pass@1 over the domains, all of the table's if none are named; None if one is missing."""
    values = [table.get(d, {}).get("pass@1") for d in (table if domains is None else domains)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _percent(share: float | None) -> str:
    """0.985 as 98.5."""
    return "-" if share is None else f"{100 * share:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns with the numbers, from the third on, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return columns([[cell if i < 2 else cell.rjust(widths[i]) for i, cell in enumerate(row)] for row in rows])


def _units(cfg: Run, path: Path) -> list[dict[str, Any]]:
    """Every unit of the recipe with its state: done, outdated, stopped or to do."""
    store = Store(path)
    attempts: dict[str, int] = {}
    logged: dict[str, int] = {}
    for row in _rows(path):
        attempts[row["stage"]] = row["attempt"]
        logged[row["stage"]] = logged.get(row["stage"], 0) + 1
    begun = {row["stage"] for row in jsonl.read(path / "ledger.jsonl") if row["event"] == "attempt"}
    states: dict[str, str] = {}
    units = []
    for unit in expand(cfg):
        state = _state(cfg, unit, store, states, attempts)
        if state == "to do" and (unit.name in begun or store.is_partial(unit.name)):
            state = "stopped"
        states[unit.name] = state
        steps = logged.get(unit.name, 0)
        units.append({"name": unit.name, "kind": unit.kind, "state": state, "steps_logged": steps})
    return units


def _unfinished(units: Sequence[Mapping[str, Any]]) -> str:
    """What is left, in words; empty if nothing is."""
    words = []
    for state in ("stopped", "outdated", "to do"):
        names = [
            f"{u['name']} after {u['steps_logged']} steps" if state == "stopped" else u["name"]
            for u in units
            if u["state"] == state
        ]
        if names:
            words.append(f"{state}: {', '.join(names)}")
    return "; ".join(words)


def _state(cfg: Run, unit: Unit, store: Store, states: Mapping[str, str], attempts: Mapping[str, int]) -> str:
    """Files are not hashed here: `posttrain run --dry-run` says whether they still verify."""
    try:
        manifest = store.manifest(unit.name)
    except ValueError:
        return "to do"
    fits = manifest.config_hash == config_hash(cfg, unit)
    newest = attempts.get(unit.name, 0) <= manifest.attempt
    sources = all(
        states[source] == "done" and manifest.parents.get(source) == store.manifest_hash(source)
        for source in stage_sources(cfg, unit)
    )
    return "done" if fits and newest and sources else "outdated"


def _stage(unit: Unit, summary: Mapping[str, Any], *, outdated: bool) -> dict[str, Any]:
    """A finished unit; what a broken or older summary lacks is zero."""
    stage = {"name": unit.name, "kind": unit.kind, "wall_s": 0.0, "steps": 0, "tokens": 0}
    stage |= {key: value for key, value in summary.items() if key != "config" and value is not None}
    figures = {k: v for k, v in (summary.get("figures") or {}).items() if v is not None}
    stage |= {"figures": figures, "outdated": outdated}
    stage["gave"] = "" if unit.kind == "evaluate" else _gave(figures)
    if isinstance(unit, Rl):
        stage["domains"] = list(unit.mix)
    return stage


def _summary(cfg: Run, report: dict[str, Any]) -> dict[str, Any]:
    """The headline figures that the stages done so far allow; points are hundredths of pass@1.

    Outdated stages are left out: a difference from them would mix two recipes.
    """
    done = {unit["name"] for unit in report["units"] if unit["state"] == "done"}
    figures = {s["name"]: s["figures"] for s in report["stages"] if s["name"] in done}
    summary: dict[str, Any] = {}
    for values in figures.values():
        for name in ("untrained_lm_gap", "lm_gap"):
            if name in values:  # of warmup, then of sparse: the later one stands
                summary[name] = values[name]
        ratios = [layer.get("recall_ratio") for layer in values.get("layers", [])]
        if any(ratio is not None for ratio in ratios):
            summary["min_recall_ratio"] = min(ratio for ratio in ratios if ratio is not None)
    bases = [s.name for s in cfg.stages if isinstance(s, Sparse) and s.attention == "sparse"]
    base = bases[0] if bases else ""
    evaluated = {name: t for name, t in report["eval"].items() if f"{name}.eval" in done}
    last = list(evaluated)[-1] if evaluated else ""
    for suffix, tables in (("", evaluated), ("_greedy", report["eval_greedy"])):
        before, after = mean_pass(tables.get(base, {})), mean_pass(tables.get(last, {}))
        if before is not None:
            summary |= {"base_stage": base, f"sparse_base{suffix}": before}
        if before is not None and after is not None and last != base:
            summary |= {"final_stage": last, f"final{suffix}": after}
            summary[f"final_minus_base{suffix}_points"] = round(100 * (after - before), 4)
    for stage in cfg.stages:
        if isinstance(stage, Rl) and len(stage.mix) == 1 and stage.source == base:
            domain = next(iter(stage.mix))
            own = mean_pass(evaluated.get(stage.name, {}), [domain])
            before = mean_pass(evaluated.get(base, {}), [domain])
            if own is not None and before is not None:
                summary[f"specialist_{domain}_points"] = round(100 * (own - before), 4)
    gaps = [values["engine/gap_mean"] for values in figures.values() if "engine/gap_mean" in values]
    if gaps:
        summary["engine_gap"] = max(gaps)
    if report["peak_rss_bytes"]:
        summary["peak_rss_bytes"] = report["peak_rss_bytes"]
    if report["load"]:
        summary |= {"load_min": min(report["load"]), "load_max": max(report["load"])}
    return summary


def _means(tables: Mapping[str, Table]) -> dict[str, dict[str, Any]]:
    """Mean over the domains of every evaluated stage, with its 95 % interval."""
    return {name: _with_interval(t) for name, t in tables.items() if mean_pass(t) is not None}


def _with_interval(table: Table) -> dict[str, Any]:
    """Normal interval: the domains are strata of fixed size."""
    mean = mean_pass(table)
    assert mean is not None, "a table without pass@1 has no mean"
    rows = [row for row in table.values() if row.get("n")]
    if len(rows) < len(table):
        return {"mean": mean, "ci95": [0.0, 1.0]}
    variance = sum(row["pass@1"] * (1 - row["pass@1"]) / row["n"] for row in rows)
    half = Z95 * math.sqrt(variance) / len(rows)
    return {"mean": mean, "ci95": [max(0.0, mean - half), min(1.0, mean + half)]}


def _gave(figures: Mapping[str, Any]) -> str:
    """What a stage says about itself, in a few words."""
    if "lm_gap" in figures:
        words = f"LM loss sparse - dense {figures['lm_gap']:+.4f}"
        if "untrained_lm_gap" in figures:
            words += f" (untrained {figures['untrained_lm_gap']:+.2f})"
        return words + (f", recall {figures['recall']:.2f}" if "recall" in figures else "")
    if {"reward_first", "reward_last"} <= figures.keys():
        return f"reward {figures['reward_first']:.2f} -> {figures['reward_last']:.2f}"
    if "rows" in figures and "loss" not in figures:
        return f"{figures['rows']} verified rows"
    if "max_logit_difference" in figures:
        return f"stock transformers differs by {figures['max_logit_difference']:.0e}"
    if "num_layers" in figures:
        return f"{figures['num_layers']} indexers added"
    return f"loss {figures['loss']:.3f}" if "loss" in figures else ""


def _words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Headline figures in words."""
    words = {}
    if "final_minus_base_points" in summary:
        greedy = summary.get("final_minus_base_greedy_points")
        words[f"{summary['final_stage']} minus {summary['base_stage']}"] = (
            f"{summary['final_minus_base_points']:+.1f} points"
            + ("" if greedy is None else f" (greedy {greedy:+.1f})")
        )
    if "engine_gap" in summary:
        words["mean |log-prob of engine - of learner|"] = f"{summary['engine_gap']:.1e}"
    return words


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the metrics: of each stage the last attempt, of each step the last row.

    A step has two rows where a stage went back to a snapshot.
    """
    rows = list(jsonl.read(path / FILE))
    newest: dict[str, int] = {}
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        newest[row["stage"]] = max(newest.get(row["stage"], 0), row["attempt"])
        last[row["stage"], row["step"]] = row
    return (
        row
        for row in rows
        if row["attempt"] == newest[row["stage"]] and row is last[row["stage"], row["step"]]
    )


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    value: dict[str, Any] = json.loads(file.read_bytes())
    return value
