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


@triton.jit
def _kernel(
    x_ptr, out_ptr, scale_ptr, num_rows, I: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = tl.arange(0, BI)
    at = row[:, None] * I + i[None, :]
    mask = (row < num_rows)[:, None] & (i < I)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
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
    tl.store(out_ptr + at, x.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), mask=row < num_rows)


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I], contiguous, I <= 128, as float8_e4m3fn and its fp32 scales [...]: x is about e4m3 * scale."""
    size = x.shape[-1]
    if not x.is_contiguous() or size > 128:
        raise ValueError(
            f"cannot quantise {tuple(x.shape)}: contiguous rows of at most 128 elements are needed"
        )
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if scale.numel():
        _kernel[(triton.cdiv(scale.numel(), ROWS),)](
            x, out, scale, scale.numel(), I=size, BI=triton.next_power_of_2(size), BR=ROWS,
            INTERPRET=interpreted(), num_warps=4,
        )  # fmt: skip
    return out, scale
