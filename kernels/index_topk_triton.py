"""Lightning-indexer scores and exact top-k in Triton, a chunk of queries at a time.

Scores: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]), V3.2-Exp Eq. 1, from bf16 or e4m3 with fp32 sums. A program
holds a tile of keys and walks over queries, with keys as rows of the product and heads as columns, so that the
weighted sum over heads stays inside a thread; the other programs of a multiprocessor multiply meanwhile. Tiles
that no query may see, or whose queries keep every key, are left out. What is stored are integers in the
order of the scores. Most of a chunk's are in the L2 cache still when topk_triton.py reads them.

A score depends on its query and key alone, and the order of its sum on the shapes alone: the same bits in every batch,
chunk and launch. -0.0 counts as 0.0, NaN as the lowest score, ties go to the lowest index. Definition:
reference.index_scores, reference.select_topk. Next: topk_triton.py.

Shape letters: N queries, S keys, J indexer heads, I indexer head size, K kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from posttrain.kernels import index_scores_gluon, topk_triton
from posttrain.kernels.kth_triton import ordered
from posttrain.kernels.lanes import Lanes, send
from posttrain.kernels.product_triton import block, dot, interpreted, twice_relu

CHUNK_BYTES = 44 << 20
"""Scores of one chunk of queries: 88 rows of 131,072 keys, so that two chunks keep every multiprocessor selecting."""
WIDE_CHUNK_BYTES = 64 << 20
"""Scores of one wide chunk: 128 queries of 131,072 keys."""
WIDE_CHUNK_STEP = 128
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Shape:
    """Launch shape of the score kernel."""

    keys: int = 128
    queries: int = 64
    """Queries of one program."""
    columns: int = 128
    """(query, head) pairs of one product; more than one query where it exceeds the number of heads."""
    warps: int = 8
    stages: int = 2
    gluon: bool = True
    """Take index_scores_gluon.py where it fits; it has one shape."""
    lanes: int = 2
    """Chunks under way: the selection of one runs beside the scores of the next."""

    def together(self, heads: int) -> int:
        """Queries of one product."""
        return min(self.queries, max(1, self.columns // heads))


SHAPE = Shape()
E4M3_SHAPE = Shape(queries=32, columns=64, warps=4)
"""Either loses up to a fifth with the other's type. A score has the same bits in all shapes (benchmarks/topk_shapes.py)."""


@dataclass(frozen=True)
class Chunk:
    """Queries whose scores are in memory together, and the window of keys that they see."""

    first_row: int
    rows: int
    first_key: int
    width: int


@dataclass(frozen=True)
class Ranges:
    """Keys begin .. end - 1 of every query, on the device as int32 [N], and the chunks, known to the host.

    Made once per batch, used by every layer: nobody waits for the device.
    """

    begin_N: Tensor
    end_N: Tensor
    on_host: tuple[NDArray[Any], NDArray[Any]]
    """The same two in host memory."""
    num_keys: int
    """Keys there must be at least."""

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """For the selection."""
        return _chunks(*self.on_host, CHUNK_BYTES, step=1)

    @cached_property
    def wide_chunks(self) -> tuple[Chunk, ...]:
        """For work on square tiles (warmup_kl_triton.py): more queries, where possible in multiples of a tile's."""
        return _chunks(*self.on_host, WIDE_CHUNK_BYTES, step=WIDE_CHUNK_STEP)


def key_ranges(begin_N: Tensor, end_N: Tensor, device: torch.device | str) -> Ranges:
    """Ranges from integer tensors in host memory. Neighbouring queries should have neighbouring ranges."""
    if begin_N.device.type != "cpu" or end_N.device.type != "cpu":
        raise ValueError("ranges are made on the host, from tensors in its memory")
    begin_N, end_N = begin_N.to(torch.int32), end_N.to(torch.int32)
    if begin_N.shape != end_N.shape or bool(((begin_N < 0) | (begin_N > end_N)).any()):
        raise ValueError("a range of keys needs 0 <= begin <= end")
    num_keys = int(end_N.max()) if len(end_N) else 0
    return Ranges(send(begin_N, device), send(end_N, device), (begin_N.numpy(), end_N.numpy()), num_keys)


