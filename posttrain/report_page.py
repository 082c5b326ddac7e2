"""report.html: one self-contained page of a run, for screen and paper.

No script, no file beside it, no address outside. A part of the page is a function of the report that
returns HTML, or nothing where the run has no such figures; _PARTS in page() is their order.
Next: report.py for where the figures come from, chart.py for the curves, page_style.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from posttrain import forgetting
from posttrain.chart import COLOURS, Chart, Series, figure, short, spread
from posttrain.page_style import CSS
from posttrain.progress import compact, duration

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl, the last attempt of each stage."""

_MEANINGS = {
    "planned": "samples that were to be made",
    "trained": "their gradients are in the model, or their rows in the data set",
    "filtered": "dropped on purpose: no learning signal, not verified, a duplicate",
    "failed": "given up after an error",
    "abandoned": "in attempts that a later attempt replaced",
    "in_flight": "of a stage that has not finished and will run again",
    "lost": "planned and never heard of again",
}
"""The fates of a sample; all but the first add up to it."""


def page(report: Report, rows: Rows) -> str:
    """The page."""
    parts = (_head, _notice, _tiles, _stages, _forgetting, _conversion, _curves, _ledger)
    body = "\n".join(part(report, rows) for part in parts)
    title = escape(f"{report['run']} - posttrain report")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title>\n'
        f"<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(report: Report, _: Rows) -> str:
    units = report["units"]
    done = sum(unit["state"] == "done" for unit in units)
    facts = [f"{done} of {len(units)} units done"]
    if report["seed"] is not None:
        facts.append(f"seed {report['seed']}")
    if report["domains"]:
        facts.append(f"domains {', '.join(report['domains'])}")
    sizes = [row["n"] for table in report["eval"].values() for row in table.values() if "n" in row]
    if sizes:
        facts.append(f"{_range(sizes, compact)} held-out tasks per domain")
    return (
        f"<h1>{escape(report['run'])}</h1>"
        f'<p class="context">{" &middot; ".join(escape(fact) for fact in facts)}</p>'
        + (f'<p class="note">{escape(report["note"])}</p>' if report["note"] else "")
    )


def _forgetting(report: Report, _: Rows) -> str:
    return forgetting.section(report)


def _notice(report: Report, _: Rows) -> str:
    if report["complete"]:
        return ""
    words = report["unfinished"] or "no recipe in this folder, so nothing is known of its stages"
    return f'<p class="notice"><b>Not finished.</b> What follows is what is done so far; {escape(words)}.</p>'


# ---- headline figures ----


def _tiles(report: Report, _: Rows) -> str:
    summary = report["summary"]
    tiles = [
        _final_tile(summary),
        _specialist_tile(summary),
        _gap_tile(summary),
        _recall_tile(summary),
        _logprob_tile(summary),
        _samples_tile(report["ledger"]),
        _time_tile(report),
    ]
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def _tile(label: str, value: str, note: str, *, unit: str = "") -> str:
    return (
        f"<li><span>{escape(label)}</span><b>{escape(value)} <i>{unit}</i></b>"
        f"<small>{escape(note)}</small></li>"
    )


def _final_tile(summary: Mapping[str, Any]) -> str:
    if "final_minus_base_points" not in summary:
        return ""
    note = f"mean pass@1 {_percent(summary['sparse_base'])} to {_percent(summary['final'])} %"
    if "final_minus_base_greedy_points" in summary:
        base, final = summary["sparse_base_greedy"], summary["final_greedy"]
        points = summary["final_minus_base_greedy_points"]
        note += f"; greedy {points:+.1f} ({_percent(base)} to {_percent(final)} %)"
    label = f"{summary['final_stage']} against {summary['base_stage']}"
    return _tile(label, f"{summary['final_minus_base_points']:+.1f}", note, unit="points")


def _specialist_tile(summary: Mapping[str, Any]) -> str:
    gains = {
        name.removeprefix("specialist_").removesuffix("_points"): value
        for name, value in summary.items()
        if name.startswith("specialist_")
    }
    if not gains:
        return ""
    note = ", ".join(f"{domain} {gain:+.1f}" for domain, gain in gains.items())
    value = _range(list(gains.values()), lambda gain: f"{gain:+.1f}")
    return _tile("Specialists in their own domain", value, note, unit="points")


