"""What grouped products of experts leave to do, in Triton: gating, its backward in one pass, the sum over a token's experts.

Rows are (token, expert) pairs sorted by expert; order_S says which pair, counted through [T, E], stands in each row. Sums
are fp32 and in a fixed order: the same bits every time. Next: experts.py.

Shape letters: T tokens, E experts per token, S = T E rows, F MLP width, D hidden, X experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 4096
"""Numbers of one array that a program holds."""
COLUMNS = 1024
"""Of one row, at most."""


@triton.jit(do_not_specialize=["num_rows"])
def _gate_kernel(
    gate_up_ptr, weight_ptr, order_ptr, out_ptr, num_rows, F: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    in_row = row < num_rows
    mask = in_row[:, None] & (f < F)[None, :]
    at = row[:, None] * (2 * F) + f[None, :]
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(order_ptr + row, mask=in_row, other=0)
    weight = tl.load(weight_ptr + pair, mask=in_row, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(out_ptr + row[:, None] * F + f[None, :], h, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_backward_kernel(
    gate_up_ptr, dh_ptr, weight_ptr, dweight_ptr, order_ptr, num_rows,
    F: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of h = weight silu(gate) up: gate and up become their gradients, dh becomes h."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    in_row = row < num_rows
    pair = tl.load(order_ptr + row, mask=in_row, other=0)
    weight = tl.load(weight_ptr + pair, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([BR], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        mask = in_row[:, None] & (f < F)[None, :]
        at, h_at = row[:, None] * (2 * F) + f[None, :], row[:, None] * F + f[None, :]
        gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + h_at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dweight += tl.sum(silu * up * dh, 1)
        dh *= weight[:, None]
        tl.debug_barrier()  # another thread might read what this one has overwritten
        tl.store(dh_ptr + h_at, silu * up * weight[:, None], mask=mask)
        tl.store(gate_up_ptr + at, dh * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
        tl.store(gate_up_ptr + at + F, dh * silu, mask=mask)
    tl.store(dweight_ptr + pair, dweight, mask=in_row)


@triton.jit
def _sum_kernel(rows_ptr, back_ptr, out_ptr, E: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for e in tl.static_range(E):
        row = tl.load(back_ptr + token * E + e)
        total += tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d, total, mask=d < D)


@triton.jit
def _zero_kernel(out_ptr, end_ptr, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    end = tl.load(end_ptr + expert)
    begin = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    if begin == end:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        tl.store(out_ptr + expert.to(tl.int64) * size + at, zero, mask=at < size)


def gate(gate_up_SF: Tensor, weights_TE: Tensor, order_S: Tensor) -> Tensor:
    """weight silu(gate) up [S, F] of rows [gate | up] [S, 2 F]; weights of any float type."""
    num_rows, size = len(gate_up_SF), gate_up_SF.shape[1] // 2
    _check(gate_up_SF, weights_TE, order_S)
    out_SF = gate_up_SF.new_empty(num_rows, size)
    BF, BR = _blocks(size)
    _gate_kernel[(triton.cdiv(num_rows, BR), triton.cdiv(size, BF))](
        gate_up_SF, weights_TE, order_S, out_SF, num_rows, F=size, BF=BF, BR=BR, num_warps=4
    )
    return out_SF


def gate_backward_(gate_up_SF: Tensor, dh_SF: Tensor, weights_TE: Tensor, order_S: Tensor) -> Tensor:
    """Of gate(): the gradient of the weights [T, E]; those of gate and up take their place, and dh becomes gate()."""
    _check(gate_up_SF, weights_TE, order_S, dh_SF)
    num_rows, size = dh_SF.shape
    dweights_TE = weights_TE.new_empty(weights_TE.shape)
    BF, BR = _blocks(size)
    _gate_backward_kernel[(triton.cdiv(num_rows, BR),)](
        gate_up_SF, dh_SF, weights_TE, dweights_TE, order_S, num_rows, F=size, BF=BF, BR=BR, num_warps=4
    )
    # For autograd, which knows nothing of Triton's writing: a second pass backward is an error.
    torch.autograd.graph.increment_version((gate_up_SF, dh_SF))
    return dweights_TE


def sum_rows(rows_SD: Tensor, back_S: Tensor, num_tokens: int) -> Tensor:
    """[T, D]: the sum of each token's rows, of which back says where they stand."""
    size = rows_SD.shape[1]
    _check(rows_SD, back_S)
    out_TD = rows_SD.new_empty(num_tokens, size)
    BD = min(COLUMNS, triton.next_power_of_2(size))
    _sum_kernel[(num_tokens, triton.cdiv(size, BD))](
        rows_SD, back_S, out_TD, E=len(back_S) // num_tokens, D=size, BD=BD, num_warps=4
    )
    return out_TD


def zero_unused_(out_XAB: Tensor, end_X: Tensor) -> Tensor:
    """Zeros where an expert has no rows; end_X, int32, says where those of each end."""
    _check(out_XAB, end_X)
    num_experts, size = len(end_X), out_XAB[0].numel()
    _zero_kernel[(num_experts, triton.cdiv(size, CELLS))](out_XAB, end_X, size, BLOCK=CELLS, num_warps=4)
    return out_XAB


def _blocks(size: int) -> tuple[int, int]:
    """Columns and rows of a program."""
    columns = min(COLUMNS, triton.next_power_of_2(size))
    return columns, CELLS // columns


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"{tuple(tensor.shape)} with strides {tensor.stride()}: contiguous rows are needed"
            )
