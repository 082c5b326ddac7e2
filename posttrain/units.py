"""The units of work of a run: its stages, and an evaluation after each stage that asks for one.

A unit is done again when something it depends on has changed: its own config, the parts of the run
it reads, the output of its sources, the files it reads from outside. Next: pipeline.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain import config, graph
from posttrain.config import Distill, Pretrain, Rl, Run, Sft, Sparse, Stage, Warmup
from posttrain.store import MANIFEST, Store, file_hash

_SMALL = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateUnit:
    """pass@1 of one stage's checkpoint on the held-out tasks of every domain."""

    name: str
    """"<stage>.eval"."""
    source: str
    as_rollouts: bool = False
    """Also sample as training does, which is not at temperature 1 from everything: a later stage measures its gap to
    this one, and the two must be the same quantity."""
    kind: Literal["evaluate"] = "evaluate"


Unit = Stage | EvaluateUnit


def expand(cfg: Run) -> list[Unit]:
    """The stages in order, each followed by its evaluation (none if there are no domains)."""
    units: list[Unit] = []
    rl = [stage for stage in cfg.stages if isinstance(stage, Rl)]
    followed = {name for stage in rl for name in graph.measured_specialists(cfg, stage).values()}
    for stage in cfg.stages:
        units.append(stage)
        if stage.evaluate and cfg.domains:
            as_rollouts = stage.name in followed and not cfg.rollouts.plain
            units.append(EvaluateUnit(name=f"{stage.name}.eval", source=stage.name, as_rollouts=as_rollouts))
    return units


def select(units: Sequence[Unit], *, only: str | None, until: str | None) -> list[Unit]:
    """The units that --only or --until leave; an evaluation goes with its stage."""
    if only is not None and until is not None:
        raise ValueError(f"--only {only} --until {until}: give one of the two")
    names = [unit.name for unit in units]
    for flag, name in (("--only", only), ("--until", until)):
        if name is not None and name not in names:
            raise ValueError(f"{flag} {name}: no such stage; the stages are {', '.join(names)}")
    if only is not None:
        return [unit for unit in units if unit.name in (only, f"{only}.eval")]
    if until is not None:
        last = f"{until}.eval" if f"{until}.eval" in names else until
        return list(units[: names.index(last) + 1])
    return list(units)


def stage_sources(cfg: Run, unit: Unit) -> list[str]:
    """Names of the stages whose output a unit reads: its sources, then the judges of its domains, then the
    evaluations of its specialists."""
    every = [unit.source] if isinstance(unit, EvaluateUnit) else graph.sources(unit)
    judges = [name for domain in _domains(cfg, unit) for name in domain.stages]
    gaps = graph.measured_specialists(cfg, unit).values() if isinstance(unit, Rl) else ()
    inside = [source for source in every if not graph.is_path(source)]
    return list(dict.fromkeys([*inside, *judges, *(f"{name}.eval" for name in gaps)]))


def ancestors(cfg: Run, units: Sequence[Unit], unit: Unit) -> list[Unit]:
    """The units whose output a unit depends on, in order."""
    by_name = {u.name: u for u in units}
    needed: set[str] = set()
    waiting = stage_sources(cfg, unit)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += stage_sources(cfg, by_name[name])
    return [u for u in units if u.name in needed]


def outside_files(cfg: Run, unit: Unit) -> list[str]:
    """Files and folders that a unit reads and no stage writes."""
    named: list[str] = []
    if not isinstance(unit, EvaluateUnit):
        named += [source for source in graph.sources(unit) if graph.is_path(source)]
    if isinstance(unit, Pretrain | Warmup | Sparse):
        named += unit.data.files
    named += [domain.tasks for domain in _domains(cfg, unit)]
    return sorted({name for name in named if "://" not in name})


def check_outside(cfg: Run, units: Sequence[Unit]) -> None:
    """Raise ValueError for what is missing now rather than when its stage starts."""
    for unit in units:
        for name in outside_files(cfg, unit):
            if not Path(name).exists():
                raise ValueError(f"stage {unit.name!r} reads {name!r}: no such file or folder")


def depends_on(cfg: Run, unit: Unit) -> dict[str, Any]:
    """Everything in the config that can change a unit's output: what its config hash is made of.

    Not in it: out and cluster (where the work runs), how weights travel, snapshots, the other stages, and whether to evaluate.
    """
    parts: dict[str, Any] = {"seed": cfg.seed}
    if isinstance(unit, EvaluateUnit):
        parts |= {"kind": unit.kind, "source": unit.source}
        parts["evaluation"] = cfg.evaluation.model_dump(mode="json")
        parts |= {"as_rollouts": True} if unit.as_rollouts else {}
    else:
        parts |= unit.model_dump(mode="json", exclude={"evaluate"})
    if isinstance(unit, Rl | Distill | EvaluateUnit):
        parts["rollouts"] = cfg.rollouts.model_dump(mode="json", exclude={"sync", "sleep", "device_gib"})
    if isinstance(unit, Pretrain | Warmup | Sparse | Rl | Sft):
        parts["learner"] = cfg.learner.model_dump(mode="json")
    parts["domains"] = {d.name: d.model_dump(mode="json") for d in _domains(cfg, unit)}
    return parts


def config_hash(cfg: Run, unit: Unit) -> str:
    """sha256 of what the unit depends on in the config."""
    return hashlib.sha256(json.dumps(depends_on(cfg, unit), sort_keys=True).encode()).hexdigest()


def parents(cfg: Run, unit: Unit, store: Store) -> dict[str, str]:
    """Hash of everything the unit reads: its sources' manifests and the files from outside."""
    hashes = {name: store.manifest_hash(name) for name in stage_sources(cfg, unit)}
    return hashes | {name: _fingerprint(Path(name)) for name in outside_files(cfg, unit)}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting that differs, as "optimizer.lr 0.001 -> 0.002"; empty if none does."""
    before, after = _flat(old), _flat(new)
    for key in [*after, *before]:
        if before.get(key) != after.get(key):
            return f"{key} {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
    return ""


def _domains(cfg: Run, unit: Unit) -> list[config.Domain]:
    """The domains whose tasks a unit reads."""
    if isinstance(unit, EvaluateUnit):
        return list(cfg.domains)
    if isinstance(unit, Pretrain | Warmup | Sparse):
        return [] if unit.data.files else list(cfg.domains)
    if isinstance(unit, Rl | Distill):
        used = unit.mix if isinstance(unit, Rl) else unit.specialists
        return [domain for domain in cfg.domains if domain.name in used]
    return []


def _fingerprint(path: Path) -> str:
    """Content of small files, size and time of large ones: 60 GB are not read just for this."""
    if (path / MANIFEST).is_file():  # a stage of another run
        return file_hash(path / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        stat = file.stat()
        small = stat.st_size <= _SMALL
        mark = file_hash(file) if small else f"{stat.st_size} {stat.st_mtime_ns}"
        digest.update(f"{file.relative_to(path)} {mark}\n".encode())
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
