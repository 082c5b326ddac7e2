"""The DSA model: transformers' DeepseekV32ForCausalLM with our attention, indexer, MoE and packed forward.

Configuration, weights, initialisation, saving and loading are transformers' own; checkpoints are plain
Hugging Face checkpoints. Left out: transformers' generate() (rollouts/torch_engine.py generates) and
padded batches. Next: attention.py, context.py.

Shape letters: T tokens, D hidden, V vocabulary, M positions whose logits are wanted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

from posttrain.kernels import backend
from posttrain.kernels.invariant import products
from posttrain.kernels.pointwise import rms_norm, swiglu
from posttrain.model.attention import DsaAttention
from posttrain.model.context import Context
from posttrain.model.moe import DsaMoE
from posttrain.model.rope import Rope, unit_circle


class RMSNorm(hf.DeepseekV32RMSNorm):
    """The same function with fewer passes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Mlp(hf.DeepseekV32MLP):
    """The same function with less kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Gated MLP of the last dimension."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


_OURS: dict[type[nn.Module], type[nn.Module]] = {hf.DeepseekV32RMSNorm: RMSNorm, hf.DeepseekV32MLP: Mlp}
"""Classes of the same parameters whose forward is ours."""


class DsaDecoderLayer(hf.DeepseekV32DecoderLayer):
    """One transformer block on packed tokens."""

    self_attn: DsaAttention
    mlp: "DsaMoE | hf.DeepseekV32MLP"
    recompute = False
    """Keep only the input for the backward pass, and compute everything else again."""

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.self_attn = DsaAttention(config, layer_idx)
        assert config.mlp_layer_types is not None, "set by the config itself"
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = DsaMoE(config)
            self.mlp.layer_idx = layer_idx
        else:
            self.mlp = hf.DeepseekV32MLP(config)
        self.input_layernorm = hf.DeepseekV32RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = hf.DeepseekV32RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]  # packed, not padded
        self, x_TD: Tensor, rope: Rope, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """[T, D] -> [T, D], and the indexer's KL where it trains.

        The KL is handed on and not left in the context, because FSDP and recomputation look at what goes in and out.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._block(x_TD, rope, context)
        found: tuple[Tensor, Tensor | None] = checkpoint(
            self._block,
            x_TD,
            rope,
            context,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _again(context, self.layer_idx)),
        )
        return found

    def _block(self, x_TD: Tensor, rope: Rope, context: Context) -> tuple[Tensor, Tensor | None]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, context)
        normed_TD = self.post_attention_layernorm(x_TD)
        is_moe = isinstance(self.mlp, DsaMoE)
        out_TD: Tensor = x_TD + (self.mlp(normed_TD, context) if is_moe else self.mlp(normed_TD))
        record = context.record(self.layer_idx)
        kl, record.kl = record.kl, None
        return out_TD, kl


@contextmanager
def _again(context: Context, layer: int) -> Iterator[None]:
    """A block's second time, with the first one's products.

    What it leaves in the context is that of the first time: Triton fills its figures in backward.
    """
    first = context.records.pop(layer)
    try:
        with products(invariant=context.backend.invariant):
            yield
    finally:
        context.records[layer] = first


class DsaModel(hf.DeepseekV32Model):
    """The body: embedding, blocks, final norm."""

    def __init__(self, config: DeepseekV32Config) -> None:
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act={config.hidden_act}: every known MLA model has silu, and so have we"
            )
        hf.DeepseekV32PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DsaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = hf.DeepseekV32RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = hf.DeepseekV32RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        for module in self.modules():
            module.__class__ = _OURS.get(type(module), type(module))
        self.post_init()

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Final hidden states [T, D] of packed tokens."""
        with products(invariant=context.backend.invariant):
            x_TD = self.embed_tokens(tokens_T)
            rope = unit_circle(self.rotary_emb, context.positions_T)
            losses: list[Tensor | None] = []
            for layer in self.layers:
                x_TD, kl = layer(x_TD, rope, context)
                losses.append(kl)
            for i, kl in enumerate(losses):
                context.record(i).kl = kl
            normed_TD: Tensor = self.norm(x_TD)
        return normed_TD


class DeepseekV32ForCausalLM(hf.DeepseekV32ForCausalLM):
    """The causal language model. Bears transformers' name so that checkpoints name the stock class."""

    def __init__(self, config: DeepseekV32Config) -> None:
        hf.DeepseekV32PreTrainedModel.__init__(self, config)
        self.model = DsaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        tokens_T: Tensor,
        context: Context,
        at_M: Tensor | None = None,
        read: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Logits fp32 [M, V] at the token positions at_M (default: all) of a packed pass.

        Or what `read` makes of the final hidden states [M, D] there and of the head [V, D], which need not give all
        logits at a time. It is called in here because a sharded head is whole only here.
        """
        x_MD = self.model(tokens_T, context)
        if at_M is not None:
            x_MD = x_MD.index_select(0, at_M)
        if read is not None:
            return read(x_MD, self.lm_head.weight)
        with products(invariant=context.backend.invariant):
            return self.lm_head(x_MD).float()

    def backend(
        self,
        choice: backend.Choice,
        *,
        deterministic: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> backend.Backend:
        """What runs this model's sparse attention on a device in a type, by default those of its weights now.

        Raises ValueError if that cannot be had.
        """
        weight = self.lm_head.weight
        return backend.resolve(
            choice,
            device or weight.device,
            dtype or weight.dtype,
            num_heads=self.config.num_attention_heads,
            entry_size=self.config.kv_lora_rank + self.config.qk_rope_head_dim,
            deterministic=deterministic,
        )

    def indexer_parameters(self) -> list[nn.Parameter]:
        """Parameters of all lightning indexers."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def moe_layers(self) -> dict[int, DsaMoE]:
        """MoE modules by layer index."""
        return {m.layer_idx: m for m in self.modules() if isinstance(m, DsaMoE)}


def target_logprobs(logits_MV: Tensor, targets_M: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets, fp32 [M]; on a GPU of logits as they come, on a CPU in their type."""
    if logits_MV.is_cuda and logits_MV.dtype != torch.float64:
        from posttrain.kernels import logprob_triton  # triton exists on Linux only

        return logprob_triton.target_logprobs(logits_MV, targets_M, temperature)
    scaled_MV = logits_MV if temperature == 1 else logits_MV / temperature  # the same numbers, a pass less
    return -F.cross_entropy(scaled_MV, targets_M, reduction="none")


# In checkpoints every expert has weights of its own, in memory they are stacked. transformers leaves models
# that are not its own out of that translation unless the mapping was registered by hand.
register_checkpoint_conversion_mapping(
    "deepseek_v32", get_checkpoint_conversion_mapping("deepseek_v32"), overwrite=True
)

__all__ = ["DeepseekV32Config", "DeepseekV32ForCausalLM", "DsaDecoderLayer", "RMSNorm", "target_logprobs"]
