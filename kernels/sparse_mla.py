"""Sparse MQA-absorbed attention with a backward of its own, in PyTorch: chunk by chunk over the queries.

The definition is reference.sparse_mla. Here the gathered entries live for one chunk only and are gathered
again in the backward pass, so that memory is O(queries) and a chunk stays in the cache. Next: reference.py.

Shape letters: N queries, H heads, E entry size (latent + rotary), S slots that hold entries, K kept entries,
R latent size, n queries of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Gathered entries of one chunk: what a core's cache holds beside the rest; on a GPU few launches count more."""


def sparse_mla(
    q_NHE: Tensor, entries_SE: Tensor, slots_NK: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    """Latent output [N, H, R] and head-mean probabilities fp32 [N, K] over the kept entries.

    q is [absorbed query | rotary query]; slots are rows of entries, of any document, -1 for none; the value
    is the first value_size dims of an entry. The probabilities are the indexer's target and carry no gradient.
    """
    if torch.is_grad_enabled() and (q_NHE.requires_grad or entries_SE.requires_grad):
        o_NHR, p_NHK = _SparseMla.apply(q_NHE, entries_SE, slots_NK, scale, value_size)
    else:
        o_NHR, p_NHK = _forward(q_NHE, entries_SE, slots_NK, scale, value_size)
    return o_NHR, p_NHK.detach().mean(1)


def _chunks(slots_NK: Tensor, entries_SE: Tensor) -> list[slice]:
    N, K = slots_NK.shape
    size = CHUNK_BYTES[entries_SE.device.type] // (K * entries_SE.shape[1] * entries_SE.element_size())
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, N, size)]


def _gather(entries_SE: Tensor, slots_nK: Tensor) -> Tensor:
    """[n, K, E]; any entry stands in where there is none."""
    return entries_SE.index_select(0, slots_nK.clamp(min=0).view(-1)).view(*slots_nK.shape, -1)


def _forward(
    q_NHE: Tensor, entries_SE: Tensor, slots_NK: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    (N, H, _), K = q_NHE.shape, slots_NK.shape[1]
    o_NHR = q_NHE.new_empty(N, H, value_size)
    p_NHK = q_NHE.new_empty(N, H, K, dtype=torch.float32)
    none_N1K = (slots_NK < 0)[:, None]
    for chunk in _chunks(slots_NK, entries_SE):
        kv_nKE = _gather(entries_SE, slots_NK[chunk])
        logits_nHK = torch.bmm(q_NHE[chunk], kv_nKE.transpose(1, 2)).float().mul_(scale)
        torch.softmax(logits_nHK.masked_fill_(none_N1K[chunk], float("-inf")), -1, out=p_NHK[chunk])
        torch.bmm(p_NHK[chunk].to(q_NHE.dtype), kv_nKE[..., :value_size], out=o_NHR[chunk])
    return o_NHR, p_NHK


class _SparseMla(torch.autograd.Function):
    """Saves the probabilities, not the gathered entries."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q_NHE, entries_SE, slots_NK, ctx.scale, ctx.value_size = args
        o_NHR, p_NHK = _forward(*args)
        ctx.save_for_backward(q_NHE, entries_SE, slots_NK, p_NHK)
        ctx.mark_non_differentiable(p_NHK)
        return o_NHR, p_NHK

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """All of a query's entries are here, so softmax goes backward as it is; an entry's gradients add up in fp32."""
        q_NHE, entries_SE, slots_NK, p_NHK = ctx.saved_tensors
        do_NHR, dtype = grads[0], q_NHE.dtype
        dq_NHE = torch.empty_like(q_NHE)
        dentries_SE = torch.zeros_like(entries_SE, dtype=torch.promote_types(dtype, torch.float32))
        do_NHE = F.pad(do_NHR, (0, q_NHE.shape[2] - ctx.value_size))  # an entry's rotary part is no value
        for chunk in _chunks(slots_NK, entries_SE):
            kv_nKE, p_nHK, do_nHR = _gather(entries_SE, slots_NK[chunk]), p_NHK[chunk], do_NHR[chunk]
            dp_nHK = torch.bmm(do_nHR, kv_nKE[..., : ctx.value_size].transpose(1, 2)).to(p_nHK.dtype)
            ds_nHK = torch.ops.aten._softmax_backward_data(dp_nHK, p_nHK, -1, p_nHK.dtype)
            ds_nHK = ds_nHK.mul_(ctx.scale).to(dtype)
            torch.bmm(ds_nHK, kv_nKE, out=dq_NHE[chunk])
            dkv_nKE = torch.bmm(ds_nHK.transpose(1, 2), q_NHE[chunk])
            dkv_nKE.baddbmm_(p_nHK.to(dtype).transpose(1, 2), do_NHE[chunk])
            slots = slots_NK[chunk].clamp(min=0).view(-1)  # what stands in for none gets exact zeros
            dentries_SE.index_add_(0, slots, dkv_nKE.flatten(0, 1).to(dentries_SE.dtype))
        return dq_NHE, dentries_SE.to(entries_SE.dtype), None, None, None
