"""Sparse MLA on a GPU at the sizes of real models: errors against fp64, edge rows, same bits, large offsets.

k = 2048 kept entries of 512 + 64 numbers, as in DeepSeek-V3.2; 64 and 128 heads run the Gluon kernels.
"""

import pytest
import torch
from torch import Tensor

from posttrain.kernels import sparse_mla_backward_triton as backward
from posttrain.kernels import sparse_mla_triton as forward
from posttrain.kernels.sparse_mla_backward_triton import LAUNCH, MERGED, Launch

KEPT, LATENT, SIZE = 2048, 512, 576
SCALE = SIZE**-0.5
REPEATS = 200


def _normal(*shape: int, seed: int) -> Tensor:
    make = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)


def _slots(num: int, keys: int, kept: int = KEPT) -> Tensor:
    """Rows of every kind; the last key is in none of them."""
    make = torch.Generator(device="cuda").manual_seed(num)
    chosen = torch.rand(num, keys - 1, generator=make, device="cuda").topk(kept, dim=-1).indices
    slots = chosen.sort(-1).values.int()
    slots[0, 100:] = -1
    slots[1, 1:] = -1
    slots[2, ::3] = -1
    slots[3] = -1
    slots[4, 64:128] = -1
    slots[5, : kept // 2] = -1
    slots[6, 1] = slots[6, 0]
    slots[7, 5] = keys + 9
    return slots


def _definition(q: Tensor, kv: Tensor, slots: Tensor, do: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    q, kv = (x.detach().to(dtype).requires_grad_() for x in (q, kv))
    valid = (slots >= 0) & (slots < len(kv))
    entries = kv[torch.where(valid, slots, 0).long()]
    logits = (q @ entries.transpose(1, 2)).to(torch.promote_types(dtype, torch.float32)) * SCALE
    probs = logits.masked_fill(~valid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    o = probs.to(dtype) @ entries[..., :LATENT]
    dq, dkv = torch.autograd.grad(o, (q, kv), do.to(dtype))
    return {"o": o.detach(), "dq": dq, "dkv": dkv, "p": probs.mean(1).detach()}


def _terms_of_dq(q: Tensor, kv: Tensor, slots: Tensor, do: Tensor) -> Tensor:
    """Per row, the size of what cancels in dQ = scale sum_j P_j (dP_j - delta) K_j: with one kept key all of it does."""
    q, kv, do = (x.double() for x in (q, kv, do))
    valid = (slots >= 0) & (slots < len(kv))
    entries = kv[torch.where(valid, slots, 0).long()]
    logits = (q @ entries.transpose(1, 2) * SCALE).masked_fill(~valid[:, None], float("-inf"))
    probs = logits.softmax(-1).nan_to_num(0.0)
    dp = do @ entries[..., :LATENT].transpose(1, 2)
    delta = (probs * dp).sum(-1, keepdim=True)
    sizes = probs * (dp.abs() + delta.abs()) * entries.norm(dim=-1)[:, None]
    return SCALE * sizes.sum(-1).norm(dim=1)


def _ours(
    q: Tensor, kv: Tensor, slots: Tensor, do: Tensor, *, deterministic: bool, launch: Launch = LAUNCH
) -> dict[str, Tensor]:
    o, lse = forward.forward(q, kv, slots, SCALE, LATENT)
    dq, dkv, p = backward.backward(
        q, kv, slots, o, lse, do, SCALE, deterministic=deterministic, with_target=True, launch=launch
    )
    assert p is not None
    return {"o": o, "lse": lse, "dq": dq, "dkv": dkv, "p": p}


@pytest.mark.parametrize("heads", [4, 16, 40, 64, 128])
@pytest.mark.parametrize("kept", [130, KEPT])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_error_is_at_most_twice_that_of_bf16_per_tensor_and_row(
    heads: int, kept: int, deterministic: bool
) -> None:
    num, keys = 40, 3000
    q, kv, do = (
        _normal(num, heads, SIZE, seed=0),
        _normal(keys, SIZE, seed=1),
        _normal(num, heads, LATENT, seed=2),
    )
    slots = _slots(num, keys, kept)
    clean = kv.clone()
    kv[keys - 1] = float("nan")  # nobody keeps it
    ours = _ours(q, kv, slots, do, deterministic=deterministic)
    exact = _definition(q, clean, slots, do, torch.float64)
    rough = _definition(q, clean, slots, do, torch.bfloat16)
    for name, true in exact.items():
        error, allowed = (ours[name].double() - true).flatten(1), (rough[name].double() - true).flatten(1)
        assert error.norm() <= 2 * allowed.norm(), name
        rows = true.flatten(1).norm(dim=1)
        # A row that bf16 happens to get right may still be off by bf16's own step, 2^-8; where terms cancel, by that of
        # fp32 times their size.
        terms = _terms_of_dq(q, clean, slots, do) if name == "dq" else rows.square().mean().sqrt()
        floor = 2**-8 * rows + 2**-21 * terms
        assert (error.norm(dim=1) <= 2 * allowed.norm(dim=1) + floor).all(), name
    assert ours["o"][3].eq(0).all() and ours["dq"][3].eq(0).all() and ours["lse"][3].eq(float("-inf")).all()


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_same_bits_in_every_repeat_with_dirty_memory_and_a_busy_stream(heads: int) -> None:
    num, keys = 64, 4000
    q, kv, do = (
        _normal(num, heads, SIZE, seed=0),
        _normal(keys, SIZE, seed=1),
        _normal(num, heads, LATENT, seed=2),
    )
    slots = _slots(num, keys)
    first = _ours(q, kv, slots, do, deterministic=True)
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            busy = (busy @ busy).clamp(-1, 1)
        dirty = torch.full((64 << 20,), float("nan"), device="cuda")
        del dirty  # the next allocations find it
        again = _ours(q, kv, slots, do, deterministic=True)
        assert all(torch.equal(first[name], again[name]) for name in first)
    fast = _ours(q, kv, slots, do, deterministic=False)
    assert all(torch.equal(first[name], fast[name]) for name in ("o", "lse", "dq", "p"))


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_query_has_the_same_bits_alone_in_a_pack_and_in_another_chunk(
    monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    num, keys = 50, 4000
    q, kv, do = (
        _normal(num, heads, SIZE, seed=0),
        _normal(keys, SIZE, seed=1),
        _normal(num, heads, LATENT, seed=2),
    )
    slots = _slots(num, keys)
    together = _ours(q, kv, slots, do, deterministic=False)
    monkeypatch.setattr(backward, "WORKSPACE_BYTES", 2 * 2 * 2 * heads * KEPT * 7)  # seven queries at a time
    chunked = _ours(q, kv, slots, do, deterministic=False)
    for row in (9, 49):
        alone = _ours(
            *(x[row : row + 1] for x in (q,)),
            kv,
            slots[row : row + 1],
            do[row : row + 1],
            deterministic=False,
        )
        for name in ("o", "lse", "dq", "p"):
            assert torch.equal(together[name], chunked[name])
            assert torch.equal(alone[name][0], together[name][row]), name


@pytest.mark.parametrize("heads", [4, 16, 32, 64])
def test_merged_gradients_of_entries_are_those_that_are_not(
    monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """Neighbours that share most entries, an odd last query, an empty row of NaN beside one that is not."""
    num, keys = 41, 3000
    q, kv = _normal(num, heads, SIZE, seed=0), _normal(keys, SIZE, seed=1)
    do, slots = _normal(num, heads, LATENT, seed=2), _slots(num, keys)
    q[3], do[3] = float("nan"), float("nan")
    slots[2] = slots[8]
    merged = _ours(q, kv, slots, do, deterministic=False, launch=Launch(merged=MERGED))
    monkeypatch.setattr(backward.gluon, "MERGED_HEADS", 0)
    plain = _ours(q, kv, slots, do, deterministic=False)
    assert plain["dkv"].isfinite().all() and torch.equal(merged["dq"], plain["dq"])
    assert (merged["dkv"] - plain["dkv"]).norm() <= 1e-5 * plain["dkv"].norm()


def test_offsets_beyond_2_to_the_31_and_more_queries_than_a_grid_has_rows() -> None:
    heads, num = 128, 70_000  # 5.2e9 numbers in q
    q = torch.zeros(num, heads, SIZE, device="cuda", dtype=torch.bfloat16)
    kv = torch.zeros(4_000_000, SIZE, device="cuda", dtype=torch.bfloat16)  # 2.3e9 numbers
    q[-3:], kv[-5000:] = _normal(3, heads, SIZE, seed=0), _normal(5000, SIZE, seed=1)
    kept = 64
    slots = (
        torch.arange(4_000_000 - kept, 4_000_000, device="cuda", dtype=torch.int32)
        .expand(num, -1)
        .contiguous()
    )
    o, lse = forward.forward(q, kv, slots, SCALE, LATENT)
    few_q, few_kv, few_slots = q[-3:].contiguous(), kv[-5000:].clone(), slots[-3:] - (4_000_000 - 5000)
    few_o, few_lse = forward.forward(few_q, few_kv, few_slots, SCALE, LATENT)
    assert torch.equal(o[-3:], few_o) and torch.equal(lse[-3:], few_lse)
    few_do = _normal(3, heads, LATENT, seed=2)
    do = torch.zeros_like(o)
    do[-3:] = few_do
    dq, dkv, _ = backward.backward(q, kv, slots, o, lse, do, SCALE, deterministic=True, with_target=False)
    few_dq, few_dkv, _ = backward.backward(
        few_q, few_kv, few_slots, few_o, few_lse, few_do, SCALE, deterministic=True, with_target=False
    )
    assert torch.equal(dq[-3:], few_dq)
    torch.testing.assert_close(dkv[-kept:], few_dkv[-kept:])  # the other queries add zeros
