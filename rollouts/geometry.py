"""The shape of a DSA model as numbers: how large it is, what an engine for it needs, what vLLM's own attention takes.

Imports no torch, so that `posttrain check` can say before a machine is rented what would not fit. Numbers are those of
a Hugging Face config. Next: ../posttrain/fit.py, vllm/stock.py.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from posttrain.model.entry import Entry

BYTES = {"float32": 4, "bfloat16": 2}
"""Of one number of a type."""
_WORK = 6
"""Copies of a pass's widest arrays that exist together in an engine: input, output, their products and fp32 twins."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What sizes depend on; the fields are those of the Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int = 0
    """0: a dense model, without indexers."""
    index_head_dim: int = 0
    index_topk: int = 0
    index_dtype: str = "model"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a config's fields; KeyError names the first that is not there."""
        names = [field.name for field in fields(cls) if field.default is MISSING or field.name in config]
        return cls(**{name: config[name] for name in names})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Of a checkpoint; None if it is not one that we can count (a stage will say what is wrong with it)."""
        try:
            return cls.of(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, KeyError):
            return None

    @property
    def num_parameters(self) -> int:
        """Weights of all layers, the embedding, the head and the routers' biases."""
        moe_layers = max(0, self.num_hidden_layers - self.first_k_dense_replace)
        dense_layers = self.num_hidden_layers - moe_layers
        each = self._attention() + self._indexer() + 2 * self.hidden_size
        gated = 3 * self.hidden_size
        dense = gated * self.intermediate_size
        experts = gated * self.moe_intermediate_size * (self.n_routed_experts + self.n_shared_experts)
        moe = experts + self.n_routed_experts * (self.hidden_size + 1)
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return self.num_hidden_layers * each + dense_layers * dense + moe_layers * moe + ends

    def entry_bytes(self, itemsize: int) -> int:
        """What the cache holds of one token in one layer, for numbers of that many bytes."""
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        entry = Entry(latent=latent, index=self.index_head_dim, e4m3=self.index_dtype == "e4m3")
        return entry.width(itemsize) * itemsize

    def _attention(self) -> int:
        query = self.q_lora_rank * (
            1 + self.hidden_size + self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        )
        values = self.num_attention_heads * self.v_head_dim
        key = self.hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        latent = self.kv_lora_rank * (self.num_attention_heads * self.qk_nope_head_dim + values)
        return query + key + latent + values * self.hidden_size

    def _indexer(self) -> int:
        if not self.index_n_heads:
            return 0
        query = self.index_n_heads * (self.q_lora_rank * self.index_head_dim + self.hidden_size)
        return query + self.index_head_dim * (self.hidden_size + 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What an engine needs on its device, in bytes."""

    weights: int
    cache: int
    work: int
    """Of one pass, at most; an estimate."""
    arithmetic: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.work


def engine_memory(
    shape: Geometry, *, dtype: str, cache_bytes: int, batched_tokens: int, max_rows: int
) -> Memory:
    """Weights, cache and work of one engine in vLLM."""
    size = BYTES[dtype]
    weights = shape.num_parameters * size
    heads = shape.num_attention_heads
    widest = max(
        heads * (shape.kv_lora_rank + shape.qk_rope_head_dim),  # queries against latents
        shape.index_n_heads * shape.index_head_dim,
        shape.intermediate_size,
        2 * shape.moe_intermediate_size * (shape.n_shared_experts or 1),
        shape.hidden_size,
    )
    logits = 3 * max_rows * shape.vocab_size * 4  # fp32: logits, log-probs, their sums
    work = max(_WORK * batched_tokens * widest * size, logits)
    per_token = shape.num_hidden_layers * shape.entry_bytes(size)
    lines = [
        f"  weights    {weights / _GIB:8.1f} GiB = {shape.num_parameters / 1e9:.2f} billion x {size} bytes ({dtype})",
        f"  cache      {cache_bytes / _GIB:8.1f} GiB = rollouts.cache_mib, {cache_bytes // per_token} tokens "
        f"of {per_token} bytes",
        f"  activations{work / _GIB:8.1f} GiB, about, for passes of {batched_tokens} tokens (rollouts.batched_tokens)",
        f"  together   {(weights + cache_bytes + work) / _GIB:8.1f} GiB",
    ]
    return Memory(weights=weights, cache=cache_bytes, work=work, arithmetic="\n".join(lines))


def need_device(memory: Memory, device_bytes: int, *, what: str, there: str = "its device has") -> None:
    """Raise ValueError, with the arithmetic, if an engine does not fit the memory of its one device."""
    if memory.total > device_bytes:
        raise ValueError(
            f"{what}: an engine in vLLM needs more than {there}, {device_bytes / _GIB:.1f} GiB, and an engine "
            "has one device:\n"
            f"{memory.arithmetic}\n"
            "take a device with more memory, bfloat16 weights, or a smaller rollouts.cache_mib or batched_tokens"
        )


def need_one_device(memory: Memory, tensor_parallel: int, *, what: str) -> None:
    """Raise ValueError, with the arithmetic, if more than one device per engine is asked for."""
    if tensor_parallel > 1:
        raise ValueError(
            f"{what}: rollouts.tensor_parallel = {tensor_parallel}: the DSA model in vLLM runs on one device; set it to "
            "1. That device must hold\n"
            f"{memory.arithmetic}\n"
            "More engines, each on its own device, are cluster.rollout_actors"
        )


def stock_obstacles(shape: Geometry, dtype: str) -> list[str]:
    """Why vLLM's own sparse attention cannot serve a model: it is made for DeepSeek-V3.2's shape alone.

    Its cache kernel takes 512 + 64 wide bf16 entries, its indexer quantises keys of 128 numbers in one block and was
    published for 32 or 64 heads (FlashMLA, DeepGEMM), top-k is 2048.
    """
    wanted = {
        "index_topk": (2048,),
        "index_head_dim": (128,),
        "index_n_heads": (32, 64),
        "kv_lora_rank": (512,),
        "qk_rope_head_dim": (64,),
        "qk_nope_head_dim": (128,),
        "v_head_dim": (128,),
        "num_attention_heads": tuple(range(1, 129)),
    }
    found = []
    for name, allowed in wanted.items():
        value = getattr(shape, name)
        if value not in allowed:
            text = " or ".join(map(str, allowed)) if len(allowed) < 9 else f"at most {allowed[-1]}"
            found.append(f"{name} = {value}, not {text}")
    if dtype != "bfloat16":
        found.append(f"cluster.dtype = {dtype}, not bfloat16")
    return found


def need_stock(obstacles: list[str], *, what: str) -> None:
    """Raise ValueError with all the reasons, if there is one."""
    if obstacles:
        raise ValueError(
            f'{what}: rollouts.attention = "stock" is impossible: {"; ".join(obstacles)}. '
            'Write rollouts.attention = "ours"'
        )
