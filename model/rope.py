"""Rotary embedding as multiplication by unit complex numbers, for MLA (pairs) and for the indexer (halves).

The result is laid out in pairs either way: a rotated query only ever meets a rotated key, in a dot product,
and there any common order gives the same number. What is written here is the definition and what the CPU runs; on a GPU
one kernel does it, in training as in generation. Next: ../kernels/rope_triton.py, attention.py, indexer.py.

Shape letters: T tokens, P rotary size of a head.
"""

import torch
from torch import Tensor, nn

from posttrain.kernels.backend import has_kernel

Rope = Tensor
"""exp(i angle), complex64 [T, P / 2], times the attention factor of YaRN."""


def unit_circle(rotary_emb: nn.Module, positions_T: Tensor) -> Rope:
    """The rotations of the positions, from transformers' module, which knows the scaling in use."""
    like = torch.empty(0, device=positions_T.device)  # fp32, whatever the model's dtype is
    cos_1TP, sin_1TP = rotary_emb(like, positions_T[None])
    half = cos_1TP.shape[-1] // 2  # transformers repeats the angles
    return torch.complex(cos_1TP[0, :, :half], sin_1TP[0, :, :half])


def rotate(x: Tensor, rope: Rope, *, start: int = 0, halves: bool = False, overwrite: bool = False) -> Tensor:
    """x [T, ..., W] with components start .. start + P - 1 rotated, in fp32; returns x's dtype.

    Components i and i + 1 form a number (interleaved, GPT-J), or with halves i and i + P / 2 (NeoX). With overwrite nobody
    needs x any more, and where there is no gradient either the result may take its place.
    """
    if has_kernel(x):
        from posttrain.kernels import rope_triton  # triton exists on Linux only

        return rope_triton.rotate(x, rope, start=start, halves=halves, overwrite=overwrite)
    end = start + 2 * rope.shape[-1]
    turned = _turned(x[..., start:end], rope, halves)
    if turned.shape == x.shape:
        return turned
    parts = (x[..., :start], turned, x[..., end:])
    return torch.cat([part for part in parts if part.shape[-1]], -1)


def rotate_into(out: Tensor, x: Tensor, rope: Rope) -> None:
    """Write x [T, ..., P], rotated, to a place of its own. No gradient."""
    if has_kernel(x):
        from posttrain.kernels import rope_triton  # triton exists on Linux only

        rope_triton.rotate_into(out, x, rope)
    else:
        out.copy_(_turned(x, rope, halves=False))


def _turned(x: Tensor, rope: Rope, halves: bool) -> Tensor:
    numbers = (
        x.float().unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.float().unflatten(-1, (-1, 2))
    )
    turned = torch.view_as_complex(numbers.contiguous()) * rope.view(len(rope), *[1] * (x.dim() - 2), -1)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
