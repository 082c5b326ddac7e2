"""Fast kernels against their definitions: values and gradients in fp64, odd sizes, chunks that end anywhere."""

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels import experts, pointwise, reference, sparse_mla

LENGTHS, H, R, P, K, SCALE = [11, 1, 23, 4], 3, 7, 4, 5, 0.3


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _document_by_document(q: torch.Tensor, entries: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    """The definition, one document at a time."""
    parts, start = [], 0
    for n, kept_BQK in zip(LENGTHS, kept, strict=True):
        rows = slice(start, start + n)
        parts.append(reference.sparse_mla(q[None, rows], entries[None, rows], kept_BQK, SCALE, R)[0][0])
        start += n
    return torch.cat(parts)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_sparse_mla_is_its_definition(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setitem(sparse_mla.CHUNK_BYTES, "cpu", chunk_bytes)
    total = sum(LENGTHS)
    q, entries = _random(total, H, R + P, seed=0), _random(total, R + P, seed=1)
    kept, slots, start = [], [], 0
    for n in LENGTHS:
        positions = torch.arange(n)[None]
        scores = _random(1, n, n, seed=n).relu()  # with ties
        kept.append(reference.select_topk(scores, reference.causal_mask(positions, n), K))
        local = F.pad(kept[-1][0], (0, K - kept[-1].shape[-1]), value=-1)
        slots.append(torch.where(local < 0, local, local + start))
        start += n
    inputs = (q.requires_grad_(), entries.requires_grad_())
    out, p = sparse_mla.sparse_mla(q, entries, torch.cat(slots), SCALE, R)
    wanted = _document_by_document(q, entries, kept)
    torch.testing.assert_close(out, wanted, atol=2e-7, rtol=0)  # probabilities are fp32
    torch.testing.assert_close(p.sum(-1), torch.ones(total), atol=1e-6, rtol=0)
    assert not p.requires_grad
    grad = _random(total, H, R, seed=5)
    ours = torch.autograd.grad(out, inputs, grad)
    for a, b in zip(ours, torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    with torch.no_grad():
        assert torch.equal(sparse_mla.sparse_mla(q, entries, torch.cat(slots), SCALE, R)[0], out)


def test_the_gradient_of_an_entry_kept_often_adds_up() -> None:
    q, entries = _random(6, 1, 3, seed=0), _random(2, 3, seed=1).requires_grad_()
    slots = torch.zeros(6, 1, dtype=torch.long)
    out, p = sparse_mla.sparse_mla(q, entries, slots, SCALE, 2)
    assert torch.equal(p, torch.ones(6, 1))
    out.sum().backward()
    assert entries.grad is not None
    wanted = torch.tensor([[6.0, 6.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(entries.grad, wanted, atol=1e-6, rtol=0)


def test_rms_norm_is_that_of_torch() -> None:
    x, weight = _random(13, 7, seed=0).requires_grad_(), _random(7, seed=1).requires_grad_()
    ours, theirs = pointwise.rms_norm(x, weight, 1e-3), F.rms_norm(x, (7,), weight, 1e-3)
    torch.testing.assert_close(ours, theirs)
    grad = _random(13, 7, seed=2)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(theirs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(pointwise.rms_norm(x, weight, 1e-3), theirs)


def test_rms_norm_keeps_bf16_and_computes_in_fp32() -> None:
    x = (1000 * _random(5, 33, seed=0)).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(_random(33, seed=1).bfloat16())
    out = pointwise.rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    wanted = F.rms_norm(x.float(), (33,), weight.float(), 1e-6)
    torch.testing.assert_close(out.float(), wanted, atol=0, rtol=2**-7)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_swiglu_is_silu_times_up() -> None:
    gate, up = _random(9, 5, seed=0).requires_grad_(), _random(9, 5, seed=1).requires_grad_()
    ours, theirs = pointwise.swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    grad = _random(9, 5, seed=2)
    for a, b in zip(
        torch.autograd.grad(ours, (gate, up), grad),
        torch.autograd.grad(theirs, (gate, up), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def _one_expert_at_a_time(x: torch.Tensor, chosen: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """The definition of run_experts, token by token."""
    weights, gate_up, down = rest
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[0])
        for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            gate, up = (x[t] @ gate_up[e]).chunk(2)
            row = row + weight * ((F.silu(gate) * up) @ down[e])
        rows.append(row)
    return torch.stack(rows)


def test_experts_are_their_definition() -> None:
    """Values and all gradients; the third expert gets no token, the matrices come transposed as in the model."""
    chosen = torch.tensor([[0, 1], [3, 0], [1, 0], [0, 3], [1, 3]])
    x, weights = _random(5, 7, seed=0).requires_grad_(), _random(5, 2, seed=1).requires_grad_()
    gate_up, down = (_random(4, *shape, seed=2).requires_grad_() for shape in ((6, 7), (7, 3)))
    inputs = (x, weights, gate_up, down)
    matrices = gate_up.transpose(1, 2), down.transpose(1, 2)
    ours = experts.run_experts(x, chosen, weights, *matrices)
    wanted = _one_expert_at_a_time(x, chosen, weights, *matrices)
    torch.testing.assert_close(ours, wanted)
    grad = _random(5, 7, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_experts_of_no_tokens_give_nothing_and_zero_gradients() -> None:
    """A rank whose experts nobody has chosen still goes backward."""
    x = torch.zeros(0, 5, requires_grad=True)
    matrices = [torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)]
    out = experts.run_experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), *matrices)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad is not None and x.grad.shape == (0, 5)
    assert all(m.grad is not None and not m.grad.any() for m in matrices)
