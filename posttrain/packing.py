"""Samples to packed batches: no padding, every loss weight fixed before the forward pass.

The weight of a token already contains the normaliser of the whole step, so that the loss is a plain sum
and does not depend on how samples are cut into micro-batches. Next: loss.py.

Shape letters: T tokens of a batch, M valid ones, S sequences in it, N layers, L tokens of a sample, K kept
cache entries, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.prefixes import prompt_of
from posttrain.schema import Batch, Sample, SamplingMask

Norm = Literal["sequence", "token", "constant"]


def token_weights(samples: Sequence[Sample], norm: Norm, num_groups: int) -> list[float]:
    """Weight of each valid token, per sample, times the domain's weight.

    "sequence" (V3.2 Eq. 5): 1/G of the group and 1/|o| of the sequence, averaged over the num_groups
    tasks of the step. "token" (DAPO Eq. 12): one over all valid tokens of the step. "constant" (Dr.GRPO 3.2): as
    "sequence", with the sample's length budget for |o|.
    """
    lengths = [int(s.mask.sum()) for s in samples]
    total = sum(lengths)
    if norm == "token":
        return [s.weight / total for s in samples]
    if norm == "constant":
        assert all(s.length_budget for s in samples), "a sample without a length budget"
        lengths = [s.length_budget for s in samples]
    return [
        s.weight / (num_groups * s.group_size * length) for s, length in zip(samples, lengths, strict=True)
    ]


def pack(samples: Sequence[Sample], weights: Sequence[float], *, tokens_per_batch: int) -> list[Batch]:
    """Batches of at most tokens_per_batch tokens (one longer sample gets its own), neighbours in length.

    Sorting by length keeps the documents of a batch alike, which the grid inside attention likes; completions of one
    prompt stay together, by the longest, because the prompt is run once per batch (prefixes.py). A batch has one teacher,
    or none.
    """
    prompts = [prompt_of(s.tokens, s.mask).tobytes() for s in samples]
    longest: dict[bytes, int] = {}
    for prompt, sample in zip(prompts, samples, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(sample.tokens))

    def rank(i: int) -> tuple[int, int, bytes, int, str]:
        sample, prompt = samples[i], prompts[i]
        teacher = -1 if sample.teacher is None else sample.teacher
        return teacher, longest[prompt], prompt, len(sample.tokens), sample.id

    batches: list[Batch] = []
    chosen: list[int] = []
    width = 0
    for i in sorted(range(len(samples)), key=rank):
        # The grid of a batch is (number of documents) x (longest document).
        width = max(width, len(samples[i].tokens))
        full = (len(chosen) + 1) * width > tokens_per_batch
        if chosen and (full or samples[i].teacher != samples[chosen[0]].teacher):
            batches.append(_batch([samples[j] for j in chosen], [weights[j] for j in chosen]))
            chosen, width = [], len(samples[i].tokens)
        chosen.append(i)
    if chosen:
        batches.append(_batch([samples[j] for j in chosen], [weights[j] for j in chosen]))
    return batches


def with_old_logprobs(batch: Batch, logp_M: NDArray[np.float32]) -> Batch:
    """The batch with the learner's own log-probs of its valid tokens as the old policy's."""
    old_T = np.zeros(len(batch.tokens_T), np.float32)
    old_T[batch.mask_T] = logp_M
    return replace(batch, old_logprobs_T=old_T)


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
        clip_S2=np.array([s.clip or (np.nan, np.nan) for s in samples], np.float32),
        ids=tuple(s.id for s in samples),
        teacher=samples[0].teacher,
        kept_NTK=_joined("kept", samples, _kept),
        experts_NTE=_joined("experts", samples, _experts),
        sampling_mask=_sampling_mask(samples),
    )


def _spread(values: Sequence[float], lengths: Sequence[int]) -> NDArray[np.float32]:
    return np.repeat(np.asarray(values, np.float32), lengths)


def _joined(field: str, samples: Sequence[Sample], part: Callable[[Sample, int], Any]) -> Any:
    """One array [N, T, width] from those of the samples; None if they have none."""
    found = [getattr(s, field) for s in samples]
    if all(array is None for array in found):
        return None
    assert all(array is not None for array in found), f"only some samples of a batch have {field}"
    width = max(array.shape[-1] for array in found)
    return np.concatenate([part(s, width) for s in samples], axis=1)


def _kept(sample: Sample, width: int) -> NDArray[Any]:
    """[N, L, width]: the last token, which was no query of the engine, keeps itself."""
    kept, length = sample.kept, len(sample.tokens)
    assert kept is not None and kept.shape[1] == length - 1, f"{sample.id}: kept entries of other tokens"
    padded_NLK = np.pad(kept, ((0, 0), (0, 1), (0, width - kept.shape[2])), constant_values=-1)
    padded_NLK[:, -1, 0] = length - 1
    return padded_NLK


def _experts(sample: Sample, width: int) -> NDArray[np.int16]:
    """[N, L, E]: -1 for the last token, which the engine never routed."""
    experts, length = sample.experts, len(sample.tokens)
    assert experts is not None and experts.shape[1] == length - 1, f"{sample.id}: experts of other tokens"
    return np.pad(experts, ((0, 0), (0, 1), (0, 0)), constant_values=-1)


def _sampling_mask(samples: Sequence[Sample]) -> SamplingMask | None:
    """None if nothing was cut for any target. A sample without a mask was drawn from everything."""
    counts, ids = [], []
    for sample in samples:
        mask, length = sample.sampling_mask, len(sample.tokens)
        if mask is None:
            counts.append(np.zeros(length, np.int32))
            continue
        assert len(mask.counts) == length, f"{sample.id}: a sampling mask of other tokens"
        # Sets of tokens that are no targets are not needed.
        counts.append(np.where(sample.mask, mask.counts, 0))
        ids.append(mask.ids[np.repeat(sample.mask, mask.counts)])
    if not any(len(part) for part in ids):
        return None
    return SamplingMask(counts=np.concatenate(counts).astype(np.int32), ids=np.concatenate(ids))
