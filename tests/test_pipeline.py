"""The whole pipeline, tiny but real: every stage under Ray, killed and continued, and bad inputs.

The one run that most tests look at takes about a minute; all of this file is slow.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import config, jsonl
from posttrain.model import checkpoint
from posttrain.store import SNAPSHOTS, Store, file_hash
from posttrain.units import expand

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = {"pretrain": 100, "warmup": 4, "sparse": 4, "sft": 4, "mixed": 3}
STEPS |= dict.fromkeys(("rl-math", "rl-logic", "rl-agent", "rl-align"), 2)
DOMAINS = ("math", "logic", "agent", "align")
DEADLINE_S = 600


def _options() -> list[str]:
    settings = {f"stages.{name}.steps": n for name, n in STEPS.items()}
    settings |= {f"stages.{name}.heldout_tokens": 500 for name in ("warmup", "sparse")}
    settings |= {f"domains.{name}.num_eval": 6 for name in DOMAINS}
    settings |= {f"stages.rl-{name}.tasks_per_step": 6 for name in DOMAINS}
    settings |= {"cluster.threads": 1}  # runs are compared to the last digit; the number of idle cores varies
    settings |= {"stages.mixed.tasks_per_step": 8, "stages.distill.tasks_per_domain": 100}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def _command(out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "posttrain",
        "run",
        "configs/demo.toml",
        "--out",
        str(out),
        *_options(),
        *more,
    ]


def _run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(out, *more), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    done = _run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for who in ("learner", "rollouts"):
        assert done.stdout.count(f"{who}: kernels by torch (") == 1, "which kernels run is told once"
    return out / "demo"


def _report(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def _nothing_lost(run: Path) -> None:
    ledger = _report(run)["ledger"]
    assert ledger["planned"] > 0 and ledger["trained"] > 0
    fates = ("trained", "filtered", "failed", "abandoned", "lost")
    assert ledger["planned"] == sum(ledger[name] for name in fates)
    assert ledger["lost"] == ledger["duplicated"] == ledger["unplanned"] == 0, ledger


def test_every_stage_leaves_what_it_promises(finished: Path) -> None:
    report = _report(finished)
    _nothing_lost(finished)
    assert report["complete"] and report["run"] == "demo"
    kinds = {stage["kind"] for stage in report["stages"]}
    assert kinds == {"pretrain", "convert", "warmup", "sparse", "rl", "distill", "sft", "export", "evaluate"}
    for stage in report["stages"]:
        assert {"name", "kind", "wall_s", "steps", "tokens", "figures"} <= stage.keys()
        assert stage["tokens"] > 0 or stage["kind"] in ("convert", "export")
    for table in (report["eval"], report["eval_greedy"]):
        assert set(table) == {"pretrain", "sparse", "sft", "mixed", *(f"rl-{d}" for d in DOMAINS)}
        for row in (row for rows in table.values() for row in rows.values()):
            assert row["n"] == 6 and row["ci95"][0] <= row["pass@1"] <= row["ci95"][1]
    assert 0 < report["peak_rss_bytes"] < 6 * 2**30
    for stage, who in (("convert", set()), ("sparse", {"learner"}), ("rl-math", {"learner", "rollouts"})):
        backends = json.loads((finished / stage / "summary.json").read_text())["backends"]
        assert set(backends) == who and all(text.startswith("torch (") for text in backends.values())
    figures = {stage["name"]: stage["figures"] for stage in report["stages"]}
    assert len(figures["sparse"]["layers"]) == 3
    assert figures["warmup"]["untrained_lm_gap"] > figures["sparse"]["lm_gap"]


def test_the_report_is_one_self_contained_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert (
        "demo" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    )


def test_warmup_leaves_the_language_model_bit_for_bit(finished: Path) -> None:
    before = checkpoint.load(finished / "convert").state_dict()
    after = checkpoint.load(finished / "warmup").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".indexer." in name for name in changed)


def test_rollout_files_hold_every_token_and_both_logprobs(finished: Path) -> None:
    table = pq.read_table(finished / "mixed" / "rollouts" / "step-00000.parquet").to_pylist()
    assert len(table) == 8 * 8
    for row in table:
        assert len(row["tokens"]) == len(row["sampled"]) == len(row["engine_logprobs"])
        assert (row["learner_logprobs"] is not None) == (row["fate"] == "trained")
        if row["fate"] == "trained":
            pairs = zip(row["engine_logprobs"], row["learner_logprobs"], strict=True)
            assert max(abs(a - b) for a, b in pairs) < 0.05
            assert row["advantage"] is not None
    assert {row["fate"] for row in table} <= {"trained", "filtered: no signal"}


def test_distilled_rows_are_verified_and_carry_their_provenance(finished: Path) -> None:
    rows = pq.read_table(finished / "distill" / "data.parquet").to_pylist()
    assert rows and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["specialist"] == f"rl-{row['domain']}" and row["reward"] == 1.0
        assert len(row["checkpoint_sha256"]) == 64 and row["messages"][-1]["role"] == "assistant"
        assert sum(row["sampled"]) > 0
    assert len(load_from_disk(str(finished / "distill" / "dataset"))) == len(rows)


def test_stock_transformers_loads_the_export(finished: Path) -> None:
    export = finished / "export"
    assert "rollouts" not in {p.name for p in export.iterdir()}
    stock = AutoModelForCausalLM.from_pretrained(export)
    assert type(stock).__module__.startswith("transformers.") and stock.config.model_type == "deepseek_v32"
    words = AutoTokenizer.from_pretrained(export)
    prompt = [{"role": "user", "content": "sort these letters up : b a"}]
    tokens = words.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ours = checkpoint.load(finished / "mixed")
    given = torch.tensor(tokens)
    with torch.no_grad():
        difference = stock(given[None]).logits[0] - ours(given, tiny.packed([len(tokens)]))
    assert difference.abs().max() < 1e-4


def test_a_complete_run_is_skipped(finished: Path) -> None:
    before = (finished / "mixed" / "manifest.json").read_bytes()
    again = _run(finished.parent)
    assert again.returncode == 0
    units = expand(config.load([ROOT / "configs" / "demo.toml"]))
    assert again.stdout.count("complete, skipped") == len(units) == 21
    assert (finished / "mixed" / "manifest.json").read_bytes() == before


def test_dry_run_says_what_a_change_would_redo(finished: Path) -> None:
    plan = _run(finished.parent, "--dry-run", "--set", "stages.sft.steps=5")
    state = {line.split()[0]: line for line in plan.stdout.splitlines() if line}
    assert "done" in state["distill"] and "to do" in state["sft"] and "to do" in state["export"]
    assert "steps 4 -> 5" in state["sft"]
    assert "done" in state["rl-math.eval"]


def test_status_and_export_commands(finished: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "posttrain"]
    status = subprocess.run([*run, "status", finished], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mixed" in status.stdout and "lost 0" in status.stdout and "no driver" in status.stdout
    subprocess.run([*run, "export", finished / "sft", tmp_path / "out"], cwd=ROOT, check=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "deepseek_v32"


# ---- kill -9 ----


class _Driver:
    """A driver in its own process, watched from outside."""

    def __init__(self, out: Path, log: Path, *more: str) -> None:
        self.run = out / "demo"
        with log.open("a") as file:
            self.process = subprocess.Popen(_command(out, *more), cwd=ROOT, stdout=file, stderr=file)

    def wait_for(self, stage: str, event: str) -> None:
        """Until an event of the stage is in the ledger (or, for evaluations, its folder is)."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the driver ended before {stage} {event}"
            if event == "partial" and (self.run / f".partial-{stage}").exists():
                return
            rows = jsonl.read(self.run / "ledger.jsonl")
            if any(row["stage"] == stage and row["event"] == event for row in rows):
                return
            time.sleep(0.02)
        raise TimeoutError(f"{stage} {event}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


MOMENTS = [
    ("pretrain", "trained"),
    ("pretrain.eval", "partial"),
    ("warmup", "trained"),
    ("sparse", "planned"),
    ("rl-logic", "generated"),
    ("rl-agent", "scored"),
    ("rl-align", "trained"),
    ("distill", "scored_or_planned"),
    ("sft", "trained"),
    ("mixed", "trained"),
    ("mixed.eval", "partial"),
]


def test_a_driver_killed_in_any_stage_is_continued(finished: Path, tmp_path: Path) -> None:
    """One run, killed again and again; every restart skips what is complete."""
    log = tmp_path / "log.txt"
    for stage, event in MOMENTS:
        driver = _Driver(tmp_path, log)
        driver.wait_for(stage, "planned" if event == "scored_or_planned" else event)
        driver.kill()
    done = _run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "demo"
    _nothing_lost(run)
    report = _report(run)
    assert report["complete"] and report["ledger"]["abandoned"] > 0
    assert "complete, skipped" in done.stdout and not list(run.glob(".partial-*"))
    # The same seeds give the same numbers, killed or not.
    assert report["eval"] == _report(finished)["eval"]
    attempts = {s: Store(run).manifest(s).attempt for s in ("convert", "sparse", "mixed")}
    assert attempts["convert"] == 1 and attempts["sparse"] >= 2 and attempts["mixed"] >= 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_stage_goes_on_from_its_snapshot(finished: Path, tmp_path: Path, ranks: int) -> None:
    """test_snapshots.py compares every bit after kills at chosen moments, without Ray; this is the same with it.

    The second run may have two ranks: it reads what one has written.
    """
    log, flags = tmp_path / "log.txt", ("--until", "pretrain", "--set", "snapshots.every_steps=20")
    driver = _Driver(tmp_path, log, *flags)
    driver.wait_for("pretrain", "snapshot")
    deadline = time.monotonic() + DEADLINE_S
    while not list(driver.run.glob(f".partial-pretrain/{SNAPSHOTS}/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    done = _run(tmp_path, *flags, "--set", f"cluster.sharding.ranks={ranks}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from its snapshot" in done.stdout
    run = tmp_path / "demo"
    assert Store(run).manifest("pretrain").attempt == 1
    weights = "pretrain/model.safetensors"
    same = file_hash(run / weights) == file_hash(finished / weights)
    assert same or ranks == 2, "sums of two ranks round differently"
    losses = [
        json.loads((r / "pretrain/summary.json").read_text())["figures"]["loss"] for r in (run, finished)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert _report(run)["ledger"]["lost"] == _report(run)["ledger"]["duplicated"] == 0


def test_adapters_on_two_ranks_train_a_specialist(finished: Path, tmp_path: Path) -> None:
    """rl under Ray with everything that several ranks do: rollouts from collected weights, a reference, a checkpoint."""
    shutil.copytree(finished, tmp_path / "demo")
    stage = {"lora": "{rank = 4}", "mix": "{align = {kl_coef = 0.1}}", "steps": 3, "evaluate": "false"}
    flags = [word for k, v in stage.items() for word in ("--set", f"stages.rl-align.{k}={v}")]
    done = _run(tmp_path, "--only", "rl-align", "--set", "cluster.sharding.ranks=2", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (checkpoint.load(tmp_path / "demo" / s).state_dict() for s in ("sparse", "rl-align"))
    moved = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert {"q_a_proj", "kv_b_proj", "down_proj"} <= moved
    assert not any("norm" in name or "indexer" in name or "embed" in name for name in moved)
    files = sorted((tmp_path / "demo" / "rl-align" / "rollouts").iterdir())[1:]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    gaps = [
        abs(a - b)
        for row in rows
        if row["fate"] == "trained"
        for a, b in zip(row["engine_logprobs"], row["learner_logprobs"], strict=True)
    ]
    assert gaps and max(gaps) < 0.05, "engines have the merged weights"


def test_a_killed_rollout_actor_is_replaced(finished: Path, tmp_path: Path) -> None:
    driver = _Driver(tmp_path, tmp_path / "log.txt")
    driver.wait_for("rl-math", "trained")
    actors = [
        process
        for process in psutil.Process(driver.process.pid).children(recursive=True)
        if "_RolloutActor" in " ".join(process.cmdline())
    ]
    assert len(actors) == 1
    actors[0].kill()
    assert driver.process.wait(DEADLINE_S) == 0, (tmp_path / "log.txt").read_text()
    _nothing_lost(driver.run)
    events = list(jsonl.read(driver.run / "ledger.jsonl"))
    report = _report(driver.run)
    restarts = sum(stage["figures"].get("restarts", 0) for stage in report["stages"])
    failures = [row for row in events if row["event"] == "generation_failed"]
    assert restarts == 1 or failures, "the actor was not missed"
    assert report["ledger"]["abandoned"] == 0, "the stage went on"
    assert report["eval"] == _report(finished)["eval"]


def test_a_killed_learner_fails_the_stage_in_one_line_and_the_run_continues(tmp_path: Path) -> None:
    driver = _Driver(tmp_path, tmp_path / "log.txt")
    driver.wait_for("warmup", "trained")
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        if "_LearnerActor" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    assert driver.process.wait(DEADLINE_S) == 1
    text = (tmp_path / "log.txt").read_text()
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "stage warmup failed" in errors[0] and "Traceback" not in text
    assert _run(tmp_path, "--until", "warmup").returncode == 0
    _nothing_lost(driver.run)
