"""Index scores and exact top-k of new tokens against a paged cache: the selection of a decoding step, in Triton.

A program scores a span of a sequence's keys, found through the block table, with the very tile that
index_topk_triton.py scores with, and the same top-k follows, so that a step selects what the packed training
kernels select, bit for bit, in any batch, from bf16 or from e4m3. No length is read on the host: the grid is that of the
longest sequence allowed, the kernel itself writes down which keys a token sees, and the calls can be captured in a CUDA
graph. Definition: reference.paged with reference.index_scores and reference.select_topk. Next: pages.py,
paged_mla_triton.py.

Shape letters: B sequences, Q new tokens of each, N = B Q, P blocks in the pool, S tokens of a block, M blocks of
a sequence, J indexer heads, I indexer head size, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import topk_triton
from posttrain.kernels.index_topk_triton import Shape, score_tile
from posttrain.kernels.kth_triton import ordered
from posttrain.kernels.pages import Pages
from posttrain.kernels.product_triton import block, interpreted

SPANS = (2048, 1024, 512)
"""Keys that a program may score: multiples of the tile's."""
ENOUGH = 924
"""Programs from which longer spans are faster: seven a multiprocessor."""
SHAPE = Shape(queries=32, columns=64, warps=4)
"""One new token needs no wider product; tests hold that a score has the bits that the packed kernel's shape gives it."""
STAGES = 5
"""Of the loop over tiles: the blocks they are in, two tiles on their way, one in the product."""


