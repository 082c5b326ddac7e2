"""Tiny random checkpoints of every architecture, and small packed batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.models.glm4_moe_lite.configuration_glm4_moe_lite import Glm4MoeLiteConfig

from posttrain import config
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.model.context import PackedContext
from posttrain.schema import Sample
from posttrain.toy import tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 221,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "routed_scaling_factor": 1.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def model(
    *, topk: int = 7, seed: int = 0, index_heads: int = 2, index_dim: int = 16, **changes: Any
) -> DeepseekV32ForCausalLM:
    """Our model with random weights; one dense and two MoE layers."""
    torch.manual_seed(seed)
    config = DeepseekV32Config(
        **(SHAPE | changes),
        first_k_dense_replace=1,
        index_topk=topk,
        index_n_heads=index_heads,
        index_head_dim=index_dim,
    )
    made = DeepseekV32ForCausalLM(config)
    # Biases and norms start at 0 and 1: move them, or mistakes in them would stay unseen.
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith(("e_score_correction_bias", "k_norm.bias")):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
    return made


def sparse_checkpoint(path: Path, **options: Any) -> Path:
    """A `deepseek_v32` folder with the tokenizer of the small world."""
    checkpoint.save(model(**options), path, tokenizer.build())
    return path


def dense_checkpoint(path: Path, kind: str = "deepseek_v3", **changes: Any) -> Path:
    """A stock dense MLA checkpoint of a real architecture."""
    torch.manual_seed(3)
    if kind == "deepseek_v3":
        config: Any = DeepseekV3Config(**(SHAPE | {"first_k_dense_replace": 1} | changes))
    else:
        layers = ["dense", "sparse", "sparse"]
        config = Glm4MoeLiteConfig(**(SHAPE | {"mlp_layer_types": layers} | changes))
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    made.save_pretrained(path)
    tokenizer.build().save_pretrained(path)
    return path


def packed(lengths: list[int], attention: str = "sparse", **options: Any) -> PackedContext:
    """A context for documents of these lengths."""
    starts = torch.tensor([0, *np.cumsum(lengths)])
    return PackedContext(attention=attention, cu_seqlens_S=starts, **options)  # type: ignore[arg-type]


def tokens(num: int, seed: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(6, SHAPE["vocab_size"], (num,), generator=torch.Generator().manual_seed(seed))


def sample(id: str, length: int, seed: int = 0, **fields: Any) -> Sample:
    """A sample whose second half is the target."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) >= max(1, length // 2)
    return Sample(id=id, tokens=rng.integers(6, 214, length).astype(np.int32), mask=mask, **fields)


def demo() -> config.Run:
    """The demo's recipe without the rewards that ask a judge, which its run has to train first."""
    cfg = config.load([Path(__file__).parents[1] / "configs" / "demo.toml"])
    domains = [
        d.model_copy(update={"rewards": [reward for reward in d.rewards if not reward.stages]})
        for d in cfg.domains
    ]
    return cfg.model_copy(update={"domains": domains})
