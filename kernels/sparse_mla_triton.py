"""Sparse MQA-absorbed attention in Triton: forward, and a backward in two kernels that also gives the KL target.

One program works on one query and a tile of its heads, so a row's result never depends on what else is in the
batch. Missing entries (-1) are read as another entry of the same row and get probability zero exactly, so that
whatever lies in rows nobody selected cannot leak. The gradient of the entries is summed over all heads in
registers before it is added to memory: as fp32 (fast), or as 64-bit integers, which add up to the same bits in
any order (deterministic). Definition: reference.sparse_mla. Next: README.md, sparse_mla.py.

Shape letters: N queries, H heads, E entry size = R + P, R latent (value) size, P rotary size, S slots,
K kept entries, G tiles of heads.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
WORKSPACE_BYTES = 1 << 30
"""Probabilities and their gradients of one chunk of queries in the backward pass."""


@dataclass(frozen=True)
class Tiles:
    """Launch shapes; the defaults were chosen on an H200."""

    heads: int = 64
    keys: int = 64
    warps: int = 8
    stages: int = 2
    columns: int = 128
    """Entry columns of one program of the second backward kernel."""


FORWARD = Tiles()
BACKWARD_Q = Tiles(stages=1)
BACKWARD_KV = Tiles(warps=4, stages=3)


@triton.jit
def _row(slots_ptr, row, num_slots, K: tl.constexpr, KB: tl.constexpr):
    """A slot of the row to read instead of missing ones, and the end of its valid slots (0: empty row)."""
    at = tl.arange(0, KB)
    slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    stand_in = tl.max(tl.where(valid, slots, 0), 0)
    end = tl.max(tl.where(valid, at + 1, 0), 0)
    return stand_in, end


@triton.jit
def _slots(slots_ptr, row, start, stand_in, num_slots, K: tl.constexpr, BK: tl.constexpr):
    at = start + tl.arange(0, BK)
    slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    return tl.where(valid, slots, stand_in).to(tl.int64), valid


@triton.jit
def _forward_kernel(
    q_ptr, kv_ptr, slots_ptr, o_ptr, lse_ptr, scale, num_slots,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr,
    INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query, BH heads: online softmax over the kept entries."""
    E: tl.constexpr = R + P
    row = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    in_h, in_r, in_p = h < H, r < R, p < P
    q_row = q_ptr + (row * H + h[:, None]) * E
    q = tl.load(q_row + r[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    q_rot = tl.load(q_row + R + p[None, :], mask=in_h[:, None] & in_p[None, :], other=0.0)
    stand_in, end = _row(slots_ptr, row, num_slots, K, KB)
    m = tl.full([BH], -1e30, tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BR], tl.float32)
    stop = K if INTERPRET else end
    for start in tl.range(0, stop, BK, num_stages=STAGES):
        slots, valid = _slots(slots_ptr, row, start, stand_in, num_slots, K, BK)
        entry = kv_ptr + slots[:, None] * E
        if BR == R:
            k = tl.load(entry + r[None, :])
        else:
            k = tl.load(entry + r[None, :], mask=in_r[None, :], other=0.0)
        if BP == P:
            k_rot = tl.load(entry + R + p[None, :])
        else:
            k_rot = tl.load(entry + R + p[None, :], mask=in_p[None, :], other=0.0)
        if INTERPRET:
            logits = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32))
            logits += tl.dot(q_rot.to(tl.float32), tl.trans(k_rot).to(tl.float32))
        else:
            logits = tl.dot(q, tl.trans(k))
            logits = tl.dot(q_rot, tl.trans(k_rot), logits)
        logits = tl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, 1))
        prob = tl.exp2(logits - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(prob, 1)
        acc = acc * shrink[:, None]
        if INTERPRET:
            acc += tl.dot(prob.to(k.dtype).to(tl.float32), k.to(tl.float32))
        else:
            acc = tl.dot(prob.to(k.dtype), k, acc)
        m = new_m
    any_key = total > 0
    safe = tl.where(any_key, total, 1.0)
    out = tl.where(any_key[:, None], acc / safe[:, None], 0.0)
    o_row = o_ptr + (row * H + h[:, None]) * R
    tl.store(o_row + r[None, :], out.to(o_ptr.dtype.element_ty), mask=in_h[:, None] & in_r[None, :])
    lse = tl.where(any_key, (m + tl.log2(safe)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row * H + h, lse, mask=in_h)


@triton.jit
def _backward_q_kernel(
    q_ptr, kv_ptr, slots_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, prob_ptr, ds_ptr, target_ptr,
    scale, num_slots, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr,
    TARGET: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query, BH heads: dQ, and P and dS for the second kernel; the sum of P over these heads for the KL."""
    E: tl.constexpr = R + P
    tile = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    row = first_row + local
    h = tile * BH + tl.arange(0, BH)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    in_h, in_r, in_p = h < H, r < R, p < P
    in_hr, in_hp = in_h[:, None] & in_r[None, :], in_h[:, None] & in_p[None, :]
    q_row = (row * H + h[:, None]) * E
    o_row = (row * H + h[:, None]) * R
    do = tl.load(do_ptr + o_row + r[None, :], mask=in_hr, other=0.0)
    o = tl.load(o_ptr + o_row + r[None, :], mask=in_hr, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    q = tl.load(q_ptr + q_row + r[None, :], mask=in_hr, other=0.0)
    q_rot = tl.load(q_ptr + q_row + R + p[None, :], mask=in_hp, other=0.0)
    lse = tl.load(lse_ptr + row * H + h, mask=in_h, other=float("inf")) * LOG2E
    stand_in, end = _row(slots_ptr, row, num_slots, K, KB)
    dq = tl.zeros([BH, BR], tl.float32)
    dq_rot = tl.zeros([BH, BP], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        slots, valid = _slots(slots_ptr, row, start, stand_in, num_slots, K, BK)
        entry = kv_ptr + slots[:, None] * E
        if BR == R:
            k = tl.load(entry + r[None, :])
        else:
            k = tl.load(entry + r[None, :], mask=in_r[None, :], other=0.0)
        if BP == P:
            k_rot = tl.load(entry + R + p[None, :])
        else:
            k_rot = tl.load(entry + R + p[None, :], mask=in_p[None, :], other=0.0)
        if INTERPRET:
            logits = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32))
            logits += tl.dot(q_rot.to(tl.float32), tl.trans(k_rot).to(tl.float32))
            dp = tl.dot(do.to(tl.float32), tl.trans(k).to(tl.float32))
        else:
            logits = tl.dot(q, tl.trans(k))
            logits = tl.dot(q_rot, tl.trans(k_rot), logits)
            dp = tl.dot(do, tl.trans(k))
        keep = valid[None, :] & in_h[:, None]
        prob = tl.where(keep, tl.exp2(logits * (scale * LOG2E) - lse[:, None]), 0.0)
        ds = tl.where(keep, prob * (dp - delta[:, None]) * scale, 0.0)
        at = start + tl.arange(0, BK)
        if TARGET:
            target = target_ptr + ((row * tl.num_programs(0) + tile) * K + at)
            tl.store(target, tl.sum(prob, 0), mask=at < K)
        prob, ds = prob.to(k.dtype), ds.to(k.dtype)
        where = (local * H + h[:, None]) * K + at[None, :]
        inside = in_h[:, None] & (at < K)[None, :]
        tl.store(prob_ptr + where, prob, mask=inside)
        tl.store(ds_ptr + where, ds, mask=inside)
        if INTERPRET:
            dq += tl.dot(ds.to(tl.float32), k.to(tl.float32))
            dq_rot += tl.dot(ds.to(tl.float32), k_rot.to(tl.float32))
        else:
            dq = tl.dot(ds, k, dq)
            dq_rot = tl.dot(ds, k_rot, dq_rot)
    if end == 0:  # an empty row: what was read may be anything
        dq = tl.zeros([BH, BR], tl.float32)
        dq_rot = tl.zeros([BH, BP], tl.float32)
    tl.store(dq_ptr + q_row + r[None, :], dq.to(dq_ptr.dtype.element_ty), mask=in_hr)
    tl.store(dq_ptr + q_row + R + p[None, :], dq_rot.to(dq_ptr.dtype.element_ty), mask=in_hp)


@triton.jit
def _backward_kv_kernel(
    q_ptr, slots_ptr, do_ptr, prob_ptr, ds_ptr, dkv_ptr, unit_ptr, lost_ptr, num_slots, first_row,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query, BC columns of the entries: dKV = dS^T Q + P^T dO over all heads, added to the slots."""
    E: tl.constexpr = R + P
    local = tl.program_id(1).to(tl.int64)
    row = first_row + local
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    h = tl.arange(0, BH)
    in_hc = (h < H)[:, None] & (c < E)[None, :]
    q = tl.load(q_ptr + (row * H + h[:, None]) * E + c[None, :], mask=in_hc, other=0.0)
    in_value = (h < H)[:, None] & (c < R)[None, :]
    do = tl.load(do_ptr + (row * H + h[:, None]) * R + c[None, :], mask=in_value, other=0.0)
    unit = tl.load(unit_ptr) if EXACT else 1.0
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + tl.arange(0, BK)
        where = (local * H + h[:, None]) * K + at[None, :]
        inside = (h < H)[:, None] & (at < K)[None, :]
        ds = tl.load(ds_ptr + where, mask=inside, other=0.0)
        prob = tl.load(prob_ptr + where, mask=inside, other=0.0)
        if INTERPRET:
            acc = tl.dot(tl.trans(ds).to(tl.float32), q.to(tl.float32))
            acc += tl.dot(tl.trans(prob).to(tl.float32), do.to(tl.float32))
        else:
            acc = tl.dot(tl.trans(ds), q)
            acc = tl.dot(tl.trans(prob), do, acc)
        slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
        valid = (slots >= 0) & (slots < num_slots)
        target = dkv_ptr + slots.to(tl.int64)[:, None] * E + c[None, :]
        mask = valid[:, None] & (c < E)[None, :]
        if EXACT:
            finite = tl.abs(acc) < float("inf")
            if tl.min(tl.where(mask & (finite == 0), 0, 1)) == 0:
                tl.store(lost_ptr, float("nan"))  # integers cannot say so themselves
            units = (tl.where(finite, acc, 0.0) * unit).to(tl.int64)
            tl.atomic_add(target, units, mask=mask, sem="relaxed")
        else:
            tl.atomic_add(target, acc, mask=mask, sem="relaxed")


def forward(
    q_NHE: Tensor, entries_SE: Tensor, slots_NK: Tensor, scale: float, value_size: int, tiles: Tiles = FORWARD
) -> tuple[Tensor, Tensor]:
    """Output [N, H, R] in q's dtype and the log-sum-exp of the scaled logits, fp32 [N, H] (-inf: empty row).

    slots are int32; anything outside 0 .. S - 1 is a missing entry.
    """
    N, H, E = _check(q_NHE, entries_SE, slots_NK, value_size)
    o_NHR = q_NHE.new_empty(N, H, value_size)
    lse_NH = q_NHE.new_empty(N, H, dtype=torch.float32)
    shape = _shape(H, E, value_size, slots_NK.shape[1], tiles)
    if N:
        _forward_kernel[(shape.pop("G"), N)](
            q_NHE, entries_SE, slots_NK, o_NHR, lse_NH, scale, len(entries_SE),
            **shape, INTERPRET=_interpreted(), STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return o_NHR, lse_NH


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
    tiles_q: Tiles = BACKWARD_Q,
    tiles_kv: Tiles = BACKWARD_KV,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dQ [N, H, E] in q's dtype, dKV fp32 [S, E], and with_target the head-mean probabilities fp32 [N, K].

    dQ and the target are always the same bits; dKV is with deterministic.
    """
    value_size = o_NHR.shape[-1]
    N, H, E = _check(q_NHE, entries_SE, slots_NK, value_size)
    K = slots_NK.shape[1]
    shape = _shape(H, E, value_size, K, tiles_q)
    tiles_of_heads = shape.pop("G")
    dq_NHE = torch.empty_like(q_NHE)
    target_NGK = q_NHE.new_empty((N, tiles_of_heads, K) if with_target else (1,), dtype=torch.float32)
    rows = max(1, min(N, WORKSPACE_BYTES // (2 * q_NHE.element_size() * H * K)))
    work = q_NHE.new_empty(2, rows, H, K)
    lost = q_NHE.new_zeros(1, dtype=torch.float32)
    dkv_SE = q_NHE.new_zeros(entries_SE.shape, dtype=torch.int64 if deterministic else torch.float32)
    unit = _unit(q_NHE, entries_SE, do_NHR, scale) if deterministic else lost
    BH = max(16, triton.next_power_of_2(H))
    for first in range(0, N, rows):
        count = min(rows, N - first)
        _backward_q_kernel[(tiles_of_heads, count)](
            q_NHE, entries_SE, slots_NK, o_NHR, lse_NH, do_NHR, dq_NHE, work[0], work[1], target_NGK,
            scale, len(entries_SE), first, **shape, TARGET=with_target,
            INTERPRET=_interpreted(), STAGES=tiles_q.stages, num_warps=tiles_q.warps,
        )  # fmt: skip
        _backward_kv_kernel[(triton.cdiv(E, tiles_kv.columns), count)](
            q_NHE, slots_NK, do_NHR, work[0], work[1], dkv_SE, unit, lost, len(entries_SE), first,
            H=H, R=value_size, P=E - value_size, K=K, BH=BH, BC=tiles_kv.columns, BK=tiles_kv.keys,
            EXACT=deterministic, INTERPRET=_interpreted(), STAGES=tiles_kv.stages, num_warps=tiles_kv.warps,
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


def _check(q_NHE: Tensor, entries_SE: Tensor, slots_NK: Tensor, value_size: int) -> tuple[int, int, int]:
    N, H, E = q_NHE.shape
    if entries_SE.shape[1] != E or not 0 < value_size < E or len(slots_NK) != N:
        raise ValueError(
            f"q {tuple(q_NHE.shape)}, entries {tuple(entries_SE.shape)}, slots {tuple(slots_NK.shape)} and "
            f"value size {value_size} do not fit together"
        )
    if slots_NK.dtype != torch.int32:
        raise ValueError(f"slots are {slots_NK.dtype}, not int32")
    for name, tensor in (("q", q_NHE), ("entries", entries_SE), ("slots", slots_NK)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    return N, H, E


def _shape(H: int, E: int, value_size: int, K: int, tiles: Tiles) -> dict[str, int]:
    P = E - value_size
    BH = min(tiles.heads, max(16, triton.next_power_of_2(H)))
    return {
        "G": triton.cdiv(H, BH),
        "H": H,
        "R": value_size,
        "P": P,
        "K": K,
        "BH": BH,
        "BR": max(16, triton.next_power_of_2(value_size)),
        "BP": max(16, triton.next_power_of_2(P)),
        "BK": tiles.keys,
        "KB": triton.next_power_of_2(K),
    }


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)
