"""The report: numbers by hand, a page that stands alone, runs that are half done, failed or empty."""

import io
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain import chart, config, disk, forgetting, report, report_page
from posttrain.chart import Chart, Series
from posttrain.config import Run
from posttrain.intervals import mean_interval, wilson
from posttrain.ledger import Ledger
from posttrain.metrics import Metrics
from posttrain.progress import Progress
from posttrain.store import Origin, Store
from posttrain.units import config_hash, depends_on, expand, parents

HOSTILE = "<script>alert(1)</script>"
TASKS = [{"name": d, "tasks": f"py://{d}:tasks", "rewards": [{"fn": "m:f"}]} for d in ("math", "logic")]
LR = {"optimizer": {"lr": 1e-3}}


def _cfg(out: Path, *, stages: list[dict[str, Any]] | None = None, **changes: Any) -> Run:
    """Two domains; convert, warmup, sparse and its evaluation, a specialist and its evaluation."""
    (out / "dense").mkdir()
    default = [
        {"name": "convert", "kind": "convert", "source": str(out / "dense"), "index_topk": 4},
        {"name": "warmup", "kind": "warmup", "source": "convert", "steps": 3, **LR},
        {"name": "sparse", "kind": "sparse", "source": "warmup", "steps": 3, **LR},
        {"name": "rl-math", "kind": "rl", "source": "sparse", "mix": {"math": {}}, "steps": 2, **LR},
    ]
    recipe = {"name": "small", "seed": 7, "out": out, "domains": TASKS, "stages": stages or default}
    return Run.model_validate(recipe | changes)


def _layers(*ratios: float | None) -> list[dict[str, Any]]:
    return [
        {"layer": i, "kl": 0.1 * i, "recall": 0.5, "recall_oracle": 0.6, "recall_ratio": ratio}
        for i, ratio in enumerate(ratios)
    ]


FIGURES: dict[str, dict[str, Any]] = {
    "convert": {"num_layers": 2},
    "warmup": {
        "lm_loss_dense": 1.0,
        "lm_loss_sparse": 1.25,
        "lm_gap": 0.25,
        "untrained_lm_gap": 2.5,
        "recall": 0.75,
        "layers": _layers(0.9, 0.75),
        "counted_targets": 50_123,
    },
    "sparse": {"lm_loss_dense": 1.0, "lm_loss_sparse": 1.01, "lm_gap": 0.01, "layers": _layers(0.95, 0.875)},
    "rl-math": {"reward_first": 0.25, "reward_last": 0.75, "engine/gap_mean": 2e-7},
}
EVAL = {"sparse.eval": (0.25, 0.5, 0.5, 0.75), "rl-math.eval": (0.75, 0.25, 1.0, 0.5)}
"""math and logic sampled, math and logic greedy; of 4 tasks each."""
ROWS = {
    "warmup": [{"loss": 1.5, "indexer_kl/0": 0.5, "indexer_kl/1": 0.25, "tokens": 30}] * 3,
    "sparse": [{"loss": 1.5, "indexer_kl/0": 0.2, "indexer_kl/1": 0.1, "tokens": 30}] * 3,
    "rl-math": [
        {"reward": 0.25, "reward/math": 0.25, "signal": 0.5, "mean_tokens": 20.0, "engine/gap_mean": 1e-7},
        {"reward": 0.75, "reward/math": 0.75, "signal": 0.25, "mean_tokens": 30.0, "engine/gap_mean": 3e-7},
    ],
}


def _share(share: float) -> dict[str, Any]:
    return {
        "pass@1": share,
        "ci95": list(wilson(round(4 * share), 4)),
        "n": 4,
        "mean_tokens": 9.5,
        "median_tokens": 9.0,
    }