def _gap_tile(summary: Mapping[str, Any]) -> str:
    if "lm_gap" not in summary:
        return ""
    note = "per token, held out"
    if "untrained_lm_gap" in summary:
        note += f"; with untrained indexers {summary['untrained_lm_gap']:+.2f}"
    return _tile("LM loss, sparse minus dense", f"{summary['lm_gap']:+.4f}", note, unit="nats")


def _recall_tile(summary: Mapping[str, Any]) -> str:
    if "min_recall_ratio" not in summary:
        return ""
    note = "attention the indexer catches, of what the best choice of as many keys would"
    return _tile("Recall, worst layer", _percent(summary["min_recall_ratio"]), note, unit="%")


def _logprob_tile(summary: Mapping[str, Any]) -> str:
    if "engine_gap" not in summary:
        return ""
    note = "mean difference of log-probabilities, worst RL stage"
    return _tile("Engine against learner", short(summary["engine_gap"]), note)


def _samples_tile(ledger: Mapping[str, int]) -> str:
    note = f"{ledger['planned']:,} planned, {ledger['trained']:,} trained"
    return _tile("Samples lost or duplicated", f"{ledger['lost']:,} / {ledger['duplicated']:,}", note)


def _time_tile(report: Report) -> str:
    facts = []
    if report["peak_rss_bytes"]:
        facts.append(f"peak memory {report['peak_rss_bytes'] / 2**30:.2f} GiB")
    if report["load"]:
        facts.append(f"load {_range(report['load'], lambda load: f'{load:.1f}')}")
    return _tile("Time, all units", duration(report["wall_s"]), "; ".join(facts))


# ---- stages ----


