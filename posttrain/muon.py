"""Muon: momentum whose matrix is made orthogonal, for hidden matrices that may be cut over ranks.

The function is torch.optim.Muon's with adjust_lr_fn = "match_rms_adamw", to the bit, and on sharded matrices too:
momentum and weights stay cut, the update alone is collected, because the directions of a part are not a part of the
directions. Left out: sharing the matrices out; every rank orthogonalises all of them. Next: optimizer.py.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.shards import own_part, whole

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""The quintic of Keller Jordan's Muon: steepest at zero, and within [0.7, 1.2] after five steps."""
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, as large as AdamW's updates (Moonlight, arXiv 2502.16982, 2.2)."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none of our steps computes a loss again
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = own_part(orthogonal(whole(gradient.lerp(momentum, group["momentum"]))), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, in bf16: five Newton-Schulz steps X <- a X + (b A + c A A) X, A = X X^T."""
    x = matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x
