"""Sparse MQA-absorbed attention with a backward of its own, in PyTorch: chunk by chunk over the queries.

The definition is reference.sparse_mla. Here the gathered entries live for one chunk only and are gathered
again in the backward pass, so that memory is O(queries) and a chunk stays in the cache. Next: reference.py.

Shape letters: as in reference.py, and N = B Q queries, n queries of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Gathered entries of one chunk: what a core's cache holds; on a GPU few launches count more."""


def sparse_mla(
    q_BQHE: Tensor, entries_BLE: Tensor, kept_BQK: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    """Latent output [B, Q, H, R] and head-mean probabilities fp32 [B, Q, K] over the kept entries (-1: none).

    q is [absorbed query | rotary query]; the value is the first value_size dims of an entry. The
    probabilities are the indexer's target and carry no gradient.
    """
    B, Q, H, E = q_BQHE.shape
    K = kept_BQK.shape[-1]
    entries_LE, stride = _one_row(entries_BLE)
    rows_B = torch.arange(0, B * stride, stride, device=kept_BQK.device).view(B, 1, 1)
    flat_NK = (kept_BQK.clamp(min=0) + rows_B).view(B * Q, K)
    inputs = (q_BQHE.reshape(B * Q, H, E), entries_LE, flat_NK, kept_BQK.view(B * Q, 1, K))
    if torch.is_grad_enabled() and (q_BQHE.requires_grad or entries_BLE.requires_grad):
        o_NHR, p_NHK = _SparseMla.apply(*inputs, scale, value_size)
    else:
        o_NHR, p_NHK = _forward(*inputs, scale, value_size)
    return o_NHR.view(B, Q, H, value_size), p_NHK.detach().mean(1).view(B, Q, K)


def _one_row(entries_BLE: Tensor) -> tuple[Tensor, int]:
    """The entries as [rows, E] without a copy, and how many rows apart the documents lie.

    A cache hands over the filled part of each of its rows: documents are then further apart than long.
    """
    B, L, E = entries_BLE.shape
    apart, rest = divmod(entries_BLE.stride(0), E)
    if rest or entries_BLE.stride()[1:] != (E, 1):
        return entries_BLE.reshape(B * L, E), L
    return entries_BLE.as_strided(((B - 1) * apart + L, E), (E, 1)), apart


def _chunks(flat_NK: Tensor, entries_LE: Tensor) -> list[slice]:
    N, K = flat_NK.shape
    size = CHUNK_BYTES[entries_LE.device.type] // (K * entries_LE.shape[1] * entries_LE.element_size())
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, N, size)]


def _gather(entries_LE: Tensor, flat_nK: Tensor) -> Tensor:
    return entries_LE.index_select(0, flat_nK.reshape(-1)).view(*flat_nK.shape, entries_LE.shape[1])


def _forward(
    q_NHE: Tensor, entries_LE: Tensor, flat_NK: Tensor, kept_N1K: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    outputs, probs = [], []
    for chunk in _chunks(flat_NK, entries_LE):
        kv_nKE = _gather(entries_LE, flat_NK[chunk])
        logits_nHK = torch.bmm(q_NHE[chunk], kv_nKE.transpose(1, 2)).float() * scale
        p_nHK = logits_nHK.masked_fill_(kept_N1K[chunk] < 0, float("-inf")).softmax(-1)
        probs.append(p_nHK)
        outputs.append(torch.bmm(p_nHK.to(q_NHE.dtype), kv_nKE[..., :value_size]))
    return (outputs[0], probs[0]) if len(probs) == 1 else (torch.cat(outputs), torch.cat(probs))


class _SparseMla(torch.autograd.Function):
    """Saves the probabilities, not the gathered entries."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q_NHE, entries_LE, flat_NK, _, ctx.scale, ctx.value_size = args
        o_NHR, p_NHK = _forward(*args)
        ctx.save_for_backward(q_NHE, entries_LE, flat_NK, p_NHK, o_NHR)
        ctx.mark_non_differentiable(p_NHK)
        return o_NHR, p_NHK

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Softmax backward with delta = dO . O; dK and dV add up in fp32, duplicates and all."""
        q_NHE, entries_LE, flat_NK, p_NHK, o_NHR = ctx.saved_tensors
        do_NHR, dtype = grads[0], q_NHE.dtype
        dq_NHE = torch.empty_like(q_NHE)
        dentries_LE = torch.zeros_like(entries_LE, dtype=torch.promote_types(dtype, torch.float32))
        delta_NH1 = (do_NHR * o_NHR).sum(-1, keepdim=True, dtype=p_NHK.dtype)
        for chunk in _chunks(flat_NK, entries_LE):
            kv_nKE, p_nHK, do_nHR = _gather(entries_LE, flat_NK[chunk]), p_NHK[chunk], do_NHR[chunk]
            dp_nHK = torch.bmm(do_nHR, kv_nKE[..., : ctx.value_size].transpose(1, 2)).to(p_nHK.dtype)
            ds_nHK = (dp_nHK.sub_(delta_NH1[chunk]).mul_(p_nHK).mul_(ctx.scale)).to(dtype)
            dq_NHE[chunk] = torch.bmm(ds_nHK, kv_nKE)
            dkv_nKE = torch.bmm(ds_nHK.transpose(1, 2), q_NHE[chunk])
            dkv_nKE[..., : ctx.value_size] += torch.bmm(p_nHK.to(dtype).transpose(1, 2), do_nHR)
            dentries_LE.index_add_(
                0, flat_NK[chunk].reshape(-1), dkv_nKE.flatten(0, 1).to(dentries_LE.dtype)
            )
        return dq_NHE, dentries_LE.to(entries_LE.dtype), None, None, None, None
