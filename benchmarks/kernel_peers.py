"""Kernels of others, for kernels.py: what is importable is timed beside ours, what is not is left out.

FlashMLA and DeepGEMM as vLLM 0.26 ships them, cuDNN-frontend 1.32 (`cudnn.DSA`). Their own documentation
says how to install them; nothing of them is needed to use posttrain.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def flash_mla(q: Tensor, kv: Tensor, slots: Tensor, scale: float, value_size: int) -> Run | None:
    """Sparse forward; returns (out, max logits, lse)."""
    try:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_sparse_fwd
    except ImportError:
        return None
    return lambda: flash_mla_sparse_fwd(q, kv[:, None], slots[:, None], scale, value_size)


def _cudnn() -> Any:
    try:
        from cudnn import DSA
    except ImportError:
        return None
    return DSA


def cudnn_backward(
    q: Tensor, kv: Tensor, o: Tensor, do: Tensor, lse: Tensor, slots: Tensor, scale: float
) -> Run | None:
    """dq, dkv."""
    DSA = _cudnn()
    if DSA is None:
        return None
    sink = torch.full((q.shape[1],), float("-inf"), device="cuda")
    return lambda: DSA.sparse_attention_backward_wrapper(q, kv, o, do, lse, sink, slots, softmax_scale=scale)


def cudnn_target(q: Tensor, kv: Tensor, lse: Tensor, slots: Tensor, scale: float) -> Run | None:
    """Head-summed probabilities of the kept entries."""
    DSA = _cudnn()
    if DSA is None:
        return None
    heads = q.shape[1]
    return lambda: DSA.sparse_attn_score_recompute_wrapper(
        q[None], kv[None], lse[None], slots[None], scale, qhead_per_kv_head=heads
    )


def cudnn_scores(q: Tensor, k: Tensor, w: Tensor) -> Run | None:
    """Causal scores fp32 of the last queries, [S, L]."""
    DSA = _cudnn()
    if DSA is None:
        return None
    offset = torch.tensor([len(k) - len(q)], dtype=torch.int32, device="cuda")
    return lambda: DSA.indexer_forward_wrapper(
        q[None], k[None, :, None], w[None], ratio=1, q_causal_offsets=offset
    )


def cudnn_topk(scores: Tensor, lengths: Tensor, kept: int) -> Run | None:
    """The best keys of every row, lowest index first among equals, ascending."""
    DSA = _cudnn()
    if DSA is None:
        return None
    return lambda: DSA.indexer_top_k_wrapper(scores, lengths, kept, return_val=False, deterministic=True)


def cudnn_indexer_backward(
    q: Tensor, k: Tensor, w: Tensor, p: Tensor, predicted: Tensor, slots: Tensor
) -> Run | None:
    """dq, dw, dk of the sparse KL, from target and softmax of the scores; target is overwritten."""
    DSA = _cudnn()
    if DSA is None:
        return None
    one = torch.ones(1, device="cuda")
    return lambda: DSA.indexer_backward_wrapper(
        q[None], w[None], k[None], p[None], predicted[None], slots[None], one
    )


def deep_gemm_scores(
    q8: Tensor, k8: Tensor, k_scale: Tensor, w: Tensor, begins: Tensor, ends: Tensor
) -> Run | None:
    """fp8 scores fp32 [S, L]; w carries the scale of q."""
    try:
        import deep_gemm
    except ImportError:
        return None
    return lambda: deep_gemm.fp8_mqa_logits(q8, (k8, k_scale), w, begins, ends, clean_logits=False)
