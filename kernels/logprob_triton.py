"""Log-softmax of logits at one target each, in Triton: no probabilities in memory, logits read as they are.

Sums are fp32. The gradient is made from the logits once more. Definition: cross entropy in ../model/arch.py. Next: ../model/arch.py.

Shape letters: M rows, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of one row that a program holds at once."""


@triton.jit
def _forward_kernel(
    logits_ptr, target_ptr, logp_ptr, lse_ptr, stride, temperature, V, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    top = tl.full([BLOCK], float("-inf"), tl.float32)  # every lane keeps sums of its own
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) / temperature
        new = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    lse = base + tl.log(tl.sum(total * tl.exp(top - base), 0))
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    x = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32) / temperature
    tl.store(logp_ptr + row, x - lse)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _backward_kernel(
    logits_ptr, target_ptr, lse_ptr, grad_ptr, out_ptr, stride, temperature, V, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + at, mask=at < V, other=0.0).to(tl.float32) / temperature
    p = tl.exp(x - tl.load(lse_ptr + row))
    is_target = (at == tl.load(target_ptr + row)).to(tl.float32)
    grad = tl.load(grad_ptr + row) / temperature
    tl.store(out_ptr + row * V + at, (is_target - p) * grad, mask=at < V)


def target_logprobs(logits_MV: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the targets, fp32 [M]; NaN where a target is none of the V entries."""
    if logits_MV.stride(1) != 1:
        raise ValueError(f"logits with strides {logits_MV.stride()}: the last one must be 1")
    logp_M: Tensor = _TargetLogprobs.apply(logits_MV, targets_M.contiguous(), float(temperature))
    return logp_M


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logits_MV, targets_M, ctx.temperature = args
        num, size = logits_MV.shape
        logp_M, lse_M = (logits_MV.new_empty(num, dtype=torch.float32) for _ in range(2))
        if num:
            _forward_kernel[(num,)](
                logits_MV, targets_M, logp_M, lse_M, logits_MV.stride(0), ctx.temperature, size,
                BLOCK=min(BLOCK, triton.next_power_of_2(size)), num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(logits_MV, targets_M, lse_M)
        return logp_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits_MV, targets_M, lse_M = ctx.saved_tensors
        num, size = logits_MV.shape
        out_MV = logits_MV.new_empty(num, size)
        block = min(BLOCK, triton.next_power_of_2(size))
        if num:
            _backward_kernel[(num, triton.cdiv(size, block))](
                logits_MV, targets_M, lse_M, grads[0].contiguous(), out_MV, logits_MV.stride(0),
                ctx.temperature, size, BLOCK=block, num_warps=8,
            )  # fmt: skip
        return out_MV, None, None
