"""The indexer's kernels on a GPU at the sizes of DeepSeek-V3.2: exact selections, errors against fp64, same bits, large offsets.

64 heads of size 128, k = 2048.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from posttrain.kernels import fp8_triton, index_topk_triton, reference, topk_triton
from posttrain.kernels.dense_probs_triton import attention_lse
from posttrain.kernels.index_topk_triton import key_ranges, packed, topk
from posttrain.kernels.indexer_kl_triton import indexer_kl
from posttrain.kernels.warmup_kl_triton import Attention, warmup_kl

HEADS, SIZE, KEPT = 64, 128, 2048
REPEATS = 200


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    make = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=make, device="cuda", dtype=dtype)


def _index(num: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    w = _normal(num, HEADS, seed=2, dtype=torch.float32) * (HEADS * SIZE) ** -0.5
    return _normal(num, HEADS, SIZE, seed=0), _normal(keys, SIZE, seed=1), w


def _always_the_same(run: Callable[[], tuple[Tensor, ...]], repeats: int = REPEATS) -> None:
    """Bits of every result, with memory that was NaN and a second stream that is busy."""
    first = run()
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(repeats):
        with torch.cuda.stream(other):
            busy = (busy @ busy).clamp(-1, 1)
        dirty = torch.full((256 << 20,), float("nan"), device="cuda")
        del dirty  # the next allocations find it
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def _close(ours: tuple[Tensor, ...], exact: list[Tensor], rough: list[Tensor]) -> None:
    """Errors at most twice those of the bf16 definition, as a whole and per row."""
    for name, found, true, bf16 in zip(("kl", "dq", "dk", "dw"), ours, exact, rough, strict=True):
        error, allowed = ((x.double() - true).reshape(len(true), -1) for x in (found, bf16))
        assert error.norm() <= 2 * allowed.norm(), name
        rows = true.reshape(len(true), -1).norm(dim=1)
        # A row that bf16 happens to get right may still be off by bf16's own step, 2^-8.
        assert (error.norm(dim=1) <= 2 * allowed.norm(dim=1) + 2**-8 * rows).all(), name


@pytest.mark.parametrize("keys", [5000, 8250, 40_000, 140_001])
def test_selection_of_hard_rows_equals_a_stable_sort(keys: int) -> None:
    """Integers as scores have them: from those of -inf to those of inf, or that of NaN."""
    scores = torch.randint(-0x7F800001, 0x7F800001, (40, keys), device="cuda").int()
    scores[0], scores[1] = 7, torch.arange(keys, device="cuda")
    scores[2], scores[3] = -scores[1], scores[3] % 5
    scores[4, ::3] = 0x7F800000
    scores[37, ::2], scores[38, 9:], scores[39] = -(2**31), -0x7F800001, -(2**31)
    scores[5:30] = _normal(25, keys, seed=3, dtype=torch.float32).abs().view(torch.int32)
    begin, end = torch.zeros(40, dtype=torch.int32), torch.full((40,), keys, dtype=torch.int32)
    begin[30] = 11
    end[31:37] = torch.tensor([0, 1, KEPT - 1, KEPT, KEPT + 1, 4097])
    begin, end = begin.cuda(), end.cuda()
    out = torch.full((40, KEPT), -9, dtype=torch.int32, device="cuda")
    work = torch.full((40 * topk_triton.SHAPE.workspace(KEPT, keys),), -7, dtype=torch.int32, device="cuda")
    topk_triton.topk_rows(scores, begin, end, work, out, first_row=0, rows=40, first_key=0, width=keys)
    for row in range(40):
        b, e = int(begin[row]), int(end[row])
        wanted = scores[row, b:e].long().sort(descending=True, stable=True).indices[:KEPT].sort().values + b
        wanted = torch.nn.functional.pad(wanted, (0, KEPT - len(wanted)), value=-1).int()
        assert torch.equal(out[row], wanted), f"row {row}"


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
def test_scores_by_gluon_have_the_bits_of_triton(e4m3: bool, size: int, heads: int) -> None:
    """Packed documents, chunks of one of them, keys that stand apart; every cell that a query needs is written."""
    begin = torch.tensor([0] * 3000 + [3000] * 1500 + [4500] * 77, dtype=torch.int32)
    end = torch.cat(
        (torch.arange(3000) + 1, torch.arange(3000, 4500) + 1, torch.arange(9000, 9077) + 1)
    ).int()
    ranges = key_ranges(begin, end, "cuda")
    q, k = _normal(len(begin), heads, size, seed=5), _normal(9100, 2 * size, seed=6)[:, :size]
    w, scale = _normal(len(begin), heads, seed=7, dtype=torch.float32), None
    if e4m3:
        (q, w), (k, scale) = fp8_triton.quantize_e4m3(q, weight=w), fp8_triton.quantize_e4m3(k.contiguous())
        scale = torch.stack((scale, torch.full_like(scale, float("nan"))), 1)[:, 0]
    base = index_topk_triton.SHAPE if scale is None else index_topk_triton.E4M3_SHAPE
    found = []
    for gluon in (True, False):
        shape, written = replace(base, gluon=gluon), []
        for chunk in ranges.chunks:
            out = torch.full((chunk.rows, chunk.width), 7, dtype=torch.int32, device="cuda")
            index_topk_triton._write_scores(q, k, w, scale, out, ranges, chunk, 100, shape)
            rows = slice(chunk.first_row, chunk.first_row + chunk.rows)
            at = chunk.first_key + torch.arange(chunk.width, device="cuda")
            seen = (at >= ranges.begin_N[rows, None]) & (at < ranges.end_N[rows, None])
            needed = seen & (ranges.end_N - ranges.begin_N > 100)[rows, None]
            written.append(out[needed])
        found.append(torch.cat(written))
    assert torch.equal(*found) and not (found[0] == 7).any()
    assert torch.equal(
        *(topk(q, k, w, ranges, 100, k_scale_S=scale, shape=replace(base, gluon=g)) for g in (True, False))
    )


@pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
def test_topk_of_exact_sums_keeps_the_lowest_of_equal_scores(e4m3: bool) -> None:
    """Multiples of 0.5: every order of summation gives the same scores, and there are thousands of ties."""
    lengths = [3001, 1, 5000, 130]
    total = sum(lengths)
    q, k, w = _index(total, total)
    q, k = ((x.float() * 2).round().clamp(-4, 4) / 2 for x in (q, k))
    w = (_normal(total, HEADS, seed=4, dtype=torch.float32) * 2).round() / 2
    if e4m3:
        (q8, q_scale), (k8, k_scale) = fp8_triton.quantize_e4m3(q), fp8_triton.quantize_e4m3(k)
        assert torch.equal(q8.float() * q_scale[..., None], q), "these are numbers that e4m3 holds"
        found = topk(q8, k8, w * q_scale, packed(lengths, "cuda"), KEPT, k_scale_S=k_scale)
    else:
        found = topk(q.bfloat16(), k.bfloat16(), w, packed(lengths, "cuda"), KEPT)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        scores = torch.zeros(length, length, device="cuda", dtype=torch.float64)
        for head in range(HEADS):
            scores += (q[part, head].double() @ k[part].double().T).relu() * w[part, head, None].double()
        mask = torch.arange(length, device="cuda") <= torch.arange(length, device="cuda")[:, None]
        wanted = reference.select_topk(scores[None], mask[None], KEPT)[0]
        wanted = torch.nn.functional.pad(wanted, (0, KEPT - wanted.shape[1]), value=-1)
        assert torch.equal(found[part], torch.where(wanted < 0, wanted, wanted + start).int())
        start += length


def test_e4m3_equals_the_definition() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = _normal(1001, 3, SIZE, seed=0, dtype=torch.float32)
        x *= torch.exp2(_normal(1001, 3, 1, seed=1, dtype=torch.float32) * 12)
        x[0], x[1, 0, 3], x[2, 1, 0] = 0.0, float("inf"), float("nan")
        values, scale = fp8_triton.quantize_e4m3(x.to(dtype))
        wanted, wanted_scale = reference.quantize_e4m3(x.to(dtype))
        torch.testing.assert_close(scale, wanted_scale, equal_nan=True, atol=0, rtol=0)
        finite = wanted_scale.isfinite()
        assert torch.equal(values.view(torch.uint8)[finite], wanted.view(torch.uint8)[finite])


def test_topk_has_the_same_bits_always_alone_and_in_other_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [700, 9000]
    total = sum(lengths)
    q, k, w = _index(total, total)
    together = topk(q, k, w, packed(lengths, "cuda"), KEPT)
    _always_the_same(lambda: (topk(q, k, w, packed(lengths, "cuda"), KEPT),))
    monkeypatch.setattr(index_topk_triton, "CHUNK_BYTES", 1 << 20)
    assert torch.equal(topk(q, k, w, packed(lengths, "cuda"), KEPT), together)
    rows = slice(9000, 9003)
    ranges = key_ranges(torch.zeros(3), torch.arange(8301, 8304), "cuda")
    alone = topk(q[rows].contiguous(), k[700:], w[rows].contiguous(), ranges, KEPT)
    assert torch.equal(alone + 700, together[rows])


def _kl_inputs(num: int, keys: int) -> tuple[Tensor, ...]:
    q, k, w = _index(num, keys)
    chosen = torch.rand(num, keys - 1, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    slots = chosen.topk(KEPT, dim=-1).indices.sort(-1).values.int()
    slots[0, 100:], slots[1, ::3], slots[2], slots[3, 5] = -1, -1, -1, keys + 9
    valid = (slots >= 0) & (slots < keys)
    p = (_normal(num, KEPT, seed=5, dtype=torch.float32) * 2).masked_fill(~valid, float("-inf"))
    p = p.softmax(-1).nan_to_num(0.0)
    weight = torch.rand(num, generator=torch.Generator("cuda").manual_seed(2), device="cuda")
    return q, k, w, slots, p, weight


def _kl_definition(q: Tensor, k: Tensor, w: Tensor, slots: Tensor, p: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:  # fmt: skip
    q, k, w = (x.detach().to(dtype).requires_grad_() for x in (q, k, w))
    valid = (slots >= 0) & (slots < len(k))
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.einsum("nji,nki->njk", q, k[torch.where(valid, slots, 0).long()]).relu()
    scores = torch.einsum("njk,nj->nk", x.to(wide), w.to(wide))
    some = valid.any(-1)
    kl = torch.zeros(len(q), device="cuda", dtype=wide)
    kl[some] = reference.indexer_kl(p[some].to(wide), scores[some], valid[some])
    return [kl.detach(), *torch.autograd.grad((kl * weight.to(wide)).sum(), (q, k, w))]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_sparse_kl_errs_at_most_twice_as_much_as_bf16(deterministic: bool) -> None:
    inputs = _kl_inputs(40, 3000)
    exact, rough = (_kl_definition(*inputs, dtype) for dtype in (torch.float64, torch.bfloat16))
    inputs[1][2999] = float("nan")  # nobody keeps it
    found = indexer_kl(*inputs, deterministic=deterministic)
    _close(found, exact, rough)
    assert found[0][2] == 0 and found[1][2].eq(0).all() and found[3][2].eq(0).all()


def test_sparse_kl_has_the_same_bits_always_and_alone() -> None:
    inputs = _kl_inputs(300, 4000)
    _always_the_same(lambda: indexer_kl(*inputs, deterministic=True))
    together = indexer_kl(*inputs, deterministic=False)
    q, k, w, slots, p, weight = inputs
    row = slice(77, 78)
    alone = indexer_kl(q[row], k, w[row], slots[row], p[row], weight[row], deterministic=False)
    for number in (0, 1, 3):
        assert torch.equal(alone[number], together[number][row])


def _attention(num: int, keys: int, heads: int) -> Attention:
    kv = _normal(keys, heads, 256, seed=11)
    q, rotary = _normal(num, heads, 192, seed=10), _normal(keys, 64, seed=12)
    return Attention(q, kv[..., :128], rotary, torch.zeros(num, heads, device="cuda"), 192**-0.5)


def _with_lse(attention: Attention, ranges: index_topk_triton.Ranges) -> Attention:
    q, k, rotary, scale = attention.q_NHE, attention.k_SHC, attention.k_rot_SP, attention.scale
    return Attention(q, k, rotary, attention_lse(q, k, rotary, ranges, scale), scale)


@pytest.mark.parametrize("heads", [16, 128])
def test_warmup_loss_errs_at_most_twice_as_much_as_bf16(heads: int) -> None:
    lengths = [500, 1, 1300]
    total = sum(lengths)
    ranges, attention = packed(lengths, "cuda"), _attention(total, total, heads)
    q, k, w = _index(total, total)
    weight = torch.rand(total, generator=torch.Generator("cuda").manual_seed(2), device="cuda")
    attention = _with_lse(attention, ranges)
    found = warmup_kl(attention, q, k, w, ranges, weight)
    keys = torch.arange(total, device="cuda")
    mask = (keys >= ranges.begin_N[:, None]) & (keys < ranges.end_N[:, None])
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        p = torch.zeros(total, total, device="cuda", dtype=wide)
        for head in range(heads):
            keys_E = torch.cat((attention.k_SHC[:, head], attention.k_rot_SP), -1).to(dtype)
            logits = (attention.q_NHE[:, head].to(dtype) @ keys_E.T).to(wide) * attention.scale
            logits = logits.masked_fill(~mask, float("-inf"))
            if dtype == torch.float64:
                torch.testing.assert_close(
                    attention.lse_NH[:, head].double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-4
                )
            p += logits.softmax(-1) / heads
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, w)]
        scores = torch.zeros(total, total, device="cuda", dtype=wide)
        for head in range(HEADS):
            scores = scores + (leaves[0][:, head] @ leaves[1].T).relu().to(wide) * leaves[2][
                :, head, None
            ].to(wide)
        kl = reference.indexer_kl(p, scores, mask)
        results.append([kl.detach(), *torch.autograd.grad((kl * weight.to(wide)).sum(), leaves)])
    _close(found, *results)


def test_warmup_loss_has_the_same_bits_always_alone_and_in_other_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [701, 3000]
    total = sum(lengths)
    attention, (q, k, w) = _attention(total, total, 16), _index(total, total)
    weight = torch.ones(total, device="cuda")
    attention = _with_lse(attention, packed(lengths, "cuda"))
    _always_the_same(lambda: warmup_kl(attention, q, k, w, packed(lengths, "cuda"), weight), repeats=50)
    together = warmup_kl(attention, q, k, w, packed(lengths, "cuda"), weight)
    monkeypatch.setattr(index_topk_triton, "WIDE_CHUNK_BYTES", 3 << 20)
    chunked = warmup_kl(attention, q, k, w, packed(lengths, "cuda"), weight)
    row = slice(3000, 3001)
    ranges = key_ranges(torch.tensor([0]), torch.tensor([2300]), "cuda")
    part = Attention(
        attention.q_NHE[row],
        attention.k_SHC[701:],
        attention.k_rot_SP[701:],
        attention.lse_NH[row],
        attention.scale,
    )
    alone = warmup_kl(part, q[row], k[701:], w[row], ranges, weight[row])
    for number in (0, 1, 3):
        assert torch.equal(chunked[number], together[number])
        assert torch.equal(alone[number], together[number][row])
    assert torch.equal(attention_lse(part.q_NHE, part.k_SHC, part.k_rot_SP, ranges, part.scale), part.lse_NH)


def test_offsets_beyond_2_to_the_31() -> None:
    """2.2e9 numbers in the queries of the selection and in the keys of the KL."""
    num, last = 270_000, 4000
    q = torch.zeros(num, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    k, w = torch.zeros(num, SIZE, device="cuda", dtype=torch.bfloat16), torch.zeros(num, HEADS, device="cuda")
    few_q, few_k, few_w = _index(last, last)
    q[-last:], k[-last:], w[-last:] = few_q, few_k, few_w
    lengths = [2000] * ((num - last) // 2000) + [last]
    found = topk(q, k, w, packed(lengths, "cuda"), KEPT)
    few = topk(few_q, few_k, few_w, packed([last], "cuda"), KEPT)
    assert torch.equal(found[-last:], torch.where(few < 0, few, few + num - last))
    del q, k, w
    slots = few[-300:] + 17_000_000
    many = torch.zeros(17_000_000 + last, SIZE, device="cuda", dtype=torch.bfloat16)
    many[17_000_000:] = few_k
    p = _normal(300, KEPT, seed=5, dtype=torch.float32).softmax(-1)
    weight = torch.ones(300, device="cuda")
    args = few_q[-300:], few_w[-300:]
    wanted = indexer_kl(args[0], few_k, args[1], few[-300:], p, weight, deterministic=True)
    ours = indexer_kl(args[0], many, args[1], slots, p, weight, deterministic=True)
    assert all(torch.equal(wanted[n], ours[n]) for n in (0, 1, 3))
    assert torch.equal(wanted[2], ours[2][17_000_000:])
