"""DSA with Triton's kernels: selection, sparse attention with the indexer's KL in one backward, decoding, the warm-up loss.

Nothing here is as large as queries times keys: a pass keeps q, the entries, the slots, o and the log-sum-exp.
The KL's target p (the head-mean probabilities over the kept keys) comes for nothing out of the kernel that
computes dQ, so it exists in the backward pass only, and with it the KL's value and the indexer's gradients.
The PyTorch counterpart is sparse_mla.py with reference.py. Next: sparse_mla_triton.py, indexer_kl_triton.py.

Shape letters: T queries, S slots, H heads, E entry size (latent + rotary), R latent (value) size, K kept,
J indexer heads, I indexer head size; in decoding B sequences with Q new tokens each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import (
    fp8_triton,
    index_topk_triton,
    indexer_kl_triton,
    paged_index_topk_triton,
    paged_mla_triton,
    sparse_mla_backward_triton,
    sparse_mla_triton,
)
from posttrain.kernels.index_topk_triton import Ranges
from posttrain.kernels.pages import Pages, read, slots_of
from posttrain.kernels.warmup_kl_triton import Attention, warmup_kl


@dataclass(frozen=True, slots=True)
class Index:
    """What the index scores are made of: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s])."""

    q_TJI: Tensor
    k_SI: Tensor
    """In q's dtype; one row per slot."""
    w_TJ: Tensor
    """fp32, with every factor: J^-1/2 and I^-1/2."""
    k_scale_S: Tensor | None = None
    """fp32; then k is e4m3, and q is or becomes so to be scored, with its scales in w: for selection only."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and w, contiguous."""
        return self.q_TJI.contiguous(), self.k_SI.contiguous(), self.w_TJ.contiguous()


@dataclass(frozen=True, slots=True)
class Kl:
    """The indexer's loss, the sum over queries of D_KL(p || softmax I) over the kept keys (V3.2-Exp Eq. 4)."""

    loss: Tensor
    """Add it, weighted, to what backward() is called on. The number itself is NaN."""
    value: Tensor
    """fp32 scalar: the loss in numbers, from the backward pass on; NaN before."""


@torch.no_grad()
def select(index: Index, ranges: Ranges, num_kept: int) -> Tensor:
    """Slots of the num_kept best keys of its range for every query: int32 [T, K], ascending, -1 beyond.

    Order: score descending, slot ascending. Raises ValueError for what does not fit.
    """
    q_TJI, w_TJ, scale_S = index.q_TJI.contiguous(), index.w_TJ.contiguous(), index.k_scale_S
    if scale_S is not None and q_TJI.dtype != torch.float8_e4m3fn:
        q_TJI, w_TJ = quantized((q_TJI,), (w_TJ,))
    return index_topk_triton.topk(q_TJI, index.k_SI, w_TJ, ranges, num_kept, k_scale_S=scale_S)


