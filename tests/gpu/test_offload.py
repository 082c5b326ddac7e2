"""Parameters, gradients and moments in host memory give what they give on the device; on one GPU, and on two if there are.

python -m pytest tests/gpu/test_offload.py -q -s
"""

from pathlib import Path

import pytest
import tiny
import torch
from group_worker import OFFLOADED, Found
from ranks import LIMITS, assert_alike, distances, launch

ALONE = {
    "offloaded": "micro-batches",
    "offloaded, adamw": "adamw",
    "offloaded, muon": "muon",
    "offloaded, spread": "micro-batches",
    "offloaded, bf16": "bf16",
}
"""What a learner alone finds for the same work on the device."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def alone(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return launch(path, tmp_path_factory.mktemp("alone"), size=0, names=[*set(ALONE.values())], device="cuda")


@pytest.mark.parametrize("size", [1, 2])
def test_parameters_in_host_memory_change_nothing(
    path: Path, alone: dict[str, Found], tmp_path: Path, size: int
) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"{size} GPUs are needed")
    names = [name for name in OFFLOADED if size > 1 or "spread" not in name]
    results = launch(path, tmp_path, size=size, names=names, device="cuda")
    for name, found in results.items():
        expected = alone[ALONE[name]]
        far = distances(found, expected)
        print(f"{size} GPUs, {name:18s}" + "  ".join(f"{k} {v:.1e}" for k, v in sorted(far.items())))
        if "bf16" in name:  # up to the rounding of sums
            assert far["grad"] < 1e-2 and far["logprobs"] < 1e-2
        else:
            assert_alike(found, expected, LIMITS.get(ALONE[name], 1e-6))
