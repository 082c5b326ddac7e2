"""Dense MLA checkpoint -> DSA checkpoint: the same weights plus fresh lightning indexers.

Reads one tensor at a time and writes shards of bounded size, so that a model larger than memory converts
too. FP8 block-scaled weights become bf16, multi-token-prediction layers are dropped, half-split rotary
weights are reordered to the interleaved layout. Everything that `deepseek_v32` cannot express is refused
before the first byte is written. Left out: training the indexers (stages warmup and sparse).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

from posttrain.model.checkpoint import ROUTER, SHARED_FIELDS
from posttrain.model.entry import need_index_dtype

SOURCES = ("deepseek_v3", "glm4_moe_lite")
FP8_BLOCK = 128
SHARD_BYTES = 4 << 30
COPIED_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a conversion did."""

    model_type: str
    num_layers: int
    dequantised: int
    """Weights that were FP8."""
    dropped_layers: tuple[int, ...]
    """Multi-token-prediction layers left out."""
    reordered: int
    """Weights whose rotary rows were brought into the interleaved order."""
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Counts:
    dequantised: int = 0
    reordered: int = 0
    dropped: set[int] = field(default_factory=set)


def convert(
    source: Path,
    out: Path,
    *,
    index_topk: int,
    index_n_heads: int,
    index_head_dim: int,
    index_hadamard: bool = False,
    index_dtype: str = "model",
    seed: int,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Write the DSA form of a dense checkpoint into `out`.

    Raises ValueError with one line for anything that is not a dense MLA checkpoint or that
    `deepseek_v32` cannot express; then nothing has been written.
    """
    raw = _read_json(source / "config.json", f"{source}: not a Hugging Face checkpoint (no config.json)")
    config = _target_config(source, raw)
    if index_head_dim < config.qk_rope_head_dim:
        raise ValueError(
            f"index_head_dim={index_head_dim}: its first {config.qk_rope_head_dim} dimensions are rotary "
            "(qk_rope_head_dim); make it at least as large"
        )
    if index_hadamard and index_head_dim & (index_head_dim - 1):
        raise ValueError(f"index_head_dim={index_head_dim}: index_hadamard needs a power of two")
    need_index_dtype(index_dtype, index=index_head_dim, latent=config.kv_lora_rank)
    config.index_topk, config.index_n_heads, config.index_head_dim = index_topk, index_n_heads, index_head_dim
    if index_hadamard:
        config.index_hadamard = True
    if index_dtype != "model":  # absent from checkpoints that do without
        config.index_dtype = index_dtype
    files = _tensor_files(source)
    _check_complete(source, files, config)
    counts = _Counts()
    out.mkdir(parents=True, exist_ok=True)
    permute = raw.get("rope_interleave", True) is False
    tensors = _converted(source, files, config, counts, permute=permute)
    _write_shards(out, _with_indexers(tensors, config, seed), shard_bytes)
    config.architectures = ["DeepseekV32ForCausalLM"]
    config.update(ROUTER)
    config.save_pretrained(str(out))
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            (out / file.name).write_bytes(file.read_bytes())
    dropped = tuple(sorted(counts.dropped))
    notes = (f"multi-token-prediction layers {list(dropped)} dropped",) if dropped else ()
    return Report(
        model_type=raw["model_type"],
        num_layers=config.num_hidden_layers,
        dequantised=counts.dequantised,
        dropped_layers=dropped,
        reordered=counts.reordered,
        notes=notes,
    )


def init_indexer(config: DeepseekV32Config, layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of one fresh indexer: normal(0, initializer_range) projections, identity LayerNorm, fp32."""
    prefix = f"model.layers.{layer}.self_attn.indexer"
    shapes = {
        "wq_b": (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
        "wk": (config.index_head_dim, config.hidden_size),
        "weights_proj": (config.index_n_heads, config.hidden_size),
    }
    weights = {
        f"{prefix}.{name}.weight": torch.randn(shape, generator=generator) * config.initializer_range
        for name, shape in shapes.items()
    }
    weights[f"{prefix}.k_norm.weight"] = torch.ones(config.index_head_dim)
    weights[f"{prefix}.k_norm.bias"] = torch.zeros(config.index_head_dim)
    return weights


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 e4m3 weight times its scale per 128 x 128 block (the last block of a row or column may be smaller)."""
    rows, columns = weight.shape
    full = scale.float().repeat_interleave(FP8_BLOCK, 0)[:rows]
    full = full.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (weight.float() * full).to(torch.bfloat16)


def interleave_rows(tensor: Tensor, rotary: int, head: int) -> Tensor:
    """Reorder the last `rotary` of every `head` rows from half-split pairs (i, i + P/2) to (2i, 2i + 1)."""
    split = tensor.unflatten(0, (-1, head)).clone()
    half = split[:, head - rotary :].unflatten(1, (2, rotary // 2))
    split[:, head - rotary :] = half.transpose(1, 2).flatten(1, 2)
    ordered: Tensor = split.flatten(0, 1)
    return ordered


def _target_config(source: Path, raw: dict[str, Any]) -> DeepseekV32Config:
    """The `deepseek_v32` config of the same model, or ValueError saying why there is none."""
    kind = raw.get("model_type")
    if raw.get("index_topk") is not None:
        raise ValueError(f"{source}: model_type {kind!r} already has an indexer; start at stage sparse or rl")
    if "kv_lora_rank" not in raw or raw["kv_lora_rank"] is None:
        raise ValueError(f"{source}: model_type {kind!r} is not MLA (no kv_lora_rank); DSA needs MLA latents")
    if kind not in SOURCES:
        raise ValueError(f"{source}: model_type {kind!r} cannot be converted; known: {', '.join(SOURCES)}")
    if raw.get("q_lora_rank") is None:
        raise ValueError(
            f"{source}: q_lora_rank is null; the indexer reads the query latent, which this model has not"
        )
    config = AutoConfig.from_pretrained(str(source))
    rope = dict(config.rope_parameters or {})
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{source}: partial_rotary_factor is not 1; deepseek_v32 rotates all rotary dimensions"
        )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)}
    fields["rope_parameters"] = rope
    if getattr(config, "mlp_layer_types", None):
        fields["mlp_layer_types"] = list(config.mlp_layer_types)
        fields["first_k_dense_replace"] = config.mlp_layer_types.index("sparse")
    return DeepseekV32Config(**fields)


def _tensor_files(source: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = _read_json(index, "")["weight_map"]
        files = {name: source / file for name, file in names.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ValueError(f"{source}: shard {file.name} is missing")
        return files
    single = source / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{source}: no model.safetensors and no model.safetensors.index.json")
    with _open(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def _check_complete(source: Path, files: dict[str, Path], config: DeepseekV32Config) -> None:
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj".split()
    needed = ["model.embed_tokens.weight", "model.norm.weight"]
    needed += [
        f"model.layers.{n}.self_attn.{name}.weight"
        for n in range(config.num_hidden_layers)
        for name in attention
    ]
    missing = [name for name in needed if name not in files]
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors missing, the first is {missing[0]}")


def _converted(
    source: Path,
    files: dict[str, Path],
    config: DeepseekV32Config,
    counts: _Counts,
    *,
    permute: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the target, dequantised and reordered, without the indexers."""
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    for name in sorted(files, key=lambda n: (files[n], n)):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            counts.dropped.add(int(layer[1]))
            continue
        if name.endswith(".weight_scale_inv"):
            continue
        tensor = _read(files[name], name)
        scale = f"{name}_scale_inv"
        if scale in files:
            tensor = dequantise(tensor, _read(files[scale], scale))
            counts.dequantised += 1
        elif tensor.dtype == torch.float8_e4m3fn:
            raise ValueError(f"{source}: {name} is FP8 without {scale}")
        rows = {"q_b_proj": head, "kv_a_proj_with_mqa": latent}.get(name.split(".")[-2])
        if permute and rows is not None:
            tensor = interleave_rows(tensor, config.qk_rope_head_dim, rows)
            counts.reordered += 1
        yield name, tensor


def _with_indexers(
    tensors: Iterator[tuple[str, Tensor]], config: DeepseekV32Config, seed: int
) -> Iterator[tuple[str, Tensor]]:
    dtype = torch.float32
    for name, tensor in tensors:
        if name == "model.embed_tokens.weight":
            dtype = tensor.dtype
        yield name, tensor
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config.num_hidden_layers):
        for name, tensor in init_indexer(config, layer, generator).items():
            yield name, tensor.to(dtype)


def _write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Shards of at most shard_bytes (one larger tensor gets its own) and the index over them."""
    where: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal shard, size, number
        if shard:
            number += 1
            save_file(shard, out / f"part-{number:05d}.safetensors", metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, number))
        shard, size = {}, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        size, total = size + num_bytes, total + num_bytes
    flush()
    final = {i: f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)}
    for i, file in final.items():
        (out / f"part-{i:05d}.safetensors").rename(out / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[i] for name, i in sorted(where.items())},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read(file: Path, name: str) -> Tensor:
    with _open(file) as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own class for torn files, OSError for missing ones
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(missing or f"{file} is missing")
    try:
        data: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    return data
