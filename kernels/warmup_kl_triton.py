"""The indexer's dense warm-up loss in Triton: D_KL(p || softmax(I)) over all keys a query sees, with its gradients.

V3.2-Exp Eq. 3: p is the head-mean of the main attention, which is frozen; dI = softmax(I) - p. No L x L array exists:
queries are taken in chunks, and for each chunk

1. dense_probs_triton.py writes p;
2. a pass over tiles writes the scores I and, for every pair and head, the sign of q . k: one bit;
3. a pass over rows turns both into the loss and dI;
4. two passes over tiles form the gradients. With g[t, j, s] = dI[t, s] 1[q[t, j] . k[s] > 0], which the bits give
   without the products, and head weights outside the sums over keys (as in indexer_kl_triton.py),
       dq[t, j] = w[t, j] (sum_s g k[s])     dw[t, j] = q[t, j] . (sum_s g k[s])     dk[s] = sum_tj g (w q)[t, j].

Sums over keys run in segments that begin where the query's document does, sums over queries in a fixed order: no atomic,
the same bits every time; loss, dq and dw of a query are also the same in every batch and chunk. Definition:
reference.dense_probs, reference.indexer_kl. Next: dense_probs_triton.py.

Shape letters: N queries, S keys, H heads, E head size, C its own part, P its rotary part, J indexer heads, I indexer
head size. A word holds the bits of up to 32 heads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import dense_probs_triton
from posttrain.kernels.index_topk_triton import Chunk, Ranges
from posttrain.kernels.product_triton import block, dot, interpreted, twice_relu

SEGMENT = 8192
"""Keys of one sum of dq."""
PROGRAMS = 264
"""Sums of dk that run at once: keys are few where documents are short, then the queries that see them are split."""


@dataclass(frozen=True)
class Shape:
    """Launch shape of one of the passes over tiles."""

    keys: int
    warps: int
    stages: int
    queries: int = 1


SCORES = Shape(keys=128, warps=4, stages=2, queries=32)
"""queries: of one program, one after another."""
GRAD_Q = Shape(keys=64, warps=4, stages=2, queries=2)
"""queries: together as rows of one product."""
GRAD_K = Shape(keys=128, warps=8, stages=2, queries=128)
"""queries: (query, head) pairs that one product sums over."""


@triton.jit
def _rows_of(begin_ptr, end_ptr, first_row, rows, first, BK: tl.constexpr, BQ: tl.constexpr, group):
    """First and last + 1 of rows group .. group + BQ - 1 that see one of BK keys from `first` on."""
    row = group + tl.arange(0, BQ)
    begin = tl.load(begin_ptr + first_row + row, mask=row < rows, other=0)
    end = tl.load(end_ptr + first_row + row, mask=row < rows, other=0)
    sees = (begin < first + BK) & (end > first) & (begin < end)
    return tl.min(tl.where(sees, row, 0x7FFFFFFF), 0), tl.max(tl.where(sees, row + 1, 0), 0)


@triton.jit(do_not_specialize=["first_row", "rows", "first_key", "num_keys"])
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, scores_ptr, signs_ptr, begin_ptr, end_ptr,
    first_row, rows, first_key, num_keys, width,
    J: tl.constexpr, I: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
    BK: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores and signs of BQ queries of the chunk and BK keys of its window."""
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    group = tl.program_id(1) * BQ
    first = first_key + tl.program_id(0) * BK
    start, stop = _rows_of(begin_ptr, end_ptr, first_row, rows, first, BK, BQ, group)
    if start < stop:
        i, j = tl.arange(0, BI), tl.arange(0, BJ)
        bit = tl.full([1], 1, tl.int32) << tl.arange(0, BW)
        plane = tl.arange(0, BJ // BW)
        key = (first_key + at).to(tl.int64)
        there = (at < width) & (key < num_keys)
        k = tl.load(k_ptr + key[:, None] * I + i[None, :], mask=there[:, None] & (i < I)[None, :], other=0.0)
        for local in tl.range(
            group if INTERPRET else start, group + BQ if INTERPRET else stop, num_stages=STAGES
        ):
            head = (first_row + local) * J if INTERPRET else (first_row + local).to(tl.int64) * J
            mask = (j < J) & (local < rows)
            q = tl.load(
                q_ptr + head * I + j[:, None] * I + i[None, :],
                mask=mask[:, None] & (i < I)[None, :],
                other=0.0,
            )
            w = tl.load(w_ptr + head + j, mask=mask, other=0.0)
            x = dot(k, tl.trans(q), INTERPRET)
            score = 0.5 * tl.sum(twice_relu(x) * w[None, :], 1)
            out_at = local * width.to(tl.int64) + at
            tl.store(scores_ptr + out_at, score, mask=(at < width) & (local < rows))
            positive = tl.reshape(x > 0, [BK, BJ // BW, BW])
            words = tl.sum(tl.where(positive, bit[None, None, :], 0), 2)
            signs_at = (local * (BJ // BW) + plane)[None, :] * width.to(tl.int64) + at[:, None]
            tl.store(signs_ptr + signs_at, words, mask=(at < width)[:, None] & (local < rows))


@triton.jit(do_not_specialize=["first_row", "first_key"])
def _row_kernel(
    scores_ptr, p_ptr, begin_ptr, end_ptr, weight_ptr, kl_ptr, first_row, first_key, width, BLOCK: tl.constexpr
):  # fmt: skip
    """KL of one query; dI = weight (softmax(I) mass - p) takes the place of its scores where it sees the key."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    begin = tl.load(begin_ptr + row)
    num = tl.load(end_ptr + row) - begin
    scores_ptr += local * width + (begin - first_key)
    p_ptr += local * width + (begin - first_key)
    top = tl.full([BLOCK], -1e30, tl.float32)  # every lane keeps sums of its own
    total = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < num:
        at = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + at, mask=at < num, other=float("-inf"))
        p = tl.load(p_ptr + at, mask=at < num, other=0.0)
        new = tl.maximum(top, score)
        total = total * tl.exp(top - new) + tl.exp(score - new)
        top = new
        mass += p
        logp = tl.log(tl.where(p > 0, p, 1.0))
        cross += p * (logp - tl.where(at < num, score, 0.0))
        start += BLOCK
    highest = tl.max(top, 0)
    all_total = tl.sum(total * tl.exp(top - highest), 0)
    lse = highest + tl.log(tl.where(all_total == 0, 1.0, all_total))
    all_mass = tl.sum(mass, 0)
    tl.store(kl_ptr + row, tl.where(num > 0, tl.sum(cross, 0) + all_mass * lse, 0.0))
    weight = tl.load(weight_ptr + row)
    start = 0
    while start < num:
        at = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + at, mask=at < num, other=float("-inf"))
        p = tl.load(p_ptr + at, mask=at < num, other=0.0)
        tl.store(scores_ptr + at, (tl.exp(score - lse) * all_mass - p) * weight, mask=at < num)
        start += BLOCK


@triton.jit(do_not_specialize=["first_row", "rows", "first_key"])
def _grad_q_kernel(
    k_ptr, di_ptr, signs_ptr, begin_ptr, end_ptr, part_ptr, first_row, rows, first_key, width,
    J: tl.constexpr, I: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
    BK: tl.constexpr, QD: tl.constexpr, SEGMENT: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum_s g k[s] of QD queries over one segment of keys, counted from where their document begins."""
    PLANES: tl.constexpr = BJ // BW
    i = tl.arange(0, BI)
    line = tl.arange(0, QD * PLANES)  # (query, plane)
    local = tl.program_id(0) * QD + line // PLANES
    begin = tl.load(begin_ptr + first_row + local, mask=local < rows, other=0)
    end = tl.load(end_ptr + first_row + local, mask=local < rows, other=0)
    begin = tl.where(begin < end, begin, 0x7FFFFFFF)
    acc = tl.zeros([QD * BJ, BI], tl.float32)
    document = tl.min(begin, 0)
    while document < 0x7FFFFFFF:  # once, or more often where a document ends between these queries
        mine = begin == document
        first = document + tl.program_id(1) * SEGMENT
        stop = tl.minimum(first + SEGMENT, tl.max(tl.where(mine, end, 0), 0))
        for step in tl.range(0, SEGMENT if INTERPRET else stop - first, BK, num_stages=STAGES):
            key = first + step + tl.arange(0, BK)
            k_at = key.to(tl.int64)[:, None] * I + i[None, :]
            k = tl.load(k_ptr + k_at, mask=(key < stop)[:, None] & (i < I)[None, :], other=0.0)
            at = key - first_key
            seen = mine[:, None] & (key[None, :] < tl.minimum(end, stop)[:, None])
            di = tl.load(di_ptr + local.to(tl.int64)[:, None] * width + at[None, :], mask=seen, other=0.0)
            signs_at = (tl.program_id(0).to(tl.int64) * QD * PLANES + line)[:, None] * width + at[None, :]
            words = tl.load(signs_ptr + signs_at, mask=seen, other=0)
            on = (words[:, None, :] >> tl.arange(0, BW)[None, :, None]) & 1
            g = tl.where(on != 0, di.to(k.dtype)[:, None, :], 0.0)
            acc += dot(tl.reshape(g, [QD * BJ, BK]), k, INTERPRET)
        document = tl.min(tl.where(begin > document, begin, 0x7FFFFFFF), 0)
    m = tl.arange(0, QD * BJ)
    local = tl.program_id(0) * QD + m // BJ
    head = m % BJ
    part = (tl.program_id(1) * rows + local).to(tl.int64) * J + head
    mask = ((local < rows) & (head < J))[:, None] & (i < I)[None, :]
    tl.store(part_ptr + part[:, None] * I + i[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "segments"])
def _finish_q_kernel(
    part_ptr, q_ptr, w_ptr, dq_ptr, dw_ptr, first_row, rows, segments,
    J: tl.constexpr, I: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dq and dw of one query from the sums of its segments."""
    local = tl.program_id(0).to(tl.int64)
    j, i = tl.arange(0, BJ), tl.arange(0, BI)
    mask = (j < J)[:, None] & (i < I)[None, :]
    at = j[:, None] * I + i[None, :]
    acc = tl.zeros([BJ, BI], tl.float32)
    segment = 0
    while segment < segments:
        acc += tl.load(part_ptr + (segment * rows + local) * J * I + at, mask=mask, other=0.0)
        segment += 1
    head = (first_row + local) * J
    q = tl.load(q_ptr + head * I + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + head + j, mask=j < J, other=0.0)
    tl.store(dq_ptr + head * I + at, acc * w[:, None], mask=mask)
    tl.store(dw_ptr + head + j, tl.sum(acc * q, 1), mask=j < J)


@triton.jit(do_not_specialize=["first_row", "rows", "first_key"])
def _grad_k_kernel(
    qw_ptr, di_ptr, signs_ptr, begin_ptr, end_ptr, part_ptr, first_row, rows, first_key, width,
    J: tl.constexpr, I: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
    BK: tl.constexpr, QD: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum_tj g (w q)[t, j] of BK keys over a part of the chunk's queries that see one of them, QD at a time."""
    PLANES: tl.constexpr = BJ // BW
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    key = first_key + at
    i, b = tl.arange(0, BI), tl.arange(0, BW)
    line, pair = tl.arange(0, QD * PLANES), tl.arange(0, QD * BJ)  # (query, plane), (query, head)
    first = first_key + tl.program_id(0) * BK
    start, stop = _rows_of(begin_ptr, end_ptr, first_row, rows, first, BK, ROWS, 0)
    start = tl.minimum(start, stop)  # of keys that nobody sees
    per_split = tl.cdiv(stop - start, tl.num_programs(1))
    start += tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, stop)
    acc = tl.zeros([BK, BI], tl.float32)
    for step in tl.range(0, ROWS if INTERPRET else stop - start, QD, num_stages=STAGES):
        local = (start + step + line // PLANES).to(tl.int64)
        inside = local < stop
        begin = tl.load(begin_ptr + first_row + local, mask=inside, other=0)
        end = tl.load(end_ptr + first_row + local, mask=inside, other=0)
        seen = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
        di = tl.load(di_ptr + local[None, :] * width + at[:, None], mask=seen, other=0.0)
        signs_at = (local * PLANES + line % PLANES)[None, :] * width + at[:, None]
        words = tl.load(signs_ptr + signs_at, mask=seen, other=0)
        on = (words[:, :, None] >> b[None, None, :]) & 1
        g = tl.where(on != 0, di.to(qw_ptr.dtype.element_ty)[:, :, None], 0.0)
        query, j = (start + step + pair // BJ).to(tl.int64), pair % BJ
        mask = ((j < J) & (query < stop))[:, None] & (i < I)[None, :]
        qw = tl.load(qw_ptr + (query * J + j)[:, None] * I + i[None, :], mask=mask, other=0.0)
        acc += dot(tl.reshape(g, [BK, QD * BJ]), qw, INTERPRET)
    part = (tl.program_id(1) * width + at).to(tl.int64)
    tl.store(part_ptr + part[:, None] * I + i[None, :], acc, mask=(at < width)[:, None] & (i < I)[None, :])


@dataclass(frozen=True)
class Attention:
    """The main attention, frozen: q [own | rotary] [N, H, E], k [S, H, C] of any strides, the rotary k [S, P] of all
    heads, log-sum-exp of the scaled logits fp32 [N, H] (dense_probs_triton.attention_lse where nobody has it)."""

    q_NHE: Tensor
    k_SHC: Tensor
    k_rot_SP: Tensor
    lse_NH: Tensor
    scale: float


@dataclass(frozen=True)
class Shapes:
    """Launch shapes of every pass."""

    probs: dense_probs_triton.Tiles = dense_probs_triton.TILES
    scores: Shape = SCORES
    grad_q: Shape = GRAD_Q
    grad_k: Shape = GRAD_K


def warmup_kl(
    attention: Attention,
    q_NJI: Tensor,
    k_SI: Tensor,
    w_NJ: Tensor,
    ranges: Ranges,
    weight_N: Tensor,
    *,
    shapes: Shapes = Shapes(),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL fp32 [N], and the gradients of sum(weight * KL): dq [N, J, I] in q's dtype, dk [S, I] and dw [N, J] in fp32.

    w is fp32 and carries every factor. A query without keys gives 0. The bits are always the same.
    """
    N, J, I = q_NJI.shape
    _check(attention, q_NJI, k_SI, w_NJ, ranges, weight_N)
    kl_N, dq_NJI, dw_NJ = w_NJ.new_empty(N), q_NJI.new_empty(N, J, I), w_NJ.new_empty(N, J)
    dk_SI = torch.zeros(k_SI.shape, dtype=torch.float32, device=k_SI.device)
    for chunk in ranges.wide_chunks:
        space = _Workspace.make(chunk, q_NJI)
        dense_probs_triton.chunk_probs(
            attention.q_NHE, attention.k_SHC, attention.k_rot_SP, attention.lse_NH, ranges, chunk,
            attention.scale, space.p, tiles=shapes.probs,
        )  # fmt: skip
        _loss(chunk, space, q_NJI, k_SI, w_NJ, ranges, weight_N, kl_N, shapes.scores)
        _gradients_q(chunk, space, q_NJI, k_SI, w_NJ, ranges, dq_NJI, dw_NJ, shapes.grad_q)
        _gradient_k(chunk, space, q_NJI, w_NJ, ranges, dk_SI, shapes.grad_k)
    return kl_N, dq_NJI, dk_SI, dw_NJ


def _check(
    attention: Attention, q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, ranges: Ranges, weight_N: Tensor
) -> None:
    N, J, I = q_NJI.shape
    if k_SI.shape[1] != I or k_SI.dtype != q_NJI.dtype or w_NJ.shape != (N, J) or weight_N.shape != (N,):
        raise ValueError(
            f"q {tuple(q_NJI.shape)} {q_NJI.dtype}, k {tuple(k_SI.shape)} {k_SI.dtype}, w {tuple(w_NJ.shape)} and "
            f"weights {tuple(weight_N.shape)} do not fit together"
        )
    if len(ranges.begin_N) != N or len(attention.q_NHE) != N or ranges.num_keys > len(k_SI):
        raise ValueError(
            f"{N} queries and {len(k_SI)} keys of the indexer, {len(attention.q_NHE)} queries of the attention, ranges "
            f"of {len(ranges.begin_N)} queries over {ranges.num_keys} keys"
        )
    for name, tensor in (("w", w_NJ), ("weight", weight_N), ("lse", attention.lse_NH)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous float32")
    if not (q_NJI.is_contiguous() and k_SI.is_contiguous()):
        raise ValueError("q and k of the indexer must be contiguous")


@dataclass(frozen=True)
class _Workspace:
    """What a chunk needs between its passes: 16 bytes per pair for 64 heads."""

    p: Tensor
    scores: Tensor
    """Then dI."""
    signs: Tensor

    @staticmethod
    def make(chunk: Chunk, q_NJI: Tensor) -> "_Workspace":
        cells = chunk.rows * chunk.width
        planes = _sizes(q_NJI)["BJ"] // _sizes(q_NJI)["BW"]
        p, scores = (q_NJI.new_empty(cells, dtype=torch.float32) for _ in range(2))
        return _Workspace(p, scores, q_NJI.new_empty(cells * planes, dtype=torch.int32))


def _sizes(q_NJI: Tensor) -> dict[str, int]:
    J, I = q_NJI.shape[1:]
    BJ = block(J)
    return {"J": J, "I": I, "BJ": BJ, "BI": block(I), "BW": min(32, BJ)}


def _loss(
    chunk: Chunk, space: _Workspace, q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, ranges: Ranges,
    weight_N: Tensor, kl_N: Tensor, shape: Shape,
) -> None:  # fmt: skip
    """Scores, signs, KL and dI of a chunk."""
    _scores_kernel[(triton.cdiv(chunk.width, shape.keys), triton.cdiv(chunk.rows, shape.queries))](
        q_NJI, k_SI, w_NJ, space.scores, space.signs, ranges.begin_N, ranges.end_N,
        chunk.first_row, chunk.rows, chunk.first_key, len(k_SI), chunk.width, **_sizes(q_NJI),
        BK=shape.keys, BQ=shape.queries, INTERPRET=interpreted(), STAGES=shape.stages,
        num_warps=shape.warps,
    )  # fmt: skip
    _row_kernel[(chunk.rows,)](
        space.scores, space.p, ranges.begin_N, ranges.end_N, weight_N, kl_N,
        chunk.first_row, chunk.first_key, chunk.width, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def _gradients_q(
    chunk: Chunk, space: _Workspace, q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, ranges: Ranges,
    dq_NJI: Tensor, dw_NJ: Tensor, shape: Shape,
) -> None:  # fmt: skip
    sizes = _sizes(q_NJI)
    segments = triton.cdiv(chunk.width, SEGMENT)
    part = dw_NJ.new_empty(segments * chunk.rows, *dq_NJI.shape[1:])
    _grad_q_kernel[(triton.cdiv(chunk.rows, shape.queries), segments)](
        k_SI, space.scores, space.signs, ranges.begin_N, ranges.end_N, part,
        chunk.first_row, chunk.rows, chunk.first_key, chunk.width, **sizes, BK=shape.keys, QD=shape.queries,
        SEGMENT=SEGMENT, INTERPRET=interpreted(), STAGES=shape.stages,
        num_warps=shape.warps,
    )  # fmt: skip
    _finish_q_kernel[(chunk.rows,)](
        part, q_NJI, w_NJ, dq_NJI, dw_NJ, chunk.first_row, chunk.rows, segments,
        J=sizes["J"], I=sizes["I"], BJ=sizes["BJ"], BI=sizes["BI"], num_warps=4,
    )  # fmt: skip


def _gradient_k(
    chunk: Chunk, space: _Workspace, q_NJI: Tensor, w_NJ: Tensor, ranges: Ranges, dk_SI: Tensor, shape: Shape
) -> None:
    sizes, rows = _sizes(q_NJI), slice(chunk.first_row, chunk.first_row + chunk.rows)
    qw_nJI = torch.mul(q_NJI[rows], w_NJ[rows, :, None], out=torch.empty_like(q_NJI[rows]))  # one pass
    blocks = triton.cdiv(chunk.width, shape.keys)
    splits = max(1, min(PROGRAMS // blocks, triton.cdiv(chunk.rows, 16)))
    part = dk_SI.new_empty(splits, chunk.width, dk_SI.shape[1])
    _grad_k_kernel[(blocks, splits)](
        qw_nJI, space.scores, space.signs, ranges.begin_N, ranges.end_N, part,
        chunk.first_row, chunk.rows, chunk.first_key, chunk.width, **sizes,
        BK=shape.keys, QD=max(1, shape.queries // sizes["BJ"]), ROWS=triton.next_power_of_2(chunk.rows),
        INTERPRET=interpreted(), STAGES=shape.stages, num_warps=shape.warps,
    )  # fmt: skip
    keys = min(chunk.width, len(dk_SI) - chunk.first_key)
    dk_SI[chunk.first_key : chunk.first_key + keys] += part[:, :keys].sum(0)