@triton.jit
def page(table_ptr, sequence, at, there, stride_table, PAGE: tl.constexpr):
    """Block (int64) and place in it of keys `at` of a sequence; zeros where they are not there."""
    block = tl.load(table_ptr + sequence * stride_table + at // PAGE, mask=there, other=0)
    return block.to(tl.int64), tl.where(there, at % PAGE, 0)


@triton.jit
def _blocks(row_ptr, start, length, BK: tl.constexpr, PAGE: tl.constexpr):
    """Blocks (int64) of BK keys of a sequence from `start` on, a multiple of BK.

    Read one by one, since a tensor of them leaves no shared memory for a second program.
    """
    first = start // PAGE
    which = (start + tl.arange(0, BK)) // PAGE - first
    found = tl.zeros([BK], tl.int64)
    for n in tl.static_range(_num_blocks(BK, PAGE)):
        block = tl.load(row_ptr + first + n, mask=(first + n) * PAGE < length, other=0)
        found = tl.where(which == n, block.to(tl.int64), found)
    return found


@triton.constexpr_function
def _num_blocks(keys, page):
    """Blocks that hold so many keys, of which the first is a multiple of them."""
    if page % keys == 0:
        return 1
    return keys // page if keys % page == 0 else keys // page + 2


@triton.jit
def _paged_scores_kernel(
    q_ptr, pool_ptr, w_ptr, scale_ptr, table_ptr, lengths_ptr, keys_ptr, begin_ptr, end_ptr,
    stride_table, stride_block, stride_token, stride_scale_block, stride_scale_token, width,
    Q: tl.constexpr, J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr, QD: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
    INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SPAN keys of a sequence against QD of its new tokens; the first program of a token says which keys it sees."""
    sequence = (tl.program_id(0) // tl.cdiv(Q, QD)).to(tl.int64)
    first_new = tl.program_id(0) % tl.cdiv(Q, QD) * QD
    first = tl.program_id(1) * SPAN
    length = tl.load(lengths_ptr + sequence)
    row = sequence * Q + first_new
    n = tl.arange(0, QD)
    end = length - (Q - 1 - first_new - n)  # keys that each new token sees
    if first == 0:
        tl.store(begin_ptr + row + n, tl.zeros([QD], tl.int32), mask=first_new + n < Q)
        tl.store(end_ptr + row + n, tl.maximum(end, 0), mask=first_new + n < Q)
    if (first < length) & (length > K):  # with no more than K keys all are kept
        i = tl.arange(0, BI)
        nth, j = tl.arange(0, QD * BJ) // BJ, tl.arange(0, QD * BJ) % BJ
        inside = (j < J) & (first_new + nth < Q)
        q_at = (row * J + (nth * J + j)[:, None]) * I + i[None, :]
        q = tl.load(q_ptr + q_at, mask=inside[:, None] & (i < I)[None, :], other=0.0)
        w = tl.load(w_ptr + row * J + nth * J + j, mask=inside, other=0.0)
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            at = first + start + tl.arange(0, BK)
            there = at < length
            block = _blocks(table_ptr + sequence * stride_table, first + start, length, BK, PAGE)
            place = at % PAGE
            k_at = block * stride_block + place * stride_token
            k = tl.load(
                pool_ptr + k_at[:, None] + i[None, :], mask=there[:, None] & (i < I)[None, :], other=0.0
            )
            score = score_tile(k, q, w, BK, QD, BJ, INTERPRET)
            if SCALED:
                scale_at = block * stride_scale_block + place * stride_scale_token
                score *= tl.load(scale_ptr + scale_at, mask=there, other=0.0)[:, None]
            seen = (at[:, None] < end[None, :]) & (first_new + n < Q)[None, :]
            tl.store(keys_ptr + (row + n)[None, :] * width + at[:, None], ordered(score), mask=seen)


def topk(
    q_BQJI: Tensor,
    w_BQJ: Tensor,
    pages: Pages,
    num_kept: int,
    *,
    shape: Shape = SHAPE,
    select: topk_triton.Shape = topk_triton.SHAPE,
) -> Tensor:
    """Positions of the num_kept best keys of every new token: int32 [B, Q, K], ascending, -1 beyond.

    The Q new tokens are the last of each sequence, their keys in the cache already; each sees itself and what is
    before it. w is fp32 and carries every factor, the scales of q among them if it is e4m3; q has the dtype of the
    keys. Raises ValueError for what does not fit.
    """
    B, Q, J, I = q_BQJI.shape
    pool_PSI, table_BM = pages.index_PSI, pages.table_BM
    fits = pool_PSI.shape[2] == I and pool_PSI.dtype == q_BQJI.dtype and len(table_BM) == B
    if not fits or w_BQJ.shape != (B, Q, J) or w_BQJ.dtype != torch.float32:
        raise ValueError(
            f"q {tuple(q_BQJI.shape)} {q_BQJI.dtype}, keys {tuple(pool_PSI.shape)} {pool_PSI.dtype}, "
            f"w {tuple(w_BQJ.shape)} {w_BQJ.dtype} and {len(table_BM)} sequences do not fit together"
        )
    N, width = B * Q, triton.cdiv(pages.max_length, 32) * 32
    kept_NK = torch.empty(N, num_kept, dtype=torch.int32, device=q_BQJI.device)
    work = N * select.workspace(num_kept, width)
    buffer = torch.empty(N * width + work, dtype=torch.int32, device=q_BQJI.device)
    begin_N, end_N = buffer.new_empty(2, triton.cdiv(N, 4) * 4)  # both aligned: kernels are compiled once
    BJ = block(J)
    if N:
        groups = B * triton.cdiv(Q, shape.together(BJ))
        span = next((s for s in SPANS if groups * triton.cdiv(pages.max_length, s) >= ENOUGH), SPANS[-1])
        scale_PS = w_BQJ[0] if pages.scale_PS is None else pages.scale_PS  # read only where keys have scales
        _paged_scores_kernel[(groups, triton.cdiv(pages.max_length, span))](
            q_BQJI.contiguous(), pool_PSI, w_BQJ.contiguous(), scale_PS, table_BM, pages.lengths_B, buffer,
            begin_N, end_N, table_BM.stride(0), pool_PSI.stride(0), pool_PSI.stride(1),
            scale_PS.stride(0), scale_PS.stride(1), width,
            Q=Q, J=J, I=I, K=num_kept, BJ=BJ, BI=block(I), BK=shape.keys,
            QD=shape.together(BJ), SPAN=span, PAGE=pages.page, SCALED=pages.scale_PS is not None,
            INTERPRET=interpreted(), STAGES=STAGES, num_warps=shape.warps,
        )  # fmt: skip
        topk_triton.topk_rows(
            buffer, begin_N, end_N, buffer[N * width :], kept_NK,
            first_row=0, rows=N, first_key=0, width=width, shape=select,
        )  # fmt: skip
    return kept_NK.view(B, Q, num_kept)
