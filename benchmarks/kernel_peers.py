"""Kernels of others, for kernels.py: what is importable is timed beside ours, what is not is left out.

FlashMLA and DeepGEMM as vLLM 0.26 ships them, cuDNN-frontend 1.32 (`cudnn.DSA`). Their own documentation
says how to install them; nothing of them is needed to use posttrain.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.fp8_triton import quantize_e4m3
from posttrain.kernels.pages import Pages

Run = Callable[[], Any]


def missing() -> dict[str, str]:
    """Peers that cannot be imported, and why."""
    found = {}
    for name in ("vllm.third_party.flashmla.flash_mla_interface", "cudnn", "deep_gemm"):
        try:
            importlib.import_module(name)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # an extension may want a driver that is not there
            found[name] = str(error)
    return found


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


def cudnn_predict(q: Tensor, k: Tensor, w: Tensor, slots: Tensor) -> Run | None:
    """Softmax of the scores of the kept keys, from bf16 head weights."""
    DSA = _cudnn()
    if DSA is None:
        return None
    w, heads = w.bfloat16(), q.shape[1]
    return lambda: DSA.sparse_indexer_score_recompute_wrapper(
        q[None], k[None], w[None], slots[None], qhead_per_kv_head=heads
    )


def cudnn_indexer_backward(
    q: Tensor, k: Tensor, w: Tensor, p: Tensor, predicted: Tensor, slots: Tensor
) -> Run | None:
    """dq, dw, dk of the sparse KL, from target and softmax of the scores; target is overwritten."""
    DSA = _cudnn()
    if DSA is None:
        return None
    one, w = torch.ones(1, device="cuda"), w.bfloat16()
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


def deep_gemm_paged(q8: Tensor, k8_PSI: Tensor, scale_PS: Tensor, w_BJ: Tensor, pages: Pages) -> Run | None:
    """fp8 scores fp32 [B, L] of one new token per sequence; q8 [B, 1, J, I]. A block is its keys, then their scales."""
    try:
        import deep_gemm
    except ImportError:
        return None
    blocks, block = scale_PS.shape
    cache = torch.cat((k8_PSI.flatten(1).view(torch.uint8), scale_PS.view(torch.uint8)), 1)
    cache = cache.view(blocks, block, 1, -1)
    lengths_B1, length = pages.lengths_B[:, None], pages.max_length
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths_B1, block, processors)
    return lambda: deep_gemm.fp8_paged_mqa_logits(
        q8, cache, w_BJ, lengths_B1, pages.table_BM, plan, length, clean_logits=False
    )


def flash_mla_decode(
    q_B1HE: Tensor, entries_SE: Tensor, slots_BK: Tensor, block: int, scale: float
) -> Run | None:
    """Sparse attention of a decoding step over an e4m3 cache: 512 numbers, 4 scales and 64 bf16 rotary numbers a token."""
    try:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata
    except ImportError:
        return None
    values, scales = quantize_e4m3(entries_SE[:, :512].contiguous().view(-1, 4, 128))
    parts = (values.view(-1, 512), scales, entries_SE[:, 512:].contiguous())
    cache = torch.cat([part.view(torch.uint8) for part in parts], 1).view(-1, block, 1, 656)
    batch = len(q_B1HE)
    dummy = torch.zeros(batch, 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), len(entries_SE), dtype=torch.int32, device="cuda")

    def run() -> Any:
        return flash_mla_with_kvcache(
            q=q_B1HE, k_cache=cache, block_table=dummy, head_dim_v=512, cache_seqlens=lengths,
            tile_scheduler_metadata=get_mla_metadata()[0], is_fp8_kvcache=True, indices=slots_BK[:, None],
            softmax_scale=scale,
        )  # fmt: skip

    return run
