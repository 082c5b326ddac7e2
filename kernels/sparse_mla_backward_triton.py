"""Sparse MQA-absorbed attention in Triton, backward: dQ, the gradient of the entries, and the KL target.

Three kernels. `_delta_kernel`: delta = dO . O per query and head. `_pairs_kernel`: logits and dP of a tile of
kept entries and all heads, from which come the probabilities P, dS = P (dP - delta) scale and, at no further
product, the head-summed target of the indexer; the log-sum-exp is known, so tiles are independent of each
other. `_grads_kernel`: dQ = dS K and d(entries) = dS^T Q + P^T dO for a block of columns; the gradient of an
entry is summed over all heads in registers before it is added to memory, as fp32 (fast) or as 64-bit integers,
which add up to the same bits in any order (deterministic). P and dS pass through memory in the inputs' dtype,
the type in which they enter the products anyway. Definition: reference.sparse_mla. Next: README.md.

Shape letters as in sparse_mla_triton.py; n queries of a chunk.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.sparse_mla_triton import LOG2E, block, check, dot, interpreted, kept, last_kept

WORKSPACE_BYTES = 1 << 30
"""P and dS of one chunk of queries."""


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
    dq: Tiles = Tiles(keys=64, columns=128, warps=8, stages=3)
    dkv: Tiles = Tiles(keys=64, columns=128, warps=4, stages=2)


LAUNCH = Launch()


@triton.jit
def _delta_kernel(o_ptr, do_ptr, delta_ptr, num, R: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, BR)
    mask = (at < num)[:, None] & (r < R)[None, :]
    o = tl.load(o_ptr + at[:, None] * R + r[None, :], mask=mask, other=0.0)
    do = tl.load(do_ptr + at[:, None] * R + r[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=at < num)


@triton.jit
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
        logits = dot(k, tl.trans(q), logits, INTERPRET)
        dp = dot(k, tl.trans(do), dp, INTERPRET)
    prob = tl.exp2(logits * (scale * LOG2E) - lse[None, :])
    prob = tl.where(valid[:, None], prob, 0.0)
    ds = tl.where(valid[:, None], prob * (dp - delta[None, :]) * scale, 0.0)
    if TARGET:
        tl.store(target_ptr + (row * G + tile % G) * K + at, tl.sum(prob, 1), mask=at < K)
    where = work_ptr + (local * K + at[:, None]) * (2 * H) + h[None, :]
    inside = (at < K)[:, None] & in_h[None, :]
    tl.store(where, ds.to(work_ptr.dtype.element_ty), mask=inside)
    tl.store(where + H, prob.to(work_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add(dkv_ptr, grad, slots, valid, c, in_c, unit, lost_ptr, E: tl.constexpr, EXACT: tl.constexpr):
    """Add the gradients [BK, BC] of entries to memory."""
    target = dkv_ptr + slots[:, None] * E + c[None, :]
    mask = valid[:, None] & in_c[None, :]
    if EXACT:
        finite = tl.abs(grad) < float("inf")
        if tl.min(tl.where(mask & (finite == 0), 0, 1)) == 0:
            tl.store(lost_ptr, float("nan"))  # integers cannot say so themselves
        units = (tl.where(finite, grad, 0.0) * unit).to(tl.int64)
        tl.atomic_add(target, units, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(target, grad, mask=mask, sem="relaxed")


@triton.jit
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
        dq = dot(tl.trans(ds), k, dq, INTERPRET)
    mask = (h < H)[:, None] & (c < E)[None, :]
    tl.store(dq_ptr + (row * H + h[:, None]) * E + c[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_kernel(
    q_ptr, slots_ptr, do_ptr, work_ptr, dkv_ptr, unit_ptr, lost_ptr, num_slots, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    VALUE: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one query adds to BC columns of its entries: [dS | P]^T [Q | dO] (VALUE), dS^T Q for the rotary ones."""
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
    unit = tl.load(unit_ptr) if EXACT else 1.0
    end = K if INTERPRET else last_kept(slots_ptr, row, num_slots, K, KB)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        at, slots, valid = kept(slots_ptr, row, start, num_slots, K, BK)
        ds_p = tl.load(
            work_ptr + (local * K + at[:, None]) * (2 * H) + (h + H * (is_q == 0))[None, :],
            mask=(at < K)[:, None] & (h < H)[None, :], other=0.0,
        )  # fmt: skip
        grad = dot(ds_p, q_do, tl.zeros([BK, BC], tl.float32), INTERPRET)
        _add(dkv_ptr, grad, slots, valid, c, in_c, unit, lost_ptr, E, EXACT)


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

    dQ and the target are always the same bits; dKV is with deterministic.
    """
    R = o_NHR.shape[-1]
    N, H, E = check(q_NHE, entries_SE, slots_NK, R)
    K, P = slots_NK.shape[1], E - R
    BH, KB = min(launch.pairs.heads, block(H)), triton.next_power_of_2(K)
    G = triton.cdiv(H, BH)
    delta_NH = q_NHE.new_empty(N, H, dtype=torch.float32)
    dq_NHE = torch.empty_like(q_NHE)
    target_NGK = q_NHE.new_empty((N, G, K) if with_target else (1,), dtype=torch.float32)
    rows = max(1, min(N, WORKSPACE_BYTES // (2 * q_NHE.element_size() * H * K)))
    work_nK2H = q_NHE.new_empty(rows, K, 2 * H)
    lost = q_NHE.new_zeros(1, dtype=torch.float32)
    dkv_SE = q_NHE.new_zeros(entries_SE.shape, dtype=torch.int64 if deterministic else torch.float32)
    unit = _unit(q_NHE, entries_SE, do_NHR, scale) if deterministic else lost
    S, INTERPRET = len(entries_SE), interpreted()
    if N:
        _delta_kernel[(triton.cdiv(N * H, 16),)](o_NHR, do_NHR, delta_NH, N * H, R=R, BR=block(R), ROWS=16)
    for first in range(0, N, rows):
        count = min(rows, N - first)
        t = launch.pairs
        _pairs_kernel[(count * G * triton.cdiv(K, t.keys),)](
            q_NHE, entries_SE, slots_NK, do_NHR, lse_NH, delta_NH, work_nK2H, target_NGK, scale, S, first,
            H=H, R=R, P=P, K=K, BH=BH, BD=t.columns, BK=t.keys, G=G, TARGET=with_target,
            INTERPRET=INTERPRET, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
        t = launch.dq
        columns = min(t.columns, block(E))
        _dq_kernel[(count * triton.cdiv(E, columns),)](
            entries_SE, slots_NK, work_nK2H, dq_NHE, S, first,
            H=H, E=E, K=K, KB=KB, BH=block(H), BC=columns, BK=t.keys,
            INTERPRET=INTERPRET, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
        t = launch.dkv
        for value, size in ((True, R), (False, P)):
            columns = min(t.columns, block(size))
            _dkv_kernel[(count * triton.cdiv(size, columns),)](
                q_NHE, slots_NK, do_NHR, work_nK2H, dkv_SE, unit, lost, S, first,
                H=H, R=R, P=P, K=K, KB=KB, BH=block(H), BC=columns, BK=t.keys, VALUE=value,
                EXACT=deterministic, INTERPRET=INTERPRET, STAGES=t.stages, num_warps=t.warps,
            )  # fmt: skip
    if deterministic:
        dkv_SE = (dkv_SE.double() / unit.double()).float() + lost
    return dq_NHE, dkv_SE, target_NGK.sum(1) / H if with_target else None


def _unit(q_NHE: Tensor, entries_SE: Tensor, do_NHR: Tensor, scale: float) -> Tensor:
    """How many integer units are 1.0, fp32 [1]: the largest power of two with which no sum overflows.

    |dS| <= 2 scale max|dO . V|, |P| <= 1, and no entry can be kept by more queries than there are. Entries
    that are not finite are left out: nobody may have kept them; if somebody has, the kernel says so.
    """
    N, H, R = do_NHR.shape
    v_SR = entries_SE[:, :R].abs()
    q, do = (x.abs().amax().double() for x in (q_NHE, do_NHR))
    v = v_SR.masked_fill(~v_SR.isfinite(), 0.0).amax().double()
    bound = N * H * do * (2 * scale * R * v * q + 1)
    bound = torch.where(bound.isfinite() & (bound > 0), bound, 1.0)
    return torch.exp2(torch.floor(62 - torch.log2(bound)).clamp(-100, 100)).float().reshape(1)