def _stages(report: Report, _: Rows) -> str:
    units = [unit for unit in report["units"] if unit["kind"] != "evaluate"]
    if not units:
        return ""
    domains = report["domains"]
    stages = {stage["name"]: stage for stage in report["stages"]}
    heads = [("Stage", ""), ("Time", "n"), ("Steps", "n"), ("Tokens", "n")]
    heads += [(domain, "n") for domain in domains] + ([("Mean", "n")] if domains else [])
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in heads)
    body = "".join(_stage_row(report, unit, stages) for unit in units)
    note = "".join(
        (
            "pass@1 in %: <b>sampled</b> at T = 1" if domains else "",
            ", greedy beside it" if report["eval_greedy"] else "",
            "; below each its 95 % interval. Shaded: the domains a stage was trained on by RL."
            if domains
            else "",
        )
    )
    return (
        f'<section><h2>Stages</h2><p class="note">{note}</p><div class="wide"><table class="stages">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _stage_row(report: Report, unit: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str:
    name = unit["name"]
    stage = stages.get(name)
    gave = stage["gave"] if stage is not None else ""
    if unit["state"] == "stopped":
        gave = f"stopped after {unit['steps_logged']} steps"
    elif unit["state"] != "done":
        gave = "; ".join(filter(None, [unit["state"], gave]))
    first = f'<th scope="row">{escape(name)} <i>{escape(unit["kind"])}</i><small>{escape(gave)}</small></th>'
    if stage is None:
        numbers = [("Time", "-"), ("Steps", "-"), ("Tokens", "-")]
    else:
        numbers = [
            ("Time", escape(duration(stage["wall_s"]))),
            ("Steps", f"{stage['steps']:,}"),
            ("Tokens", compact(stage["tokens"])),
        ]
        evaluation = stages.get(f"{name}.eval")
        if evaluation is not None:
            numbers[0] = ("Time", f"{numbers[0][1]}<small>+ {duration(evaluation['wall_s'])} eval</small>")
    cells = "".join(f'<td class="n" data-label="{label}">{value}</td>' for label, value in numbers)
    tables = [report[mode].get(name, {}) for mode in ("eval", "eval_greedy")]
    trained = () if stage is None else stage.get("domains", ())
    for domain in report["domains"]:
        rows = [table.get(domain) for table in tables]
        cells += _score(domain, rows, "pass@1", own=domain in trained)
    if report["domains"]:
        means = [report[mode].get(name) for mode in ("eval_mean", "eval_greedy_mean")]
        cells += _score("Mean", means, "mean", own=False)
    return f'<tr class="{unit["state"].replace(" ", "-")}">{first}{cells}</tr>'


def _score(label: str, rows: Sequence[Mapping[str, Any] | None], key: str, *, own: bool) -> str:
    """A cell with the sampled and the greedy share, each over its interval."""
    classes = "n score own" if own else "n score"
    words = []
    for mode, row in zip(("sampled", "greedy"), rows, strict=True):
        if row is None or row.get(key) is None:
            continue
        ends = row.get("ci95")
        small = "" if not ends else "&ndash;".join(f"{100 * end:.0f}" for end in ends)
        words.append(f'<span class="{mode}">{_percent(row[key])}<small>{small}</small></span>')
    if not words:
        classes += " none"
    return f'<td class="{classes}" data-label="{escape(label)}">{"".join(words) or "-"}</td>'


# ---- conversion ----


def _conversion(report: Report, _: Rows) -> str:
    measured = [stage for stage in report["stages"] if stage["figures"].get("layers")]
    if not measured:
        return ""
    counted = [s["figures"]["counted_targets"] for s in measured if s["figures"].get("counted_targets")]
    held_out = f" ({_range(counted, lambda n: f'{n:,}')} tokens)" if counted else ""
    notes = (
        "Recall is the share of the dense attention that falls on the kept keys; the oracle keeps the "
        f"keys with the most attention. Held out{held_out}: queries with more keys than are kept."
    )
    return (
        f'<section><h2>Conversion to sparse attention</h2><p class="note">{notes}</p><div class="pair">'
        f"{_losses(measured)}{''.join(map(_layers, measured))}</div></section>"
    )


def _losses(measured: Sequence[Mapping[str, Any]]) -> str:
    heads = ("after", "dense", "sparse", "gap", "untrained")
    body = ""
    for stage in measured:
        figures = stage["figures"]
        cells = [
            _number(figures.get("lm_loss_dense"), ".4f"),
            _number(figures.get("lm_loss_sparse"), ".4f"),
            _number(figures.get("lm_gap"), "+.4f"),
            _number(figures.get("untrained_lm_gap"), "+.4f"),
        ]
        body += f'<tr><th scope="row">{escape(stage["name"])}</th>{_cells(cells)}</tr>'
    return (
        '<div class="wide"><table><caption>LM loss in nats per token; untrained: the gap with fresh '
        f"indexers</caption><thead><tr>{_heads(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _layers(stage: Mapping[str, Any]) -> str:
    body = ""
    for layer in stage["figures"]["layers"]:
        cells = [_number(layer.get("kl"), ".4f")]
        cells += [_number(layer.get(key), ".3f") for key in ("recall", "recall_oracle", "recall_ratio")]
        body += f'<tr><th scope="row">{layer["layer"]}</th>{_cells(cells)}</tr>'
    return (
        f'<div class="wide"><table><caption>Indexers after {escape(stage["name"])}; KL in nats per query'
        f"</caption><thead><tr>{_heads(('layer', 'KL', 'recall', 'oracle', 'ratio'))}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _heads(names: Iterable[str]) -> str:
    return "".join(
        f'<th scope="col"{"" if i == 0 else " class=n"}>{escape(name)}</th>' for i, name in enumerate(names)
    )


def _cells(values: Iterable[str]) -> str:
    return "".join(f'<td class="n">{escape(value)}</td>' for value in values)


# ---- curves ----


def _curves(report: Report, rows: Rows) -> str:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    known = [unit["name"] for unit in report["units"] if unit["kind"] != "evaluate"]
    for name in known or dict.fromkeys(row["stage"] for row in rows):
        by_stage[name] = [row for row in rows if row["stage"] == name]
    groups = {
        "Reward in RL": _rewards(by_stage, report["domains"]),
        "Rollouts in RL": _rollouts(by_stage),
        "Language-model loss": _lm_losses(by_stage),
        "Indexer": [*_indexer_kl(by_stage), _recall(report)],
    }
    found = ""
    for title, charts in groups.items():
        figures = "".join(figure(chart) for chart in charts)
        if figures:
            found += f'<h3>{title}</h3><div class="charts">{figures}</div>'
    return f"<section><h2>Curves</h2>{found}</section>" if found else ""


def _rewards(by_stage: Mapping[str, Rows], domains: Sequence[str]) -> list[Chart]:
    charts = []
    for name, rows in by_stage.items():
        named = {key for row in rows for key in row if key.startswith("reward/")}
        parts = sorted(named, key=lambda key: (_place(key.removeprefix("reward/"), domains), key))
        series = []
        for key in parts or ["reward"]:
            domain = key.removeprefix("reward/")
            # A domain has the same colour in every chart.
            series.append(_series(rows, key, domain, _place(domain, domains)))
        charts.append(Chart(title=name, unit="mean reward", series=tuple(series), share=True))
    return charts


def _place(domain: str, domains: Sequence[str]) -> int:
    return domains.index(domain) if domain in domains else len(domains)


def _rollouts(by_stage: Mapping[str, Rows]) -> list[Chart]:
    def lines(key: str) -> tuple[Series, ...]:
        every = {name: rows for name, rows in by_stage.items() if any("signal" in row for row in rows)}
        return tuple(_series(rows, key, name, i) for i, (name, rows) in enumerate(every.items()))

    return [
        Chart(title="Length", unit="sampled tokens", series=lines("mean_tokens")),
        Chart(title="Groups with a signal", unit="share", series=lines("signal"), share=True),
        Chart(
            title="Engine against learner", unit="|log-prob gap|", series=lines("engine/gap_mean"), log=True
        ),
    ]


def _lm_losses(by_stage: Mapping[str, Rows]) -> list[Chart]:
    charts = []
    for name, rows in by_stage.items():
        series = _series(rows, "loss", "loss", 0)
        values = [y for _, y in series.points if y > 0]
        if values and not any("reward" in row for row in rows):
            # A loss that falls by a factor of ten or more says nothing on a linear axis.
            log = max(values) > 10 * min(values)
            charts.append(Chart(title=name, unit="nats / token", series=(series,), log=log))
    return charts


def _indexer_kl(by_stage: Mapping[str, Rows]) -> list[Chart]:
    charts = []
    for name, rows in by_stage.items():
        layers = {key.partition("/")[2] for row in rows for key in row if key.startswith("indexer_kl/")}
        order = sorted(layers, key=lambda layer: (len(layer), layer))
        series = [_series(rows, f"indexer_kl/{n}", f"layer {n}", i) for i, n in enumerate(order)]
        charts.append(Chart(title=f"KL, {name}", unit="nats / query", series=tuple(spread(series))))
    return charts


def _recall(report: Report) -> Chart:
    measured = [stage for stage in report["stages"] if stage["figures"].get("layers")]
    points: dict[int, list[tuple[float, float]]] = {}
    for place, stage in enumerate(measured):
        for layer in stage["figures"]["layers"]:
            if layer.get("recall_ratio") is not None:
                points.setdefault(layer["layer"], []).append((place, layer["recall_ratio"]))
    series = [
        Series(name=f"layer {n}", points=tuple(points[n]), colour=i) for i, n in enumerate(sorted(points))
    ]
    names = tuple(stage["name"] for stage in measured)
    return Chart(
        title="Recall after each stage",
        unit="share of the oracle's",
        x_unit="stage",
        x_names=names,
        series=tuple(spread(series)),
    )


def _series(rows: Rows, key: str, name: str, colour: int) -> Series:
    points = tuple(
        (float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), int | float)
    )
    return Series(name=name, points=points, colour=colour % (2 * COLOURS))


# ---- ledger ----


def _ledger(report: Report, _: Rows) -> str:
    ledger = report["ledger"]
    fates = [name for name in _MEANINGS if name != "planned"]
    total = sum(ledger.get(name, 0) for name in fates)
    equation = " + ".join(f"{_words(name)} {ledger.get(name, 0):,}" for name in fates)
    relation = "=" if total == ledger["planned"] else "is not"
    more = [f"{ledger['duplicated']:,} duplicated", f"{ledger['unplanned']:,} unplanned"]
    if ledger["abandoned_trained"]:
        more.append(f"{ledger['abandoned_trained']:,} of the abandoned had been trained")
    meanings = "".join(f"<dt>{_words(name)}</dt><dd>{text}</dd>" for name, text in _MEANINGS.items())
    return (
        "<section><h2>Samples</h2>"
        f'<p class="account">planned {ledger["planned"]:,} {relation} {equation}; {", ".join(more)}</p>'
        f"<dl>{meanings}</dl></section>"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _range(values: Sequence[float], show: Any) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"
