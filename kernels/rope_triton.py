"""Rotary embedding in Triton: one read and one write, forward and backward, and in place where nobody needs the numbers.

Definition: ../model/rope.py. A number's two parts lie side by side (pairs) or half the rotary size apart (halves); the
gradient of a rotation is the rotation back, and so is its order. Sums are fp32.

Shape letters: T tokens, H heads, W numbers of a head, P of which are rotated.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Heads of tokens of one program."""


@triton.jit
def _copied(
    x_row, out_row, there, FIRST: tl.constexpr, NUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """NUM numbers of each row from FIRST on, as they are."""
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < NUM)[None, :]
    numbers = tl.load(x_row[:, None] + FIRST + at[None, :], mask=mask)
    tl.store(out_row[:, None] + FIRST + at[None, :], numbers, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x_ptr, rope_ptr, out_ptr, num_rows, x_token, x_head, out_token, out_head,
    H: tl.constexpr, P: tl.constexpr, START: tl.constexpr, BEFORE: tl.constexpr,
    BEFORE_BLOCK: tl.constexpr, BEHIND: tl.constexpr, BEHIND_BLOCK: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    FROM_HALVES: tl.constexpr, TO_HALVES: tl.constexpr, BACK: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """BR rows, each a head of a token."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < num_rows
    token, head = (row // H).to(tl.int64), row % H
    x_row = x_ptr + token * x_token + head * x_head
    out_row = out_ptr + token * out_token + head * out_head
    i, both = tl.arange(0, BP), tl.arange(0, 2 * BP)
    mask, mask_both = there[:, None] & (i < P // 2)[None, :], there[:, None] & (both < P)[None, :]
    turn = tl.load(rope_ptr + token[:, None] * P + both[None, :], mask=mask_both, other=0.0)
    cos, sin = tl.split(tl.reshape(turn, [BR, BP, 2]))
    x = x_row[:, None] + START
    if FROM_HALVES:
        real, imaginary = tl.load(x + i[None, :], mask=mask), tl.load(x + P // 2 + i[None, :], mask=mask)
    else:
        pairs = tl.load(x + both[None, :], mask=mask_both)
        real, imaginary = tl.split(tl.reshape(pairs, [BR, BP, 2]))
    real, imaginary = real.to(tl.float32), imaginary.to(tl.float32)
    if BACK:
        sin = -sin
    turned = (real * cos - imaginary * sin).to(out_ptr.dtype.element_ty)
    turned_imaginary = (real * sin + imaginary * cos).to(out_ptr.dtype.element_ty)
    if IN_PLACE:
        tl.debug_barrier()  # other threads have read what is now written
    out = out_row[:, None] + START
    if TO_HALVES:
        tl.store(out + i[None, :], turned, mask=mask)
        tl.store(out + P // 2 + i[None, :], turned_imaginary, mask=mask)
    else:
        pairs = tl.reshape(tl.join(turned, turned_imaginary), [BR, 2 * BP])
        tl.store(out + both[None, :], pairs, mask=mask_both)
    if BEFORE > 0:
        _copied(x_row, out_row, there, 0, BEFORE, BEFORE_BLOCK)
    if BEHIND > 0:
        _copied(x_row, out_row, there, START + P, BEHIND, BEHIND_BLOCK)


def rotate(x: Tensor, rope: Tensor, *, start: int, halves: bool, overwrite: bool) -> Tensor:
    """x [T, ..., W], at most one dimension between, with numbers start .. start + P - 1 rotated, in pairs.

    rope is complex64 [T, P / 2]. With overwrite x itself is, where nothing needs a gradient. Raises ValueError for what does
    not fit.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Rotate.apply(x, rope, start, halves)
        return found
    out = x if overwrite else torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, rope, out, start, from_halves=halves)
    return out


def rotate_into(out: Tensor, x: Tensor, rope: Tensor) -> None:
    """Write the numbers [T, ..., P], rotated, to a place of their own. No gradient."""
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{tuple(x.shape)} {x.dtype} rotated is not {tuple(out.shape)} {out.dtype}; give a place for all of it"
        )
    _launch(x, rope, out, 0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, ctx.rope, ctx.start, ctx.halves = args
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch(x, ctx.rope, out, ctx.start, from_halves=ctx.halves)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        dx = torch.empty_like(dout, memory_format=torch.contiguous_format)
        _launch(dout, ctx.rope, dx, ctx.start, to_halves=ctx.halves, back=True)
        return dx, None, None, None


def _launch(
    x: Tensor, rope: Tensor, out: Tensor, start: int,
    *, from_halves: bool = False, to_halves: bool = False, back: bool = False,
) -> None:  # fmt: skip
    size, width = 2 * rope.shape[-1], x.shape[-1]
    fits = rope.dtype == torch.complex64 and rope.shape[0] == x.shape[0] and 0 <= start <= width - size
    if not fits or not size or x.dim() not in (2, 3) or not rope.is_contiguous():
        raise ValueError(f"rotations {tuple(rope.shape)} {rope.dtype} from {start} on in {tuple(x.shape)}")
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(f"strides {x.stride()} and {out.stride()}: the last one must be 1")
    if not x.numel():
        return
    if x.dim() == 2:
        x, out = x[:, None], out[:, None]
    num, heads = x.shape[:2]
    in_place = out.data_ptr() == x.data_ptr()
    before, behind = (0, 0) if in_place else (start, width - start - size)
    _rotate_kernel[(triton.cdiv(num * heads, ROWS),)](
        x, torch.view_as_real(rope), out, num * heads, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        H=heads, P=size, START=start,
        BEFORE=before, BEFORE_BLOCK=triton.next_power_of_2(max(before, 1)),
        BEHIND=behind, BEHIND_BLOCK=triton.next_power_of_2(max(behind, 1)),
        BR=ROWS, BP=triton.next_power_of_2(size // 2),
        FROM_HALVES=from_halves, TO_HALVES=to_halves, BACK=back, IN_PLACE=in_place, num_warps=4,
    )  # fmt: skip
