"""Every launch of a kernel at the sizes of real models: what test_compile.py compiles for a GPU that is not there.

A row calls the kernel's public function on small CPU tensors whose *compile-time* sizes are real (heads, entry,
kept keys); compile_worker.py compiles what it launches and launches nothing. Add a row per new function, size or
dtype. Imports Triton's kernels, so only the worker imports this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.kernels import (
    dsa,
    index_topk_triton,
    indexer_kl_triton,
    sparse_mla_backward_triton,
    sparse_mla_triton,
)
from posttrain.kernels.index_topk_triton import key_ranges
from posttrain.kernels.pages import Pages

KEPT = 2048
LATENT, ROTARY = 512, 64
INDEX_HEADS, INDEX_SIZE = 64, 128
QUERIES, SLOTS = 16, 4096


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call, and the bytes per thread that its kernels may spill from registers, by kernel (others: 0)."""

    call: Callable[[], object]
    spill: Mapping[str, int] = field(default_factory=dict)


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _slots() -> Tensor:
    return torch.zeros(QUERIES, KEPT, dtype=torch.int32)


def _sparse_forward(heads: int) -> None:
    q, kv = _bf16(QUERIES, heads, LATENT + ROTARY), _bf16(SLOTS, LATENT + ROTARY)
    sparse_mla_triton.forward(q, kv, _slots(), 0.1, LATENT)


def _sparse_backward(heads: int, *, deterministic: bool, with_target: bool) -> None:
    q, kv = _bf16(QUERIES, heads, LATENT + ROTARY), _bf16(SLOTS, LATENT + ROTARY)
    o, lse = _bf16(QUERIES, heads, LATENT), torch.zeros(QUERIES, heads)
    sparse_mla_backward_triton.backward(
        q, kv, _slots(), o, lse, o, 0.1, deterministic=deterministic, with_target=with_target
    )


def _index() -> tuple[Tensor, Tensor, Tensor]:
    q, k = _bf16(QUERIES, INDEX_HEADS, INDEX_SIZE), _bf16(SLOTS, INDEX_SIZE)
    return q, k, torch.zeros(QUERIES, INDEX_HEADS)


def _topk() -> None:
    begin = torch.zeros(QUERIES, dtype=torch.int32)
    index_topk_triton.topk(*_index(), key_ranges(begin, begin + SLOTS, "cpu"), KEPT)


def _indexer_kl(*, deterministic: bool) -> None:
    p, weight = torch.zeros(QUERIES, KEPT), torch.zeros(QUERIES)
    indexer_kl_triton.indexer_kl(*_index(), _slots(), p, weight, deterministic=deterministic)


def _pages() -> Pages:
    pool = _bf16(QUERIES * 64, 64, LATENT + ROTARY + INDEX_SIZE)
    table = torch.zeros(QUERIES, 64, dtype=torch.int32)
    entries, keys = pool.split([LATENT + ROTARY, INDEX_SIZE], -1)
    return Pages(entries, keys, table, table[:, 0].contiguous(), SLOTS)


def _decode(heads: int, new: int) -> None:
    q = _bf16(QUERIES, new, heads, LATENT + ROTARY)
    q_index, w = _bf16(QUERIES, new, INDEX_HEADS, INDEX_SIZE), torch.zeros(QUERIES, new, INDEX_HEADS)
    dsa.decode(q, q_index, w, _pages(), num_kept=KEPT, scale=0.1, value_size=LATENT)


LAUNCHES: dict[str, Launch] = {
    **{f"sparse forward, {h} heads": Launch(call=lambda h=h: _sparse_forward(h)) for h in (128, 64, 16)},
    **{
        f"sparse backward, {h} heads": Launch(
            call=lambda h=h: _sparse_backward(h, deterministic=False, with_target=True)
        )
        for h in (128, 64, 16)
    },
    "sparse backward, 128 heads, deterministic, no target": Launch(
        call=lambda: _sparse_backward(128, deterministic=True, with_target=False)
    ),
    **{
        f"decoding, {h} heads, {new} new": Launch(call=lambda h=h, new=new: _decode(h, new))
        for h, new in ((128, 1), (64, 2), (16, 1))
    },
    "index scores and top-k": Launch(call=_topk, spill={"_topk_kernel": 16}),
    "indexer KL": Launch(call=lambda: _indexer_kl(deterministic=False), spill={"_kernel": 64}),
    "indexer KL, deterministic": Launch(call=lambda: _indexer_kl(deterministic=True), spill={"_kernel": 400}),
}
