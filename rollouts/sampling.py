"""Sampling the next token: temperature, top-p, and one uniform number per (sample seed, position).

The uniform number comes from a counter-based hash, so that a sample does not depend on which other rows
share its batch or which actor runs it. Next: torch_engine.py.

Shape letters: B rows, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniforms(seeds_B: NDArray[np.uint64], positions_B: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) per seed and position, which broadcast: splitmix64 of both."""
    with np.errstate(over="ignore"):  # wrapping arithmetic is the algorithm
        x = seeds_B + (positions_B.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    uniforms_B: NDArray[np.float32] = (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return uniforms_B


def processed_logprobs(logits_BV: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Log of the distribution that is sampled from, renormalised after truncation; fp32, -inf outside.

    Kept are the likeliest tokens whose mass reaches top_p, of the top_k likeliest (0: of all). Temperature 0
    (greedy) leaves the logits as they are: its log-probs are those of temperature 1.
    """
    scaled_BV = logits_BV.float() if temperature in (0.0, 1.0) else logits_BV.float() / temperature
    logp_BV = torch.log_softmax(scaled_BV, dim=-1)
    if top_p >= 1.0 and not top_k:
        return logp_BV
    ordered_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    mass_before_BV = ordered_BV.exp().cumsum(-1) - ordered_BV.exp()
    beyond_BV = mass_before_BV >= top_p
    if top_k:
        beyond_BV[:, top_k:] = True
    dropped_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
    return torch.log_softmax(logp_BV.masked_fill(dropped_BV, float("-inf")), dim=-1)


def choose(logp_BV: Tensor, uniforms_B: Tensor, *, greedy: bool) -> Tensor:
    """Token ids [B]: the most likely one, or the inverse of the cumulative distribution at the uniform."""
    if greedy:
        return logp_BV.argmax(-1)
    cumulative_BV = logp_BV.exp().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Rounding may put the target at the very end: stay below, where the last token that adds any mass is found.
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, below_B1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


def kept_tokens(logp_BV: Tensor) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many tokens truncation left in each row [B], and which, row by row and ascending [R]; 0 where all are."""
    kept_BV = logp_BV > float("-inf")
    counts_B = kept_BV.sum(-1)
    cut_B1 = (counts_B < kept_BV.shape[1])[:, None]
    ids_R = (kept_BV & cut_B1).nonzero()[:, 1]
    counts_B = counts_B * cut_B1[:, 0]
    return counts_B.to(torch.int32).cpu().numpy(), ids_R.to(torch.int32).cpu().numpy()
