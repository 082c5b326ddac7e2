"""Optimizers: Muon on hidden matrices with AdamW on the rest, or AdamW alone; the indexers apart.

Indexer parameters always form their own AdamW with its own learning rate and gradient clip, so that the
scale of the indexer's KL never reaches the model's update. Next: learner.py.
"""

import torch
from torch import Tensor, nn

from posttrain.config import Optimizer
from posttrain.model.arch import DeepseekV32ForCausalLM


class Optimizers:
    """One optimizer step over model and indexers under one schedule."""

    def __init__(
        self, model: DeepseekV32ForCausalLM, config: Optimizer, *, train: set[str], total_steps: int
    ) -> None:
        """train holds "model", "indexer" or both; everything else stops requiring gradients."""
        self.config, self.total_steps, self.step_count = config, total_steps, 0
        indexer = set(model.indexer_parameters())
        self.parts: dict[str, list[nn.Parameter]] = {"model": [], "indexer": []}
        for parameter in model.parameters():
            part = "indexer" if parameter in indexer else "model"
            parameter.requires_grad_(part in train)
            if part in train:
                self.parts[part].append(parameter)
        self.optimizers = self._build(model)

    def _build(self, model: DeepseekV32ForCausalLM) -> list[torch.optim.Optimizer]:
        config = self.config
        matrices = _hidden_matrices(model) if config.kind == "muon" else set()
        muon = [p for p in self.parts["model"] if p in matrices]
        rest = [p for p in self.parts["model"] if p not in matrices]
        built: list[torch.optim.Optimizer] = []
        if muon:
            built.append(
                torch.optim.Muon(
                    muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        for params, lr in ((rest, config.lr), (self.parts["indexer"], config.indexer_lr)):
            if params:
                built.append(
                    torch.optim.AdamW(
                        params, lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
                    )
                )
        for optimizer in built:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return built

    def factor(self) -> float:
        """Learning-rate factor of the coming step: linear warm-up, constant, linear decay to zero."""
        config, step = self.config, self.step_count
        factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
        start = config.decay_from * self.total_steps
        if step >= start and config.decay_from < 1:
            factor *= max(0.0, (self.total_steps - step) / (self.total_steps - start))
        return factor

    def step(self) -> dict[str, float]:
        """Clip, update, clear; returns gradient norms and the rate."""
        norms: dict[str, Tensor] = {}
        for part, params in self.parts.items():
            if params:
                norms[f"grad_norm/{part}"] = nn.utils.clip_grad_norm_(params, self.config.max_grad_norm)
        factor = self.factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return {name: float(norm) for name, norm in norms.items()} | {"lr_factor": factor}


def _hidden_matrices(model: DeepseekV32ForCausalLM) -> set[nn.Parameter]:
    """2-D weights inside the blocks, routers apart: what Muon is meant for."""
    return {
        p
        for name, p in model.model.layers.named_parameters()
        if p.dim() == 2 and ".gate.weight" not in name and ".indexer." not in name
    }
