"""report.json: what a run gave, gathered from its folder alone; report.html shows the same.

Works at any time, for a run that is half done or has failed too. Next: report_page.py.
"""

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain import disk, jsonl, report_page
from posttrain.config import Rl, Run, Sparse
from posttrain.intervals import Z95
from posttrain.ledger import Ledger
from posttrain.metrics import FILE
from posttrain.progress import duration
from posttrain.table import columns
from posttrain.units import EvaluateUnit, expand

Table = dict[str, dict[str, Any]]
"""Domain -> {"pass@1", "ci95", "n", ...}."""


def write(path: Path) -> dict[str, Any]:
    """Write report.json and report.html into a run folder; returns the report."""
    report = build(path)
    disk.write_json(path / "report.json", report)
    page = report_page.page(report, _curves(path))
    with disk.explain_full(path):
        aside = path / ".report.html.partial"
        aside.write_text(page, encoding="utf-8")
        aside.replace(path / "report.html")
    return report


def build(path: Path) -> dict[str, Any]:
    """The report of a run folder."""
    cfg = Run.model_validate_json((path / "config.json").read_bytes())
    stages: list[dict[str, Any]] = []
    sampled: dict[str, Table] = {}
    greedy: dict[str, Table] = {}
    for unit in expand(cfg):
        summary = _read(path / unit.name / "summary.json")
        if summary is None:
            continue
        stages.append({name: value for name, value in summary.items() if name != "config"})
        table = _read(path / unit.name / "eval.json")
        if isinstance(unit, EvaluateUnit) and table is not None:
            sampled[unit.source] = table["sampled"]
            if "greedy" in table:
                greedy[unit.source] = table["greedy"]
    done = {stage["name"] for stage in stages}
    report: dict[str, Any] = {
        "run": cfg.name,
        "seed": cfg.seed,
        "wall_s": round(sum(stage["wall_s"] for stage in stages), 3),
        "complete": all(unit.name in done for unit in expand(cfg)),
        "stages": stages,
        "eval": sampled,
        "eval_greedy": greedy,
        "ledger": asdict(Ledger(path).counts()),
        "peak_rss_bytes": max((s.get("peak_rss_bytes", 0) for s in stages), default=0),
        "load": [stage["load_start"] for stage in stages],
    }
    report["summary"] = _summary(cfg, report)
    forgetting = _forgetting(cfg, report)
    if forgetting is not None:
        report["forgetting"] = forgetting
    return report


def text(report: dict[str, Any]) -> str:
    """The final table for the terminal: pass@1 in percent, sampled / greedy."""
    domains = sorted({domain for table in report["eval"].values() for domain in table})
    rows = [("stage", "time", *domains, "mean", "what it gave")]
    for stage in report["stages"]:
        if stage["kind"] == "evaluate":
            continue
        cells = [_cell(report, stage["name"], [domain]) for domain in domains]
        mean = _cell(report, stage["name"], domains) if domains else ""
        rows.append((stage["name"], duration(stage["wall_s"]), *cells, mean, _gave(stage)))
    ledger = report["ledger"]
    lines = [columns(rows), ""]
    if report["eval"]:
        first = next(iter(next(iter(report["eval"].values())).values()))
        lines.append(
            f"pass@1 in %, sampled at T = 1 / greedy, on {first['n']} held-out tasks per domain"
        )
    lines += [f"{name}: {value}" for name, value in _words(report["summary"]).items()]
    lines.append("samples: " + ", ".join(f"{name} {number}" for name, number in ledger.items()))
    lines.append(
        f"time: {duration(report['wall_s'])}; peak memory of all processes: "
        f"{report['peak_rss_bytes'] / 2**30:.2f} GiB; load at the start of the stages: "
        f"{min(report['load'], default=0):.1f} to {max(report['load'], default=0):.1f}"
    )
    return "\n".join(lines)


def mean_pass(table: Table) -> float:
    """Mean pass@1 over the domains."""
    return statistics.fmean(row["pass@1"] for row in table.values())


