"""Run a recipe on several seeds and put their figures side by side.

Each seed is an ordinary run in its own folder, so a killed benchmark continues where it was.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain import pipeline
from posttrain.config import Run

Report = dict[str, Any]
Row = dict[str, float]


def parser(text: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """Options that every benchmark over seeds has."""
    options = argparse.ArgumentParser(description=text)
    options.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    options.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    options.add_argument("--report-only", action="store_true", help="read finished runs")
    return options


def reports(cfg: Run, args: argparse.Namespace) -> dict[int, Report]:
    """report.json of each seed; runs what is not complete."""
    found = {}
    for seed in args.seeds:
        one = cfg.model_copy(update={"seed": seed, "name": f"{cfg.name}-{seed}", "out": args.out})
        if not args.report_only:
            print(f"== {one.name}", flush=True)
            pipeline.run(one)
        found[seed] = json.loads((one.path / "report.json").read_text())
    return found


def table(rows: dict[int, Row], limits: dict[str, tuple[str, Callable[[float], bool]]]) -> str:
    """One line per figure: each seed, their mean, the limit and whether all seeds keep it."""
    seeds = list(rows)
    lines = ["".join(["figure".ljust(44), *(f"seed {s}".rjust(11) for s in seeds), "mean".rjust(11)])]
    for name in rows[seeds[0]]:
        values = [rows[seed][name] for seed in seeds]
        numbers = "".join(f"{value:11.4g}" for value in [*values, statistics.mean(values)])
        limit, holds = limits.get(name, ("", lambda _: True))
        verdict = "" if not limit else ("  holds" if all(map(holds, values)) else "  DOES NOT HOLD")
        lines.append(f"{name.ljust(44)}{numbers}  {limit}{verdict}".rstrip())
    return "\n".join(lines)


def mean(evaluation: dict[str, Any], stage: str) -> float:
    """Mean pass@1 over the domains, in percent."""
    return 100 * statistics.mean(row["pass@1"] for row in evaluation[stage].values())


def write(path: Path, rows: dict[int, Row]) -> None:
    """The figures as JSON."""
    path.write_text(json.dumps({str(seed): row for seed, row in rows.items()}, indent=2) + "\n")
