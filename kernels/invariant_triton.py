"""A batch of matrix products in Triton that sums every element in one order, whatever the number of rows.

Tiles have one size and no product is split over K, so that a row's bits depend on the row and the matrix alone. The
price: a few rows and a narrow matrix keep few of a GPU's processors busy. Definition: torch.bmm. Next: invariant.py.

Shape letters: B matrices, T rows, K and N widths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.product_triton import dot, interpreted

TILE_T, TILE_N = 64, 64


@triton.jit(do_not_specialize=["T"])  # one kernel for any number of rows
def _product_kernel(
    x_ptr, w_ptr, out_ptr, T, N, K,
    stride_xb, stride_xt, stride_xk, stride_wb, stride_wk, stride_wn,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of one product."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_tile = x_ptr + batch * stride_xb + t[:, None] * stride_xt + k[None, :] * stride_xk
    w_tile = w_ptr + batch * stride_wb + k[:, None] * stride_wk + n[None, :] * stride_wn
    acc = tl.zeros([BT, BN], tl.float32)
    for start in range(0, K, BK):
        in_k = start + k < K
        x = tl.load(x_tile, mask=(t < T)[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_tile, mask=in_k[:, None] & (n < N)[None, :], other=0.0)
        acc += dot(x, w, INTERPRET)
        x_tile += BK * stride_xk
        w_tile += BK * stride_wk
    out = out_ptr + (batch * T + t[:, None]) * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


def product(x_BTK: Tensor, w_BKN: Tensor) -> Tensor:
    """[B, T, N] in x's dtype, fp32 sums; any strides. Raises ValueError for what does not fit."""
    B, T, K = x_BTK.shape
    if w_BKN.shape[:2] != (B, K) or w_BKN.dtype != x_BTK.dtype:
        raise ValueError(
            f"x {tuple(x_BTK.shape)} {x_BTK.dtype} and w {tuple(w_BKN.shape)} {w_BKN.dtype} do not fit together"
        )
    N = w_BKN.shape[2]
    out_BTN = torch.empty(B, T, N, dtype=x_BTK.dtype, device=x_BTK.device)
    if out_BTN.numel():
        wide = x_BTK.dtype == torch.float32
        _product_kernel[(triton.cdiv(N, TILE_N), triton.cdiv(T, TILE_T), B)](
            x_BTK, w_BKN, out_BTN, T, N, K, *x_BTK.stride(), *w_BKN.stride(),
            BT=TILE_T, BN=TILE_N, BK=32 if wide else 64, INTERPRET=interpreted(),
            num_warps=4, num_stages=2 if wide else 4,
        )  # fmt: skip
    return out_BTN
