"""Domains trained one after another against all together, where a recipe has both arms.

Next: report.py, configs/forgetting.toml.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from posttrain.config import Rl, Run


def compare(cfg: Run, means: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Both arms with their rollouts and mean pass@1 after each stage; None if they are not both there.

    means: {"mean", "ci95"} of every evaluated stage.
    """
    rl = {stage.name: stage for stage in cfg.stages if isinstance(stage, Rl)}
    chain = [n for n, s in rl.items() if s.source in rl and len(s.mix) == 1 and len(rl[s.source].mix) == 1]
    mixed = [n for n, s in rl.items() if len(s.mix) > 1 and s.source not in rl]
    if not chain or len(mixed) != 1:
        return None
    names = [chain[-1]]
    while rl[names[0]].source in rl:
        names.insert(0, rl[names[0]].source)
    if not means.keys() >= {*names, mixed[0]}:
        return None
    return {
        "sequence": names,
        "together": mixed[0],
        "rollouts_sequence": sum(_rollouts(rl[name]) for name in names),
        "rollouts_together": _rollouts(rl[mixed[0]]),
        "sequence_pass": means[names[-1]],
        "together_pass": means[mixed[0]],
    }


def section(report: Mapping[str, Any]) -> str:
    """The part of the page that sets the arms side by side."""
    both = report.get("forgetting")
    if both is None:
        return ""
    domains = report["domains"]
    stages = [*both["sequence"], both["together"]]
    rows = "".join(_row(report, name, domains) for name in stages)
    heads = "".join(f'<th scope="col" class="n">{escape(d)}</th>' for d in [*domains, "Mean", "95 %"])
    gap = 100 * (both["together_pass"]["mean"] - both["sequence_pass"]["mean"])
    return (
        "<section><h2>One after another or together</h2>"
        f'<p class="note">{both["rollouts_sequence"]:,} rollouts in the sequence, '
        f"{both['rollouts_together']:,} together; pass@1 in %, sampled. Together minus the end of the "
        f"sequence: {gap:+.1f} points on the mean of the domains.</p>"
        '<div class="wide"><table><thead><tr><th scope="col">After stage</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(report: Mapping[str, Any], name: str, domains: list[str]) -> str:
    table, mean = report["eval"][name], report["eval_mean"][name]
    cells = [f"{100 * table[d]['pass@1']:.1f}" if d in table else "-" for d in domains]
    low, high = mean["ci95"]
    cells += [f"{100 * mean['mean']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td class=n>{c}</td>" for c in cells)}</tr>'


def _rollouts(stage: Rl) -> int:
    return stage.steps * stage.tasks_per_step * stage.group_size
