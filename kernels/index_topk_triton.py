"""Lightning-indexer scores and exact top-k in Triton, a chunk of queries at a time.

Scores: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]), V3.2-Exp Eq. 1. A program holds 128 keys and walks over
queries, with keys as rows of the product and heads as columns, so that the weighted sum over heads stays inside
a thread. The scores of one chunk are meant to stay in the L2 cache between the two kernels.

Top-k: one program per row finds the k-th largest score bit by bit in three histograms of 11, 11 and 10 bits,
then writes the indices in ascending order: all above it, and of those equal to it the lowest ones. There is no
atomic and no sort, so the result is the same for every batch, chunk and launch. -0.0 counts as 0.0 and NaN as
the lowest score. Definition: reference.index_scores, reference.select_topk. Next: README.md.

Shape letters: N queries, S keys, J indexer heads, I indexer head size, K kept, n queries of a chunk, W keys of
a chunk's window.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""Scores of one chunk of queries: half of an H200's L2 cache."""


@dataclass(frozen=True)
class Shape:
    """Launch shape of the score kernel."""

    keys: int = 128
    queries: int = 32
    warps: int = 4
    stages: int = 3


SHAPE = Shape()
ROW_BLOCK = 4096
"""Scores that a top-k program reads at once."""


@triton.jit
def score_tile(k, q, w, INTERPRET: tl.constexpr):
    """Scores [BK] of keys [BK, BI] for one query [BJ, BI]: every kernel's, so that all find the same bits."""
    if INTERPRET:
        products = tl.dot(k.to(tl.float32), tl.trans(q).to(tl.float32))
    else:
        products = tl.dot(k, tl.trans(q))
    return tl.sum(tl.maximum(products, 0.0) * w[None, :], 1)


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, scores_ptr, first_row, rows, first_key, num_keys, width,
    J: tl.constexpr, I: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BK keys of the window against BQ queries of the chunk."""
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    key = first_key + at
    j, i = tl.arange(0, BJ), tl.arange(0, BI)
    k = tl.load(
        k_ptr + key.to(tl.int64)[:, None] * I + i[None, :],
        mask=((at < width) & (key < num_keys))[:, None] & (i < I)[None, :], other=0.0,
    )  # fmt: skip
    begin = tl.program_id(1) * BQ
    for step in tl.range(0, BQ, num_stages=STAGES):
        local = begin + step
        there = local < rows
        row = first_row + local.to(tl.int64) if not INTERPRET else first_row + local
        q = tl.load(
            q_ptr + (row * J + j[:, None]) * I + i[None, :],
            mask=(j < J)[:, None] & (i < I)[None, :] & there, other=0.0,
        )  # fmt: skip
        w = tl.load(w_ptr + row * J + j, mask=(j < J) & there, other=0.0)
        score = score_tile(k, q, w, INTERPRET)
        tl.store(scores_ptr + local * width.to(tl.int64) + at, score, mask=(at < width) & there)


@triton.jit
def _ordered(score):
    """uint32 that orders as the scores do: -0.0 as 0.0, NaN lowest."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    key = bits ^ flip
    return tl.where(score != score, tl.zeros_like(key), key)


