"""Which tokens of a batch its samples have in common: the prompts of the completions of one task.

A group of G completions has its prompt G times. The learner runs it once (model/shared.py); losses, gradients and figures
are those of the whole samples. Next: device_batch.py.

Shape letters: F places of a batch, T tokens that are run, S samples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.schema import Batch


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Places of a batch and the tokens that stand in them."""

    token_F: NDArray[np.int64]
    """Which token that is run stands in each place."""
    place_T: NDArray[np.int64]
    """The first place of each of these tokens, ascending."""


def prompt_of(tokens_L: NDArray[Any], mask_L: NDArray[np.bool_]) -> NDArray[Any]:
    """The tokens before a sample's first target; none without targets."""
    targets = np.flatnonzero(mask_L)
    return tokens_L[: targets[0] if len(targets) else 0]


def common(batch: Batch) -> Prefixes | None:
    """Prompts, the tokens before a sample's first target, that several samples have; None if there are none.

    With what the batch replays of the engine's choices they must have it in common, too.
    """
    token_F = np.empty(len(batch.tokens_T), np.int64)
    place_T: list[int] = []
    first: dict[bytes, int] = {}
    for begin, end in zip(batch.cu_seqlens_S[:-1].tolist(), batch.cu_seqlens_S[1:].tolist(), strict=True):
        tokens = prompt_of(batch.tokens_T[begin:end], batch.mask_T[begin:end])
        length = len(tokens)
        prompt = slice(begin, begin + length)
        known = first.setdefault(tokens.tobytes(), begin)
        start = begin
        if known != begin and _same_choices(batch, slice(known, known + length), prompt):
            token_F[prompt] = token_F[known : known + length]
            start += length
        token_F[start:end] = np.arange(len(place_T), len(place_T) + end - start)
        place_T.extend(range(start, end))
    return Prefixes(token_F, np.array(place_T)) if len(place_T) < len(token_F) else None


def _same_choices(batch: Batch, a: slice, b: slice) -> bool:
    replayed: list[Any] = [x for x in (batch.experts_NTE, batch.kept_NTK) if x is not None]
    return all(np.array_equal(x[:, a], x[:, b]) for x in replayed)
