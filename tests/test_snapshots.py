"""Snapshots: a killed stage ends with the same bits; damaged ones are refused; nothing is lost or doubled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from resume_worker import EVERY, KILLS, STEPS

from posttrain import config, packing
from posttrain.domains import open_domains
from posttrain.learner import Learner, Setup
from posttrain.ledger import Ledger
from posttrain.mixture import TaskOrder
from posttrain.schema import Batch
from posttrain.snapshots import Snapshots, newest
from posttrain.store import SNAPSHOTS, Origin, file_hash

ROOT = Path(__file__).parents[1]
ORIGIN = Origin(stage="s", kind="rl", config_hash="c", parents={"base": "p"})


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


def _learner(path: Path, dtype: str = "float32", **optimizer: Any) -> Learner:
    return Learner(
        Setup(
            checkpoint=path,
            attention="sparse",
            optimizer=config.Optimizer(**({"lr": 1e-3, "decay_from": 0.2, "warmup_steps": 3} | optimizer)),
            total_steps=12,
            train=frozenset({"model", "indexer"}),
            indexer_loss="sparse",
            balance_speed=0.01,
            deterministic=True,
            dtype=dtype,
        )
    )


def _batches(seed: int) -> list[Batch]:
    samples = [tiny.sample(f"{seed}.{i}", 9 + 4 * i, seed=10 * seed + i) for i in range(4)]
    return packing.pack(samples, packing.token_weights(samples, "token", 1), tokens_per_batch=40)


def _digest(learner: Learner, out: Path) -> str:
    return learner.finish(out)["state_sha256"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_learner_goes_on_with_the_same_bits(
    sparse: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    """Weights, their fp32 copies, moments, schedule, routing bias, spike guard, version and random numbers."""
    learner = _learner(sparse, dtype, kind=kind, spike_factor=9.0)
    for step in range(3):
        learner.lm_step(_batches(step))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    torch.manual_seed(5)
    np.random.seed(6)
    learner.snapshot(folder)
    learner.snapshot_finish()
    drawn = torch.rand(2).tolist(), np.random.random()
    for step in range(3, 6):
        learner.lm_step(_batches(step))
    other = _learner(sparse, dtype, kind=kind, spike_factor=9.0)
    other.restore(folder)
    assert (torch.rand(2).tolist(), np.random.random()) == drawn
    assert (other.version, other.optimizers.step_count) == (3, 3)
    assert [len(norms) for norms in other.optimizers.norms.values()] == [3, 3]
    for step in range(3, 6):
        other.lm_step(_batches(step))
    assert _digest(other, tmp_path / "a") == _digest(learner, tmp_path / "b")
    other.lm_step(_batches(6))
    assert _digest(other, tmp_path / "a") != _digest(learner, tmp_path / "b")


def test_a_snapshot_of_another_optimizer_is_refused(sparse: Path, tmp_path: Path) -> None:
    learner = _learner(sparse, kind="muon")
    learner.lm_step(_batches(0))
    learner.snapshot(tmp_path)
    learner.snapshot_finish()
    model = Setup(
        checkpoint=sparse,
        attention="sparse",
        optimizer=config.Optimizer(lr=1e-3),
        total_steps=9,
        train=frozenset({"model"}),
    )
    with pytest.raises(ValueError, match="a snapshot of another model or optimizer"):
        Learner(model).restore(tmp_path)


def test_an_unfinished_snapshot_is_what_training_saw_and_failures_are_raised(
    sparse: Path, tmp_path: Path
) -> None:
    """The copy is taken at once: a step during the writing changes nothing of it."""
    learner, folder = _learner(sparse), tmp_path / "snapshot"
    folder.mkdir()
    learner.lm_step(_batches(0))
    before = _digest(learner, tmp_path / "a")
    learner.snapshot(folder)
    learner.lm_step(_batches(1))
    learner.snapshot_finish()
    other = _learner(sparse)
    other.restore(folder)
    assert _digest(other, tmp_path / "b") == before
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "__0_0.distcp").mkdir()  # where the writer wants a file
    learner.snapshot(gone)
    with pytest.raises(OSError, match=r"rank 0 could not write the snapshot: .*distcp"):
        learner.snapshot_finish()


class _Stub:
    """A learner whose state is a file."""

    def __init__(self) -> None:
        self.folder = Path()

    def call(self, method: str, *args: Any) -> Any:
        """As RemoteLearner."""
        if method == "snapshot":
            self.folder = args[0]
            (self.folder / "__0_0.distcp").write_bytes(bytes(100))
        return True


def _taken(path: Path, steps: list[int], **settings: Any) -> Snapshots:
    ledger = Ledger(path)
    made = Snapshots(config.Snapshots(**settings), path, ORIGIN, ledger.begin("s"))
    for step in steps:
        made.take(step, _Stub(), {"step": step})
        made.settle()
    return made


def test_the_newest_whole_snapshot_is_taken_and_a_refusal_is_said(tmp_path: Path) -> None:
    _taken(tmp_path, [3, 9, 12], keep=2)
    folder, said = tmp_path / SNAPSHOTS, []
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000009", "step-00000012"], "keep = 2"
    last = newest(tmp_path, ORIGIN, said.append)
    assert last is not None and (last.step, last.attempt, last.state) == (12, 1, {"step": 12}) and not said
    (folder / "step-00000012" / "__0_0.distcp").write_bytes(bytes(99) + b"x")
    last = newest(tmp_path, ORIGIN, said.append)
    assert last is not None and last.step == 9
    assert said == [
        "s: the snapshot of step 12 is refused, __0_0.distcp was changed (sha256 differs); "
        "looking for the one before"
    ]
    (folder / "step-00000009" / "manifest.json").unlink()
    assert newest(tmp_path, ORIGIN, said.append) is None and "manifest.json is missing" in said[-1]


def test_a_refused_snapshot_takes_no_place(tmp_path: Path) -> None:
    """With keep = 1: 9 is refused, the stage goes on from 3 and takes one at 6, which must be the one that stays."""
    _taken(tmp_path, [3, 9], keep=2)
    folder = tmp_path / SNAPSHOTS
    (folder / "step-00000009" / "__0_0.distcp").write_bytes(b"short")
    _taken(tmp_path, [6], keep=1)
    assert [p.name for p in folder.iterdir()] == ["step-00000006"]
    last = newest(tmp_path, ORIGIN, print)
    assert last is not None and last.step == 6


def test_a_snapshot_of_another_config_or_source_is_none(tmp_path: Path) -> None:
    _taken(tmp_path, [3])
    assert newest(tmp_path, ORIGIN, print) is not None
    for change in ({"config_hash": "d"}, {"parents": {"base": "q"}}):
        assert newest(tmp_path, ORIGIN.model_copy(update=change), print) is None


def test_snapshots_are_due_by_step_and_by_clock(tmp_path: Path) -> None:
    by_step = _taken(tmp_path, [], every_steps=3)
    assert [step for step in range(8) if by_step.due(step)] == [3, 6]
    by_clock = _taken(tmp_path, [], every_s=1e-9)
    assert [step for step in range(3) if by_clock.due(step)] == [1, 2], (
        "nothing is done before the first step"
    )


def _order(cfg: config.Run) -> TaskOrder:
    return TaskOrder(open_domains(cfg), {"a": config.Mix(weight=2), "b": config.Mix()}, seed=3)


def test_the_order_of_tasks_goes_on_through_epochs_and_quarantine(tmp_path: Path) -> None:
    domain = {
        "tasks": "py://posttrain.toy.sorting:tasks?n=25",
        "rewards": [{"fn": "posttrain.rewards.answer:exact"}],
        "num_eval": 2,
    }
    stage = {"name": "x", "kind": "export", "source": "./x"}
    cfg = config.Run.model_validate(
        {"name": "t", "domains": [domain | {"name": n} for n in "ab"], "stages": [stage], "seed": 91}
    )
    order = _order(cfg)
    rewards = open_domains(cfg)["a"].rewards
    for _ in range(7):
        order.step(5)
    victim = order.more(["a"])[0][1].id
    rewards.quarantined[victim] = "why"
    state = json.loads(json.dumps(order.state()))
    expected = [[(task.id, epoch) for _, task, epoch in order.step(5)] for _ in range(20)]
    assert {epoch for step in expected for _, epoch in step} >= {1, 2, 3}
    rewards.quarantined.clear()
    again = _order(cfg)
    again.restore(state)
    assert [[(task.id, epoch) for _, task, epoch in again.step(5)] for _ in range(20)] == expected
    assert rewards.quarantined == {victim: "why"}
    rewards.quarantined.clear()


# ---- killed drivers, each a process of its own ----


def _run(out: Path, source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "tests/resume_worker.py", out, source, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _end(run: Path) -> dict[str, Any]:
    """What two runs are compared by, bit for bit."""
    ends: dict[str, Any] = {}
    for stage in ("sparse", "mixed"):
        figures = json.loads((run / stage / "summary.json").read_text())["figures"]
        ends |= {f"{stage}/state": figures["state_sha256"], f"{stage}/tokens": figures.get("mean_tokens")}
        ends[f"{stage}/weights"] = file_hash(run / stage / "model.safetensors")
    assert not list(run.glob(f"*/{SNAPSHOTS}")) and not list(run.glob(".partial-*"))
    for file in sorted((run / "mixed" / "rollouts").iterdir()):
        ends[file.name] = file_hash(file)
    assert len(ends) == 6 + STEPS
    return ends


@pytest.fixture(scope="module")
def unkilled(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unkilled")
    done = _run(out, sparse)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = Ledger(out / "r").counts()
    assert counts.trained > 100 and counts.abandoned == counts.lost == counts.duplicated == 0
    return _end(out / "r")


def _killed(sparse: Path, out: Path, point: str) -> None:
    killed = _run(out, sparse, "--kill", point)
    assert killed.returncode == -9, killed.stdout + killed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_ends_like_an_unkilled_one(
    sparse: Path, unkilled: dict[str, Any], tmp_path: Path, point: str
) -> None:
    _killed(sparse, tmp_path, point)
    done = _run(tmp_path, sparse)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("from its snapshot" in done.stdout) == (point != "trained, before the first rl snapshot")
    assert _end(tmp_path / "r") == unkilled
    counts = Ledger(tmp_path / "r").counts()
    assert counts.abandoned > 0 or point == "the 3rd rl snapshot with a manifest, not named"
    assert counts.lost == counts.duplicated == counts.unplanned == 0
    assert counts.planned == counts.trained + counts.filtered + counts.abandoned


@pytest.mark.slow
def test_without_its_random_numbers_a_resumed_run_differs(
    sparse: Path, unkilled: dict[str, Any], tmp_path: Path
) -> None:
    """The control: what the tests above compare can differ."""
    _killed(sparse, tmp_path, "generated, after 3 rl steps")
    assert _run(tmp_path, sparse, "--forget-rng").returncode == 0
    ends = _end(tmp_path / "r")
    same = {name for name in ends if ends[name] == unkilled[name]}
    assert {"sparse/state", "sparse/weights"} <= same, "that stage was complete"
    assert not {"mixed/state", "mixed/weights", f"step-{STEPS - 1:05d}.parquet"} & same


@pytest.mark.slow
def test_a_damaged_snapshot_costs_steps_but_no_bits(
    sparse: Path, unkilled: dict[str, Any], tmp_path: Path
) -> None:
    _killed(sparse, tmp_path, "planned, in the last rl step")
    folder = tmp_path / "r" / ".partial-mixed" / SNAPSHOTS
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"step-{2 * EVERY:08d}", f"step-{3 * EVERY:08d}"]
    state = folder / names[-1] / "__0_0.distcp"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    state.write_bytes(content)
    done = _run(tmp_path, sparse)
    assert f"the snapshot of step {3 * EVERY} is refused, __0_0.distcp was changed" in done.stdout
    assert f"going on after step {2 * EVERY}" in done.stdout
    assert _end(tmp_path / "r") == unkilled


@pytest.mark.slow
def test_asynchronous_snapshots_change_no_bits(
    sparse: Path, unkilled: dict[str, Any], tmp_path: Path
) -> None:
    killed = _run(tmp_path, sparse, "--asynchronous", "--kill", "planned, in the last rl step")
    assert killed.returncode == -9
    done = _run(tmp_path, sparse, "--asynchronous")
    assert done.returncode == 0 and "from its snapshot" in done.stdout, done.stdout + done.stderr
    assert _end(tmp_path / "r") == unkilled
