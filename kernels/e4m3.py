"""Indexer keys in e4m3 as a cache holds them: in rows of the model's type, of which only the bytes count.

A key of I numbers is I bytes of e4m3 and 4 of its fp32 scale; what follows is anything. Rows are copied, gathered and
concatenated as any others, and never calculated with. Definition of the values: reference.quantize_e4m3. Next: fp8_triton.py,
../model/entry.py.

Shape letters: I indexer head size, X numbers of a row.
"""

import torch
from torch import Tensor

from posttrain.kernels import reference


@torch.no_grad()
def pack(k: Tensor, width: int, *, by_triton: bool = False) -> Tensor:
    """Keys [..., I] as rows [..., X] of width numbers in their own type."""
    packed = k.new_empty(*k.shape[:-1], width)
    values, scale = unpack(packed, k.shape[-1])
    if by_triton:
        from posttrain.kernels import fp8_triton  # triton exists on Linux only

        fp8_triton.quantize_e4m3(k.contiguous(), out=(values, scale))
    else:
        for place, found in zip((values, scale), reference.quantize_e4m3(k), strict=True):
            place.copy_(found)
    return packed


def unpack(packed: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of rows [..., X], the last stride 1: float8_e4m3fn [..., I] and their fp32 scales [...]."""
    itemsize = packed.element_size()
    scale = packed[..., size // itemsize : (size + 4) // itemsize]
    return packed.view(torch.float8_e4m3fn)[..., :size], scale.view(torch.float32)[..., 0]


def values(packed: Tensor, size: int) -> Tensor:
    """The numbers that rows [..., X] stand for, fp32 [..., I]."""
    numbers, scale = unpack(packed, size)
    return numbers.float() * scale[..., None]
