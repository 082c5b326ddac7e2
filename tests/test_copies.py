"""Copies of rows by kernels: what goes where, and that nothing else is touched; gradients of the keys of heads."""

import pytest
import tiny
import torch

from posttrain.kernels import copy_triton, dense, pages, pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("num", [0, 1, 37])
def test_rows_go_to_their_slots_and_back(
    num: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """A part of a pool whose blocks and tokens stand apart, wider than one load of a row."""
    monkeypatch.setattr(pages, "has_kernel", lambda x: True)
    pool = torch.full((9, 5, 103), NAN, device=DEVICE)
    part, x = pool[:, :, 3:100], _random(num, 97, seed=1)
    slots = torch.randperm(45, generator=torch.Generator().manual_seed(2))[:num].to(DEVICE)
    pages.write(part, slots, x)
    assert int(pool.isnan().sum()) == pool.numel() - x.numel(), "nothing else"
    assert torch.equal(part[slots // 5, slots % 5], x)
    assert torch.equal(pages.read(part, slots), x)
    monkeypatch.setattr(pages, "has_kernel", lambda x: False)
    plain = torch.full_like(pool, NAN)
    pages.write(plain[:, :, 3:100], slots, x)
    assert torch.equal(plain.nan_to_num(9), pool.nan_to_num(9)) and torch.equal(pages.read(part, slots), x)


def test_rows_that_share_a_slot_leave_one_of_them() -> None:
    pool, x = torch.zeros(2, 3, 4, device=DEVICE), _random(2, 4, seed=3)
    copy_triton.write(pool, torch.tensor([4, 4], device=DEVICE), x)
    assert any(torch.equal(pool[1, 1], row) for row in x) and int((pool != 0).any(-1).sum()) == 1


@pytest.mark.parametrize(
    ("documents", "length", "heads", "own", "rotary"), [(2, 7, 3, 70, 9), (1, 1, 1, 5, 4), (3, 5, 2, 64, 64)]
)
def test_keys_of_heads(
    monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, documents: int, length: int, heads: int, own: int, rotary: int
) -> None:  # fmt: skip
    """Of views, as the model has them: own keys beside values, the rotary part at the end of an entry."""
    kv = _random(documents, length, heads, own + 6, seed=4).requires_grad_()
    entries = _random(documents, length, 11 + rotary, seed=5).requires_grad_()
    dout = _random(documents, length, heads, own + rotary, seed=6)
    runs = []
    for by_kernel in (True, False):
        monkeypatch.setattr(dense, "has_kernel", lambda x, by_kernel=by_kernel: by_kernel)
        found, values = dense.keys_and_values(kv, entries[..., 11:], own)
        assert torch.equal(values, kv[..., own:])
        runs.append((found, *torch.autograd.grad(found, (kv, entries), dout)))
    for ours, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][0].is_contiguous()


def test_what_does_not_fit_is_refused() -> None:
    pool, x, slots = (
        _random(2, 3, 4, seed=0),
        _random(5, 4, seed=1),
        torch.zeros(5, dtype=torch.int64, device=DEVICE),
    )
    for change in (
        (pool, slots[:4], x),
        (pool, slots.int(), x),
        (pool.double(), slots, x),
        (pool[..., :3], slots, x),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            copy_triton.write(*change)
    with pytest.raises(ValueError, match="last stride must be 1"):
        copy_triton.write(pool, slots, x.t().contiguous().t())
    with pytest.raises(ValueError, match="do not fit together"):
        copy_triton.keys(_random(3, 2, 4, seed=0), _random(4, 5, seed=1))


def test_a_product_in_fp32_has_the_gradients_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies without copies in fp32; here its kernel is the definition, and the gradients are ours."""
    monkeypatch.setattr(pointwise, "_product_fp32", lambda x, w: x.float() @ w.float().t())
    x, w = (_random(*shape, seed=7).bfloat16().requires_grad_() for shape in ((13, 40), (6, 40)))
    dout = _random(13, 6, seed=8)
    wanted = torch.nn.functional.linear(x.float(), w.float())
    found = pointwise._LinearFp32.apply(x, w)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out, (x, w), dout) for out in (found, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=2**-7)
    frozen = pointwise._LinearFp32.apply(x.detach(), w)
    assert torch.autograd.grad(frozen, w, dout)[0].shape == w.shape


def test_generation_counts_no_load() -> None:
    """Nobody balances the experts of an engine; a pass of the learner counts, with gradients and without."""
    model, tokens = tiny.model(), tiny.tokens(9)
    contexts = [tiny.packed([9]) for _ in range(3)]
    with torch.inference_mode():
        model(tokens, contexts[0])
    with torch.no_grad():
        model(tokens, contexts[1])
    model(tokens, contexts[2])
    for layer in model.moe_layers():
        loads = [context.records[layer].load_X for context in contexts]
        assert loads[0] is None and loads[1] is not None and loads[2] is not None
        assert torch.equal(loads[1], loads[2]) and int(loads[1].sum()) == 9 * model.config.num_experts_per_tok
