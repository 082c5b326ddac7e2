"""Samples to packed batches: no padding, every loss weight fixed before the forward pass.

The weight of a token already contains the normaliser of the whole step, so that the loss is a plain sum
and does not depend on how samples are cut into micro-batches. Next: loss.py.

Shape letters: T tokens of a batch, S sequences in it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from posttrain.schema import Batch, Sample

Norm = Literal["sequence", "token"]


def token_weights(samples: Sequence[Sample], norm: Norm, num_groups: int) -> list[float]:
    """Weight of each valid token, per sample.

    "sequence" (V3.2 Eq. 5): 1/G of the group and 1/|o| of the sequence, averaged over the num_groups
    tasks of the step. "token": one over all valid tokens of the step. Both times the domain's weight.
    """
    lengths = [int(s.mask.sum()) for s in samples]
    total = sum(lengths)
    if norm == "token":
        return [s.weight / total for s in samples]
    return [
        s.weight / (num_groups * s.group_size * length) for s, length in zip(samples, lengths, strict=True)
    ]


def pack(samples: Sequence[Sample], weights: Sequence[float], *, tokens_per_batch: int) -> list[Batch]:
    """Batches of at most tokens_per_batch tokens (one longer sample gets its own), neighbours in length.

    Sorting by length keeps the documents of a batch alike, which the grid inside attention likes.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), samples[i].id))
    batches: list[Batch] = []
    chosen: list[int] = []
    for i in order:
        # The grid of a batch is (number of documents) x (longest document), and i is the longest yet.
        if chosen and (len(chosen) + 1) * len(samples[i].tokens) > tokens_per_batch:
            batches.append(_batch([samples[j] for j in chosen], [weights[j] for j in chosen]))
            chosen = []
        chosen.append(i)
    if chosen:
        batches.append(_batch([samples[j] for j in chosen], [weights[j] for j in chosen]))
    return batches


def _batch(samples: Sequence[Sample], weights: Sequence[float]) -> Batch:
    lengths = [len(s.tokens) for s in samples]
    mask_T = np.concatenate([s.mask for s in samples])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    assert not mask_T[starts[:-1]].any(), "the first token of a document has no prediction"
    return Batch(
        tokens_T=np.concatenate([s.tokens for s in samples]).astype(np.int64),
        positions_T=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens_S=starts.astype(np.int64),
        mask_T=mask_T,
        weight_T=_spread(weights, lengths) * mask_T,
        logprobs_T=np.concatenate(
            [np.zeros(len(s.tokens), np.float32) if s.logprobs is None else s.logprobs for s in samples]
        ),
        advantage_T=_spread([s.advantage for s in samples], lengths),
        kl_coef_T=_spread([s.kl_coef for s in samples], lengths),
        ids=tuple(s.id for s in samples),
    )


def _spread(values: Sequence[float], lengths: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.repeat(np.asarray(values, np.float32), lengths)
