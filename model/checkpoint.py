"""Checkpoints in Hugging Face format: load and save the DSA model, save its dense form.

A sparse checkpoint is plain `deepseek_v32`, a dense one plain `deepseek_v3`: transformers' stock classes
load both. Making the first from the second is convert.py.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.utils import logging as hf_logging

from posttrain.model.arch import DeepseekV32ForCausalLM

SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads n_shared_experts n_routed_experts routed_scaling_factor "
    "kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim n_group topk_group "
    "num_experts_per_tok first_k_dense_replace norm_topk_prob hidden_act max_position_embeddings "
    "initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id tie_word_embeddings "
    "rope_parameters attention_bias attention_dropout"
).split()
"""Fields that mean the same in `deepseek_v3` and `deepseek_v32`."""


ROUTER: dict[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""How every model of ours routes, in the words of DeepSeek's own config. transformers knows no other way and writes none
of it; vLLM reads it, and without it would route by softmax and leave the bias out."""


def load(
    path: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DeepseekV32ForCausalLM:
    """Our model from a `deepseek_v32` folder.

    Raises ValueError if the folder holds another kind of model.
    """
    config = _config(path)
    if config.model_type != "deepseek_v32":
        raise ValueError(
            f"{path}: model_type {config.model_type!r}; only 'deepseek_v32' runs here. "
            "A dense MLA checkpoint becomes one in a convert stage"
        )
    with quiet():
        model = DeepseekV32ForCausalLM.from_pretrained(str(path), dtype=dtype, use_safetensors=True)
    return model.to(device)  # type: ignore[no-any-return, arg-type]  # transformers' untyped signature


def attention_of(path: Path | str) -> Literal["dense", "sparse"]:
    """How a checkpoint is to be run: sparse if it has indexers."""
    return "sparse" if _config(path).model_type == "deepseek_v32" else "dense"


def index_topk(path: Path | str) -> int:
    """Entries each query keeps in a sparse checkpoint."""
    if attention_of(path) == "dense":
        raise ValueError(f"{path}: a dense checkpoint has no indexers; convert it first")
    return int(_config(path).index_topk)


def max_length(path: Path | str) -> int:
    """Tokens of the longest sequence that a checkpoint's model has positions for."""
    return int(_config(path).max_position_embeddings)


def load_dense(
    path: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DeepseekV32ForCausalLM:
    """Our model, to be run with attention="dense", from a `deepseek_v3` folder that save_dense wrote.

    The indexers it has no weights for are untrained and must not be used.
    """
    with quiet():
        source = DeepseekV3ForCausalLM.from_pretrained(str(path), dtype=dtype, use_safetensors=True)
        fields = {name: getattr(source.config, name) for name in SHARED_FIELDS}
        config = DeepseekV32Config(
            **fields, index_n_heads=1, index_head_dim=source.config.qk_rope_head_dim, index_topk=1
        )
        model: Any = DeepseekV32ForCausalLM(config)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected, f"{path}: weights without a place: {unexpected}"
    assert all(".indexer." in name for name in missing), f"{path}: weights missing: {missing}"
    loaded: DeepseekV32ForCausalLM = model.to(device=device, dtype=dtype)
    return loaded


def save(model: DeepseekV32ForCausalLM, path: Path, tokenizer: Any = None) -> None:
    """Write a `deepseek_v32` folder (safetensors)."""
    model.config.update(ROUTER)
    with quiet():
        model.save_pretrained(str(path))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))


def save_dense(model: DeepseekV32ForCausalLM, path: Path, tokenizer: Any = None) -> None:
    """Write the model without its indexers as a dense `deepseek_v3` folder."""
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    config = DeepseekV3Config(**fields, **ROUTER, rope_interleave=True)
    with torch.device("meta"):
        dense = DeepseekV3ForCausalLM(config)
    weights = {n: t for n, t in model.state_dict().items() if ".indexer." not in n}
    dense.load_state_dict(weights, strict=True, assign=True)
    with quiet():
        dense.save_pretrained(str(path))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))


def from_weights(config: DeepseekV32Config, weights: dict[str, torch.Tensor]) -> DeepseekV32ForCausalLM:
    """A model around given weights, to be saved: what is not in a checkpoint (rotary tables) is not there."""
    with torch.device("meta"):
        model = DeepseekV32ForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer beside a checkpoint."""
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer that transformers can load ({error})") from None


class quiet:  # used like a keyword: with quiet()
    """No progress bars while the block runs: the pipeline has its own."""

    def __enter__(self) -> None:
        self._shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        if self._shown:
            hf_logging.enable_progress_bar()


def _config(path: Path | str) -> Any:
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a Hugging Face checkpoint ({str(error).splitlines()[0]})") from None
