"""Optimizers: Muon on hidden matrices with AdamW on the rest, or AdamW alone; the indexers apart.

Indexer parameters always form their own AdamW with its own learning rate and gradient clip, so that the
scale of the indexer's KL never reaches the model's update. Weights of fewer bits than fp32 are moved in copies of fp32, or
small steps would be rounded away. A step whose gradients are not finite, or far above what is usual, moves nothing.
Next: learner.py.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from posttrain.config import Optimizer
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.lora import is_adapter
from posttrain.muon import Muon

SPIKE_AFTER = 8
"""Gradient norms that the spike guard must have seen before it judges one."""


class Optimizers:
    """One optimizer step over model and indexers under one schedule."""

    def __init__(
        self, model: DeepseekV32ForCausalLM, config: Optimizer, *, train: set[str], total_steps: int
    ) -> None:
        """train holds "model", "indexer" or both; everything else stops requiring gradients.

        Of a model with adapters, these are what trains.
        """
        self.config, self.total_steps, self.step_count = config, total_steps, 0
        self._recent = {part: deque[float](maxlen=config.spike_window) for part in ("model", "indexer")}
        indexer = set(model.indexer_parameters())
        self.parts: dict[str, list[nn.Parameter]] = {"model": [], "indexer": []}
        adapters = {p for name, p in model.named_parameters() if is_adapter(name)}
        for parameter in model.parameters():
            part = "indexer" if parameter in indexer else "model"
            trains = part in train and (part == "indexer" or not adapters or parameter in adapters)
            parameter.requires_grad_(trains)
            if trains:
                self.parts[part].append(parameter)
        self.masters = {
            p: _master(p) for part in self.parts.values() for p in part if p.dtype != torch.float32
        }
        """The fp32 copy of each weight that has fewer bits."""
        self.optimizers = self._build(model)

    @property
    def norms(self) -> dict[str, list[float]]:
        """What the spike guard compares with: the last norms of model and indexer."""
        return {part: list(recent) for part, recent in self._recent.items()}

    def restore(self, step_count: int, norms: Mapping[str, Sequence[float]]) -> None:
        """Set the schedule and the guard; the moments are in optimizers."""
        self.step_count = step_count
        for part, recent in self._recent.items():
            recent.clear()
            recent.extend(norms[part])

    def _build(self, model: DeepseekV32ForCausalLM) -> list[torch.optim.Optimizer]:
        config = self.config
        matrices = _hidden_matrices(model) if config.kind == "muon" else set()
        muon = [p for p in self.parts["model"] if p in matrices]
        rest = [p for p in self.parts["model"] if p not in matrices]
        built: list[torch.optim.Optimizer] = []
        if muon:
            built.append(Muon(self._moved(muon), lr=config.lr, weight_decay=config.weight_decay))
        for of_part, lr in ((rest, config.lr), (self.parts["indexer"], config.indexer_lr)):
            if params := self._moved(of_part):
                built.append(
                    torch.optim.AdamW(
                        params, lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
                    )
                )
        for optimizer in built:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return built

    def moved(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimizers move, by the name of the weight: the weight itself, or its copy in fp32."""
        return {name: self.masters.get(p, p) for name, p in model.named_parameters()}

    def _moved(self, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return [self.masters.get(p, p) for p in params]

    def factor(self) -> float:
        """Learning-rate factor of the coming step: linear warm-up, constant, linear decay to zero."""
        config, step = self.config, self.step_count
        factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
        start = config.decay_from * self.total_steps
        if step >= start and config.decay_from < 1:
            factor *= max(0.0, (self.total_steps - step) / (self.total_steps - start))
        return factor

    def step(self, *, finite: bool = True) -> dict[str, float]:
        """Clip, update, clear; returns gradient norms and the rate.

        Where finite is False (the loss was not), a norm is not finite or a norm is a spike, nothing but the
        gradients is touched, and the figures have "skipped" and "nonfinite" or "spike".
        """
        norms = self._clip()
        finite = finite and all(math.isfinite(norm) for norm in norms.values())
        spikes = [finite and self._is_spike(part, norm) for part, norm in norms.items()]
        figures = {f"grad_norm/{part}": norm for part, norm in norms.items()}
        if not finite or any(spikes):
            self._clear()
            return figures | {"skipped": 1.0, "spike" if finite else "nonfinite": 1.0}
        factor = self.factor()
        for parameter, master in self.masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)
        self._clear()
        self.step_count += 1
        return figures | {"lr_factor": factor}

    def _clear(self) -> None:
        for parameter in [*self.parts["model"], *self.parts["indexer"], *self.masters.values()]:
            parameter.grad = None

    def _clip(self) -> dict[str, float]:
        """Clip the gradients of each part that trains; its norm before that."""
        norms: dict[str, Tensor] = {}
        for part, params in self.parts.items():
            if params:
                if all(p.grad is None for p in params):
                    raise ValueError(
                        f"no gradient has reached the {part} parameters, which are to be trained"
                    )
                norms[part] = clip_gradients(params, self.config.max_grad_norm)
        return {part: float(norm) for part, norm in norms.items()}

    def _is_spike(self, part: str, norm: float) -> bool:
        """Also notes the norm: where gradients stay larger, the median follows and steps are taken again."""
        recent, factor = self._recent[part], self.config.spike_factor
        usual = statistics.median(recent) if len(recent) >= SPIKE_AFTER else math.inf
        recent.append(norm)
        return factor is not None and norm > factor * usual


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """fp32, of the same value, cut over ranks as the weight is."""
    return nn.Parameter(parameter.detach().float())


def clip_gradients(params: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of `most` together; their norm before. Sharded ones count over all ranks."""
    shards = [p.grad.to_local() for p in params if isinstance(p.grad, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(params, most)
    squares = [torch.linalg.vector_norm(shard, dtype=torch.float32).square() for shard in shards]
    # Offloaded ones are in host memory; experts that are spread stay on the device.
    device = max((square.device for square in squares), key=lambda device: device.type != "cpu")
    square = torch.stack([square.to(device) for square in squares]).sum()
    dist.all_reduce(square)
    factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    for shard in shards:
        shard.mul_(factor.to(shard.device))
    return square.sqrt()


def _hidden_matrices(model: DeepseekV32ForCausalLM) -> set[nn.Parameter]:
    """2-D weights inside the blocks, routers apart: what Muon is meant for."""
    return {
        p
        for name, p in model.model.layers.named_parameters()
        if p.dim() == 2 and ".gate.weight" not in name and ".indexer." not in name
    }
