"""RMS norm, gated activation and products in fp32 with backwards of their own: fewer passes over memory, less kept for later.

Written out, autograd would keep every intermediate result (x^2, silu(gate), ...); here the inputs alone are
kept. Statistics are fp32, as in transformers. Next: ../model/arch.py.

Shape letters: T tokens, D hidden, F MLP width, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype.

    On a GPU torch's own is one kernel forward, and rounds in training as in generation; the backward is norm_triton.py's.
    """
    trains = torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad)
    if trains and x_TD.is_cuda:
        from posttrain.kernels import norm_triton  # triton exists on Linux only

        return norm_triton.rms_norm(x_TD, weight_D, eps)
    if trains:
        out: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)
        return out
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TD: Tensor = args[0]
        weight_D, eps = args[1:]
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=dtype)
        scale_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        out_TD: Tensor = (x_TD * scale_T1).to(x_TD.dtype).mul_(weight_D)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """With n = x scale and g = dy weight: dx = scale (g - n mean(g n)), dweight = sum over tokens of dy n.

        Layer norm's backward at mean 0 is the same less scale mean(g), and is one pass over memory.
        """
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        dy_TD, x_TD, w_D = (t.to(scale_T1.dtype) for t in (grads[0], x_TD, weight_D))
        zero_T1 = torch.zeros_like(scale_T1)
        dx_TD, dweight_D, _ = torch.ops.aten.native_layer_norm_backward(
            dy_TD, x_TD, w_D.shape, zero_T1, scale_T1, w_D, None, (True, True, False)
        )
        dx_TD += (dy_TD @ w_D).div_(len(w_D))[..., None] * scale_T1
        return dx_TD.to(grads[0].dtype), dweight_D.to(weight_D.dtype), None


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up."""
    if torch.is_grad_enabled() and (gate_TF.requires_grad or up_TF.requires_grad):
        out: Tensor = _SwiGlu.apply(gate_TF, up_TF)
        return out
    return F.silu(gate_TF).mul_(up_TF)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        return F.silu(args[0]).mul_(args[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate_TF, up_TF = ctx.saved_tensors
        dgate_TF = torch.ops.aten.silu_backward(grads[0] * up_TF, gate_TF)
        return dgate_TF, F.silu(gate_TF).mul_(grads[0])


def linear_fp32(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """x times the transpose of a weight, fp32 [T, N], as if both were fp32.

    A GPU multiplies numbers of two bytes exactly and adds up in fp32; so neither is copied, and the tensor cores work.
    """
    if not (x_TD.is_cuda and x_TD.element_size() == 2 and weight_ND.dtype == x_TD.dtype):
        return F.linear(x_TD.float(), weight_ND.float())
    out_TN: Tensor = _LinearFp32.apply(x_TD, weight_ND)
    return out_TN


def _product_fp32(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    return torch.mm(x_TD, weight_ND.t(), out_dtype=torch.float32)


class _LinearFp32(torch.autograd.Function):
    """torch's product of that kind has no backward."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        ctx.save_for_backward(*args)
        return _product_fp32(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TD, weight_ND = ctx.saved_tensors
        dout_TN, (needs_x, needs_weight) = grads[0], ctx.needs_input_grad
        dx_TD = (dout_TN @ weight_ND.float()).to(x_TD.dtype) if needs_x else None
        dweight_ND = (dout_TN.t() @ x_TD.float()).to(weight_ND.dtype) if needs_weight else None
        return dx_TD, dweight_ND
