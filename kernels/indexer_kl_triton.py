"""The indexer's sparse KL loss in Triton: value and gradients with respect to q, k and w in one kernel.

L_t = D_KL(p_t || softmax(I_t)) over the kept keys, V3.2-Exp Eq. 4; dI = softmax(I) - p. A program works on one
query: a first walk over its keys computes the scores and their log-sum-exp, a second one recomputes the
products and carries dI through ReLU to dq, dw and dk. No [N, J, K] array exists. dk is added to memory as
fp32, or as 64-bit integers (deterministic, as in sparse_mla_triton.py). Definition: reference.indexer_kl.
Next: README.md.

Shape letters: N queries, S keys, J indexer heads, I indexer head size, K kept.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Launch shape."""

    keys: int = 64
    warps: int = 4
    stages: int = 2


SHAPE = Shape()


@triton.jit
def _products(k_ptr, q, slots, valid, i, I: tl.constexpr, INTERPRET: tl.constexpr):
    """Keys [BK, BI] and products with the query's heads [BK, BJ]."""
    k = tl.load(k_ptr + slots[:, None] * I + i[None, :], mask=valid[:, None] & (i < I)[None, :], other=0.0)
    if INTERPRET:
        return k, tl.dot(k.to(tl.float32), tl.trans(q).to(tl.float32))
    return k, tl.dot(k, tl.trans(q))


@triton.jit
def _kernel(
    q_ptr, k_ptr, w_ptr, slots_ptr, p_ptr, weight_ptr, scores_ptr, kl_ptr, dq_ptr, dw_ptr, dk_ptr,
    unit_ptr, lost_ptr, num_slots,
    J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j, i = tl.arange(0, BJ), tl.arange(0, BI)
    in_ji = (j < J)[:, None] & (i < I)[None, :]
    q_at = (row * J + j[:, None]) * I + i[None, :]
    q = tl.load(q_ptr + q_at, mask=in_ji, other=0.0)
    w = tl.load(w_ptr + row * J + j, mask=j < J, other=0.0)
    m = -1e30
    total = 0.0
    plogp = 0.0
    ps = 0.0
    mass = 0.0
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + tl.arange(0, BK)
        slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
        valid = (slots >= 0) & (slots < num_slots)
        _, x = _products(k_ptr, q, slots.to(tl.int64), valid, i, I, INTERPRET)
        score = tl.sum(tl.maximum(x, 0.0) * w[None, :], 1)
        score = tl.where(valid, score, float("-inf"))
        tl.store(scores_ptr + row * K + at, score, mask=at < K)
        p = tl.load(p_ptr + row * K + at, mask=valid, other=0.0)
        new_m = tl.maximum(m, tl.max(score, 0))
        total = total * tl.exp(m - new_m) + tl.sum(tl.exp(score - new_m), 0)
        m = new_m
        plogp += tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)
        ps += tl.sum(p * tl.where(valid, score, 0.0), 0)
        mass += tl.sum(p, 0)
    lse = m + tl.log(tl.where(total > 0, total, 1.0))
    tl.store(kl_ptr + row, tl.where(total > 0, plogp - ps + lse * mass, 0.0))
    weight = tl.load(weight_ptr + row)
    unit = tl.load(unit_ptr) if EXACT else 1.0
    tl.debug_barrier()  # the scores just stored are read by other threads
    dq = tl.zeros([BJ, BI], tl.float32)
    dw = tl.zeros([BJ], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + tl.arange(0, BK)
        slots = tl.load(slots_ptr + row * K + at, mask=at < K, other=-1)
        valid = (slots >= 0) & (slots < num_slots)
        slots = slots.to(tl.int64)
        k, x = _products(k_ptr, q, slots, valid, i, I, INTERPRET)
        p = tl.load(p_ptr + row * K + at, mask=valid, other=0.0)
        score = tl.load(scores_ptr + row * K + at, mask=valid, other=float("-inf"))
        di = (tl.exp(score - lse) * mass - p) * weight
        dw += tl.sum(tl.maximum(x, 0.0) * di[:, None], 0)
        dx = tl.where(x > 0, di[:, None] * w[None, :], 0.0).to(q.dtype)
        if INTERPRET:
            dq += tl.dot(tl.trans(dx).to(tl.float32), k.to(tl.float32))
            dk = tl.dot(dx.to(tl.float32), q.to(tl.float32))
        else:
            dq = tl.dot(tl.trans(dx), k, dq)
            dk = tl.dot(dx, q)
        target = dk_ptr + slots[:, None] * I + i[None, :]
        mask = valid[:, None] & (i < I)[None, :]
        if EXACT:
            finite = tl.abs(dk) < float("inf")
            if tl.min(tl.where(mask & (finite == 0), 0, 1)) == 0:
                tl.store(lost_ptr, float("nan"))
            tl.atomic_add(target, (tl.where(finite, dk, 0.0) * unit).to(tl.int64), mask=mask, sem="relaxed")
        else:
            tl.atomic_add(target, dk, mask=mask, sem="relaxed")
    tl.store(dq_ptr + q_at, dq, mask=in_ji)
    tl.store(dw_ptr + row * J + j, dw, mask=j < J)


def indexer_kl(
    q_NJI: Tensor,
    k_SI: Tensor,
    w_NJ: Tensor,
    slots_NK: Tensor,
    p_NK: Tensor,
    weight_N: Tensor,
    *,
    deterministic: bool,
    shape: Shape = SHAPE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL fp32 [N], and the gradients of sum(weight * KL): dq [N, J, I], dk [S, I], dw [N, J], all fp32.

    w is fp32 and carries every factor; slots are int32, anything outside 0 .. S - 1 is a missing entry (then p
    is 0). With p of mass other than 1 the loss is that of mass * softmax, as the definition has it.
    """
    N, J, I = q_NJI.shape
    K = slots_NK.shape[1]
    for name, tensor in (("w", w_NJ), ("p", p_NK), ("weight", weight_N)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous float32")
    if k_SI.shape[1] != I or w_NJ.shape != (N, J) or p_NK.shape != (N, K) or weight_N.shape != (N,):
        raise ValueError(f"q {tuple(q_NJI.shape)}, k {tuple(k_SI.shape)}, p {tuple(p_NK.shape)} do not fit")
    like = w_NJ
    kl_N, scores_NK = like.new_empty(N), like.new_empty(N, K)
    dq_NJI, dw_NJ = like.new_empty(N, J, I), like.new_empty(N, J)
    dk_SI = torch.zeros(k_SI.shape, dtype=torch.int64 if deterministic else torch.float32, device=k_SI.device)
    lost = like.new_zeros(1)
    unit = _unit(q_NJI, w_NJ, weight_N) if deterministic else lost
    if N:
        _kernel[(N,)](
            q_NJI, k_SI, w_NJ, slots_NK, p_NK, weight_N, scores_NK, kl_N, dq_NJI, dw_NJ, dk_SI,
            unit, lost, len(k_SI), J=J, I=I, K=K,
            BJ=max(16, triton.next_power_of_2(J)), BI=max(16, triton.next_power_of_2(I)), BK=shape.keys,
            EXACT=deterministic, INTERPRET=bool(triton.knobs.runtime.interpret),
            STAGES=shape.stages, num_warps=shape.warps,
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
