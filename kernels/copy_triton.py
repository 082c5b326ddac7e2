"""Copies of rows in Triton, 16 bytes at a time: to and from a pool of blocks, and the keys of heads.

torch's own copies of rows that stand apart go number by number. Definitions: pages.py, dense.py. Next: heads_triton.py.

Shape letters: T rows (tokens), P blocks in a pool, S tokens of a block, X numbers of a row, H heads, N own and R rotary numbers of
a head's key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Of one program."""
NUMBERS = 64
"""Of a row that are on their way at once."""


@triton.jit
def _copy(x_row, out_row, there, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """NUM numbers of each row."""
    for start in tl.static_range(0, NUM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = there[:, None] & (at < NUM)[None, :]
        numbers = tl.load(x_row[:, None] + at[None, :], mask=mask)
        tl.store(out_row[:, None] + at[None, :], numbers, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _pool_kernel(
    pool_ptr, slots_ptr, rows_ptr, num_rows, stride_block, stride_token, stride_row,
    X: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """BR rows to their slots in the pool, or from there."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < num_rows
    slot = tl.load(slots_ptr + row, mask=there, other=0)
    in_pool = pool_ptr + slot // S * stride_block + slot % S * stride_token
    in_rows = rows_ptr + row.to(tl.int64) * stride_row
    if WRITE:
        _copy(in_rows, in_pool, there, X, BLOCK)
    else:
        _copy(in_pool, in_rows, there, X, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def _keys_kernel(
    own_ptr, rotary_ptr, out_ptr, num_rows, own_token, own_head, rotary_token,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BR keys, each of a head of a token."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < num_rows
    token, head = (row // H).to(tl.int64), row % H
    out = out_ptr + row.to(tl.int64) * (N + R)
    _copy(own_ptr + token * own_token + head * own_head, out, there, N, BLOCK)
    _copy(rotary_ptr + token * rotary_token, out + N, there, R, BLOCK)


def write(pool_PSX: Tensor, slots_T: Tensor, x_TX: Tensor) -> None:
    """Rows to their slots, block times S plus place, int64; of several to one slot any stays."""
    _in_pool(pool_PSX, slots_T, x_TX, write=True)


def read(pool_PSX: Tensor, slots_T: Tensor) -> Tensor:
    """The rows [T, X] of slots, int64."""
    rows_TX = pool_PSX.new_empty(len(slots_T), pool_PSX.shape[2])
    _in_pool(pool_PSX, slots_T, rows_TX, write=False)
    return rows_TX


def _in_pool(pool_PSX: Tensor, slots_T: Tensor, rows_TX: Tensor, *, write: bool) -> None:
    _, S, X = pool_PSX.shape
    if rows_TX.shape != (len(slots_T), X) or rows_TX.dtype != pool_PSX.dtype or slots_T.dtype != torch.int64:
        raise ValueError(
            f"rows {tuple(rows_TX.shape)} {rows_TX.dtype}, slots {tuple(slots_T.shape)} {slots_T.dtype} and pool "
            f"{tuple(pool_PSX.shape)} {pool_PSX.dtype} do not fit together"
        )
    if pool_PSX.stride(2) != 1 or rows_TX.stride(1) != 1 or not slots_T.is_contiguous():
        raise ValueError(f"pool {pool_PSX.stride()}, rows {rows_TX.stride()}: the last stride must be 1")
    if len(slots_T):
        _pool_kernel[(triton.cdiv(len(slots_T), ROWS),)](
            pool_PSX, slots_T, rows_TX, len(slots_T), pool_PSX.stride(0), pool_PSX.stride(1), rows_TX.stride(0),
            X=X, S=S, BR=ROWS, BLOCK=NUMBERS, WRITE=write, num_warps=4,
        )  # fmt: skip


def keys(own_THN: Tensor, rotary_TR: Tensor) -> Tensor:
    """[own | rotary] keys [T, H, N + R] of heads that share their rotary part. No gradient."""
    (T, H, N), R = own_THN.shape, rotary_TR.shape[1]
    if (
        len(rotary_TR) != T
        or own_THN.dtype != rotary_TR.dtype
        or own_THN.stride(2) != 1
        or rotary_TR.stride(1) != 1
    ):
        raise ValueError(
            f"own {tuple(own_THN.shape)} {own_THN.stride()} and rotary {tuple(rotary_TR.shape)} {rotary_TR.stride()} "
            "do not fit together"
        )
    out_THE = own_THN.new_empty(T, H, N + R)
    if T:
        _keys_kernel[(triton.cdiv(T * H, ROWS),)](
            own_THN, rotary_TR, out_THE, T * H, own_THN.stride(0), own_THN.stride(1), rotary_TR.stride(0),
            H=H, N=N, R=R, BR=ROWS, BLOCK=NUMBERS, num_warps=4,
        )  # fmt: skip
    return out_THE
