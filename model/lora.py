"""Low-rank adapters by peft: beside the linear maps of attention and dense MLPs; merged in fp32.

W + (alpha / rank) B A, A random and B zero at the start, so that the model begins as it was. Routed experts,
routers, embeddings, head, norms and indexers keep their weights. kv_b_proj is read as a matrix by the absorbed
path, which therefore asks weight_of; peft's own layer would leave its adapter out there without a word.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

_TARGETS = "q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj"
_NAME = "default"
_BASE = ".base_layer.weight"


def inject(model: hf.DeepseekV32ForCausalLM, *, rank: int, alpha: float) -> None:
    """Put fp32 adapters into the model and freeze everything else."""
    import peft  # heavy, and only this needs it

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf".*\.({_TARGETS})")  # type: ignore[arg-type]  # any number
    model.requires_grad_(False)
    # Into the layers, which have no config: of a whole model peft would take gate_proj for that of the experts.
    peft.inject_adapter_in_model(config, model.model.layers)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()  # small updates are lost in bf16


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def weight_of(linear: Any) -> Tensor:
    """The matrix that a linear map acts as: its weight, and its adapter's part where it has one that is on."""
    is_plain = isinstance(linear, nn.Linear)
    weight: Tensor = linear.weight if is_plain else linear.base_layer.weight
    if is_plain or linear.disable_adapters:
        return weight
    product = linear.lora_B[_NAME].weight @ linear.lora_A[_NAME].weight
    whole: Tensor = weight + (linear.scaling[_NAME] * product).to(weight.dtype)
    return whole


def merged(weights: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """Plain weights from a state dict with adapters; added in fp32, rounded once."""
    found = {}
    for name, tensor in weights.items():
        if is_adapter(name):
            continue
        if name.endswith(_BASE):
            stem = name.removesuffix(_BASE)
            down, up = (weights[f"{stem}.lora_{side}.{_NAME}.weight"].float() for side in "AB")
            tensor = (tensor.float() + alpha / rank * (up @ down)).to(tensor.dtype)
            name = f"{stem}.weight"
        found[name] = tensor
    return found


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapters, for passes without gradients."""
    assert not torch.is_grad_enabled(), "peft freezes adapters that are off"
    from peft.tuners.tuners_utils import BaseTunerLayer  # heavy

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert layers, "a model without adapters"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
