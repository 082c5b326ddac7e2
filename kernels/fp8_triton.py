"""Rows of numbers as e4m3 with power-of-two scales, in Triton: one read, one write.

For the indexer's queries and keys, whose head size is one scale block (DeepSeek-V3.2: 128 elements, scale format
ue8m0). Definition: reference.quantize_e4m3. Next: index_topk_triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.product_triton import interpreted

ROWS = 32
"""Rows of one program."""


@triton.jit
def _rounded(x):
    """The e4m3 numbers nearest to numbers of at most 448, ties to even, in fp32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 0xFF, 127 - 6)  # below 2^-6 steps no longer shrink
    # To this sum nothing below a step of 2^(exponent - 3) can be added.
    shift = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    size = (tl.abs(x) + shift) - shift
    return tl.where(bits < 0, -size, size)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, num_rows, stride_out, stride_scale,
    I: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, WEIGHTED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = tl.arange(0, BI)
    mask = (row < num_rows)[:, None] & (i < I)[None, :]
    x = tl.load(x_ptr + row[:, None] * I + i[None, :], mask=mask, other=0.0).to(tl.float32)
    # The bits of the largest magnitude: NaN and infinity order above every number, as integers.
    largest = tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), 1)
    finite = largest < 0x7F800000
    floor = tl.full([BR], 448 * 2.0**-23, tl.float32).to(tl.int32, bitcast=True)
    largest = tl.maximum(tl.where(finite, largest, 0), floor)
    # 448 = 1.75 * 2^8: one power of two more where the mantissa exceeds 1.75
    exponent = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, ((254 - exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    x *= inverse[:, None]
    if INTERPRET:  # its conversion cuts where the hardware's rounds
        x = _rounded(x)
    tl.store(out_ptr + row[:, None] * stride_out + i[None, :], x.to(tl.float8e4nv), mask=mask)
    if WEIGHTED:
        scale *= tl.load(w_ptr + row, mask=row < num_rows, other=0.0)
    tl.store(scale_ptr + row * stride_scale, tl.where(finite, scale, float("nan")), mask=row < num_rows)


def quantize_e4m3(
    x: Tensor, *, weight: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., I], contiguous, I <= 128, as float8_e4m3fn and its fp32 scales [...]: x is about e4m3 * scale.

    With weights fp32 [...], contiguous, the scales are multiplied by them. Both are written to `out` if it is given: rows
    that follow one another, at any distance.
    """
    size = x.shape[-1]
    if not x.is_contiguous() or size > 128:
        raise ValueError(
            f"cannot quantise {tuple(x.shape)}: contiguous rows of at most 128 elements are needed"
        )
    if weight is not None:
        fits = weight.shape == x.shape[:-1] and weight.dtype == torch.float32 and weight.is_contiguous()
        if not fits:
            raise ValueError(f"weights {tuple(weight.shape)} {weight.dtype} of rows {tuple(x.shape[:-1])}")
    if out is None:
        out = (
            torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        )
    values, scale = out[0].view(-1, size), out[1].view(-1)
    if len(scale):
        _quantize_kernel[(triton.cdiv(len(scale), ROWS),)](
            x, scale if weight is None else weight, values, scale, len(scale), values.stride(0), scale.stride(0),
            I=size, BI=triton.next_power_of_2(size), BR=ROWS, WEIGHTED=weight is not None, INTERPRET=interpreted(), num_warps=4,
        )  # fmt: skip
    return out
