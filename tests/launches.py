"""Every launch of a kernel at the sizes of real models: what test_compile.py compiles for a GPU that is not there.

A row calls the kernel's public function on small CPU tensors whose *compile-time* sizes are real (heads, entry,
kept keys); compile_worker.py compiles what it launches and launches nothing. Add a row per new function, size or
dtype. Imports Triton's kernels, so only the worker imports this.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.kernels import (
    copy_triton,
    dense_probs_triton,
    dsa,
    e4m3,
    experts_triton,
    fp8_triton,
    heads_triton,
    index_topk_triton,
    indexer_kl_triton,
    invariant_triton,
    logprob_triton,
    norm_triton,
    paged_mla_triton,
    rope_triton,
    sparse_mla_backward_triton,
    sparse_mla_triton,
    warmup_kl_triton,
)
from posttrain.kernels.index_topk_triton import key_ranges
from posttrain.kernels.pages import Pages
from posttrain.model.entry import Entry

KEPT = 2048
LATENT, ROTARY = 512, 64
OWN, VALUE = 128, 128
"""A head's own part and its value, in multi-head form."""
INDEX_HEADS, INDEX_SIZE = 64, 128
QUERIES, SLOTS = 16, 4096


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call."""

    call: Callable[[], object]
    spill: int = 16
    """Bytes per thread that any of its kernels may keep on the stack: registers that did not suffice."""
    again: Callable[[], object] = lambda: None
    """Calls that must compile nothing more: that would be a stall in the middle of a run."""


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _slots() -> Tensor:
    return torch.zeros(QUERIES, KEPT, dtype=torch.int32)


def _sparse_forward(heads: int) -> None:
    q, kv = _bf16(QUERIES, heads, LATENT + ROTARY), _bf16(SLOTS, LATENT + ROTARY)
    sparse_mla_triton.forward(q, kv, _slots(), 0.1, LATENT)


def _sparse_backward(heads: int, *, deterministic: bool, with_target: bool, merged: bool = False) -> None:
    q, kv = _bf16(QUERIES, heads, LATENT + ROTARY), _bf16(SLOTS, LATENT + ROTARY)
    o, lse = _bf16(QUERIES, heads, LATENT), torch.zeros(QUERIES, heads)
    launch = sparse_mla_backward_triton.LAUNCH
    if merged:
        launch = replace(launch, merged=sparse_mla_backward_triton.MERGED)
    sparse_mla_backward_triton.backward(
        q, kv, _slots(), o, lse, o, 0.1, deterministic=deterministic, with_target=with_target, launch=launch
    )


def _index() -> tuple[Tensor, Tensor, Tensor]:
    q, k = _bf16(QUERIES, INDEX_HEADS, INDEX_SIZE), _bf16(SLOTS, INDEX_SIZE)
    return q, k, torch.zeros(QUERIES, INDEX_HEADS)


def _topk() -> None:
    begin = torch.zeros(QUERIES, dtype=torch.int32)
    index_topk_triton.topk(*_index(), key_ranges(begin, begin + SLOTS, "cpu"), KEPT)


def _few_and_small_heads() -> None:
    begin = torch.zeros(QUERIES, dtype=torch.int32)
    ranges = key_ranges(begin, begin + SLOTS, "cpu")
    q, k, w = _bf16(QUERIES, 32, 64), _bf16(SLOTS, 64), torch.zeros(QUERIES, 32)
    index_topk_triton.topk(q, k, w, ranges, KEPT)
    q8, k8 = (x.to(torch.float8_e4m3fn) for x in (q, k))
    index_topk_triton.topk(q8, k8, w, ranges, KEPT, k_scale_S=torch.zeros(SLOTS))


def _indexer_kl(*, deterministic: bool) -> None:
    p, weight = torch.zeros(QUERIES, KEPT), torch.zeros(QUERIES)
    indexer_kl_triton.indexer_kl(*_index(), _slots(), p, weight, deterministic=deterministic)


def _warmup(heads: int) -> None:
    begin = torch.zeros(QUERIES, dtype=torch.int32)
    ranges = key_ranges(begin, begin + SLOTS, "cpu")
    q, kv, k_rot = _bf16(QUERIES, heads, OWN + ROTARY), _bf16(SLOTS, heads, OWN + VALUE), _bf16(SLOTS, ROTARY)
    keys = (kv[..., :OWN], k_rot)
    lse = dense_probs_triton.attention_lse(q, *keys, ranges, 0.1)
    attention = warmup_kl_triton.Attention(q, *keys, lse, 0.1)
    warmup_kl_triton.warmup_kl(attention, *_index(), ranges, torch.zeros(QUERIES))


def _experts(width: int) -> None:
    rows, weights, at = _bf16(QUERIES, 2 * width), torch.zeros(QUERIES // 8, 8), torch.zeros(QUERIES).long()
    experts_triton.gate_backward_(rows, experts_triton.gate(rows, weights, at), weights, at)
    experts_triton.sum_rows(rows, at, QUERIES // 8)
    experts_triton.zero_unused_(_bf16(8, width, width), torch.zeros(8, dtype=torch.int32))


def _keys(heads: int) -> None:
    kv, k_rot = _bf16(2, 8, heads, OWN + VALUE).requires_grad_(), _bf16(2, 8, ROTARY).requires_grad_()
    keys, values = heads_triton.keys_and_values(kv, k_rot, OWN)
    torch.autograd.backward((keys, values), (torch.zeros_like(keys), torch.zeros_like(values)))


def _target_logprobs(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 129_280, dtype=dtype, requires_grad=True)
    logprob_triton.target_logprobs(logits, torch.zeros(3).long(), 1.0).sum().backward()


def _norm(size: int) -> None:
    x, weight = _bf16(16, size).requires_grad_(), _bf16(size).requires_grad_()
    norm_triton.rms_norm(x, weight, 1e-6).sum().backward()


def _quantized_topk() -> None:
    q, k, w = _index()
    (q, _), (k, scale) = (fp8_triton.quantize_e4m3(x) for x in (q, k))
    begin = torch.zeros(QUERIES, dtype=torch.int32)
    index_topk_triton.topk(q, k, w, key_ranges(begin, begin + SLOTS, "cpu"), KEPT, k_scale_S=scale)


def _pages(sequences: int) -> Pages:
    pool = _bf16(64, 64, LATENT + ROTARY + INDEX_SIZE)
    table = torch.zeros(sequences, 64, dtype=torch.int32)
    entries, keys = pool.split([LATENT + ROTARY, INDEX_SIZE], -1)
    return Pages(entries, keys, table, table[:, 0].contiguous(), SLOTS)


def _decode(heads: int, new: int, sequences: int) -> None:
    q = _bf16(sequences, new, heads, LATENT + ROTARY)
    q_index, w = _bf16(sequences, new, INDEX_HEADS, INDEX_SIZE), torch.zeros(sequences, new, INDEX_HEADS)
    dsa.decode(q, q_index, w, _pages(sequences), num_kept=KEPT, scale=0.1, value_size=LATENT, max_rows=len(q))


def _decode_in_one_part() -> None:
    q, kept = _bf16(QUERIES, 1, 64, LATENT + ROTARY), torch.zeros(QUERIES, 1, KEPT, dtype=torch.int32)
    paged_mla_triton.attend(q, _pages(QUERIES), kept, 0.1, LATENT, part=KEPT)


def _in_fp32() -> None:
    """A small model in fp32: every product in three TF32 products."""
    q, kv = torch.zeros(QUERIES, 4, 64), torch.zeros(SLOTS, 64)
    o, lse = torch.zeros(QUERIES, 4, 48), torch.zeros(QUERIES, 4)
    slots, begin = torch.zeros(QUERIES, 64, dtype=torch.int32), torch.zeros(QUERIES, dtype=torch.int32)
    index = torch.zeros(QUERIES, 4, 32), torch.zeros(SLOTS, 32), torch.zeros(QUERIES, 4)
    sparse_mla_triton.forward(q, kv, slots, 0.1, 48)
    sparse_mla_backward_triton.backward(q, kv, slots, o, lse, o, 0.1, deterministic=False, with_target=True)
    index_topk_triton.topk(*index, key_ranges(begin, begin + SLOTS, "cpu"), 64)
    p, weight = torch.zeros(QUERIES, 64), torch.zeros(QUERIES)
    indexer_kl_triton.indexer_kl(*index, slots, p, weight, deterministic=False)


def _invariant(dtype: torch.dtype) -> None:
    weight = torch.zeros(1, 4096, 7168, dtype=dtype)
    invariant_triton.product(torch.zeros(1, QUERIES, 7168, dtype=dtype), weight.transpose(1, 2))


def _decode_from_e4m3(new: int, sequences: int) -> None:
    entry = Entry(latent=LATENT + ROTARY, index=INDEX_SIZE, e4m3=True)
    pool = _bf16(sequences * 64, 64, entry.width(2))
    pool[0, 0, entry.latent :] = e4m3.pack(_bf16(1, INDEX_SIZE), entry.stored(2), by_triton=True)
    keys, scale = e4m3.unpack(pool[..., entry.latent :], entry.index)
    table = torch.zeros(sequences, 64, dtype=torch.int32)
    pages = Pages(pool[..., : entry.latent], keys, table, table[:, 0].contiguous(), SLOTS, scale)
    q, q_index = _bf16(sequences, new, 64, LATENT + ROTARY), _bf16(sequences, new, INDEX_HEADS, INDEX_SIZE)
    w = torch.zeros(sequences, new, INDEX_HEADS)
    dsa.decode(q, q_index, w, pages, num_kept=KEPT, scale=0.1, value_size=LATENT, max_rows=len(q))


def _rotations() -> None:
    """Of queries, index queries and keys: in place, to another place, for training."""
    turns = torch.zeros(QUERIES, ROTARY // 2, dtype=torch.complex64)
    q, q_index, entries = (
        _bf16(QUERIES, 64, OWN + ROTARY),
        _bf16(QUERIES, 64, INDEX_SIZE),
        _bf16(QUERIES, 576),
    )
    for x, start, halves in ((q, OWN, False), (q_index, 0, True), (entries[:, LATENT:], 0, False)):
        rope_triton.rotate(x, turns, start=start, halves=halves, overwrite=True)
        leaf = x.detach().requires_grad_()
        rope_triton.rotate(leaf, turns, start=start, halves=halves, overwrite=False).backward(x)
    rope_triton.rotate_into(_bf16(QUERIES, 64, LATENT + ROTARY)[..., LATENT:], q[..., OWN:], turns)


def _copies(num: int) -> None:
    """Entries and e4m3 keys to a pool and back, keys of heads."""
    pool, slots = _bf16(8, 64, LATENT + ROTARY + 80), torch.zeros(num, dtype=torch.int64)
    for part in (pool[..., : LATENT + ROTARY], pool[..., LATENT + ROTARY :]):
        copy_triton.write(part, slots, _bf16(num, part.shape[2]))
        copy_triton.read(part, slots)
    copy_triton.keys(_bf16(num, 64, OWN + VALUE)[..., :OWN], _bf16(num, LATENT + ROTARY)[:, LATENT:])


def _passes(heads: int, sizes: tuple[tuple[int, int], ...]) -> None:
    """With so many queries and keys."""
    turns = torch.zeros(QUERIES, ROTARY // 2, dtype=torch.complex64)
    for num, slots in sizes:
        q, kv = _bf16(num, heads, LATENT + ROTARY), _bf16(slots, LATENT + ROTARY)
        kept = torch.zeros(num, KEPT, dtype=torch.int32)
        o, lse = sparse_mla_triton.forward(q, kv, kept, 0.1, LATENT)
        sparse_mla_backward_triton.backward(
            q, kv, kept, o, lse, o, 0.1, deterministic=False, with_target=True
        )
        rope_triton.rotate(q, turns[:num], start=LATENT, halves=False, overwrite=True)
        q_index, _ = fp8_triton.quantize_e4m3(_bf16(num, INDEX_HEADS, INDEX_SIZE))
        w = torch.zeros(num, INDEX_HEADS)
        keys, k_scale = e4m3.unpack(e4m3.pack(_bf16(slots, INDEX_SIZE), 80, by_triton=True), INDEX_SIZE)
        begin = torch.zeros(num, dtype=torch.int32)
        ranges = key_ranges(begin, begin + slots, "cpu")
        out = torch.zeros(num * ranges.chunks[0].width, dtype=torch.int32)
        index_topk_triton._write_scores(
            q_index, keys, w, k_scale, out, ranges, ranges.chunks[0], KEPT, index_topk_triton.E4M3_SHAPE
        )


LAUNCHES: dict[str, Launch] = {
    **{
        f"passes of any size, {h} heads": Launch(
            call=lambda h=h: _passes(h, ((QUERIES, SLOTS),)),
            again=lambda h=h: _passes(h, ((15, 4001), (1, 1))),
            spill=32,
        )
        for h in (64, 16)
    },
    "copies": Launch(call=lambda: _copies(QUERIES), again=lambda: (_copies(15), _copies(1)), spill=0),
    "rotations": Launch(call=_rotations, spill=0),
    **{
        f"sparse forward, {h} heads": Launch(call=lambda h=h: _sparse_forward(h), spill=32)
        for h in (128, 64, 16)
    },
    **{
        f"sparse backward, {h} heads": Launch(
            call=lambda h=h: _sparse_backward(h, deterministic=False, with_target=True)
        )
        for h in (128, 64, 16)
    },
    **{
        f"sparse backward, {h} heads, merged": Launch(
            call=lambda h=h: _sparse_backward(h, deterministic=False, with_target=True, merged=True)
        )
        for h in (32, 16, 4)
    },
    "sparse backward, 128 heads, deterministic, no target": Launch(
        call=lambda: _sparse_backward(128, deterministic=True, with_target=False)
    ),
    **{
        f"decoding, {h} heads, {new} new, {n} sequences": Launch(
            # 64 sequences of 128 heads: where parts are put together, outside the loop over tiles
            call=lambda h=h, new=new, n=n: _decode(h, new, n),
            spill=128 if (h, n) == (128, 64) else 16,
        )
        for h, new, n in ((128, 1, 16), (64, 2, 16), (16, 1, 16), (128, 1, 64), (64, 1, 64))
    },
    "decoding in one part": Launch(call=_decode_in_one_part),
    "index scores and top-k": Launch(call=_topk),
    "scores of 32 heads of 64": Launch(call=_few_and_small_heads),
    "e4m3 scores and top-k": Launch(call=_quantized_topk),
    **{
        f"experts of {width}": Launch(call=lambda width=width: _experts(width)) for width in (512, 1536, 2048)
    },
    **{f"keys of {heads} heads": Launch(call=lambda heads=heads: _keys(heads)) for heads in (16, 128)},
    **{
        f"log-probs of targets, {dtype}": Launch(call=lambda dtype=dtype: _target_logprobs(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{f"RMS norm of {size}": Launch(call=lambda size=size: _norm(size)) for size in (512, 1536, 7168)},
    "dense warm-up, 128 heads": Launch(call=lambda: _warmup(128)),
    "all of a small model in fp32": Launch(call=_in_fp32),
    # Fewer registers than it would like, so that three share a multiprocessor: faster all the same.
    "indexer KL": Launch(call=lambda: _indexer_kl(deterministic=False), spill=96),
    "batch-invariant product": Launch(call=lambda: _invariant(torch.bfloat16)),
    "batch-invariant product, fp32": Launch(call=lambda: _invariant(torch.float32)),
    "indexer KL, deterministic": Launch(call=lambda: _indexer_kl(deterministic=True)),
    **{
        f"decoding from e4m3, {new} new, {n} sequences": Launch(
            call=lambda new=new, n=n: _decode_from_e4m3(new, n), spill=32
        )
        for new, n in ((2, 16), (1, 64))
    },
}
