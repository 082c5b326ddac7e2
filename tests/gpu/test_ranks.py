"""Two GPUs do what one does, over NCCL: the cases of test_group.py, snapshots both ways, an RL run.

    python -m pytest tests/gpu/test_ranks.py -q -s --junitxml=ranks.xml       # prints, and writes, how far apart they are
    PYTHONPATH=.:tests RANKS_DEVICE=cpu python -m pytest --noconftest tests/gpu/test_ranks.py # the same lines over gloo

Every learner is a process of its own with one GPU. Of a learner alone and of two ranks each case runs once, all in one start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from group_worker import CASES, Found
from ranks import LIMITS, ROOT, SHARED, assert_alike, distances, joined, launch

from posttrain.model import checkpoint

DEVICE = os.environ.get("RANKS_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="two GPUs are needed"
)
FP32 = [name for name in CASES if name not in ("matrices", "bf16", "mixed precision")]
SNAPSHOTS = ["snapshot", "spread", "goes on", "saved"]
Note = Callable[[str, object], None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def one(path: Path, out: Path) -> dict[str, Found]:
    """What a learner alone finds; it leaves a snapshot."""
    return launch(path, out, size=0, names=[*CASES, "snapshot"], device=DEVICE)


@pytest.fixture(scope="module")
def two(path: Path, out: Path, one: dict[str, Found]) -> dict[str, Found]:
    """What two ranks find; they go on from the snapshot of one and leave their own."""
    return launch(path, out, size=2, names=[*CASES, *SNAPSHOTS], device=DEVICE)


@pytest.fixture(scope="module")
def shared(path: Path, out: Path) -> dict[str, Found]:
    """What two ranks find that share their batches."""
    return launch(path, out, size=2, context=2, names=SHARED, device=DEVICE)


def _alike(name: str, found: Found, expected: Found, limit: float, note: Note) -> None:
    far = distances(found, expected)
    note(name, far)
    print(f"{name:28s}" + "  ".join(f"{kind} {value:.1e}" for kind, value in sorted(far.items())))
    assert_alike(found, expected, limit)


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_are_one_learner(
    one: dict[str, Found], two: dict[str, Found], name: str, record_property: Note
) -> None:
    _alike(name, two[name], one[name], LIMITS.get(name, 1e-6), record_property)


@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_their_batches_are_one_learner(
    one: dict[str, Found], shared: dict[str, Found], name: str, record_property: Note
) -> None:
    expected = {key: value for key, value in one[name].items() if key != "figure/ties"}
    _alike(f"shared: {name}", shared[name], expected, LIMITS.get(name, 1e-6), record_property)


@pytest.mark.parametrize("name", ["bf16", "mixed precision"])
def test_bf16_on_two_ranks_is_that_of_one(
    one: dict[str, Found], two: dict[str, Found], name: str, record_property: Note
) -> None:
    """Gradients, up to the rounding of sums; weights move in fp32 under mixed precision and in bf16 without."""
    far = distances(two[name], one["bf16"])
    record_property(name, far)
    print(f"{name:28s}" + "  ".join(f"{kind} {value:.1e}" for kind, value in sorted(far.items())))
    assert far["grad"] < 1e-2 and far["logprobs"] < 1e-2


def test_muon_on_shards_is_muon_to_the_bit(one: dict[str, Found], two: dict[str, Found]) -> None:
    assert all(torch.equal(matrix, two["matrices"][name]) for name, matrix in one["matrices"].items())


def test_neither_ranks_nor_packing_change_a_step(one: dict[str, Found], two: dict[str, Found]) -> None:
    """One batch on one GPU against micro-batches on two: the gradients and the update of SGD."""
    far = distances(two["micro-batches"], one["one batch"])
    print(f"{'one batch, micro-batches':28s}" + "  ".join(f"{k} {v:.1e}" for k, v in sorted(far.items())))
    assert max(far[kind] for kind in ("grad", "logprobs", "weight")) < 1e-6


def test_a_snapshot_of_one_gpu_goes_on_on_two_and_back(
    path: Path, out: Path, one: dict[str, Found], two: dict[str, Found]
) -> None:
    back = launch(path, out, size=0, names=["goes on"], device=DEVICE)["goes on"]
    whole = joined(one["snapshot"], "weight")
    assert len(whole) > 10_000
    for found in (two["snapshot"], two["spread"], two["goes on"], back):
        assert (joined(found, "weight") - whole).norm() < 1e-6 * whole.norm()


def test_two_ranks_save_a_plain_checkpoint(out: Path, two: dict[str, Found]) -> None:
    loaded = checkpoint.load(out / "checkpoint").state_dict()
    assert loaded.keys() == two["saved"].keys()
    assert all(torch.equal(tensor, two["saved"][name]) for name, tensor in loaded.items())


RUN = """
import sys
from pathlib import Path
from resume_worker import recipe
from posttrain import config, pipeline

out, source, device, ranks, engines = sys.argv[1:]
data = recipe(Path(out), Path(source))
data["stages"] = [data["stages"][1] | {"source": source}]
data["cluster"] = {"device": device, "reward_workers": 1, "threads": 1, "rollout_actors": int(engines)}
data["cluster"]["sharding"] = {"ranks": int(ranks)}
pipeline.run(config.Run.model_validate(data))
"""
"""The mixed stage of resume_worker.py, with Ray's actors."""


def _run(path: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    """The metrics of the RL stage."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN, out, path, DEVICE, *options],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = map(json.loads, (out / "r" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == "mixed"]


@pytest.fixture(scope="module")
def alone(path: Path, out: Path) -> list[dict[str, Any]]:
    """The run on one GPU."""
    return _run(path, out / "alone", "1", "1")


@pytest.mark.parametrize("engines", ["1", "2"])
def test_an_rl_run_on_two_ranks_starts_like_one_on_one(
    path: Path, alone: list[dict[str, Any]], tmp_path: Path, engines: str, record_property: Note
) -> None:
    """Rollouts of the first step are those of one rank; in every step the engines have the learner's weights."""
    found = _run(path, tmp_path / "two", "2", engines)
    gaps = [row["engine/gap_max"] for row in found]
    record_property("gaps", gaps)
    print(
        f"RL, 2 ranks, {engines} engines: loss {found[0]['loss']:.3e} and {alone[0]['loss']:.3e}, gaps {max(gaps):.1e}"
    )
    assert len(found) == len(alone) == 7
    for name in ("reward", "loss", "grad_norm/model"):
        assert found[0][name] == pytest.approx(alone[0][name], rel=1e-3, abs=1e-7), name
    assert max(gaps) < 1e-3
