"""A model of V3.2's attention geometry on a GPU: both backends, dense rows, repeats, memory."""

import dataclasses
from typing import Any

import pytest
import real
import torch

from posttrain.kernels.backend import TORCH, Backend
from posttrain.model.arch import DeepseekV32ForCausalLM, target_logprobs
from posttrain.model.context import PackedContext

TRITON = Backend(name="triton", reason="test", dense_rows=False)
LENGTHS = [3000, 1, 700, 2049]
"""Longer and shorter than the 2048 kept entries."""


def _run(model: DeepseekV32ForCausalLM, backend: Backend, **options: Any) -> dict[str, torch.Tensor]:
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], device="cuda")
    fields = {"attention": "sparse", "cu_seqlens_S": starts, "backend": backend} | options
    context = PackedContext(**fields)
    tokens = torch.randint(512, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).cuda()
    model.zero_grad(set_to_none=True)
    logp = target_logprobs(model(tokens, context)[:-1], tokens[1:])
    total = -logp.mean()
    for record in context.records.values():
        if record.kl is not None:
            total = total + record.kl / len(tokens)
    total.backward()
    out = {"logp": logp.detach()}
    out |= {f"kl/{n}": r.kl_value for n, r in context.records.items() if r.kl_value is not None}
    return out | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.mark.parametrize("loss", ["none", "sparse"])
@pytest.mark.parametrize("dense_rows", [False, True])
def test_the_kernels_err_at_most_twice_as_much_as_torch_in_bf16(loss: str, dense_rows: bool) -> None:
    """Errors against torch in fp32. Without experts: a token that rounding sends to another one says nothing."""
    model = real.model()
    rough = _run(model, TORCH, indexer_loss=loss)
    ours = _run(model, dataclasses.replace(TRITON, dense_rows=dense_rows), indexer_loss=loss)
    exact = _run(model.float(), TORCH, indexer_loss=loss)
    assert ours.keys() == rough.keys() == exact.keys()
    far = {
        name: (error, allowed)
        for name, true in exact.items()
        if (error := _distance(ours[name], true)) > 2 * (allowed := _distance(rough[name], true)) + 2**-8
    }
    assert not far, far


def test_warmup_agrees() -> None:
    model = real.model()
    wanted, ours = (_run(model, b, attention="dense", indexer_loss="dense") for b in (TORCH, TRITON))
    far = {name: d for name in wanted if (d := _distance(ours[name], wanted[name])) > 0.05}
    assert not far, far


def test_a_deterministic_step_has_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, exact = real.model(), dataclasses.replace(TRITON, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        first = _run(model, exact, indexer_loss="sparse")
        for _ in range(5):
            again = _run(model, exact, indexer_loss="sparse")
            assert not [name for name in first if not torch.equal(first[name], again[name])]
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_grows_with_the_tokens_only() -> None:
    model, peaks = real.model(), []
    for length in (8192, 16384):
        starts = torch.tensor([0, length], device="cuda")
        context = PackedContext(
            attention="sparse", backend=TRITON, indexer_loss="sparse", cu_seqlens_S=starts
        )
        tokens = torch.zeros(length, dtype=torch.long, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model(tokens, context, torch.tensor([length - 1], device="cuda")).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        model.zero_grad(set_to_none=True)
    assert peaks[1] < 2.2 * peaks[0]
