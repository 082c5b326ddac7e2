"""Routed experts with a backward of their own: one product per expert and matrix, each written where it belongs.

Rows are (token, expert) pairs sorted by expert. Autograd would cut and join them again at every step; here each
product goes straight into its place, one expert's rows stay in the cache from its first product to its last, and
what is cheap is computed again instead of kept. Next: ../model/moe.py.

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
    """Keeps gate and up alone: each expert's rows, hidden units and outputs are made again."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        x_TD, experts_TE, weights_TE, gate_up_XDF, down_XFD = args
        expert_S = experts_TE.reshape(-1)
        order_S = expert_S.argsort(stable=True)
        ctx.shape = experts_TE.shape  # view(-1) would not know it of no tokens
        token_S = order_S // ctx.shape[1]
        every_S = torch.arange(len(order_S), device=x_TD.device)
        back_S = torch.empty_like(order_S).index_copy_(0, order_S, every_S)
        weight_S1 = weights_TE.reshape(-1, 1).index_select(0, order_S)
        gate_up_SF, out_SD = (x_TD.new_empty(len(order_S), m.shape[2]) for m in (gate_up_XDF, down_XFD))
        ctx.load = torch.bincount(expert_S, minlength=len(down_XFD)).tolist()
        for expert, rows in _rows(ctx.load):
            x = x_TD.index_select(0, token_S[rows])
            gate, up = torch.mm(x, gate_up_XDF[expert], out=gate_up_SF[rows]).chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_XFD[expert], out=out_SD[rows]).mul_(weight_S1[rows])
        ctx.save_for_backward(x_TD, weight_S1, token_S, back_S, gate_up_SF, gate_up_XDF, down_XFD)
        return _sum(out_SD, back_S, ctx.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of out = w down(h) with h = silu(gate) up: dw = dout . down(h) = h . down^T(dout), which needs no output."""
        x_TD, weight_S1, token_S, back_S, gate_up_SF, gate_up_XDF, down_XFD = ctx.saved_tensors
        dgate_up_XDF, ddown_XFD = torch.empty_like(gate_up_XDF), torch.empty_like(down_XFD)
        dweight_S, dx_SD = torch.empty_like(weight_S1[:, 0]), x_TD.new_empty(len(token_S), x_TD.shape[1])
        for expert, rows in _rows(ctx.load):
            x, dout = (source.index_select(0, token_S[rows]) for source in (x_TD, grads[0]))
            (gate, up), weight = gate_up_SF[rows].chunk(2, dim=-1), weight_S1[rows]
            silu, dh = F.silu(gate), dout @ down_XFD[expert].t()
            h = silu * up
            torch.sum(h * dh, -1, out=dweight_S[rows])
            torch.mm(h.mul_(weight).t(), dout, out=ddown_XFD[expert])
            dh.mul_(weight)
            # Needed no more, their place takes their gradients; a second pass backward is an error of autograd's.
            dgate_up = gate_up_SF[rows]
            torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=gate)
            torch.mul(dh, silu, out=up)
            torch.mm(x.t(), dgate_up, out=dgate_up_XDF[expert])
            torch.mm(dgate_up, gate_up_XDF[expert].t(), out=dx_SD[rows])
        dweights_TE = dweight_S.index_select(0, back_S).view(ctx.shape)
        return _sum(dx_SD, back_S, ctx.shape), None, dweights_TE, dgate_up_XDF, ddown_XFD


def _rows(load: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    start = 0
    for expert, num in enumerate(load):
        yield expert, slice(start, start + num)
        start += num


def _sum(out_SD: Tensor, back_S: Tensor, shape: torch.Size) -> Tensor:
    """Over the experts of each token, whose rows stand at back; shape is [T, E]."""
    return out_SD.index_select(0, back_S).view(*shape, out_SD.shape[1]).sum(1)
