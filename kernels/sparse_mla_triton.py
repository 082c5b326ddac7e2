"""Sparse MQA-absorbed attention in Triton, forward: output and log-sum-exp by online softmax.

One program works on one query and a tile of its heads, so a row's result never depends on what else is in the
batch. Two kernels of one function: with many heads they are the rows of the products, with few (less than the
64 rows of a tensor-core tile) the kept entries are the rows and the heads the columns, so that nothing is
padded. A third, in Gluon (sparse_mla_gluon.py), takes the place of the first where its shapes fit and it is
compiled. Missing entries (-1) are read as zeros and get probability zero, so that whatever lies in rows nobody
selected cannot leak. Definition: reference.sparse_mla. Next: sparse_mla_backward_triton.py, README.md.

Shape letters: N queries, H heads, E entry size = R + P, R latent (value) size, P rotary size, S slots,
K kept entries, G tiles of heads.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import sparse_mla_gluon
from posttrain.kernels.product_triton import block, dot, interpreted

LOG2E = tl.constexpr(math.log2(math.e))
MAX_HEADS = 128


@dataclass(frozen=True)
class Tiles:
    """Launch shape; the defaults were chosen on an H200 (benchmarks/kernels.py)."""

    heads: int = 64
    keys: int = 64
    warps: int = 8
    stages: int = 2


MANY = Tiles()
FEW = Tiles(heads=32, warps=4)
"""For at most 32 heads."""


@triton.jit
def kept(slots_ptr, row, start, num_slots, K: tl.constexpr, BK: tl.constexpr):
    """Place in the row, slot (0 where missing) and validity of BK kept entries."""
    at = start + tl.arange(0, BK)
    slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    return at, tl.where(valid, slots, 0).to(tl.int64), valid


@triton.jit
def last_kept(slots_ptr, row, num_slots, K: tl.constexpr, KB: tl.constexpr):
    """One past the last valid place of a row; 0 for an empty one."""
    at = tl.arange(0, KB)
    slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
    return tl.max(tl.where((slots >= 0) & (slots < num_slots), at + 1, 0), 0)


@triton.jit(do_not_specialize=["num_slots"])
def _forward_kernel(
    q_ptr, kv_ptr, slots_ptr, o_ptr, lse_ptr, scale, num_slots,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr,
    G: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query, BH heads, which are the rows of the products."""
    E: tl.constexpr = R + P
    row = (tl.program_id(0) // G).to(tl.int64)
    h = tl.program_id(0) % G * BH + tl.arange(0, BH)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    in_h, in_r, in_p = h < H, r < R, p < P
    q_row = q_ptr + (row * H + h[:, None]) * E
    q = tl.load(q_row + r[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    q_rot = tl.load(q_row + R + p[None, :], mask=in_h[:, None] & in_p[None, :], other=0.0)
    end = K if INTERPRET else last_kept(slots_ptr, row, num_slots, K, KB)
    m = tl.full([BH], -1e30, tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BR], tl.float32)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        _, slots, valid = kept(slots_ptr, row, start, num_slots, K, BK)
        entry = kv_ptr + slots[:, None] * E
        k = tl.load(entry + r[None, :], mask=valid[:, None] & in_r[None, :], other=0.0)
        k_rot = tl.load(entry + R + p[None, :], mask=valid[:, None] & in_p[None, :], other=0.0)
        logits = dot(q, tl.trans(k), INTERPRET) + dot(q_rot, tl.trans(k_rot), INTERPRET)
        logits = tl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, 1))
        prob = tl.exp2(logits - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(prob, 1)
        acc = acc * shrink[:, None] + dot(prob.to(k.dtype), k, INTERPRET)
        m = new_m
    any_key = total > 0
    safe = tl.where(any_key, total, 1.0)
    out = tl.where(any_key[:, None], acc / safe[:, None], 0.0)
    o_row = o_ptr + (row * H + h[:, None]) * R
    tl.store(o_row + r[None, :], out.to(o_ptr.dtype.element_ty), mask=in_h[:, None] & in_r[None, :])
    lse = tl.where(any_key, (m + tl.log2(safe)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row * H + h, lse, mask=in_h)


@triton.jit(do_not_specialize=["num_slots"])
def _forward_few_kernel(
    q_ptr, kv_ptr, slots_ptr, o_ptr, lse_ptr, scale, num_slots,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr,
    G: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same with the kept entries as the rows of the products and the heads as their columns."""
    E: tl.constexpr = R + P
    row = (tl.program_id(0) // G).to(tl.int64)
    h = tl.program_id(0) % G * BH + tl.arange(0, BH)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    in_h, in_r, in_p = h < H, r < R, p < P
    q_row = q_ptr + (row * H + h[:, None]) * E
    q = tl.load(q_row + r[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    q_rot = tl.load(q_row + R + p[None, :], mask=in_h[:, None] & in_p[None, :], other=0.0)
    end = K if INTERPRET else last_kept(slots_ptr, row, num_slots, K, KB)
    m = tl.full([BH], -1e30, tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BR, BH], tl.float32)
    for start in tl.range(0, end, BK, num_stages=STAGES):
        _, slots, valid = kept(slots_ptr, row, start, num_slots, K, BK)
        entry = kv_ptr + slots[:, None] * E
        k = tl.load(entry + r[None, :], mask=valid[:, None] & in_r[None, :], other=0.0)
        k_rot = tl.load(entry + R + p[None, :], mask=valid[:, None] & in_p[None, :], other=0.0)
        logits = dot(k, tl.trans(q), INTERPRET) + dot(k_rot, tl.trans(q_rot), INTERPRET)
        logits = tl.where(valid[:, None], logits * (scale * LOG2E), float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, 0))
        prob = tl.exp2(logits - new_m[None, :])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(prob, 0)
        acc = acc * shrink[None, :] + dot(tl.trans(k), prob.to(k.dtype), INTERPRET)
        m = new_m
    any_key = total > 0
    safe = tl.where(any_key, total, 1.0)
    out = tl.where(any_key[None, :], acc / safe[None, :], 0.0)
    o_at = o_ptr + (row * H + h[None, :]) * R + r[:, None]
    tl.store(o_at, out.to(o_ptr.dtype.element_ty), mask=in_h[None, :] & in_r[:, None])
    lse = tl.where(any_key, (m + tl.log2(safe)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row * H + h, lse, mask=in_h)


def forward(
    q_NHE: Tensor,
    entries_SE: Tensor,
    slots_NK: Tensor,
    scale: float,
    value_size: int,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [N, H, R] in q's dtype and the log-sum-exp of the scaled logits, fp32 [N, H] (-inf: empty row).

    slots are int32; anything outside 0 .. S - 1 is a missing entry. Raises ValueError for shapes, types or
    strides that do not fit.
    """
    N, H, E = check(q_NHE, entries_SE, slots_NK, value_size)
    K, P = slots_NK.shape[1], E - value_size
    o_NHR = q_NHE.new_empty(N, H, value_size)
    lse_NH = q_NHE.new_empty(N, H, dtype=torch.float32)
    if not N:
        return o_NHR, lse_NH
    args = (q_NHE, entries_SE, slots_NK, o_NHR, lse_NH, scale, len(entries_SE))
    KB = triton.next_power_of_2(K)
    if tiles is None and fits_gluon(q_NHE, value_size, P):
        gluon = sparse_mla_gluon
        gluon.forward_kernel[(N * (H // gluon.TILE),)](
            *args, H=H, R=value_size, P=P, K=K, KB=max(KB, 32 * gluon.WARPS), BH=gluon.TILE, BK=gluon.TILE,
            num_warps=gluon.WARPS,
        )  # fmt: skip
        return o_NHR, lse_NH
    if tiles is None:
        tiles = FEW if FEW.heads >= H else MANY
    BH = min(tiles.heads, block(H))
    kernel = _forward_few_kernel if FEW.heads >= BH else _forward_kernel
    kernel[(N * triton.cdiv(H, BH),)](
        *args, H=H, R=value_size, P=P, K=K, BH=BH, BR=block(value_size), BP=block(P), BK=tiles.keys,
        KB=KB, G=triton.cdiv(H, BH), INTERPRET=interpreted(), STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return o_NHR, lse_NH


def fits_gluon(q_NHE: Tensor, value_size: int, rotary_size: int) -> bool:
    """Whether the Gluon kernels take this: they are compiled only, copy 16 bytes at a time and mask no head."""
    return (
        not interpreted()
        and q_NHE.shape[1] in sparse_mla_gluon.HEADS
        and q_NHE.element_size() == 2
        and value_size in (256, 512)
        and rotary_size == 64
        and torch.cuda.get_device_capability(q_NHE.device)[0] == 9
    )


def check(q_NHE: Tensor, entries_SE: Tensor, slots_NK: Tensor, value_size: int) -> tuple[int, int, int]:
    """N, H, E; ValueError if the arguments do not fit together."""
    N, H, E = q_NHE.shape
    if entries_SE.shape[1] != E or not 0 < value_size < E or len(slots_NK) != N or not len(entries_SE):
        raise ValueError(
            f"q {tuple(q_NHE.shape)}, entries {tuple(entries_SE.shape)}, slots {tuple(slots_NK.shape)} and "
            f"value size {value_size} do not fit together"
        )
    if H > MAX_HEADS:
        raise ValueError(f"{H} heads; at most {MAX_HEADS}")
    if slots_NK.dtype != torch.int32:
        raise ValueError(f"slots are {slots_NK.dtype}, not int32")
    for name, tensor in (("q", q_NHE), ("entries", entries_SE), ("slots", slots_NK)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    return N, H, E
