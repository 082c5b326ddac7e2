"""Rotary embedding as multiplication by unit complex numbers, for MLA (pairs) and for the indexer (halves).

The result is laid out in pairs either way: a rotated query only ever meets a rotated key, in a dot product,
and there any common order gives the same number. Next: attention.py, indexer.py.

Shape letters: T tokens, P rotary size of a head.
"""

import torch
from torch import Tensor, nn

Rope = Tensor
"""exp(i angle), complex64 [T, P / 2], times the attention factor of YaRN."""


def unit_circle(rotary_emb: nn.Module, positions_T: Tensor) -> Rope:
    """The rotations of the positions, from transformers' module, which knows the scaling in use."""
    like = torch.empty(0, device=positions_T.device)  # fp32, whatever the model's dtype is
    cos_1TP, sin_1TP = rotary_emb(like, positions_T[None])
    half = cos_1TP.shape[-1] // 2  # transformers repeats the angles
    return torch.complex(cos_1TP[0, :, :half], sin_1TP[0, :, :half])


def rotate(x: Tensor, rope: Rope, *, halves: bool = False) -> Tensor:
    """Rotate the last dimension of x [T, ..., P] in fp32; returns x's dtype.

    Components i and i + 1 form a number (interleaved, GPT-J), or with halves i and i + P / 2 (NeoX).
    """
    numbers = (
        x.float().unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.float().unflatten(-1, (-1, 2))
    )
    turned = torch.view_as_complex(numbers.contiguous()) * rope.view(len(rope), *[1] * (x.dim() - 2), -1)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
