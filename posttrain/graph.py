"""How the stages of a recipe hang together: what each reads, in which order, who teaches whom.

Checked when a recipe is read (config.Run). Next: units.py, which makes the work of a run of it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # config.py imports this module
    from posttrain.config import Rl, Run, Stage


def sources(stage: "Stage") -> list[str]:
    """Stages (or paths) a stage reads from, in order."""
    if stage.kind == "pretrain":
        return []
    if stage.kind == "distill":
        return list(stage.specialists.values())
    if stage.kind == "sft":
        return [stage.source, *stage.data]
    if stage.kind == "rl":
        return [stage.source, *teachers(stage)]
    return [stage.source]


def is_path(source: str) -> bool:
    """Whether a source names a file or folder rather than a stage."""
    return "/" in source or "." in source or "://" in source


def teachers(stage: "Rl") -> tuple[str, ...]:
    """The specialists that an RL stage learns from, each once."""
    if stage.mopd is None:
        return ()
    return tuple(dict.fromkeys(p.specialist for p in stage.mix.values() if p.specialist is not None))


def measured_specialists(run: "Run", stage: "Rl") -> dict[str, str]:
    """Domain -> the stage that trained its specialist, for those that an evaluation follows."""
    evaluated = {s.name for s in run.stages if s.evaluate}
    return {name: p.specialist for name, p in stage.mix.items() if p.specialist in evaluated}


def check(run: "Run") -> None:
    """ValueError for names that are not unique, or name nothing, or name what comes later."""
    every = [stage.name for stage in run.stages]
    _unique("stage", every)
    _unique("domain", [d.name for d in run.domains])
    before: list[str] = []
    for stage in run.stages:
        for source in sources(stage):
            _known_source(stage.name, source, before, every)
        _domains_known(run, stage)
        if stage.kind == "rl":
            _buffers_fit(run, stage)
            _specialists_known(run, stage, before)
        if _reads_domains(stage):
            _judges_known(run, stage, before)
        before.append(stage.name)


def _unique(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is defined {names.count(name)} times; names are unique")


def _known_source(stage: str, source: str, before: Sequence[str], every: Sequence[str]) -> None:
    if is_path(source) or source in before:
        return
    why = "comes later; reorder the stages" if source in every else "is no stage"
    raise ValueError(f"stage {stage!r}: source {source!r} {why} (a path needs a slash, as in ./checkpoint)")


def _domains_known(run: "Run", stage: "Stage") -> None:
    domains = {domain.name for domain in run.domains}
    for name in getattr(stage, "mix", None) or getattr(stage, "specialists", None) or {}:
        if name not in domains:
            raise ValueError(
                f"stage {stage.name!r}: unknown domain {name!r}; known: {', '.join(sorted(domains)) or 'none'}"
            )


def _buffers_fit(run: "Run", stage: "Rl") -> None:
    for name, part in stage.mix.items():
        budget = part.max_new_tokens or run.domain(name).max_new_tokens
        if part.overlong_buffer > budget:
            raise ValueError(
                f"stage {stage.name!r}: mix.{name}.overlong_buffer={part.overlong_buffer} is more than the "
                f"length budget, {budget}"
            )


def _specialists_known(run: "Run", stage: "Rl", before: Sequence[str]) -> None:
    measured = measured_specialists(run, stage)
    for name, part in stage.mix.items():
        if part.specialist is None:
            if stage.mopd is not None and not stage.mopd.rewards:
                raise ValueError(
                    f"stage {stage.name!r}: mopd without rewards has nothing to teach {name!r} with; set "
                    f"mix.{name}.specialist or mopd.rewards = true"
                )
            continue
        _known_source(stage.name, part.specialist, before, [s.name for s in run.stages])
        if name not in measured and stage.mopd is None:
            raise ValueError(
                f"stage {stage.name!r}: mix.{name}.specialist={part.specialist!r} is not evaluated in this run, so "
                "that there is no gap to log; set its evaluate = true, or mopd to learn from it"
            )
    if stage.mopd is not None and not teachers(stage):
        raise ValueError(f"stage {stage.name!r}: mopd without a specialist; set mix.DOMAIN.specialist")
    if stage.follow_gap and not measured:
        raise ValueError(
            f"stage {stage.name!r}: follow_gap={stage.follow_gap} without an evaluated specialist; "
            "set mix.DOMAIN.specialist"
        )


def _reads_domains(stage: "Stage") -> bool:
    if stage.kind == "pretrain" or stage.kind == "warmup" or stage.kind == "sparse":
        return stage.evaluate or not stage.data.files  # demonstrations
    return stage.evaluate or stage.kind == "rl" or stage.kind == "distill"


def _judges_known(run: "Run", stage: "Stage", before: Sequence[str]) -> None:
    for domain in run.domains:
        for name in domain.stages:
            if name not in before:
                why = "comes later; put it first" if name in [s.name for s in run.stages] else "is no stage"
                raise ValueError(
                    f"domain {domain.name!r}: a reward asks stage {name!r}, which {why} "
                    f"(stage {stage.name!r} reads the domain)"
                )
