"""The indexer's sparse KL loss in Triton: value and gradients with respect to q, k and w in one kernel.

L_t = D_KL(p_t || softmax(I_t)) over the kept keys, V3.2-Exp Eq. 4; dI = softmax(I) - p. A program works on one
query: a first walk over its keys computes the scores; a second one recomputes the products and carries dI
through ReLU. Head weights stay outside the sums over keys: with g[j, s] = dI[s] 1[q[j] . k[s] > 0],

    dq[j] = w[j] (sum_s g[j, s] k[s])      dw[j] = q[j] . (sum_s g[j, s] k[s])      dk[s] = sum_j g[j, s] (w[j] q[j]).

No [N, J, K] array exists. dk is added to memory as fp32, or as 64-bit integers (deterministic, as in
sparse_mla_triton.py). Definition: reference.indexer_kl. Next: README.md.

Shape letters: N queries, S keys, J indexer heads, I indexer head size, K kept.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.product_triton import block, dot, interpreted, twice_relu


@dataclass(frozen=True)
class Shape:
    """Launch shape."""

    keys: int = 64
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    """At most so many per thread, so that more programs share a multiprocessor."""


FAST_SHAPE = Shape(stages=1, registers=168)
"""Three programs on a multiprocessor: 7 % faster on an H200."""
EXACT_SHAPE = Shape()
"""64-bit integers leave no registers to save."""


@triton.jit
def _keys(k_ptr, slots_ptr, start, num_slots, i, I: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """BK of a query's keys [BK, BI], zeros for missing ones; their slots, and which exist."""
    at = start + tl.arange(0, BK)
    slots = tl.load(slots_ptr + at, mask=at < K, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    slots = slots.to(tl.int64)
    k = tl.load(k_ptr + slots[:, None] * I + i[None, :], mask=valid[:, None] & (i < I)[None, :], other=0.0)
    return k, slots, valid


@triton.jit
def _divergence(
    scores_ptr, p_ptr, slots_ptr, num_slots, end, weight, KB: tl.constexpr
):  # fmt: skip
    """KL of a query; dI takes the place of its scores. An empty row gives 0."""
    at = tl.arange(0, KB)
    slots = tl.load(slots_ptr + at, mask=at < end, other=-1)
    valid = (slots >= 0) & (slots < num_slots)
    score = tl.load(scores_ptr + at, mask=valid, other=float("-inf"))
    p = tl.load(p_ptr + at, mask=valid, other=0.0)
    m = tl.maximum(tl.max(score, 0), -1e30)
    exp = tl.exp(score - m)
    total = tl.sum(exp, 0)
    total = tl.where(total == 0, 1.0, total)
    mass = tl.sum(p, 0)
    di = (exp * (mass / total) - p) * weight
    tl.store(scores_ptr + at, di, mask=at < end)
    logq = tl.where(valid, score, 0.0) - (m + tl.log(total))
    return tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0) - p * logq, 0)


