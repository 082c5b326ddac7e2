"""All that differs between vLLM 0.26 (torch 2.11) and 0.32 (torch 2.13), and all that is reached into. Next: model.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from posttrain.model.weights import Asleep

PARAMS = "posttrain"
"""The key of our settings in SamplingParams.extra_args."""


def cache_spec(block_size: int, entry: int, dtype: torch.dtype) -> MLAAttentionSpec:
    """One entry per token and layer, without values of its own."""
    return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=entry, dtype=dtype)


def pool(cache: Tensor) -> Tensor:
    """A layer's cache as [P, S, X]: 0.32 has an axis of heads, [P, 1, S, X]."""
    return cache.squeeze(1) if cache.dim() == 4 else cache


def metadata(layer: str) -> Any:
    """What our builder made for this pass; None where vLLM only measures memory."""
    found = get_forward_context().attn_metadata
    return found[layer] if isinstance(found, dict) else None


def host_lengths(common: CommonAttentionMetadata) -> list[int]:
    """Tokens of each sequence without waiting for the device; exact, since nothing here is speculative."""
    known = getattr(common, "seq_lens_cpu_upper_bound", None)
    lengths: list[int] = (common.seq_lens if known is None else known).tolist()
    return lengths


def runner(engine: Any) -> Any:
    """The model runner of an LLMEngine in this process."""
    return engine.model_executor.driver_worker.worker.model_runner


def close(engine: Any) -> None:
    """Free an LLMEngine now: its end tears down torch.distributed, and must not come while the next one runs."""
    client = engine.engine_core
    finalizer = getattr(client, "_finalizer", None)  # 0.32's, which acts once
    (client.shutdown if finalizer is None else finalizer)()


def on_gpu() -> bool:
    """Whether vLLM runs on a CUDA device here."""
    return bool(current_platform.is_cuda())


def sleep(engine: Any) -> Callable[[], None]:
    """Give up the memory of weights and cache, whose values are lost, between requests.

    What is returned brings it back: an empty cache, and weights that are whatever lies there.
    """
    caches = runner(engine).kv_caches
    if on_gpu():
        engine.sleep(level=2)  # its allocator keeps the addresses, which CUDA graphs know
        wake = engine.wake_up
    else:
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}
        sizes = [(storage, storage.nbytes()) for storage in storages.values()]
        asleep = Asleep(runner(engine).get_model().inner)
        for storage, _ in sizes:
            storage.resize_(0)

        def wake() -> None:
            asleep.wake()
            for storage, size in sizes:
                storage.resize_(size)

    def wake_empty() -> None:
        wake()
        for cache in caches:
            cache.zero_()  # PagedCache: finite everywhere

    return wake_empty


def free_bytes() -> int | None:
    """Memory that is free on the GPU; None where vLLM runs on the CPU."""
    if not on_gpu():
        return None
    torch.cuda.empty_cache()  # an engine before this one in the process may have left some in torch's hands
    return torch.cuda.mem_get_info()[0]


def stock_obstacles() -> list[str]:
    """Why vLLM's own sparse attention cannot run on this GPU."""
    from vllm.utils.import_utils import has_deep_gemm  # of GPU builds

    found = []
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        found.append(f"{torch.cuda.get_device_name()} is neither Hopper nor data-centre Blackwell")
    if not has_deep_gemm():
        found.append("this vLLM has no DeepGEMM, which its indexer needs")
    return found


def stock_backend(runner: Any) -> str:
    """What vLLM has chosen to attend with."""
    names = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    return ", ".join(sorted(names))


def fused_experts(
    x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, gate_up_XDF: Tensor, down_XFD: Tensor
) -> Tensor:
    """vLLM's Triton kernel for the routed experts: no wait for the device, so it can be captured in a CUDA graph."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_op  # needs a GPU build

    # It takes the matrices as the checkpoint has them, [out, in].
    gate_up_XFD, down_XDF = gate_up_XDF.transpose(1, 2), down_XFD.transpose(1, 2)
    out_TD: Tensor = fused_experts_op(x_TD, gate_up_XFD, down_XDF, weights_TE, experts_TE.int())
    return out_TD


def fused_experts_of_one_shape(*args: Tensor) -> Tensor:
    """fused_experts with the same tiles for any number of tokens: a token's bits do not depend on the others."""
    from vllm.model_executor.layers.fused_moe import override_config  # needs a GPU build

    sizes = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}
    with override_config(sizes):
        return fused_experts(*args)
