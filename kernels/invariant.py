"""Functions of rows whose bits do not depend on the other rows: what batch-invariant generation needs, and a learner that
finds the engine's log-probs again to the last bit.

A library chooses a product's kernel by the number of rows, and with it the order of its sums. Here nothing but the
widths decides. On a GPU the products are a Triton kernel with tiles of one size that sums over K in order; the rest is torch's,
which takes a block for each row there. On the CPU everything is cut into calls of the same number of rows. Gradients are torch's.
Next: invariant_triton.py, ../model/paged.py, which keeps the sequences of a batch apart.

Shape letters: T rows, K and N widths, B matrices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROWS = 32
"""Of one call on the CPU; full vectors, however wide a row is."""


class Invariant(TorchFunctionMode):
    """While it is on, the functions of this module take the place of torch's of the same names; used by `with`.

    A mode, and not other modules, because the model is the learner's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def products(*, invariant: bool) -> AbstractContextManager[Any]:
    """The mode where it is wanted, else nothing."""
    return Invariant() if invariant else nullcontext()


def linear(x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of w, in x's dtype."""
    x_TK = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        out_TN = _Product.apply(x_TK[None], w_NK.t()[None])[0]
    else:
        out_TN = _in_blocks(lambda rows: F.linear(rows, w_NK), x_TK)
    if bias_N is not None:
        out_TN = out_TN + bias_N
    out: Tensor = out_TN.view(*x.shape[:-1], len(w_NK))
    return out


def bmm(x_BTK: Tensor, w_BKN: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[B, T, K] times [B, K, N], in x's dtype."""
    if x_BTK.is_cuda:
        found_BTN = _Product.apply(x_BTK, w_BKN)
    else:
        found_BTN = _in_blocks(
            lambda rows: torch.bmm(rows.transpose(0, 1), w_BKN).transpose(0, 1), x_BTK.transpose(0, 1)
        ).transpose(0, 1)
    return found_BTN if out is None else out.copy_(found_BTN)


def mm(
    x_TK: Tensor, w_KN: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """[T, K] times [K, N], in another type if wanted."""
    dtype = out_dtype or x_TK.dtype
    found_TN = linear(x_TK.to(dtype), w_KN.t().to(dtype))
    return found_TN if out is None else out.copy_(found_TN)


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """torch's, of the last dimension."""
    return _rows(lambda rows: F.rms_norm(rows, shape, weight, eps), x)


def layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """torch's, of the last dimension."""
    return _rows(lambda rows: F.layer_norm(rows, shape, weight, bias, eps), x)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """torch's. On the CPU a number's bits depend on whether it falls to the vector or to what is left of it."""
    assert not inplace, "the model's is not"
    return _rows(F.silu, x)


def sigmoid(x: Tensor) -> Tensor:
    """torch's, as silu."""
    return _rows(torch.sigmoid, x)


def cos(x: Tensor) -> Tensor:
    """torch's, as silu."""
    return _rows(torch.cos, x)


def sin(x: Tensor) -> Tensor:
    """torch's, as silu."""
    return _rows(torch.sin, x)


def mul(x: Any, y: Any) -> Tensor:
    """torch's; complex numbers, the rotations of positions, as silu, row by row of x."""
    if not (torch.is_tensor(x) and torch.is_tensor(y) and x.is_complex()) or x.is_cuda:
        found: Tensor = torch.mul(x, y)
        return found
    y = y.expand_as(x)
    pairs = torch.stack((x, y), 1)  # [T, 2, ...]
    return _in_blocks(lambda rows: torch.mul(rows[:, 0].contiguous(), rows[:, 1].contiguous()), pairs)


def _rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.is_cuda or not x.dim():
        return function(x)
    return _in_blocks(function, x.reshape(-1, x.shape[-1])).view(x.shape)


def _in_blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of rows, called on equally many at a time; the last ones are followed by zeros."""
    num = len(x)
    if not num:
        return function(x)
    spare = x.new_zeros(-num % ROWS, *x.shape[1:])
    blocks = torch.cat((x, spare)).split(ROWS)
    return torch.cat([function(block.contiguous()) for block in blocks])[:num]


class _Product(torch.autograd.Function):
    """invariant_triton.py's, with torch's products as its backward: a gradient sums over rows in any case."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        from posttrain.kernels import invariant_triton  # triton exists on Linux only

        ctx.save_for_backward(*args)
        return invariant_triton.product(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x_BTK, w_BKN), (dout_BTN,) = ctx.saved_tensors, grads
        dx_BTK = dout_BTN @ w_BKN.transpose(1, 2) if ctx.needs_input_grad[0] else None
        dw_BKN = x_BTK.transpose(1, 2) @ dout_BTN if ctx.needs_input_grad[1] else None
        return dx_BTK, dw_BKN


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    torch.bmm: bmm,
    torch.mm: mm,
    F.rms_norm: rms_norm,
    F.layer_norm: layer_norm,
    F.silu: silu,
    torch.Tensor.sigmoid: sigmoid,
    torch.Tensor.mul: mul,
    torch.Tensor.cos: cos,
    torch.Tensor.sin: sin,
}
