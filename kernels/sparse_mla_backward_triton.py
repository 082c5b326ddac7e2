"""Sparse MQA-absorbed attention in Triton, backward: dQ, the gradient of the entries, and the KL target.

Three kernels. `_delta_kernel`: delta = dO . O per query and head. `_pairs_kernel`: logits and dP of a tile of
kept entries and all heads, from which come the probabilities P, dS = P (dP - delta) scale and, at no further
product, the head-summed target of the indexer; the log-sum-exp is known, so tiles are independent of each
other. `_dq_kernel`: dQ = dS K. `_dkv_kernel`: dS^T Q + P^T dO, what a query adds to its entries, summed over all
heads in registers. In fast mode it is added to memory atomically, in fp32, with 64 heads for two neighbouring
queries at once (sparse_mla_backward_gluon.py; merged_dkv_triton.py if asked for); in deterministic mode it is written down in the
inputs' dtype, and `_sum_kernel` adds the rows of each entry up in the order of the queries, in fp32.
P and dS pass through memory in the inputs' dtype, the type in which they enter the products anyway.

Adding to memory is bound by the L2 cache, the products by the tensor cores: in fast mode two chunks of queries are
under way, so that the one hides behind the other. Definition: reference.sparse_mla. Next: README.md.

Shape letters as in sparse_mla_triton.py; n queries of a chunk.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import merged_dkv_triton
from posttrain.kernels import sparse_mla_backward_gluon as gluon
from posttrain.kernels.lanes import Lanes
from posttrain.kernels.merge_triton import MOST, merge
from posttrain.kernels.product_triton import block, dot, interpreted
from posttrain.kernels.sparse_mla_triton import LOG2E, check, fits_gluon, kept, last_kept

WORKSPACE_BYTES = 1 << 30
"""P and dS of the chunks of queries under way; in deterministic mode the rows of one chunk."""
LANES = 2
"""Chunks under way at the same time; in deterministic mode one, since their sums have an order."""


@dataclass(frozen=True)
class Tiles:
    """Launch shape of one kernel; the defaults were chosen on an H200 (benchmarks/kernels.py)."""

    keys: int
    columns: int
    """Of the entries: of one step of the products (pairs), or of a program (dq, dkv)."""
    warps: int
    stages: int
    heads: int = 128


@dataclass(frozen=True)
class Launch:
    """Launch shapes of the backward pass."""

    pairs: Tiles = Tiles(keys=128, columns=64, warps=4, stages=3, heads=64)
    dq: Tiles = Tiles(keys=64, columns=128, warps=4, stages=3)
    dkv: Tiles | None = None
    """None: in Gluon where its shapes fit."""
    merged: Tiles | None = None
    """dkv of two queries with few heads at once (merged_dkv_triton.py); None, until a GPU has said that it is faster: not."""


DKV = Tiles(keys=64, columns=128, warps=4, stages=3)
MERGED = DKV


LAUNCH = Launch()


@triton.jit(do_not_specialize=["num"])
def _delta_kernel(o_ptr, do_ptr, delta_ptr, num, R: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, BR)
    mask = (at < num)[:, None] & (r < R)[None, :]
    o = tl.load(o_ptr + at[:, None] * R + r[None, :], mask=mask, other=0.0)
    do = tl.load(do_ptr + at[:, None] * R + r[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=at < num)


@triton.jit(do_not_specialize=["num_slots", "first_row"])
def _pairs_kernel(
    q_ptr, kv_ptr, slots_ptr, do_ptr, lse_ptr, delta_ptr, work_ptr, target_ptr,
    scale, num_slots, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    TARGET: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query, BK kept entries (rows of the products), BH heads (columns): P, dS, sum of P over the heads."""
    E: tl.constexpr = R + P
    TILES: tl.constexpr = G * tl.cdiv(K, BK)
    local = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    row = first_row + local
    h = tile % G * BH + tl.arange(0, BH)
    in_h = h < H
    at, slots, valid = kept(slots_ptr, row, tile // G * BK, num_slots, K, BK)
    d = tl.arange(0, BD)
    entry = kv_ptr + slots[:, None] * E + d[None, :]
    q_at = q_ptr + (row * H + h[:, None]) * E + d[None, :]
    do_at = do_ptr + (row * H + h[:, None]) * R + d[None, :]
    lse = tl.load(lse_ptr + row * H + h, mask=in_h, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + row * H + h, mask=in_h, other=0.0)
    logits = tl.zeros([BK, BH], tl.float32)
    dp = tl.zeros([BK, BH], tl.float32)
    for first in tl.range(0, E, BD, num_stages=STAGES):
        in_e, in_r = first + d < E, first + d < R
        k = tl.load(entry + first, mask=valid[:, None] & in_e[None, :], other=0.0)
        q = tl.load(q_at + first, mask=in_h[:, None] & in_e[None, :], other=0.0)
        do = tl.load(do_at + first, mask=in_h[:, None] & in_r[None, :], other=0.0)
        logits += dot(k, tl.trans(q), INTERPRET)
        dp += dot(k, tl.trans(do), INTERPRET)
    prob = tl.exp2(logits * (scale * LOG2E) - lse[None, :])
    prob = tl.where(valid[:, None], prob, 0.0)
    ds = tl.where(valid[:, None], prob * (dp - delta[None, :]) * scale, 0.0)
    if TARGET:
        tl.store(target_ptr + (row * G + tile % G) * K + at, tl.sum(prob, 1), mask=at < K)
    where = work_ptr + (local * K + at[:, None]) * (2 * H) + h[None, :]
    inside = (at < K)[:, None] & in_h[None, :]
    tl.store(where, ds.to(work_ptr.dtype.element_ty), mask=inside)
    tl.store(where + H, prob.to(work_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_slots", "first_row"])
def _dq_kernel(
    kv_ptr, slots_ptr, work_ptr, dq_ptr, num_slots, first_row,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one query, all heads, BC columns."""
    BLOCKS: tl.constexpr = tl.cdiv(E, BC)
    local = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = first_row + local
    c = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    h = tl.arange(0, BH)
    end = K if INTERPRET else last_kept(slots_ptr, row, num_slots, K, KB)
    dq = tl.zeros([BH, BC], tl.float32)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        at, slots, valid = kept(slots_ptr, row, start, num_slots, K, BK)
        ds = tl.load(
            work_ptr + (local * K + at[:, None]) * (2 * H) + h[None, :],
            mask=(at < K)[:, None] & (h < H)[None, :], other=0.0,
        )  # fmt: skip
        k = tl.load(
            kv_ptr + slots[:, None] * E + c[None, :], mask=valid[:, None] & (c < E)[None, :], other=0.0
        )
        dq += dot(tl.trans(ds), k, INTERPRET)
    mask = (h < H)[:, None] & (c < E)[None, :]
    tl.store(dq_ptr + (row * H + h[:, None]) * E + c[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_slots", "first_row"])
def _dkv_kernel(
    q_ptr, slots_ptr, do_ptr, work_ptr, dkv_ptr, num_slots, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    VALUE: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one query adds to BC columns of its entries: [dS | P]^T [Q | dO] (VALUE), dS^T Q for the rotary ones.

    With ROWS dkv_ptr is a table with a row for each kept entry of the chunk.
    """
    E: tl.constexpr = R + P
    BLOCKS: tl.constexpr = tl.cdiv(R if VALUE else P, BC)
    B2: tl.constexpr = 2 * BH if VALUE else BH
    local = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = first_row + local
    c = (0 if VALUE else R) + tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    in_c = c < (R if VALUE else E)
    h2 = tl.arange(0, B2)
    h, is_q = h2 % BH, h2 < BH
    in_hc = (h < H)[:, None] & in_c[None, :]
    q_do = tl.load(q_ptr + (row * H + h[:, None]) * E + c[None, :], mask=in_hc & is_q[:, None], other=0.0)
    if VALUE:
        do_at = do_ptr + (row * H + h[:, None]) * R + c[None, :]
        q_do += tl.load(do_at, mask=in_hc & (is_q == 0)[:, None], other=0.0)
    end = K if INTERPRET else last_kept(slots_ptr, row, num_slots, K, KB)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        at, slots, valid = kept(slots_ptr, row, start, num_slots, K, BK)
        ds_p = tl.load(
            work_ptr + (local * K + at[:, None]) * (2 * H) + (h + H * (is_q == 0))[None, :],
            mask=(at < K)[:, None] & (h < H)[None, :], other=0.0,
        )  # fmt: skip
        grad = dot(ds_p, q_do, INTERPRET)
        if ROWS:
            target = dkv_ptr + (local * K + at[:, None]) * E + c[None, :]
            tl.store(target, grad.to(dkv_ptr.dtype.element_ty), mask=valid[:, None] & in_c[None, :])
        else:
            target = dkv_ptr + slots[:, None] * E + c[None, :]
            tl.atomic_add(target, grad, mask=valid[:, None] & in_c[None, :], sem="relaxed")


@triton.jit
def _sum_kernel(
    rows_ptr, order_ptr, starts_ptr, dkv_ptr,
    R: tl.constexpr, P: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Add the rows of one entry in their order, BI at a time."""
    E: tl.constexpr = R + P
    slot = tl.program_id(0).to(tl.int64)
    i = tl.load(starts_ptr + slot)
    end = tl.load(starts_ptr + slot + 1)
    if i < end:
        r, p = tl.arange(0, BR), tl.arange(0, BP)
        latent = tl.zeros([BI, BR], tl.float32)
        rotary = tl.zeros([BI, BP], tl.float32)
        while i < end:
            at = i + tl.arange(0, BI)
            there = (at < end)[:, None]
            row = rows_ptr + tl.load(order_ptr + at, mask=at < end, other=0)[:, None] * E
            part = tl.load(row + r[None, :], mask=there & (r < R)[None, :], other=0.0)
            part_rotary = tl.load(row + R + p[None, :], mask=there & (p < P)[None, :], other=0.0)
            latent += part.to(tl.float32)
            rotary += part_rotary.to(tl.float32)
            i += BI
        dkv = dkv_ptr + slot * E
        tl.store(dkv + r, tl.load(dkv + r, mask=r < R, other=0.0) + tl.sum(latent, 0), mask=r < R)
        tl.store(dkv + R + p, tl.load(dkv + R + p, mask=p < P, other=0.0) + tl.sum(rotary, 0), mask=p < P)


@dataclass(frozen=True)
class _Pass:
    """What all chunks of one backward pass share."""

    q_NHE: Tensor
    entries_SE: Tensor
    slots_NK: Tensor
    do_NHR: Tensor
    lse_NH: Tensor
    delta_NH: Tensor
    scale: float
    launch: Launch

    @property
    def shape(self) -> dict[str, int]:
        """Sizes as kernels take them."""
        H, E = self.q_NHE.shape[1:]
        R = self.do_NHR.shape[-1]
        return {"H": H, "R": R, "P": E - R, "K": self.slots_NK.shape[1]}


def backward(
    q_NHE: Tensor,
    entries_SE: Tensor,
    slots_NK: Tensor,
    o_NHR: Tensor,
    lse_NH: Tensor,
    do_NHR: Tensor,
    scale: float,
    *,
    deterministic: bool,
    with_target: bool,
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dQ [N, H, E] in q's dtype, dKV fp32 [S, E], and with_target the head-mean probabilities fp32 [N, K].

    dQ and the target are always the same bits; dKV is with deterministic. Raises ValueError as forward() does.
    """
    R = o_NHR.shape[-1]
    N, H, E = check(q_NHE, entries_SE, slots_NK, R)
    K, S = slots_NK.shape[1], len(entries_SE)
    delta_NH = q_NHE.new_empty(N, H, dtype=torch.float32)
    dq_NHE = torch.empty_like(q_NHE)
    G = triton.cdiv(H, min(launch.pairs.heads, block(H)))
    target_NGK = q_NHE.new_empty((N, G, K) if with_target else (1,), dtype=torch.float32)
    count = 1 if deterministic else LANES
    bytes_per_query = q_NHE.element_size() * K * (E if deterministic else 2 * H * count)
    rows = max(1, min(N, WORKSPACE_BYTES // bytes_per_query))
    works = [q_NHE.new_empty(rows, K, 2 * H) for _ in range(min(count, triton.cdiv(N, rows)))]
    dkv_SE = q_NHE.new_zeros(S, E, dtype=torch.float32)
    if N:
        _delta_kernel[(triton.cdiv(N * H, 16),)](o_NHR, do_NHR, delta_NH, N * H, R=R, BR=block(R), ROWS=16)
    this = _Pass(q_NHE, entries_SE, slots_NK, do_NHR, lse_NH, delta_NH, scale, launch)
    lanes = Lanes(q_NHE.device, len(works))
    for chunk, first in enumerate(range(0, N, rows)):
        work_nK2H = works[chunk % len(works)][: N - first]
        with lanes.lane(chunk % len(works)):
            _pairs(this, work_nK2H, target_NGK, first, with_target=with_target)
            if deterministic:
                _add_in_order(this, work_nK2H, dkv_SE, first)
            else:
                _dkv(this, work_nK2H, dkv_SE, first, rows=False)
            _dq(this, work_nK2H, dq_NHE, first)
    lanes.join()
    return dq_NHE, dkv_SE, target_NGK.sum(1) / H if with_target else None


def _pairs(this: _Pass, work_nK2H: Tensor, target_NGK: Tensor, first: int, *, with_target: bool) -> None:
    t, shape = this.launch.pairs, this.shape
    BH = min(t.heads, block(shape["H"]))
    G = triton.cdiv(shape["H"], BH)
    _pairs_kernel[(len(work_nK2H) * G * triton.cdiv(shape["K"], t.keys),)](
        this.q_NHE, this.entries_SE, this.slots_NK, this.do_NHR, this.lse_NH, this.delta_NH,
        work_nK2H, target_NGK, this.scale, len(this.entries_SE), first,
        **shape, BH=BH, BD=t.columns, BK=t.keys, G=G, TARGET=with_target,
        INTERPRET=interpreted(), STAGES=t.stages, num_warps=t.warps,
    )  # fmt: skip


def _dq(this: _Pass, work_nK2H: Tensor, dq_NHE: Tensor, first: int) -> None:
    t = this.launch.dq
    _, H, E = dq_NHE.shape
    K = this.slots_NK.shape[1]
    columns = min(t.columns, block(E))
    _dq_kernel[(len(work_nK2H) * triton.cdiv(E, columns),)](
        this.entries_SE, this.slots_NK, work_nK2H, dq_NHE, len(this.entries_SE), first,
        H=H, E=E, K=K, KB=triton.next_power_of_2(K), BH=block(H), BC=columns, BK=t.keys,
        INTERPRET=interpreted(), STAGES=t.stages, num_warps=t.warps,
    )  # fmt: skip


def _dkv(this: _Pass, work_nK2H: Tensor, target: Tensor, first: int, *, rows: bool) -> None:
    """Add to the entries' gradients fp32 [S, E], or write the rows [n K, E]."""
    t, shape = this.launch.dkv, this.shape
    in_gluon = t is None and fits_gluon(this.q_NHE, shape["R"], shape["P"])
    if not rows and shape["K"] <= MOST:
        if this.launch.merged is not None and shape["H"] <= merged_dkv_triton.HEADS:
            _dkv_merged_few(this, work_nK2H, target, first, this.launch.merged)
            return
        if in_gluon and shape["H"] <= gluon.MERGED_HEADS:
            _dkv_merged(this, work_nK2H, target, first)
            return
    KB = triton.next_power_of_2(shape["K"])
    args = (this.q_NHE, this.slots_NK, this.do_NHR, work_nK2H, target, len(this.entries_SE), first)
    for value, size in ((True, shape["R"]), (False, shape["P"])):
        if in_gluon:
            columns = min(gluon.COLUMNS, size)
            gluon.dkv_kernel[(len(work_nK2H) * (size // columns),)](
                *args, **shape, KB=max(KB, 32 * gluon.WARPS), BC=columns, BK=gluon.KEYS,
                VALUE=value, ROWS=rows, num_warps=gluon.WARPS,
            )  # fmt: skip
            continue
        tiles = t or DKV
        columns = min(tiles.columns, block(size))
        _dkv_kernel[(len(work_nK2H) * triton.cdiv(size, columns),)](
            *args, **shape, KB=KB, BH=block(shape["H"]), BC=columns, BK=tiles.keys, VALUE=value, ROWS=rows,
            INTERPRET=interpreted(), STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip


def _dkv_merged(this: _Pass, work_nK2H: Tensor, dkv_SE: Tensor, first: int) -> None:
    """Add to the entries' gradients, once for two neighbouring queries."""
    shape = this.shape
    merged = merge(this.slots_NK[first : first + len(work_nK2H)], len(this.entries_SE))
    for value, size in ((True, shape["R"]), (False, shape["P"])):
        columns = min(gluon.COLUMNS, size)
        gluon.dkv_merged_kernel[(len(merged.num_P) * (size // columns),)](
            this.q_NHE, merged.slots_PU, merged.places_PU, merged.num_P, merged.kept_P2, this.do_NHR, work_nK2H,
            dkv_SE, len(this.entries_SE), first, **shape, BC=columns, BK=gluon.KEYS, VALUE=value,
            num_warps=gluon.MERGED_WARPS if value else gluon.WARPS,
        )  # fmt: skip


def _dkv_merged_few(this: _Pass, work_nK2H: Tensor, dkv_SE: Tensor, first: int, t: Tiles) -> None:
    """The same with few heads, in Triton."""
    shape = this.shape
    merged = merge(this.slots_NK[first : first + len(work_nK2H)], len(this.entries_SE))
    for value, size in ((True, shape["R"]), (False, shape["P"])):
        columns = min(t.columns, block(size))
        merged_dkv_triton.dkv_merged_few_kernel[(len(merged.num_P) * triton.cdiv(size, columns),)](
            this.q_NHE, merged.slots_PU, merged.places_PU, merged.num_P, merged.kept_P2, this.do_NHR, work_nK2H,
            dkv_SE, first, **shape, BH=block(shape["H"]), BC=columns, BK=t.keys, VALUE=value,
            INTERPRET=interpreted(), STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip


def _add_in_order(this: _Pass, work_nK2H: Tensor, dkv_SE: Tensor, first: int) -> None:
    """Write the rows of the chunk, sort them by entry (stable: by query within an entry), sum."""
    n, K, _ = work_nK2H.shape
    S, E = dkv_SE.shape
    rows_LE = this.q_NHE.new_empty(n * K, E)
    _dkv(this, work_nK2H, rows_LE, first, rows=True)
    slots_L = this.slots_NK[first : first + n].reshape(-1)
    slots_L = torch.where((slots_L >= 0) & (slots_L < S), slots_L, S)
    sorted_L, order_L = slots_L.sort(stable=True)
    starts = torch.searchsorted(sorted_L, torch.arange(S + 1, dtype=torch.int32, device=slots_L.device))
    R, P = this.shape["R"], this.shape["P"]
    _sum_kernel[(S,)](rows_LE, order_L, starts, dkv_SE, R=R, P=P, BR=block(R), BP=block(P), BI=8, num_warps=4)
