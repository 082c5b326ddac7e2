"""Routed experts with a backward of their own: one product per expert and matrix, each written where it belongs.

Rows are (token, expert) pairs sorted by expert. Autograd would cut and join them again at every step; here each
product goes straight into its part of one tensor, the routing weight multiplies the hidden units, and what is
cheap is computed again instead of kept. Next: ../model/moe.py.

Shape letters: T tokens, D hidden, X experts, E experts chosen per token, S = T E rows, F MLP width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def run_experts(
    x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, gate_up_XDF: Tensor, down_XFD: Tensor
) -> Tensor:
    """Weighted sum of the gated MLPs of each token's experts, [T, D]; gate_up is [X, D, 2 F], down [X, F, D]."""
    out_TD: Tensor = _Experts.apply(x_TD, experts_TE, weights_TE.to(x_TD.dtype), gate_up_XDF, down_XFD)
    return out_TD


class _Experts(torch.autograd.Function):
    """Keeps the rows before the activation; the rows themselves and the hidden units are made again."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        x_TD, experts_TE, weights_TE, gate_up, down = args
        expert_S = experts_TE.reshape(-1)
        order_S = expert_S.argsort(stable=True)
        token_S = order_S // experts_TE.shape[1]
        back_S = torch.empty_like(order_S).index_copy_(
            0, order_S, torch.arange(len(order_S), device=x_TD.device)
        )
        ctx.load = torch.bincount(expert_S, minlength=len(gate_up)).tolist()
        gate_up_SF = _products(x_TD.index_select(0, token_S), gate_up, ctx.load)
        gate_SF, up_SF = gate_up_SF.chunk(2, dim=-1)
        weight_S1 = weights_TE.reshape(-1, 1).index_select(0, order_S)
        out_SD = _products(F.silu(gate_SF).mul_(up_SF).mul_(weight_S1), down, ctx.load)
        ctx.save_for_backward(x_TD, weight_S1, token_S, back_S, gate_up_SF, gate_up, down)
        return _sum(out_SD, back_S, len(x_TD))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """With g the weight, out = g down(h) and h = silu(gate) up: dg = h . dh, where dh is that of the weighted h."""
        x_TD, weight_S1, token_S, back_S, gate_up_SF, gate_up, down = ctx.saved_tensors
        gate_SF, up_SF = gate_up_SF.chunk(2, dim=-1)
        dout_SD = grads[0].index_select(0, token_S)
        dh_SF = _products(dout_SD, down.transpose(1, 2), ctx.load)
        silu_SF = F.silu(gate_SF)
        h_SF = silu_SF * up_SF
        dweight_S = (h_SF * dh_SF).sum(-1)
        ddown = _outer(h_SF.mul_(weight_S1), dout_SD, ctx.load, like=down)
        dh_SF.mul_(weight_S1)
        dgate_up_SF = torch.empty_like(gate_up_SF)
        dgate_SF, dup_SF = dgate_up_SF.chunk(2, dim=-1)
        torch.mul(dh_SF, silu_SF, out=dup_SF)
        dgate_SF.copy_(torch.ops.aten.silu_backward(dh_SF.mul_(up_SF), gate_SF))
        dgate_up = _outer(x_TD.index_select(0, token_S), dgate_up_SF, ctx.load, like=gate_up)
        dx_TD = _sum(_products(dgate_up_SF, gate_up.transpose(1, 2), ctx.load), back_S, len(x_TD))
        dweights_TE = dweight_S.index_select(0, back_S).view(len(x_TD), -1)
        return dx_TD, None, dweights_TE, dgate_up, ddown


def _parts(load: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, rows in enumerate(load):
        yield expert, slice(start, start + rows)
        start += rows


def _products(rows_SD: Tensor, matrices_XDF: Tensor, load: list[int]) -> Tensor:
    """Each row times the matrix of its expert."""
    out_SF = rows_SD.new_empty(len(rows_SD), matrices_XDF.shape[2])
    for expert, part in _parts(load):
        torch.mm(rows_SD[part], matrices_XDF[expert], out=out_SF[part])
    return out_SF


def _outer(a_SD: Tensor, b_SF: Tensor, load: list[int], *, like: Tensor) -> Tensor:
    """Gradient of the matrices: a^T b over the rows of each expert."""
    out_XDF = torch.empty_like(like)
    for expert, part in _parts(load):
        torch.mm(a_SD[part].t(), b_SF[part], out=out_XDF[expert])
    return out_XDF


def _sum(out_SD: Tensor, back_S: Tensor, num_tokens: int) -> Tensor:
    """Over the experts of each token, whose rows stand at back."""
    return out_SD.index_select(0, back_S).view(num_tokens, -1, out_SD.shape[1]).sum(1)
