"""Packed tokens to a grid of rows and back, with gradients that copy where autograd's own would add.

Each token stands in one place of the grid, and the other places repeat some token: padding, which no real query sees, so
that its gradient is 0. Next: context.py.

Shape letters: T tokens, N places of the grid.
"""

from typing import Any

import torch
from torch import Tensor


def to_grid(x_T: Tensor, token_N: Tensor, place_T: Tensor) -> Tensor:
    """[T, ...] -> [N, ...]: the token of each place; place_T says where each token stands."""
    x_N: Tensor = _ToGrid.apply(x_T, token_N, place_T)
    return x_N


def to_flat(x_N: Tensor, place_T: Tensor) -> Tensor:
    """[N, ...] -> [T, ...]: what stands in the place of each token."""
    x_T: Tensor = _ToFlat.apply(x_N, place_T)
    return x_T


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        x_T, token_N, ctx.place_T = args
        return x_T.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].index_select(0, ctx.place_T), None, None


class _ToFlat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        x_N, ctx.place_T = args
        ctx.num = len(x_N)
        return x_N.index_select(0, ctx.place_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_N = grads[0].new_zeros(ctx.num, *grads[0].shape[1:])
        return grad_N.index_copy_(0, ctx.place_T, grads[0]), None
