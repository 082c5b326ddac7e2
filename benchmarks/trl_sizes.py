"""What vs_trl.py measures: how large a step is, of which model, and by which programs. Next: worker.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CPU_ARCH: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6,
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "intermediate_size": 576, "moe_intermediate_size": 192, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "initializer_range": 0.1, "max_position_embeddings": 512,
    "index_topk": 16, "index_n_heads": 2, "index_head_dim": 32,
}  # fmt: skip
"""About 4.0 M parameters; experts and top-k as in configs/demo.toml."""
GPU_ARCH: dict[str, Any] = CPU_ARCH | {
    "vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 4096, "moe_intermediate_size": 512,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "initializer_range": 0.02, "max_position_embeddings": 2048,
    "index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128,
}  # fmt: skip
"""About 0.6 B parameters with the attention of DeepSeek-V3.2, the one that vLLM's own DeepSeek-V3.2 runs."""
TINY_ARCH: dict[str, Any] = CPU_ARCH | {"vocab_size": 300, "num_hidden_layers": 2}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work a step is, and of which model."""

    arch: Mapping[str, Any]
    prompt: int
    """Letters (tokens) of a prompt; 0: the sorting tasks of the toy world."""
    tasks_per_step: int
    group_size: int
    new_tokens: int
    micro_batch: int
    dtype: str
    """Of our learner and engine on a GPU; TRL has fp32 parameters and computes in bf16 there."""
    device: str
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One program that is measured."""

    script: str
    rollouts: str
    """How it generates, in its own worker's words."""

    @property
    def is_trl(self) -> bool:
        """Whether it runs in TRL's environment."""
        return self.script == "trl_worker.py"


SIDES = {
    "trl": Side("trl_worker.py", "generate"),
    "trl-continuous": Side("trl_worker.py", "continuous batching"),
    "trl-vllm": Side("trl_worker.py", "vllm"),
    "trl-vllm-mended": Side("trl_worker.py", "vllm, names mended"),
    "trl-vllm-hf": Side("trl_worker.py", "vllm, model of transformers"),
    "ours": Side("ours_worker.py", "torch"),
    "ours-ray": Side("ours_worker.py", "ray"),
    "ours-vllm": Side("ours_worker.py", "vllm"),
}
"""ours: learner and engine in one process; ours-ray, ours-vllm: in Ray actors, as a run has them."""
SIZES = {
    "cpu": Size(
        arch=CPU_ARCH, prompt=0, tasks_per_step=8, group_size=4, new_tokens=64, micro_batch=32,
        dtype="float32", device="cpu", sides=("trl", "ours"),
    ),
    "gpu": Size(
        arch=GPU_ARCH, prompt=126, tasks_per_step=64, group_size=8, new_tokens=512, micro_batch=16,
        dtype="bfloat16", device="cuda",
        sides=("ours", "trl", "trl-continuous", "trl-vllm", "trl-vllm-mended", "ours-vllm"),
    ),
}  # fmt: skip
"""The GPU's is that of the promise: 64 prompts of 128 tokens, 8 completions each, 512 tokens."""