def _run(
    cfg: Run,
    *,
    until: int | None = None,
    figures: Mapping[str, Mapping[str, Any]] = FIGURES,
    wall_s: float = 1.5,
) -> Path:
    """A run folder as the pipeline leaves it; the stage after `until` units has failed in the middle."""
    units = expand(cfg)
    store = Store(cfg.path)
    quiet = Progress(Console(file=io.StringIO()))
    cfg.path.mkdir(parents=True)
    disk.write_json(cfg.path / "config.json", cfg.model_dump(mode="json"))
    ledger = Ledger(cfg.path)
    with Metrics(cfg.path, quiet) as metrics:
        for place, unit in enumerate(units[: len(units) if until is None else until + 1]):
            account = ledger.begin(unit.name)
            out = store.partial(unit.name)
            with metrics.stage(unit.name, unit.kind, account.attempt):
                for step, row in enumerate(ROWS.get(unit.name, [])):
                    account.planned([f"{step}/a", f"{step}/b"])
                    account.trained([f"{step}/a"])
                    account.filtered([f"{step}/b"])
                    metrics.log(step, row)
            if place == until:
                account.planned(["on its way"])
                store.discard(unit.name)
                break
            if unit.name in EVAL:
                math_s, logic_s, math_g, logic_g = map(_share, EVAL[unit.name])
                greedy = {"math": math_g, "logic": logic_g} if cfg.evaluation.greedy else {}
                sampled = {"math": math_s, "logic": logic_s}
                disk.write_json(
                    out / "eval.json", {"sampled": sampled} | ({"greedy": greedy} if greedy else {})
                )
            summary = {
                "name": unit.name,
                "kind": unit.kind,
                "wall_s": wall_s,
                "steps": len(ROWS.get(unit.name, [])),
                "tokens": 90,
                "figures": figures.get(unit.name, {}),
                "load_start": 0.5 + place,
                "load_end": 1.0,
                "peak_rss_bytes": 2**30 + place,
            }
            disk.write_json(out / "summary.json", summary | {"config": depends_on(cfg, unit)})
            made_from = parents(cfg, unit, store)
            store.commit(
                Origin(
                    stage=unit.name, kind=unit.kind, config_hash=config_hash(cfg, unit), parents=made_from
                ),
                1,
            )
            ledger.committed(unit.name, account.attempt)
    ledger.close()
    return cfg.path


