"""A small model with V3.2's attention geometry, on the GPU in bf16."""

from typing import Any

import torch

from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM


def model(*, dense_layers: int = 2, **changes: Any) -> DeepseekV32ForCausalLM:
    """Two layers of hidden 512, dense or the last ones with experts, 2048 entries kept, random weights of seed 0; changes are fields of the config."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=512, hidden_size=512, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=dense_layers, kv_lora_rank=512,
        q_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=32768, initializer_range=0.05, index_topk=2048, index_n_heads=64,
        index_head_dim=128, bos_token_id=None, eos_token_id=1, pad_token_id=0, **changes,
    )  # fmt: skip
    made: Any = DeepseekV32ForCausalLM(config)
    return made.to(device="cuda", dtype=torch.bfloat16)  # type: ignore[no-any-return]
