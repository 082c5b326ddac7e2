"""How far a run is, read from its folder alone. Changes nothing, so it is safe beside a driver."""

import json
from dataclasses import asdict
from pathlib import Path

from posttrain import jsonl
from posttrain.config import Run
from posttrain.ledger import Ledger
from posttrain.metrics import FILE
from posttrain.progress import duration
from posttrain.store import Store
from posttrain.table import columns
from posttrain.units import Unit, expand


def text(path: Path) -> str:
    """The state of every unit, the last step, and the count of the samples."""
    try:
        cfg = Run.model_validate_json((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no run there (config.json is missing)") from None
    store = Store(path)
    running = store.is_locked()
    lines = [f"run {cfg.name} in {path}: {'a driver is at work' if running else 'no driver'}"]
    lines.append(columns([_unit(store, unit, running=running) for unit in expand(cfg)]))
    lines.append(_last_step(path))
    counts = asdict(Ledger(path).counts(running=running))
    lines.append("samples: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    return "\n".join(lines)


def _unit(store: Store, unit: Unit, *, running: bool) -> tuple[str, str, str]:
    # Files are not hashed here: `posttrain run --dry-run` says whether they still verify.
    return f"  {unit.name}", unit.kind, _state(store, unit, running=running)


def _state(store: Store, unit: Unit, *, running: bool) -> str:
    if store.is_partial(unit.name):
        return "running" if running else "stopped in the middle"
    try:
        manifest = store.manifest(unit.name)
        summary = json.loads((store.path / unit.name / "summary.json").read_bytes())
    except (OSError, ValueError):
        broken = (store.path / unit.name).exists()
        return "broken, will be run again" if broken else "to do"
    took = duration(summary["wall_s"])
    again = f", attempt {manifest.attempt}" if manifest.attempt > 1 else ""
    return f"done in {took}, {summary['steps']} steps, {summary['tokens']} tokens{again}"


def _last_step(path: Path) -> str:
    last = None
    for row in jsonl.read(path / FILE):
        last = row
    if last is None:
        return "no step logged yet"
    values = {k: v for k, v in last.items() if k not in ("stage", "attempt", "step", "time")}
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return f"last step: {last['stage']} {last['step']} (attempt {last['attempt']}): {shown}"