class _Page(HTMLParser):
    """What a page is made of; assertion error for a tag that is not closed in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _page(run: Path) -> _Page:
    report.write(run)
    return _Page((run / "report.html").read_text())


# ---- intervals ----


def test_wilson_by_hand() -> None:
    # z = 2: centre (p + 4 / 2n) / (1 + 4 / n), half 2 / (1 + 4 / n) * sqrt(p q / n + 4 / 4 n^2)
    assert wilson(2, 4, z=2.0) == pytest.approx((0.5 - math.sqrt(0.125), 0.5 + math.sqrt(0.125)))
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((1 - wilson(0, 10)[1], 1.0)) and wilson(10, 10)[1] <= 1


def test_mean_interval_by_hand() -> None:
    # Mean 0.5, standard deviation 0.5 over four tasks: half = z * 0.5 / 2 with three degrees of freedom.
    deviation = math.sqrt(4 * 0.25 / 3)
    low, high = mean_interval([0.0, 1.0, 0.0, 1.0], z=1.0)
    assert (low, high) == pytest.approx((0.5 - deviation / 2, 0.5 + deviation / 2))
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)  # cut to what a share can be
    assert mean_interval([0.5]) == (0.0, 1.0)


def test_intervals_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="n=0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(AssertionError, match="5 successes of 4"):
        wilson(5, 4)


# ---- report.json ----


def test_report_of_a_finished_run_by_hand(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path))
    written = report.write(run)
    found = json.loads((run / "report.json").read_text())
    assert found == disk.plain(written)
    assert found["run"] == "small" and found["complete"] and found["unfinished"] == ""
    names = ["convert", "warmup", "sparse", "sparse.eval", "rl-math", "rl-math.eval"]
    assert [stage["name"] for stage in found["stages"]] == names
    assert [stage["kind"] for stage in found["stages"]][-2:] == ["rl", "evaluate"]
    assert found["wall_s"] == 9.0
    assert found["stages"][4]["domains"] == ["math"] and found["stages"][4]["steps"] == 2
    row = found["eval"]["sparse"]["math"]
    assert (row["pass@1"], row["n"], row["mean_tokens"], row["median_tokens"]) == (0.25, 4, 9.5, 9.0)
    assert found["eval_greedy"]["rl-math"]["math"]["pass@1"] == 1.0
    # Mean of 0.25 and 0.5: variance (0.25 * 0.75 + 0.5 * 0.5) / 4 / 4 = 0.02734.
    mean = found["eval_mean"]["sparse"]
    assert mean["mean"] == 0.375
    assert mean["ci95"] == pytest.approx([0.375 - 1.96 * 0.16536, 0.375 + 1.96 * 0.16536], abs=1e-4)
    counts = found["ledger"]
    assert (counts["planned"], counts["trained"], counts["filtered"]) == (16, 8, 8)
    assert counts["lost"] == counts["duplicated"] == counts["in_flight"] == 0


def test_summary_by_hand(tmp_path: Path) -> None:
    summary = report.build(_run(_cfg(tmp_path)))["summary"]
    assert summary == {
        "untrained_lm_gap": 2.5,
        "lm_gap": 0.01,
        "min_recall_ratio": 0.875,
        "base_stage": "sparse",
        "sparse_base": 0.375,
        "sparse_base_greedy": 0.625,
        "final_stage": "rl-math",
        "final": 0.5,
        "final_greedy": 0.75,
        "final_minus_base_points": 12.5,
        "final_minus_base_greedy_points": 12.5,
        "specialist_math_points": 50.0,
        "engine_gap": 2e-7,
        "peak_rss_bytes": 2**30 + 5,
        "load_min": 0.5,
        "load_max": 5.5,
    }


def test_a_dense_control_is_not_the_base(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path)
    sparse = cfg.stages[2].model_copy(update={"evaluate": False})
    control = sparse.model_copy(update={"name": "control", "attention": "dense"})
    stages = [*cfg.stages[:2], control, *cfg.stages[2:]]
    run = _run(cfg.model_copy(update={"stages": stages}))
    assert report.build(run)["summary"]["base_stage"] == "sparse"


def test_without_greedy_there_are_no_greedy_figures(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path, evaluation={"greedy": False}))
    found = report.build(run)
    assert found["eval_greedy"] == {} and found["summary"]["final"] == 0.5
    assert not any("greedy" in name for name in found["summary"])
    assert "greedy" not in report.text(found) and "greedy" not in _page(run).text


def test_figures_that_are_missing_or_not_numbers_are_left_out(tmp_path: Path) -> None:
    broken = {
        "warmup": {"lm_gap": float("nan"), "layers": _layers(None, 0.5), "untrained_lm_gap": 1.0},
        "sparse": {"layers": [{"layer": 0}]},
    }
    run = _run(_cfg(tmp_path), figures=broken)
    summary = report.build(run)["summary"]
    assert "lm_gap" not in summary and "engine_gap" not in summary
    assert summary["min_recall_ratio"] == 0.5 and summary["untrained_lm_gap"] == 1.0
    assert "rl-math" in _page(run).text


def test_sequence_against_mixed_needs_both_arms(tmp_path: Path) -> None:
    assert "forgetting" not in report.build(_run(_cfg(tmp_path)))


def test_sequence_against_mixed() -> None:
    cfg = config.load([Path(__file__).parents[1] / "configs" / "forgetting.toml"])
    names = ["then-math", "then-logic", "then-agent", "then-align"]
    means = {name: {"mean": 0.7, "ci95": [0.6, 0.8]} for name in names}
    assert forgetting.compare(cfg, means) is None, "one arm alone"
    means["together"] = {"mean": 0.82, "ci95": [0.8, 0.84]}
    both = forgetting.compare(cfg, means)
    assert both is not None and both["sequence"] == names
    assert both["rollouts_sequence"] == both["rollouts_together"] == 120 * 32 * 8
    tables = {name: {"math": {"pass@1": 0.5}} for name in means}
    page = forgetting.section({"forgetting": both, "domains": ["math"], "eval": tables, "eval_mean": means})
    assert "+12.0 points" in page and "80.0 to 84.0" in page and "30,720 rollouts" in page
    assert "conflict between the domains is designed" in cfg.note


# ---- half done, failed, empty ----


def test_a_failed_run_says_what_is_done(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path), until=4)  # in rl-math, after both steps
    found = report.write(run)
    assert not found["complete"]
    assert [u["state"] for u in found["units"]] == ["done"] * 4 + ["stopped", "to do"]
    assert found["unfinished"] == "stopped: rl-math after 2 steps; to do: rl-math.eval"
    assert found["wall_s"] == 6.0 and list(found["eval"]) == ["sparse"]
    assert "final" not in found["summary"] and found["summary"]["sparse_base"] == 0.375
    assert found["ledger"]["in_flight"] == 1 and found["ledger"]["lost"] == 0
    assert "not finished: stopped: rl-math after 2 steps" in report.text(found)
    page = _page(run).text
    assert "Not finished." in page and "rl-math after 2 steps" in page
    assert "mean reward" in page, "what was logged is shown"


def test_a_run_that_failed_at_once(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path), until=0)
    found = report.write(run)
    assert found["stages"] == [] and found["wall_s"] == 0
    assert found["units"][0]["state"] == "stopped" and "Not finished." in _page(run).text


def test_stages_of_another_config_are_outdated_and_not_compared(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path)
    run = _run(cfg)
    stages = [s if s.name != "rl-math" else s.model_copy(update={"steps": 9}) for s in cfg.stages]
    disk.write_json(run / "config.json", cfg.model_copy(update={"stages": stages}).model_dump(mode="json"))
    found = report.build(run)
    assert found["unfinished"] == "outdated: rl-math, rl-math.eval" and not found["complete"]
    assert found["eval"]["rl-math"]["math"]["pass@1"] == 0.75, "still shown"
    assert not {"final", "specialist_math_points", "engine_gap"} & found["summary"].keys()


def test_a_stage_made_from_an_older_source_is_outdated(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path))
    manifest = run / "sparse" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    states = {unit["name"]: unit["state"] for unit in report.build(run)["units"]}
    assert states["sparse"] == "done" and states["sparse.eval"] == states["rl-math.eval"] == "outdated"


def test_a_step_that_was_done_again_after_a_snapshot_counts_once(tmp_path: Path) -> None:
    lines = [{"stage": "rl", "attempt": 1, "step": step, "loss": loss} for step, loss in enumerate("abcd")]
    lines += [
        {"stage": "rl", "attempt": 1, "step": step, "loss": loss} for step, loss in ((2, "C"), (3, "D"))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["loss"] for row in report._rows(tmp_path)] == ["a", "b", "C", "D"]


def test_only_the_last_attempt_is_drawn(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "sparse", "attempt": 2, "step": 0, "loss": 9.5}) + "\n")
    found = report.build(run)
    assert next(u for u in found["units"] if u["name"] == "sparse")["state"] == "outdated"
    assert "9.5 \u2192 9.5" in _page(run).text and "1.5 \u2192 1.5" in _page(run).text


def test_an_empty_folder_has_an_empty_report(tmp_path: Path) -> None:
    found = report.write(tmp_path)
    assert found["run"] == tmp_path.name and found["stages"] == [] and not found["complete"]
    assert found["ledger"]["planned"] == 0
    assert "no recipe in this folder" in _page(tmp_path).text
    assert "planned 0" in report.text(found)


# ---- the terminal ----


def test_final_table_by_hand(tmp_path: Path) -> None:
    lines = report.text(report.build(_run(_cfg(tmp_path), wall_s=65))).splitlines()
    assert lines[0].split() == ["stage", "kind", "time", "steps", "tokens", "math", "logic", "mean"]
    assert lines[1].split() == ["convert", "convert", "1:05", "0", "90", "-", "-", "-"]
    assert lines[3].split() == ["sparse", "sparse", "1:05", "3", "90", "25.0", "50.0", "37.5/62.5"]
    assert lines[4].split() == ["rl-math", "rl", "1:05", "2", "90", "75.0", "25.0", "50.0/75.0"]
    assert lines[5].endswith("on 4 held-out tasks per domain")
    assert len({len(line) for line in lines[:5]}) == 1, "numbers end at the same column"
    assert "rl-math minus sparse: +12.5 points (greedy +12.5)" in lines
    assert "  rl-math  reward 0.25 -> 0.75" in lines


# ---- the page ----


def test_the_page_stands_alone_and_holds_every_part(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path))
    page = _page(run)
    html = (run / "report.html").read_text()
    assert not re.search(r"(https?:)?//|@import|url\(", html), "nothing from outside"
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not any(name in ("src", "href") for name, _ in page.attributes)
    assert ("charset", "utf-8") in page.attributes and html.startswith("<!doctype html>")
    for words in (
        "small",
        "6 of 6 units done",
        "+12.5 points",
        "37.5 to 50.0 %",
        "Conversion to sparse attention",
        "+0.0100",
        "50,123 tokens",
        "planned 16 = trained 8 + filtered 8 + failed 0 + abandoned 0 + in flight 0 + lost 0; "
        "0 duplicated, 0 unplanned",
        "math 0.25 \u2192 0.75",
        "layer 1 0.25 \u2192 0.25",
        "layer 1 0.75 \u2192 0.875",
        "rl-math 20 \u2192 30",
        "rl-math 1e-7 \u2192 3e-7",
    ):
        assert words in page.text, words
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert page.tags.count("figure") == 9  # 1 reward, 3 of rollouts, 2 losses, 2 KL, recall


def test_the_page_marks_the_domain_a_specialist_trained_on(tmp_path: Path) -> None:
    run = _run(_cfg(tmp_path))
    report.write(run)
    own = re.findall(r'<td class="n score own" data-label="(\w+)"', (run / "report.html").read_text())
    assert own == ["math"]


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    found = report.build(_run(_cfg(tmp_path)))
    text = json.dumps(found)
    for name in ("small", "rl-math", "sparse", "warmup", "math", "logic"):
        text = text.replace(f'"{name}"', json.dumps(f"{HOSTILE}\"'&{name}"))
    rows = [
        {"stage": f"{HOSTILE}\"'&rl-math", "attempt": 1, "step": s, f"reward/{HOSTILE}": 0.5, "signal": 1}
        for s in range(3)
    ]
    html = report_page.page(json.loads(text), rows)
    page = _Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert f"{HOSTILE}\"'&small" in page.text and page.text.count(HOSTILE) > 10


def test_an_empty_folder_with_a_hostile_name(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    page = _page(folder)
    assert "script" not in page.tags and folder.name in page.text


# ---- charts ----


def _line(*values: float) -> Series:
    return Series(name="a", points=tuple((float(i), v) for i, v in enumerate(values)))


def test_thin_keeps_the_mean_of_neighbours() -> None:
    thinned = chart.thin(_line(0, 2, 4, 6, 8), limit=3)
    assert thinned.points == ((0.5, 1.0), (2.5, 5.0), (4.0, 8.0))
    assert len(chart.thin(_line(*range(1001))).points) == 167  # of six each
    assert chart.thin(_line(1, 2), limit=2) == _line(1, 2)


def test_many_lines_become_lowest_median_highest() -> None:
    lines = [Series(name=str(i), points=((0.0, float(i)), (1.0, 10.0 - i))) for i in range(9)]
    assert [(s.name, s.points) for s in chart.spread(lines)] == [
        ("lowest", ((0.0, 0.0), (1.0, 2.0))),
        ("median", ((0.0, 4.0), (1.0, 6.0))),
        ("highest", ((0.0, 8.0), (1.0, 10.0))),
    ]
    assert chart.spread(lines[:8]) == lines[:8]


def test_a_logarithmic_axis_leaves_zeros_out_and_says_so() -> None:
    drawn = chart.figure(Chart(title="t", unit="u", series=(_line(1e-8, 0.0, 1e-5, math.nan),), log=True))
    assert "1 steps at 0 are not drawn" in drawn and "1e-8 &rarr; 1e-5" in drawn
    ticks = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    assert ticks == ["1e-8", "1e-7", "1e-6", "1e-5"]
    # From (0, bottom) to (2, top): three decades.
    assert re.search(r'class="line" d="M44\.0 190\.0L[0-9.]+ 20\.0"', drawn)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((3.0, 47.0), ["0", "10", "20", "30", "40", "50"]),
        ((0.92, 0.97), ["0.92", "0.93", "0.94", "0.95", "0.96", "0.97"]),
        ((5.0, 5.0), ["3", "4", "5", "6", "7"]),
        ((0.0, 0.0), ["-1", "-0.5", "0", "0.5", "1"]),
        ((-2.0, 1.0), ["-2", "-1", "0", "1"]),
    ],
)
def test_axis_ticks_are_round_and_hold_the_line(values: tuple[float, ...], ticks: list[str]) -> None:
    drawn = chart.figure(Chart(title="t", unit="u", series=(_line(*values),)))
    found = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    heights = [float(y) for y in re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', drawn)]
    assert len(heights) == len(values) and all(20 <= y <= 190 for y in heights)
    assert float(found[0]) <= min(values) and float(found[-1]) >= max(values)
    assert found == ticks


def test_labels_keep_their_distance_inside_the_plot() -> None:
    series = tuple(Series(name=f"s{i}", points=((0.0, 0.0), (1.0, 0.001 * i)), colour=i) for i in range(8))
    flat = Series(name="top", points=((0.0, 0.0), (1.0, 9.0)), colour=0)
    drawn = chart.figure(Chart(title="t", unit="u", series=(*series[:7], flat)))
    places = sorted(float(y) for y in re.findall(r'class="end" x="[^"]+" y="([^"]+)"', drawn))
    assert len(places) == 8 and places[-1] <= 220
    assert all(after - before >= 12.9 for before, after in pairwise(places))


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart.figure(Chart(title="t", unit="u", series=())) == ""
    assert chart.figure(Chart(title="t", unit="u", series=(_line(math.nan),))) == ""
    one = chart.figure(Chart(title="t", unit="u", series=(_line(0.5),)))
    assert "circle" in one and "nan" not in one


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.91234, "0.912"), (1234.4, "1,234"), (3e-8, "3e-8"), (2.5e-5, "2.5e-5"), (-0.5, "-0.5")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert chart.short(value) == text
