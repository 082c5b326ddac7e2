"""What holds for every test: no network, no telemetry, one thread per process (two cores are few)."""

import os

# Before anything imports torch, datasets or Ray; processes that a test starts inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when a kernel is defined


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Tensor.new_empty allocates is NaN, or -1 in workspaces of integers."""
    make = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = make(self, *args, **kwargs)  # type: ignore[arg-type,call-overload]
        return out.fill_(float("nan") if out.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def selected_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of every launch of the packed selection, as they come."""
    from posttrain.kernels import index_topk_triton  # after the environment above is set

    rows: list[int] = []
    topk = index_topk_triton.topk

    def watched(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(len(q))
        return topk(q, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(index_topk_triton, "topk", watched)
    return rows
