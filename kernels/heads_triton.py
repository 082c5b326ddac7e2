"""Keys and values of multi-head attention, and in Triton their gradients in one pass: what is shared is summed over the heads.

Autograd would join strided pieces and sum beside it. Definition: dense.py. Next: copy_triton.py.

Shape letters: B documents, L tokens of each, H heads, N own size of a head's key, V value size, P rotary size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels import copy_triton

HEADS = 16
"""Of one token, that a program holds at once."""


@triton.jit(do_not_specialize=["length"])
def _keys_backward_kernel(
    dk_ptr, dv_ptr, dkv_ptr, drot_ptr, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, length,
    H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, V: tl.constexpr,
    BE: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The gradients of one token's own parts, values and, summed over the heads, rotary part."""
    token = tl.program_id(0).to(tl.int64)
    batch, at = token // length, token % length
    e, v = tl.arange(0, BE), tl.arange(0, BV)
    total = tl.zeros([BE], tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        there = (h < H)[:, None]
        h_64 = h.to(tl.int64)[:, None]
        dk_at = batch * dk_batch + at * dk_token + h_64 * dk_head + e[None, :]
        dk = tl.load(dk_ptr + dk_at, mask=there & (e < N + P)[None, :], other=0.0)
        total += tl.sum(dk.to(tl.float32), 0)
        dv_at = batch * dv_batch + at * dv_token + h_64 * dv_head + v[None, :]
        dv = tl.load(dv_ptr + dv_at, mask=there & (v < V)[None, :], other=0.0)
        out = (token * H + h)[:, None] * (N + V)
        tl.store(dkv_ptr + out + e[None, :], dk, mask=there & (e < N)[None, :])
        tl.store(dkv_ptr + out + N + v[None, :], dv, mask=there & (v < V)[None, :])
    tl.store(drot_ptr + token * P + (e - N), total, mask=(e >= N) & (e < N + P))


def keys_and_values(kv_BLH: Tensor, k_rot_BLP: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Keys [B, L, H, N + P] and, a view, values [B, L, H, V] of kv [B, L, H, N + V], contiguous, N = own, and rotary keys.

    Raises ValueError for what does not fit.
    """
    if not kv_BLH.is_contiguous() or k_rot_BLP.stride(-1) != 1 or k_rot_BLP.shape[:2] != kv_BLH.shape[:2]:
        raise ValueError(
            f"kv {tuple(kv_BLH.shape)} with strides {kv_BLH.stride()} and rotary keys {tuple(k_rot_BLP.shape)} with "
            f"strides {k_rot_BLP.stride()} do not fit together"
        )
    found: tuple[Tensor, Tensor] = _Keys.apply(kv_BLH, k_rot_BLP, own)
    return found


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        kv_BLH, k_rot_BLP, own = args
        (B, L, H, width), P = kv_BLH.shape, k_rot_BLP.shape[-1]
        ctx.sizes = {"H": H, "N": own, "P": P, "V": width - own}
        k_THE = copy_triton.keys(kv_BLH[..., :own].flatten(0, 1), k_rot_BLP.flatten(0, 1))
        return k_THE.view(B, L, H, own + P), kv_BLH[..., own:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dk, dv = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        sizes, (B, L) = ctx.sizes, dk.shape[:2]
        dkv_BLH = dk.new_empty(B, L, sizes["H"], sizes["N"] + sizes["V"])
        drot_BLP = dk.new_empty(B, L, sizes["P"])
        _keys_backward_kernel[(B * L,)](
            dk, dv, dkv_BLH, drot_BLP, *dk.stride()[:3], *dv.stride()[:3], L, **sizes,
            BE=triton.next_power_of_2(dk.shape[-1]), BV=triton.next_power_of_2(sizes["V"]),
            BH=min(HEADS, triton.next_power_of_2(sizes["H"])), num_warps=4,
        )  # fmt: skip
        return dkv_BLH, drot_BLP, None