def packed(lengths: Sequence[int], device: torch.device | str) -> Ranges:
    """Ranges of packed documents of these lengths: a query sees its document up to itself."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    begin_N = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return key_ranges(begin_N, torch.arange(1, len(begin_N) + 1), device)


def _chunks(begin_N: NDArray[Any], end_N: NDArray[Any], num_bytes: int, *, step: int) -> tuple[Chunk, ...]:
    empty_N = begin_N == end_N
    low_N = np.where(empty_N, np.iinfo(np.int32).max, begin_N).astype(np.int64)
    high_N = np.where(empty_N, 0, end_N).astype(np.int64)
    found: list[Chunk] = []
    first = 0
    while first < len(begin_N):
        # No more rows than would fit if none were wider than the first: the device waits for this.
        least = 4 * _width(high_N[first] - low_N[first])
        part = slice(first, first + min(CHUNK_ROWS, int(num_bytes // least) + 1))
        low, high = np.minimum.accumulate(low_N[part]), np.maximum.accumulate(high_N[part])
        width = _width(high - low)
        cells = width * np.arange(1, len(width) + 1)
        rows = max(1, int((cells * 4 <= num_bytes).sum()))  # cells grow with every row
        if step < rows < len(begin_N) - first:
            rows = rows // step * step
        first_key = int(low[rows - 1]) if high[rows - 1] > low[rows - 1] else 0
        found.append(Chunk(first, rows, first_key, int(width[rows - 1])))
        first += rows
    return tuple(found)


def _width(span: Any) -> Any:
    """Scores of a row that are in memory, for so many keys."""
    return (np.maximum(span, 1) + 31) // 32 * 32


@triton.jit
def _seen(
    begin_ptr, end_ptr, first_row, rows, key,
    K: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """First and last + 1 row of BQ that need the scores of BK keys from `key` on: rows that keep not all."""
    row = tl.program_id(1) * BQ + tl.arange(0, BQ)
    begin = tl.load(begin_ptr + first_row + row, mask=row < rows, other=0)
    end = tl.load(end_ptr + first_row + row, mask=row < rows, other=0)
    sees = (begin < key + BK) & (end > key) & (end - begin > K)
    return tl.min(tl.where(sees, row, 0x7FFFFFFF), 0), tl.max(tl.where(sees, row + 1, 0), 0)


@triton.jit
def score_tile(k, q, w, BK: tl.constexpr, QD: tl.constexpr, BJ: tl.constexpr, INTERPRET: tl.constexpr):
    """Scores [BK, QD] of keys [BK, BI] for QD queries, their heads as rows [QD BJ, BI] of one product.

    Every kernel that selects scores here, with the same shape, so that all find the same bits.
    """
    x = dot(k, tl.trans(q), INTERPRET)
    part = twice_relu(x) * w[None, :]
    return 0.5 * tl.sum(tl.reshape(part, [BK, QD, BJ]), 2)


@triton.jit(do_not_specialize=["first_row", "rows", "first_key", "num_keys"])
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, keys_ptr, begin_ptr, end_ptr,
    first_row, rows, first_key, num_keys, width, stride_key, stride_scale,
    J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    BQ: tl.constexpr, QD: tl.constexpr, SCALED: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BK keys of the window against BQ queries of the chunk, QD of them in one product."""
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    group = tl.program_id(1) * BQ
    start, stop = _seen(begin_ptr, end_ptr, first_row, rows, first_key + tl.program_id(0) * BK, K, BK, BQ)
    if start < stop:
        key = first_key + at
        i = tl.arange(0, BI)
        there = (at < width) & (key < num_keys)
        k_at = key.to(tl.int64)[:, None] * stride_key + i[None, :]
        k = tl.load(k_ptr + k_at, mask=there[:, None] & (i < I)[None, :], other=0.0)
        k_scale = tl.zeros([BK], tl.float32)
        if SCALED:
            k_scale = tl.load(k_scale_ptr + key.to(tl.int64) * stride_scale, mask=there, other=0.0)
        nth, j = tl.arange(0, QD * BJ) // BJ, tl.arange(0, QD * BJ) % BJ
        n = tl.arange(0, QD)
        start = group if INTERPRET else group + (start - group) // QD * QD
        stop = group + BQ if INTERPRET else stop
        for local in tl.range(start, stop, QD, num_stages=STAGES):
            head = (first_row + local) * J if INTERPRET else (first_row + local).to(tl.int64) * J
            inside = (j < J) & (local + nth < rows)
            mask = inside[:, None] if BI == I else inside[:, None] & (i < I)[None, :]
            q_at = head * I + (nth * J + j)[:, None] * I + i[None, :]
            q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
            w = tl.load(w_ptr + head + nth * J + j, mask=inside, other=0.0)
            score = score_tile(k, q, w, BK, QD, BJ, INTERPRET)
            if SCALED:
                score *= k_scale[:, None]
            out_at = (local + n).to(tl.int64)[None, :] * width + at[:, None]
            mask = (at < width)[:, None] & (local + n < rows)[None, :]
            tl.store(keys_ptr + out_at, ordered(score), mask=mask)


