"""Takes the place of vLLM's sampler: the sampling of the torch engine, so that a seed means the same sample in both.

A token is drawn from one number per (seed, position). vLLM's own seeds are generators with a state, which preemption, a
second turn or another actor would not bring back. Next: ../sampling.py, engine.py.

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from posttrain.rollouts import sampling
from posttrain.rollouts.request import Sampling
from posttrain.rollouts.vllm.compat import PARAMS
from posttrain.schema import SamplingMask


@dataclass(slots=True)
class Draws:
    """What was drawn for one request, by position in the sequence."""

    seed: int
    logprobs: dict[int, float] = field(default_factory=dict)
    masks: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    """What the token was drawn from, where truncation cut something."""
    broken: bool = False
    """Logits were not finite; what was drawn since means nothing."""
    id: str | None = None
    """vLLM's name of the request that is drawn for."""
    computed: int = 0
    """Tokens that were in the cache before the last pass."""

    def forget(self, position: int) -> None:
        """The token at this position was drawn for nothing."""
        self.logprobs.pop(position)
        self.masks.pop(position, None)

    def mask(self, length: int) -> SamplingMask:
        """Of a sequence of that many tokens."""
        counts = np.zeros(length, np.int32)
        for position, ids in self.masks.items():
            counts[position] = len(ids)
        parts = [self.masks[position] for position in sorted(self.masks)]
        return SamplingMask(counts=counts, ids=np.concatenate([np.zeros(0, np.int32), *parts]))


class SeededSampler:
    """Called by the model runner once per pass."""

    def __init__(self, runner: Any, record: Callable[[int], None]) -> None:
        """record is told the number of sequences of each pass, when its records can be taken."""
        self._runner, self._record = runner, record
        self.settings = Sampling()
        self.num_preempted = 0
        self.draws: dict[int, Draws] = {}
        """By the number that the request carries in its sampling parameters."""

    def __call__(self, logits: Tensor, sampling_metadata: Any) -> SamplerOutput:
        """One token per row; rows whose prompt is not complete yet are drawn for nothing."""
        runner, settings = self._runner, self.settings
        num_rows = len(logits)
        self._record(num_rows)
        ids = runner.input_batch.req_ids[:num_rows]
        draws = [self.draws[runner.requests[id].sampling_params.extra_args[PARAMS]] for id in ids]
        positions_B = runner.input_batch.num_tokens_no_spec[:num_rows].astype(np.int64)
        seeds_B = np.array([d.seed % 2**64 for d in draws], np.uint64)
        uniform_B = torch.from_numpy(sampling.uniforms(seeds_B, positions_B)).to(logits.device)
        finite_B = logits.isfinite().all(-1)
        logits = torch.where(finite_B[:, None], logits, 0.0)
        logp_BV = sampling.processed_logprobs(logits, settings.temperature, settings.top_p, settings.top_k)
        chosen_B = sampling.choose(logp_BV, uniform_B, greedy=settings.temperature == 0)
        logp_B = logp_BV.gather(1, chosen_B[:, None])[:, 0].tolist()
        masks = _masks(logp_BV) if settings.record_mask else [None] * num_rows
        incomplete_B = runner.discard_request_mask.np[:num_rows]
        rows = zip(draws, positions_B.tolist(), logp_B, finite_B.tolist(), masks, incomplete_B, strict=True)
        for id, draw, computed in zip(ids, draws, runner.input_batch.num_computed_tokens_cpu, strict=False):
            self.num_preempted += computed < draw.computed
            draw.id, draw.computed = id, int(computed)
        for draw, position, logp, finite, mask, incomplete in rows:
            draw.broken |= not finite
            if not incomplete:
                draw.logprobs[position] = logp
                if mask is not None and len(mask):
                    draw.masks[position] = mask
        return SamplerOutput(sampled_token_ids=chosen_B[:, None].to(torch.int32), logprobs_tensors=None)


def _masks(logp_BV: Tensor) -> list[Any]:
    counts_B, ids_R = sampling.kept_tokens(logp_BV)
    return np.split(ids_R, np.cumsum(counts_B)[:-1])
