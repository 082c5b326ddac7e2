"""Routed experts with a backward of their own, which autograd would cut and join again at every step.

Rows are (token, expert) pairs sorted by expert. What is cheap is computed again in the backward pass instead of kept. It
is written twice: with grouped products, one for all experts, on GPUs that have them; and one expert after another, where each
product goes straight into its place and one expert's rows stay in the cache from its first product to its last. Next:
experts_triton.py, ../model/moe.py.

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
    if len(x_TD) and takes_groups(down_XFD):
        return run_groups(x_TD, experts_TE, weights_TE, gate_up_XDF, down_XFD)
    out_TD: Tensor = _Experts.apply(x_TD, experts_TE, weights_TE.to(x_TD.dtype), gate_up_XDF, down_XFD)
    return out_TD


def takes_groups(down_XFD: Tensor) -> bool:
    """Whether torch has one kernel for the products of all experts: bf16, Hopper or Blackwell, rows of whole 16 bytes.

    Elsewhere its grouped product is a loop that waits for the device. Nor does it take no rows at all.
    """
    if not down_XFD.is_cuda or down_XFD.dtype != torch.bfloat16 or len(down_XFD) >= 1024:
        return False
    capability = torch.cuda.get_device_capability(down_XFD.device)
    return capability[0] in (9, 10) and not any(size % 8 for size in down_XFD.shape[1:])


def run_groups(
    x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, gate_up_XDF: Tensor, down_XFD: Tensor
) -> Tensor:
    """run_experts by grouped products, without waiting for the device; weights may have more bits than the rest."""
    out_TD: Tensor = _Groups.apply(x_TD, experts_TE, weights_TE.contiguous(), gate_up_XDF, down_XFD)
    return out_TD


class _Groups(torch.autograd.Function):
    """Keeps gate and up alone: rows, hidden units and outputs are made again. Weights go in before the second matrix."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        from posttrain.kernels import experts_triton  # triton exists on Linux only

        x_TD, experts_TE, weights_TE, gate_up_XDF, down_XFD = args
        # int16: a sort looks at every byte.
        expert_S, order_S = experts_TE.reshape(-1).to(torch.int16).sort(stable=True)
        every_X = torch.arange(len(down_XFD), dtype=torch.int16, device=x_TD.device)
        end_X = torch.searchsorted(expert_S, every_X, right=True, out_int32=True)
        every_S = torch.arange(len(order_S), device=x_TD.device)
        back_S = torch.empty_like(order_S).index_copy_(0, order_S, every_S)
        x_SD = x_TD.index_select(0, order_S // experts_TE.shape[1])
        gate_up_SF = F.grouped_mm(x_SD, gate_up_XDF, offs=end_X)
        h_SF = experts_triton.gate(gate_up_SF, weights_TE, order_S)
        out_SD = F.grouped_mm(h_SF, down_XFD, offs=end_X)
        ctx.save_for_backward(x_TD, weights_TE, order_S, back_S, end_X, gate_up_SF, gate_up_XDF, down_XFD)
        return experts_triton.sum_rows(out_SD, back_S, len(x_TD))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """As _Experts does; gradients of matrices in the layout of the model, whose matrices come transposed."""
        from posttrain.kernels import experts_triton  # triton exists on Linux only

        x_TD, weights_TE, order_S, back_S, end_X, gate_up_SF, gate_up_XDF, down_XFD = ctx.saved_tensors
        token_S = order_S // weights_TE.shape[1]
        dout_SD = grads[0].index_select(0, token_S)
        h_SF = F.grouped_mm(dout_SD, down_XFD.transpose(1, 2), offs=end_X)  # dh, until h takes its place
        dweights_TE = experts_triton.gate_backward_(gate_up_SF, h_SF, weights_TE, order_S)
        ddown_XFD = _matrices(dout_SD, h_SF, end_X) if ctx.needs_input_grad[4] else None
        del dout_SD, h_SF
        dgate_up_XDF = None
        if ctx.needs_input_grad[3]:
            dgate_up_XDF = _matrices(gate_up_SF, x_TD.index_select(0, token_S), end_X)
        dx_SD = F.grouped_mm(gate_up_SF, gate_up_XDF.transpose(1, 2), offs=end_X)
        dx_TD = experts_triton.sum_rows(dx_SD, back_S, len(x_TD))
        return dx_TD, None, dweights_TE, dgate_up_XDF, ddown_XFD


def _matrices(out_SA: Tensor, in_SB: Tensor, end_X: Tensor) -> Tensor:
    """[X, B, A]: the gradient of each expert's matrix, in^T out over its rows, stored as [X, A, B].

    Without rows torch leaves anything there (github.com/pytorch/pytorch/issues/172439).
    """
    from posttrain.kernels import experts_triton  # triton exists on Linux only

    found_XAB = F.grouped_mm(out_SA.t(), in_SB, offs=end_X)
    return experts_triton.zero_unused_(found_XAB, end_X).transpose(1, 2)


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