def topk(
    q_NJI: Tensor,
    k_SI: Tensor,
    w_NJ: Tensor,
    ranges: Ranges,
    num_kept: int,
    *,
    k_scale_S: Tensor | None = None,
    shape: Shape | None = None,
    select: topk_triton.Shape = topk_triton.SHAPE,
) -> Tensor:
    """The num_kept best keys of its range for every query: int32 [N, K], ascending, -1 beyond.

    q and k have one dtype. w is fp32 and carries every factor (J^-1/2, I^-1/2, the scales of a quantised q);
    the scales of quantised keys, one per key (I <= 128), are k_scale, fp32. Keys and their scales may stand at any distance.
    """
    N = len(q_NJI)
    shape = shape or (SHAPE if k_scale_S is None else E4M3_SHAPE)
    _check(q_NJI, k_SI, w_NJ, ranges, k_scale_S)
    out_NK = torch.empty(N, num_kept, dtype=torch.int32, device=q_NJI.device)
    keys = max((c.rows * c.width for c in ranges.chunks), default=0)
    work = max((c.rows * select.workspace(num_kept, c.width) for c in ranges.chunks), default=0)
    # Both buffers begin where 16 bytes can be loaded, or kernels are compiled twice.
    work = triton.cdiv(work, 32) * 32
    buffers = torch.empty(shape.lanes, keys + work, dtype=torch.int32, device=q_NJI.device)
    lanes = Lanes(q_NJI.device, shape.lanes)
    for number, chunk in enumerate(ranges.chunks):
        buffer = buffers[number % shape.lanes]
        with lanes.lane(number % shape.lanes):
            _write_scores(q_NJI, k_SI, w_NJ, k_scale_S, buffer, ranges, chunk, num_kept, shape)
            topk_triton.topk_rows(
                buffer, ranges.begin_N, ranges.end_N, buffer[keys:], out_NK, first_row=chunk.first_row,
                rows=chunk.rows, first_key=chunk.first_key, width=chunk.width, shape=select,
            )  # fmt: skip
    lanes.join()
    return out_NK


