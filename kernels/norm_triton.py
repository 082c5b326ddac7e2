"""RMS norm's backward in Triton: one read of x and dy for all three, the gradient of x, that of the weight, the statistics.

The gradient of the weight is summed by a fixed number of programs, each over its rows in order: the same bits every time.
Definition: pointwise.py. Next: pointwise.py.

Shape letters: T tokens, D hidden, G programs.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CELLS = 4096
"""Numbers of x that a program holds at once, or one row."""
PROGRAMS = 528
"""Four per multiprocessor of an H200."""


@triton.jit(do_not_specialize=["num_rows", "per_program"])
def _backward_kernel(
    x_ptr, dy_ptr, w_ptr, dx_ptr, dw_ptr, num_rows, per_program, eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx of a program's rows and, over them, its part of dw: with n = x scale and g = dy w, dx = scale (g - n mean(g n))."""
    d = tl.arange(0, BD)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros([BD], tl.float32)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, num_rows)
    while first < last:
        row = (first + tl.arange(0, BR)).to(tl.int64)
        mask = (row < last)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        n = x * scale[:, None]
        dw += tl.sum(dy * n, 0)
        g = dy * w[None, :]
        mean = tl.sum(g * n, 1) / D
        tl.store(dx_ptr + at, scale[:, None] * (g - n * mean[:, None]), mask=mask)
        first += BR
    tl.store(dw_ptr + tl.program_id(0) * D + d, dw, mask=d < D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """torch's forward, so that training rounds as generation does, with this file's backward."""
    out: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TD, weight_D, ctx.eps = args
        ctx.save_for_backward(x_TD, weight_D)
        return F.rms_norm(x_TD, weight_D.shape, weight_D, ctx.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TD, weight_D = ctx.saved_tensors
        size = len(weight_D)
        x, dy = x_TD.reshape(-1, size).contiguous(), grads[0].reshape(-1, size).contiguous()
        BD = triton.next_power_of_2(size)
        BR = max(1, CELLS // BD)
        programs = max(1, min(PROGRAMS, triton.cdiv(len(x), BR)))
        dx, dw_GD = x.new_empty(x.shape), x.new_empty(programs, size, dtype=torch.float32)
        _backward_kernel[(programs,)](
            x, dy, weight_D, dx, dw_GD, len(x), triton.cdiv(len(x), programs), ctx.eps,
            D=size, BD=BD, BR=BR, num_warps=4 if BD <= CELLS else 8,
        )  # fmt: skip
        return dx.view(x_TD.shape), dw_GD.sum(0).to(weight_D.dtype), None