def _summary(cfg: Run, report: dict[str, Any]) -> dict[str, float]:
    """The headline figures that the stages done so far allow; points are hundredths of pass@1."""
    figures = {stage["name"]: stage["figures"] for stage in report["stages"]}
    summary: dict[str, float] = {}
    for values in figures.values():
        for name in ("untrained_lm_gap", "lm_gap", "recall"):
            if name in values:  # of warmup, then of sparse: the later one stands
                summary[name] = values[name]
    base = next((s.name for s in cfg.stages if isinstance(s, Sparse)), None)
    tables = {"": report["eval"], "_greedy": report["eval_greedy"]}
    for suffix, evaluated in tables.items():
        if base not in evaluated:
            continue
        summary[f"sparse_base{suffix}"] = mean_pass(evaluated[base])
        last = list(evaluated)[-1]
        if last != base:
            gain = mean_pass(evaluated[last]) - mean_pass(evaluated[base])
            summary[f"final{suffix}"] = mean_pass(evaluated[last])
            summary[f"final_minus_base{suffix}_points"] = 100 * gain
    for stage in cfg.stages:
        if isinstance(stage, Rl) and len(stage.mix) == 1 and stage.source == base:
            domain = next(iter(stage.mix))
            evaluated = report["eval"]
            if stage.name in evaluated and base in evaluated:
                gain = evaluated[stage.name][domain]["pass@1"] - evaluated[base][domain]["pass@1"]
                summary[f"specialist_{domain}_points"] = 100 * gain
    gaps = [values["logprob_gap"] for values in figures.values() if "logprob_gap" in values]
    if gaps:
        summary["logprob_gap"] = max(gaps)
    return summary


def _forgetting(cfg: Run, report: dict[str, Any]) -> dict[str, Any] | None:
    """Domains trained one after another against all together, where a recipe has both arms."""
    rl = {stage.name: stage for stage in cfg.stages if isinstance(stage, Rl)}
    chain = [n for n, s in rl.items() if s.source in rl and len(s.mix) == 1 and len(rl[s.source].mix) == 1]
    mixed = [n for n, s in rl.items() if len(s.mix) > 1 and s.source not in rl]
    if not chain or len(mixed) != 1:
        return None
    names = [chain[-1]]
    while rl[names[0]].source in rl:
        names.insert(0, rl[names[0]].source)
    if any(name not in report["eval"] for name in (*names, mixed[0])):
        return None
    return {
        "sequence": names,
        "together": mixed[0],
        "rollouts_sequence": sum(_rollouts(rl[name]) for name in names),
        "rollouts_together": _rollouts(rl[mixed[0]]),
        "sequence_pass": _with_interval(report["eval"][names[-1]]),
        "together_pass": _with_interval(report["eval"][mixed[0]]),
    }


def _rollouts(stage: Rl) -> int:
    return stage.steps * stage.tasks_per_step * stage.group_size


def _with_interval(table: Table) -> dict[str, Any]:
    """Mean over the domains with its 95 % interval: domains are strata of fixed size."""
    mean = mean_pass(table)
    variance = sum(row["pass@1"] * (1 - row["pass@1"]) / row["n"] for row in table.values())
    half = Z95 * math.sqrt(variance) / len(table)
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def _cell(report: dict[str, Any], stage: str, domains: list[str]) -> str:
    if stage not in report["eval"]:
        return "-"
    tables = [report["eval"].get(stage), report["eval_greedy"].get(stage)]
    return "/".join(
        f"{100 * statistics.fmean(table[domain]['pass@1'] for domain in domains):.0f}"
        for table in tables
        if table is not None
    )


def _gave(stage: dict[str, Any]) -> str:
    """What a stage says about itself, in a few words."""
    figures = stage["figures"]
    if "lm_gap" in figures:
        gap = f"LM loss sparse - dense {figures['lm_gap']:+.4f}, recall {figures['recall']:.2f}"
        before = figures.get("untrained_lm_gap")
        return gap if before is None else f"{gap} (untrained {before:+.2f})"
    if "reward_last" in figures:
        return f"reward {figures['reward_first']:.2f} -> {figures['reward_last']:.2f}"
    if "rows" in figures and "loss" not in figures:
        return f"{figures['rows']} verified rows"
    if "max_logit_difference" in figures:
        return f"stock transformers differs by {figures['max_logit_difference']:.0e}"
    if "num_layers" in figures:
        return f"{figures['num_layers']} indexers added"
    return f"loss {figures['loss']:.3f}" if "loss" in figures else ""


def _words(summary: dict[str, float]) -> dict[str, str]:
    """Headline figures in words."""
    words = {}
    if "final_minus_base_points" in summary:
        greedy = summary.get("final_minus_base_greedy_points")
        words["final checkpoint minus sparse base"] = (
            f"{summary['final_minus_base_points']:+.1f} points"
            + ("" if greedy is None else f" (greedy {greedy:+.1f})")
        )
    if "logprob_gap" in summary:
        words["mean |log-prob of engine - of learner|"] = f"{summary['logprob_gap']:.1e}"
    return words


def _curves(path: Path) -> list[dict[str, Any]]:
    """The rows of the metrics, the last attempt of each stage."""
    rows = list(jsonl.read(path / FILE))
    newest: dict[str, int] = {}
    for row in rows:
        newest[row["stage"]] = max(newest.get(row["stage"], 0), row["attempt"])
    return [row for row in rows if row["attempt"] == newest[row["stage"]]]


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    value: dict[str, Any] = json.loads(file.read_bytes())
    return value