@torch.no_grad()
def quantized(q: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of rows in pieces all q [T, ..., J, I] as e4m3, and all w [T, ..., J] with its scales."""
    sizes = [len(piece) for piece in q]
    q_TJI = torch.empty(sum(sizes), *q[0].shape[1:], dtype=torch.float8_e4m3fn, device=q[0].device)
    w_TJ = w[0].new_empty(q_TJI.shape[:-1])
    for piece, weight, *out in zip(q, w, q_TJI.split(sizes), w_TJ.split(sizes), strict=True):
        fp8_triton.quantize_e4m3(piece.contiguous(), weight=weight.contiguous(), out=(out[0], out[1]))
    return q_TJI, w_TJ


@torch.no_grad()
def decode(
    q_BQHE: Tensor,
    q_index_BQJI: Tensor,
    w_BQJ: Tensor,
    pages: Pages,
    *,
    num_kept: int,
    scale: float,
    value_size: int,
    max_rows: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Latent output [B, Q, H, R] of new tokens that are in the cache already, and the kept positions int32 [B, Q, K].

    A row's bits depend on max_rows, of the engine, and not on B; if deterministic they are those of select() and attend() for
    the same token in a packed document. q and the indexer's q and w are as there. Raises ValueError for what does not fit.
    """
    if pages.scale_PS is not None:
        q_index_BQJI, w_BQJ = quantized((q_index_BQJI,), (w_BQJ,))
    kept_BQK = paged_index_topk_triton.topk(q_index_BQJI, w_BQJ, pages, num_kept)
    if deterministic:
        return _attend_copies(q_BQHE, pages, kept_BQK, scale, value_size), kept_BQK
    part = paged_mla_triton.part_size(max_rows, q_BQHE.shape[2], num_kept)
    o_BQHR, _ = paged_mla_triton.attend(q_BQHE, pages, kept_BQK, scale, value_size, part=part)
    return o_BQHR, kept_BQK


def _attend_copies(q_BQHE: Tensor, pages: Pages, kept_BQK: Tensor, scale: float, value_size: int) -> Tensor:
    """The packed kernel on copies of the kept entries: it adds up in the order of the entries, wherever they lie."""
    B, Q, H, E = q_BQHE.shape
    kept_NK = kept_BQK.flatten(0, 1)
    slot_NK = slots_of(kept_NK, pages.table_BM.repeat_interleave(Q, 0), pages.block_size)
    entries_SE = read(pages.entries_PSE, slot_NK.clamp(min=0).flatten())
    place_NK = torch.arange(kept_NK.numel(), dtype=torch.int32, device=kept_NK.device).view_as(kept_NK)
    slots_NK = place_NK.masked_fill(kept_NK < 0, -1)
    o_NHR, _ = sparse_mla_triton.forward(q_BQHE.reshape(B * Q, H, E), entries_SE, slots_NK, scale, value_size)
    return o_NHR.view(B, Q, H, value_size)


def attend(
    q_THE: Tensor,
    entries_SE: Tensor,
    slots_TK: Tensor,
    *,
    scale: float,
    value_size: int,
    deterministic: bool,
    index: Index | None = None,
    weight_T: Tensor | None = None,
) -> tuple[Tensor, Kl | None]:
    """Latent output [T, H, R] in q's dtype over the kept entries; with an index that trains, its KL too.

    q is [absorbed query | rotary query], in the dtype of the entries (gradients of the entries add up in fp32).
    slots are int32, -1 (or anything else out of range) is no entry; a row without any gives zeros. Whatever of
    q, entries and index requires a gradient gets one; without grad mode there is no KL. In the KL's sum a query
    counts weight times, once by default. dQ and the KL are the same bits every time; the gradients of entries and
    index keys are if deterministic. Raises ValueError on shapes and types that do not fit.
    """
    entries_SE = entries_SE.contiguous()
    settings = (scale, value_size, deterministic)
    if index is None or not torch.is_grad_enabled():
        o_THR, _ = _Attend.apply(q_THE, entries_SE, slots_TK, None, None, None, None, None, *settings)
        return o_THR, None
    value = torch.full((), float("nan"), dtype=torch.float32, device=q_THE.device)
    o_THR, loss = _Attend.apply(
        q_THE, entries_SE, slots_TK, *index.parts(), _weights(index, weight_T), value, *settings
    )
    return o_THR, Kl(loss, value)


def warmup_loss(index: Index, attention: Attention, ranges: Ranges, weight_T: Tensor | None = None) -> Tensor:
    """The indexer's warm-up loss, fp32 scalar: sum over queries of D_KL(p || softmax I) over all keys (V3.2-Exp Eq. 3).

    p is the head-mean of the attention, which gets no gradient; q, k and w of the index do. A query counts weight
    times, once by default. The bits are always the same. Raises ValueError for what does not fit.
    """
    loss: Tensor = _WarmupLoss.apply(*index.parts(), attention, ranges, _weights(index, weight_T))
    return loss


def _weights(index: Index, weight_T: Tensor | None) -> Tensor:
    return index.w_TJ.new_ones(len(index.w_TJ)) if weight_T is None else weight_T


class _WarmupLoss(torch.autograd.Function):
    """Makes the gradients in the forward pass: kept, they are smaller than the attention they come from."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q_TJI, k_SI, w_TJ, attention, ranges, weight_T = args
        kl_T, *grads = warmup_kl(attention, q_TJI, k_SI, w_TJ, ranges, weight_T)
        parts = zip(grads, (q_TJI, k_SI, w_TJ), strict=True)
        ctx.save_for_backward(*(grad.to(x.dtype) for grad, x in parts))
        total: Tensor = (kl_T * weight_T).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *(grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors), None, None, None


class _Attend(torch.autograd.Function):
    """Keeps its inputs, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        (
            q_THE,
            entries_SE,
            slots_TK,
            q_TJI,
            k_SI,
            w_TJ,
            weight_T,
            ctx.value,
            ctx.scale,
            value_size,
            ctx.deterministic,
        ) = args
        o_THR, lse_TH = sparse_mla_triton.forward(q_THE, entries_SE, slots_TK, ctx.scale, value_size)
        ctx.save_for_backward(q_THE, entries_SE, slots_TK, o_THR, lse_TH, q_TJI, k_SI, w_TJ, weight_T)
        if not any(ctx.needs_input_grad[:2]):  # only the indexer trains
            ctx.mark_non_differentiable(o_THR)
        return o_THR, None if ctx.value is None else torch.full_like(ctx.value, float("nan"))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """dQ and the target first; from them the KL and its gradients, weighted by the gradient of its sum."""
        q_THE, entries_SE, slots_TK, o_THR, lse_TH, q_TJI, k_SI, w_TJ, weight_T = ctx.saved_tensors
        do_THR, dloss = grads
        needs = ctx.needs_input_grad
        trains_index = any(needs[3:6])
        dq_THE, dentries_SE, p_TK = sparse_mla_backward_triton.backward(
            q_THE,
            entries_SE,
            slots_TK,
            o_THR,
            lse_TH,
            do_THR.contiguous(),
            ctx.scale,
            deterministic=ctx.deterministic,
            with_target=trains_index,
        )
        dindex: tuple[Tensor | None, ...] = (None, None, None)
        if trains_index:
            assert p_TK is not None, "asked for with_target"
            kl_T, *dparts = indexer_kl_triton.indexer_kl(
                q_TJI, k_SI, w_TJ, slots_TK, p_TK, weight_T * dloss.float(), deterministic=ctx.deterministic
            )
            ctx.value.copy_((kl_T * weight_T).sum())
            parts = zip(dparts, (q_TJI, k_SI, w_TJ), needs[3:6], strict=True)
            dindex = tuple(d.to(x.dtype) if needed else None for d, x, needed in parts)
        dmodel = (dq_THE if needs[0] else None, dentries_SE.to(entries_SE.dtype) if needs[1] else None)
        return *dmodel, None, *dindex, None, None, None, None, None