@triton.jit
def _add_rows(out_ptr, rows, value, valid, i, unit_ptr, lost_ptr, I: tl.constexpr, EXACT: tl.constexpr):
    """Add value to columns i of rows of fp32 memory, or of integers of which unit are 1.0."""
    target = out_ptr + rows[:, None] * I + i[None, :]
    mask = valid[:, None] & (i < I)[None, :]
    if EXACT:
        finite = tl.abs(value) < float("inf")
        if tl.min(tl.where(mask & (finite == 0), 0, 1)) == 0:
            tl.store(lost_ptr, float("nan"))  # integers cannot say so themselves
        units = (tl.where(finite, value, 0.0) * tl.load(unit_ptr)).to(tl.int64)
        tl.atomic_add(target, units, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(target, value, mask=mask, sem="relaxed")


@triton.jit
def _weighted(q_ptr, w, row, j, i, J: tl.constexpr, I: tl.constexpr):
    """Columns i of w q, in q's dtype."""
    mask = (j < J)[:, None] & (i < I)[None, :]
    q = tl.load(q_ptr + (row * J + j[:, None]) * I + i[None, :], mask=mask, other=0.0)
    return (q.to(tl.float32) * w[:, None]).to(q.dtype)


@triton.jit(do_not_specialize=["num_slots"])
def _kernel(
    q_ptr, k_ptr, w_ptr, slots_ptr, p_ptr, weight_ptr, scores_ptr, kl_ptr, dq_ptr, dw_ptr, dk_ptr,
    unit_ptr, lost_ptr, num_slots,
    J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, KB: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query."""
    row = tl.program_id(0).to(tl.int64)
    j, i = tl.arange(0, BJ), tl.arange(0, BI)
    in_ji = (j < J)[:, None] & (i < I)[None, :]
    q_at = (row * J + j[:, None]) * I + i[None, :]
    q = tl.load(q_ptr + q_at, mask=in_ji, other=0.0)
    w = tl.load(w_ptr + row * J + j, mask=j < J, other=0.0)
    slots_ptr += row * K
    scores_ptr += row * K
    all_at = tl.arange(0, KB)
    all_slots = tl.load(slots_ptr + all_at, mask=all_at < K, other=-1)
    end = tl.max(tl.where((all_slots >= 0) & (all_slots < num_slots), all_at + 1, 0), 0)
    stop = K if INTERPRET else end
    for start in tl.range(0, stop, BK, num_stages=STAGES):
        k, slots, valid = _keys(k_ptr, slots_ptr, start, num_slots, i, I, K, BK)
        x = dot(k, tl.trans(q), INTERPRET)
        score = 0.5 * tl.sum(twice_relu(x) * w[None, :], 1)
        tl.store(scores_ptr + start + tl.arange(0, BK), score, mask=valid)
    tl.debug_barrier()  # the scores just stored are read by other threads
    weight = tl.load(weight_ptr + row)
    tl.store(kl_ptr + row, _divergence(scores_ptr, p_ptr + row * K, slots_ptr, num_slots, end, weight, KB))
    tl.debug_barrier()
    # dk in two halves of columns: its sums and the addresses they go to would fill the registers
    low, high = tl.arange(0, BC), BC + tl.arange(0, BC)
    qw_low = _weighted(q_ptr, w, row, j, low, J, I)
    qw_high = _weighted(q_ptr, w, row, j, high, J, I)
    gk = tl.zeros([BJ, BI], tl.float32)
    for start in tl.range(0, stop, BK, num_stages=STAGES):
        k, slots, valid = _keys(k_ptr, slots_ptr, start, num_slots, i, I, K, BK)
        x = dot(k, tl.trans(q), INTERPRET)
        di = tl.load(scores_ptr + start + tl.arange(0, BK), mask=valid, other=0.0)
        g = tl.where(x > 0, di[:, None], 0.0).to(q.dtype)
        gk += dot(tl.trans(g), k, INTERPRET)
        _add_rows(dk_ptr, slots, dot(g, qw_low, INTERPRET), valid, low, unit_ptr, lost_ptr, I, EXACT)
        _add_rows(dk_ptr, slots, dot(g, qw_high, INTERPRET), valid, high, unit_ptr, lost_ptr, I, EXACT)
    # q and w once more: kept from above they would occupy registers all the time
    q = tl.load(q_ptr + q_at, mask=in_ji, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * J + j, mask=j < J, other=0.0)
    tl.store(dq_ptr + q_at, gk * w[:, None], mask=in_ji)
    tl.store(dw_ptr + row * J + j, tl.sum(gk * q, 1), mask=j < J)


def indexer_kl(
    q_NJI: Tensor,
    k_SI: Tensor,
    w_NJ: Tensor,
    slots_NK: Tensor,
    p_NK: Tensor,
    weight_N: Tensor,
    *,
    deterministic: bool,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL fp32 [N], and the gradients of sum(weight * KL): dq [N, J, I], dk [S, I], dw [N, J], all fp32.

    w is fp32 and carries every factor; slots are int32, anything outside 0 .. S - 1 is a missing entry (its p
    is not read). With p of mass other than 1 the loss is that of mass * softmax, as the definition has it.
    KL, dq and dw are always the same bits; dk is with deterministic.
    """
    N, J, I = q_NJI.shape
    K = slots_NK.shape[1]
    shape = shape or (EXACT_SHAPE if deterministic else FAST_SHAPE)
    for name, tensor in (("w", w_NJ), ("p", p_NK), ("weight", weight_N)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous float32")
    if k_SI.shape[1] != I or w_NJ.shape != (N, J) or p_NK.shape != (N, K) or weight_N.shape != (N,):
        raise ValueError(f"q {tuple(q_NJI.shape)}, k {tuple(k_SI.shape)}, p {tuple(p_NK.shape)} do not fit")
    if slots_NK.dtype != torch.int32:
        raise ValueError(f"slots are {slots_NK.dtype}, not int32")
    if not (q_NJI.is_contiguous() and k_SI.is_contiguous() and slots_NK.is_contiguous()):
        raise ValueError("q, k and slots must be contiguous")
    like, BI = w_NJ, block(I)
    kl_N, scores_NK = like.new_empty(N), like.new_empty(N, K)
    dq_NJI, dw_NJ = like.new_empty(N, J, I), like.new_empty(N, J)
    dk_SI = torch.zeros(k_SI.shape, dtype=torch.int64 if deterministic else torch.float32, device=k_SI.device)
    lost = like.new_zeros(1)
    unit = _unit(q_NJI, w_NJ, weight_N) if deterministic else lost
    if N:
        _kernel[(N,)](
            q_NJI, k_SI, w_NJ, slots_NK, p_NK, weight_N, scores_NK, kl_N, dq_NJI, dw_NJ, dk_SI,
            unit, lost, len(k_SI), J=J, I=I, K=K,
            BJ=block(J), BI=BI, BC=max(16, BI // 2),
            BK=shape.keys, KB=triton.next_power_of_2(K), EXACT=deterministic,
            INTERPRET=interpreted(), STAGES=shape.stages, num_warps=shape.warps,
            maxnreg=shape.registers,
        )  # fmt: skip
    if deterministic:
        dk_SI = (dk_SI.double() / unit.double()).float() + lost
    return kl_N, dq_NJI, dk_SI, dw_NJ


def _unit(q_NJI: Tensor, w_NJ: Tensor, weight_N: Tensor) -> Tensor:
    """How many integer units are 1.0: |dI| <= weight (p and softmax have mass 1), no key is kept by more than N."""
    q, w, weight = (x.abs().amax().double() for x in (q_NJI, w_NJ, weight_N))
    bound = q.new_tensor(float(len(q_NJI) * q_NJI.shape[1])) * q * w * weight * 2
    bound = torch.where(bound.isfinite() & (bound > 0), bound, 1.0)
    return torch.exp2(torch.floor(62 - torch.log2(bound)).clamp(-100, 100)).float().reshape(1)