def _write_scores(
    q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, k_scale_S: Tensor | None, out: Tensor, ranges: Ranges,
    chunk: Chunk, num_kept: int, shape: Shape,
) -> None:  # fmt: skip
    """The scores of a chunk as integers in their order, [rows, width], where a query needs them."""
    _, J, I = q_NJI.shape
    if shape.gluon and _fits_gluon(q_NJI, k_SI):
        _write_by_gluon(q_NJI, k_SI, w_NJ, k_scale_S, out, ranges, chunk, num_kept)
        return
    BJ = block(J)
    _scores_kernel[(triton.cdiv(chunk.width, shape.keys), triton.cdiv(chunk.rows, shape.queries))](
        q_NJI, k_SI, w_NJ, w_NJ if k_scale_S is None else k_scale_S, out, ranges.begin_N, ranges.end_N,
        chunk.first_row, chunk.rows, chunk.first_key, len(k_SI), chunk.width,
        k_SI.stride(0), 1 if k_scale_S is None else k_scale_S.stride(0),
        J=J, I=I, K=num_kept, BJ=BJ, BI=block(I), BK=shape.keys,
        BQ=shape.queries, QD=shape.together(BJ),
        SCALED=k_scale_S is not None, INTERPRET=interpreted(),
        STAGES=shape.stages, num_warps=shape.warps,
    )  # fmt: skip


def _write_by_gluon(
    q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, k_scale_S: Tensor | None, out: Tensor, ranges: Ranges,
    chunk: Chunk, num_kept: int,
) -> None:  # fmt: skip
    _, J, I = q_NJI.shape
    gluon = index_scores_gluon
    gluon.scores_kernel[(triton.cdiv(chunk.width, gluon.KEYS), triton.cdiv(chunk.rows, gluon.QUERIES))](
        q_NJI, k_SI, w_NJ, w_NJ if k_scale_S is None else k_scale_S, out, ranges.begin_N, ranges.end_N,
        chunk.first_row, chunk.rows, chunk.first_key, len(k_SI), chunk.width,
        k_SI.stride(0), 1 if k_scale_S is None else k_scale_S.stride(0),
        J=J, I=I, K=num_kept, BK=gluon.KEYS, BQ=gluon.QUERIES, BUFFERS=gluon.BUFFERS,
        SCALED=k_scale_S is not None, num_warps=gluon.WARPS, maxnreg=gluon.REGISTERS,
    )  # fmt: skip


def _fits_gluon(q_NJI: Tensor, k_SI: Tensor) -> bool:
    """Whether the Gluon kernel takes this: Hopper, 16-bit or e4m3 queries of its sizes, keys at steps of 16 bytes."""
    _, J, I = q_NJI.shape
    narrow = q_NJI.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    sizes = J in index_scores_gluon.HEADS and I in index_scores_gluon.SIZES
    sizes = sizes and k_SI.stride(0) * k_SI.element_size() % 16 == 0 and k_SI.data_ptr() % 16 == 0
    return narrow and sizes and not interpreted() and torch.cuda.get_device_capability(q_NJI.device)[0] == 9


def _check(q_NJI: Tensor, k_SI: Tensor, w_NJ: Tensor, ranges: Ranges, k_scale_S: Tensor | None) -> None:
    N, J, I = q_NJI.shape
    if k_SI.shape[1] != I or k_SI.dtype != q_NJI.dtype or w_NJ.shape != (N, J) or w_NJ.dtype != torch.float32:
        raise ValueError(
            f"q {tuple(q_NJI.shape)} {q_NJI.dtype}, k {tuple(k_SI.shape)} {k_SI.dtype} and "
            f"w {tuple(w_NJ.shape)} {w_NJ.dtype} do not fit together"
        )
    if len(ranges.begin_N) != N or ranges.num_keys > len(k_SI):
        raise ValueError(
            f"ranges of {len(ranges.begin_N)} queries over {ranges.num_keys} keys, but there are {N} and {len(k_SI)}"
        )
    if (q_NJI.element_size() == 1) != (k_scale_S is not None):
        raise ValueError("quantised keys need scales, others have none")
    if k_scale_S is not None and (
        k_scale_S.shape != (len(k_SI),) or k_scale_S.dtype != torch.float32 or I > 128
    ):
        raise ValueError(f"scales {tuple(k_scale_S.shape)} {k_scale_S.dtype} of {len(k_SI)} keys of size {I}")
    for name, tensor in (("q", q_NJI), ("w", w_NJ)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    if k_SI.stride(1) != 1:
        raise ValueError(f"k has strides {k_SI.stride()}, not contiguous rows")