@triton.jit
def _rank(
    scores_ptr, begin, end, prefix, wanted, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Among the keys whose higher bits are `prefix`: the digit of the wanted-th largest, and how many lie above."""
    bins = tl.arange(0, 1 << BITS)
    counts = tl.zeros([1 << BITS], tl.int32)
    start = begin
    while start < end:
        at = start + tl.arange(0, BLOCK)
        key = _ordered(tl.load(scores_ptr + at, mask=at < end, other=0.0))
        if SHIFT + BITS < 32:
            here = (at < end) & ((key >> (SHIFT + BITS)).to(tl.int32) == prefix)
        else:
            here = at < end
        digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digit, 1 << BITS, mask=here)
        start += BLOCK
    total = tl.sum(counts, 0)
    above = total - tl.cumsum(counts, 0)  # keys with a larger digit
    digit = tl.max(tl.where(above + counts >= wanted, bins, 0), 0)
    # Several digits may qualify: the largest does, the smaller ones have it above them.
    taken = tl.sum(tl.where(bins == digit, above, 0), 0)
    return digit, taken


@triton.jit
def _topk_kernel(
    scores_ptr, begin_ptr, end_ptr, out_ptr, first_row, first_key, width,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best keys of one row."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    begin = tl.load(begin_ptr + row) - first_key
    end = tl.load(end_ptr + row) - first_key
    scores = scores_ptr + local * width
    out = out_ptr + row * K
    if end - begin <= K:
        start = 0
        while start < K:
            at = start + tl.arange(0, BLOCK)
            key = tl.where(at < end - begin, first_key + begin + at, -1)
            tl.store(out + at, key, mask=at < K)
            start += BLOCK
    else:
        high, above = _rank(scores, begin, end, 0, K, 21, 11, BLOCK)
        wanted = K - above
        middle, above = _rank(scores, begin, end, high, wanted, 10, 11, BLOCK)
        wanted -= above
        prefix = (high << 11) | middle
        low, above = _rank(scores, begin, end, prefix, wanted, 0, 10, BLOCK)
        wanted -= above  # of the keys equal to the threshold
        threshold = (prefix.to(tl.uint32) << 10) | low.to(tl.uint32)
        written = 0
        equal = 0
        start = begin
        while start < end:
            at = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(scores + at, mask=at < end, other=0.0))
            tie = (key == threshold) & (at < end)
            nth = equal + tl.cumsum(tie.to(tl.int32), 0)
            keep = ((key > threshold) & (at < end)) | (tie & (nth <= wanted))
            place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(out + place, first_key + at, mask=keep)
            written += tl.sum(keep.to(tl.int32), 0)
            equal += tl.sum(tie.to(tl.int32), 0)
            start += BLOCK


def topk(
    q_NJI: Tensor,
    k_SI: Tensor,
    w_NJ: Tensor,
    begin_N: Tensor,
    end_N: Tensor,
    num_kept: int,
    *,
    shape: Shape = SHAPE,
) -> Tensor:
    """The num_kept best keys of begin .. end - 1 for every query: int32 [N, K], ascending, -1 beyond.

    w is fp32 and carries every factor (J^-1/2, I^-1/2, scales of quantised q and k). Neighbouring queries
    should have neighbouring ranges: the window of a chunk spans them all. Reads begin and end on the host.
    """
    N, J, I = q_NJI.shape
    if k_SI.shape[1] != I or w_NJ.shape != (N, J) or w_NJ.dtype != torch.float32:
        raise ValueError(f"q {tuple(q_NJI.shape)}, k {tuple(k_SI.shape)}, w {tuple(w_NJ.shape)} {w_NJ.dtype}")
    out_NK = torch.empty(N, num_kept, dtype=torch.int32, device=q_NJI.device)
    begins, ends = begin_N.tolist(), end_N.tolist()
    buffer: Tensor | None = None
    first = 0
    while first < N:
        first_key, last_key, rows = _window(begins, ends, first)
        width = max(1, last_key - first_key)
        if buffer is None or buffer.numel() < rows * width:
            buffer = torch.empty(
                max(rows * width, CHUNK_BYTES // 4), dtype=torch.float32, device=q_NJI.device
            )
        grid = (triton.cdiv(width, shape.keys), triton.cdiv(rows, shape.queries))
        _scores_kernel[grid](
            q_NJI, k_SI, w_NJ, buffer, first, rows, first_key, len(k_SI), width,
            J=J, I=I, BJ=max(16, triton.next_power_of_2(J)), BI=max(16, triton.next_power_of_2(I)),
            BK=shape.keys, BQ=shape.queries, INTERPRET=bool(triton.knobs.runtime.interpret),
            STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip
        _topk_kernel[(rows,)](
            buffer, begin_N, end_N, out_NK, first, first_key, width, K=num_kept, BLOCK=ROW_BLOCK, num_warps=8
        )
        first += rows
    return out_NK


def topk_rows(scores_NL: Tensor, begin_N: Tensor, end_N: Tensor, out_NK: Tensor) -> None:
    """Write the best of the keys begin .. end - 1 (int32, columns of the scores) of every row, ascending, -1 beyond."""
    rows, width = scores_NL.shape
    _topk_kernel[(rows,)](
        scores_NL, begin_N, end_N, out_NK, 0, 0, width, K=out_NK.shape[1], BLOCK=ROW_BLOCK, num_warps=8
    )


def _window(begins: list[int], ends: list[int], first: int) -> tuple[int, int, int]:
    """First and last key of a chunk that starts at this query, and how many queries it takes."""
    low, high = begins[first], ends[first]
    rows = 1
    for row in range(first + 1, len(begins)):
        new_low, new_high = min(low, begins[row]), max(high, ends[row])
        if (rows + 1) * (new_high - new_low) * 4 > CHUNK_BYTES:
            break
        low, high, rows = new_low, new_high, rows + 1
    return low, high, rows
