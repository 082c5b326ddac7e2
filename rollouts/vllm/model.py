"""Our DSA model as vLLM sees it: a model class, one cache layer per block, and the builder of attention contexts.

The body is ../../model/arch.py, the very modules that the learner runs, on a PagedContext; vLLM owns the scheduling, the
blocks and the prefix cache. Weights are read by model/checkpoint.py, not by vLLM. Left out: tensor and pipeline
parallelism. Next: compat.py, engine.py, ../../model/paged.py.

Shape letters: T tokens, D hidden, V vocabulary, B sequences, M blocks of a sequence.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from posttrain.kernels.backend import Choice
from posttrain.kernels.dense import lengths
from posttrain.kernels.experts import run_groups, takes_groups
from posttrain.kernels.invariant import products
from posttrain.model import checkpoint
from posttrain.model.context import PackedContext
from posttrain.model.entry import Entry
from posttrain.model.moe import DsaMoE, Experts
from posttrain.model.paged import NewTokens, PagedCache, PagedContext, paged
from posttrain.model.weights import Weights, take
from posttrain.rollouts.vllm import compat
from posttrain.rollouts.vllm.records import Records, Shape, Stage


class DsaForVllm(nn.Module):
    """vLLM's surface of the model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError("the DSA model in vLLM runs on one device; tensor_parallel_size must be 1")
        path, dtype = vllm_config.model_config.model, vllm_config.model_config.dtype
        self.attention = checkpoint.attention_of(path)
        load = checkpoint.load if self.attention == "sparse" else checkpoint.load_dense
        device = str(vllm_config.device_config.device)
        with torch.device("cpu"):
            self.inner = load(path, dtype=dtype, device=device).eval().requires_grad_(False)
        choice: Choice = vllm_config.additional_config.get("backend", "auto")
        deterministic = bool(vllm_config.additional_config.get("deterministic", False))
        self.backend = replace(
            self.inner.backend(choice, deterministic=deterministic),
            max_rows=max(
                1, vllm_config.scheduler_config.max_num_seqs // 2
            ),  # half of the time there are fewer
        )
        if device.startswith("cuda"):
            for moe in self.inner.moe_layers().values():
                moe.run = self._experts(moe)
        self.max_length: int = vllm_config.model_config.max_model_len
        config = self.inner.config
        layers = vllm_config.compilation_config.static_forward_context
        self.entry = Entry.of(config)
        if self.attention == "dense":
            self.entry = replace(self.entry, index=0)
        width = self.entry.width(dtype.itemsize)
        self.caches = [CacheLayer(width, dtype) for _ in range(config.num_hidden_layers)]
        self.names = [f"model.layers.{i}.self_attn" for i in range(len(self.caches))]
        layers.update(zip(self.names, self.caches, strict=True))
        self.records: Records | None = None
        """Where kept keys and experts go, while somebody wants them."""
        rows = max(vllm_config.compilation_config.cudagraph_capture_sizes or [0])
        self._stage = Stage(self.shape(), rows, torch.device(device)) if rows else None
        self._in_python = False
        """Whether the last pass ran forward(), and was no replay of a CUDA graph."""
        self._is_warm = False

    def _experts(self, moe: DsaMoE) -> Experts:
        """vLLM's kernel; where bits count the learner's, if that can be captured in a CUDA graph."""
        if not self.backend.deterministic:
            return compat.fused_experts
        grouped = self.backend.invariant and takes_groups(moe.experts.down_proj)
        return run_groups if grouped else compat.fused_experts_of_one_shape

    def shape(self, *, kept: bool = True, experts: bool = True) -> Shape:
        """Of the records of one token."""
        config, moe = self.inner.config, self.inner.moe_layers()
        return Shape(
            config.num_hidden_layers,
            config.index_topk if kept and self.attention == "sparse" else 0,
            (len(moe), config.num_experts_per_tok) if experts and moe else (0, 0),
        )

    def record(self, num_rows: int) -> None:
        """Called after every pass, with its number of sequences: take what a replayed graph has left."""
        if self.records is not None and not self._in_python:
            assert self._stage is not None, "a graph was captured without a place for its records"
            self.records.take(self._stage, num_rows)
        self._in_python = False

    @property
    def config(self) -> Any:
        """The checkpoint's."""
        return self.inner.config

    def take(self, weights: Weights) -> None:
        """Copy the learner's weights; ValueError, and nothing changes, if they are not whole."""
        take(self.inner, weights)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, D]"""
        embeddings: Tensor = self.inner.model.embed_tokens(input_ids)
        return embeddings

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, D] of the pass's new tokens."""
        self._in_python = True
        new = compat.metadata(self.names[0])
        if new is None or self.caches[0].kv_cache is None:  # vLLM measures memory
            if input_ids.is_cuda:
                self._warm(input_ids)
            return self._alone(input_ids)
        capturing = input_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        context = self._context(new, positions, record_kept=capturing or self.records is not None)
        # Triton's kernels have such products for the learner, too.
        with products(invariant=self.backend.deterministic and not self.backend.invariant):
            hidden_TD: Tensor = self.inner.model(input_ids, context)
        if capturing:
            assert self._stage is not None, "rows for every captured size"
            self._stage.write(context)
        elif self.records is not None:
            self.records.write(context)
        return hidden_TD

    def _alone(self, tokens_T: Tensor) -> Tensor:
        """A pass [T, D] of one prompt without the cache."""
        ends_S = torch.tensor([0, len(tokens_T)], device=tokens_T.device)
        packed = PackedContext(attention=self.attention, backend=self.backend, cu_seqlens_S=ends_S)
        hidden_TD: Tensor = self.inner.model(tokens_T, packed)
        return hidden_TD

    def _warm(self, tokens_T: Tensor) -> None:
        """Let cuDNN make its plans for prompts of every length (kernels/dense.py): no request shall wait for one."""
        if (
            self._is_warm
            or self.attention == "dense"
            or self.backend.name != "triton"
            or self.backend.deterministic
        ):
            return
        self._is_warm = True
        for length in lengths(self.inner.config.index_topk):
            if length <= len(tokens_T):
                self._alone(tokens_T[:length])

    def _context(self, new: "Metadata", positions_T: Tensor, *, record_kept: bool) -> PagedContext:
        pools = [compat.pool(layer.cache) for layer in self.caches]
        block_size = pools[0].shape[1]
        return paged(
            NewTokens(
                counts_B=new.counts,
                ends_B=new.ends,
                positions_T=positions_T,
                table_BM=new.table_BM,
                lengths_B=new.lengths_B,
                # Rows that only fill up a captured CUDA graph have slot -1: block 0, which vLLM gives to nobody.
                slots_T=new.slots_T.clamp(min=0),
            ),
            PagedCache(pools_PSX=pools, entry=self.entry),
            attention=self.attention,
            backend=self.backend,
            max_length=min(self.max_length, new.table_BM.shape[1] * block_size),
            record_kept=record_kept,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """fp32 [T, V]"""
        with products(invariant=self.backend.deterministic):
            logits: Tensor = self.inner.lm_head(hidden_states).float()
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing to do: __init__ has read the checkpoint."""
        return {name for name, _ in self.named_parameters()}


class CacheLayer(AttentionLayerBase):
    """One layer's place in vLLM's cache."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.kv_cache: Tensor | None = None

    @property
    def cache(self) -> Tensor:
        """The pool of blocks."""
        assert self.kv_cache is not None, "vLLM has not bound the cache"
        return self.kv_cache

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Ours, whatever the platform would choose."""
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One entry per token, as numbers of the model's type."""
        return compat.cache_spec(vllm_config.cache_config.block_size, self.width, self.dtype)


@dataclass(slots=True)
class Metadata(AttentionMetadata):
    """One pass: the sequences, and where their new tokens go."""

    counts: list[int]
    ends: list[int]
    table_BM: Tensor
    lengths_B: Tensor
    slots_T: Tensor


class Builder(AttentionMetadataBuilder[Metadata]):
    """Makes it from what the scheduler decided."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1
    """vLLM puts sequences with one new token first."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """The pass's metadata, shared by all layers."""
        common = common_attn_metadata
        num_tokens = common.num_actual_tokens
        if common.max_query_len == 1:  # of a captured graph, rows without a sequence too
            counts, ends = [1] * num_tokens, [common.max_seq_len] * num_tokens
        else:
            starts = common.query_start_loc_cpu.tolist()
            counts = [end - start for start, end in itertools.pairwise(starts)]
            ends = compat.host_lengths(common)
        return Metadata(
            counts=counts,
            ends=ends,
            table_BM=common.block_table_tensor,
            lengths_B=common.seq_lens,
            slots_T=common.slot_mapping[:num_tokens],
        )


class Backend(AttentionBackend):
    """Names of things, as vLLM wants them."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """Shown in logs."""
        return "POSTTRAIN_DSA"

    @staticmethod
    def get_impl_cls() -> Any:
        """None: our modules attend, not a layer of vLLM's."""
        return None

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The maker of Metadata."""
        return Builder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Asked for by 0.26 only."""
        return num_blocks, block_size, head_size
