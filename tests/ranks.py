"""Learners in processes of their own, and the comparison of what one and several of them find.

Used by test_group.py on the CPU and gpu/test_ranks.py on two GPUs; the cases are those of group_worker.py.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from group_worker import Found

ROOT = Path(__file__).parents[1]
LIMITS = {"muon": 1e-3, "adamw": 1e-5, "adapters": 1e-5, "spread, three steps": 1e-5}
"""Cases of several updates, where the last bit of a gradient grows; Muon rounds to bf16 on its way."""
SHARED = (
    "one batch",
    "micro-batches",
    "recomputed",
    "kept",
    "taught",
    "gspo",
    "warm-up",
    "adapters",
    "spread experts",
)
"""Cases of ranks that share their batches."""


def launch(
    path: Path, out: Path, *, size: int, context: int = 1, names: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Found]:
    """What ranks in processes of their own find, by case; size 0 is a learner alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [str(size), str(port), path, out, str(context), device, *names]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "tests/group_worker.py", str(rank), *given],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths, "GROUP_DEVICE": device, "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(max(1, size))
    ]
    texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(texts)
    results: dict[str, Found] = torch.load(out / "results.pt")
    return results


def joined(found: Found, kind: str) -> torch.Tensor:
    """All tensors of a kind ("grad", "weight", "logprobs") as one vector, fp64."""
    return torch.cat([t.double().flatten() for name, t in sorted(found.items()) if name.startswith(kind)])


def distances(found: Found, expected: Found) -> dict[str, float]:
    """By kind, the norm of the difference in parts of the norm."""
    kinds = {key.partition("/")[0] for key in expected} - {"figure", "lm_loss"}
    pairs = {kind: (joined(found, kind), joined(expected, kind)) for kind in kinds}
    return {kind: float((ours - theirs).norm() / theirs.norm()) for kind, (ours, theirs) in pairs.items()}


def assert_alike(found: Found, expected: Found, limit: float = 1e-6) -> None:
    """Gradients, weights after the update and log-probs to a part of their norm, and every figure."""
    assert found.keys() == expected.keys() and len(found) > 20
    kinds = {key.partition("/")[0] for key in found} - {"figure"}
    if limit > 1e-6:  # a bit may choose another entry or expert for a token
        kinds -= {"logprobs"}
    for kind in kinds:
        ours, theirs = joined(found, kind), joined(expected, kind)
        assert theirs.norm() > 1e-3
        assert (ours - theirs).norm() < limit * theirs.norm(), kind
    for key in (key for key in found if key.startswith("figure")):
        assert float(found[key]) == pytest.approx(
            float(expected[key]), rel=max(2e-5, 10 * limit), abs=1e-7
        ), key
