"""Causal attention of whole documents by torch, whose kernel is named here and not left to the process.

cuDNN's is several times as fast as the others on Hopper, but makes a plan for every shape it meets, which can take half a
second; and vLLM turns it off in its process. So it gets the long documents, in few lengths and numbers; short ones, of any
number and length, have the one kernel that takes a head whose values are smaller than its keys. On the CPU the choice is
torch's. Next: heads_triton.py, ../model/attention.py.

Shape letters: B documents, L tokens of each, H heads, E size of a head = N own and R rotary numbers, V value size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.kernels.backend import has_kernel

LONG = 512
"""Tokens from which a document is long."""
STEP = 256
"""Long documents are padded to multiples of this, or of an eighth of their length; at once go a power of two of them."""
_FOR_SHORT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_FOR_LONG = [SDPBackend.CUDNN_ATTENTION, *_FOR_SHORT]


def padded(length: int) -> int:
    """Tokens that a long document is padded to."""
    step = max(STEP, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def lengths(longest: int) -> list[int]:
    """What long documents of at most so many tokens are padded to."""
    found = [padded(LONG)]
    while found[-1] < longest:
        found.append(padded(found[-1] + 1))
    return found


def keys_and_values(kv_BLH: Tensor, rotary_BLR: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Keys [own | rotary] [B, L, H, N + R] and values [B, L, H, V] of what each head has of its own, [own | value] with
    N = own, and the rotary part that the heads share."""
    if has_kernel(kv_BLH):
        from posttrain.kernels import heads_triton  # triton exists on Linux only

        return heads_triton.keys_and_values(kv_BLH, rotary_BLR, own)
    own_BLHN, v_BLHV = kv_BLH.split([own, kv_BLH.shape[-1] - own], dim=-1)
    rotary_BLHR = rotary_BLR[:, :, None].expand(-1, -1, kv_BLH.shape[2], -1)
    return torch.cat((own_BLHN, rotary_BLHR), dim=-1), v_BLHV


def causal(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHV: Tensor, scale: float) -> Tensor:
    """[B, L, H, V]"""
    if q_BLHE.is_cuda:
        return _causal_on_gpu(q_BLHE, k_BLHE, v_BLHV, scale)
    return _attend(q_BLHE, k_BLHE, v_BLHV, scale)


def _causal_on_gpu(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHV: Tensor, scale: float) -> Tensor:
    length = q_BLHE.shape[1]
    if length < LONG:
        with sdpa_kernel(_FOR_SHORT, set_priority=True):
            return _attend(q_BLHE, k_BLHE, v_BLHV, scale)
    with sdpa_kernel(_FOR_LONG, set_priority=True):
        sizes = _powers(len(q_BLHE))
        parts = (_padded(x).split(sizes) for x in (q_BLHE, k_BLHE, v_BLHV))
        found = [_attend(q, k, v, scale)[:, :length] for q, k, v in zip(*parts, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _powers(number: int) -> list[int]:
    """Powers of two that add up to it."""
    return [1 << n for n in reversed(range(number.bit_length())) if number >> n & 1]


def _attend(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHV: Tensor, scale: float) -> Tensor:
    q_BHLE, k_BHLE, v_BHLV = (x.transpose(1, 2) for x in (q_BLHE, k_BLHE, v_BLHV))
    return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLV, is_causal=True, scale=scale).transpose(1, 2)


def _padded(x_BLHE: Tensor) -> Tensor:
    """Zeros behind each document: no query sees them."""
    spare = padded(x_BLHE.shape[1]) - x_BLHE.shape[1]
    return F.pad(x_BLHE, (0, 0, 0, 0, 0, spare)) if spare else x_BLHE
