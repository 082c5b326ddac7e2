"""Kept keys and experts of every token in the paged cache, stored beside it, block by block.

A token that the prefix cache supplies is not computed again; its records lie where its cache entry lies, and live as
long. Next: sampler.py.

Shape letters: P blocks, S tokens of a block, N layers, K kept, E experts per token, L tokens of a sequence.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.model.paged import PagedContext

UNWRITTEN = -2
MAX_BYTES = 8 << 30


class Records:
    """Host arrays with a row per token of the pool."""

    def __init__(
        self, *, num_slots: int, block_size: int, num_layers: int, topk: int, experts: tuple[int, int], max_length: int
    ) -> None:
        """topk 0: no kept keys are wanted; experts: (number of MoE layers, experts per token), (0, 0): no experts.

        Raises ValueError if they do not fit into memory.
        """
        small = max_length <= np.iinfo(np.int16).max
        dtype = torch.int16 if small else torch.int32
        num_bytes = num_slots * (num_layers * topk * dtype.itemsize + experts[0] * experts[1] * 2)
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"records of {num_slots} cache entries need {num_bytes / 2**30:.0f} GiB "
                f"({num_layers} layers x {topk} kept keys), at most {MAX_BYTES >> 30} GiB are allowed: "
                "set keep.topk = false, or make the engine's cache smaller"
            )
        self.kept = topk > 0
        self._block_size, self._topk, self._num_layers = block_size, topk, num_layers
        self._kept_SNK = torch.full((num_slots, num_layers, topk), UNWRITTEN, dtype=dtype)
        self._experts_SNE = torch.full((num_slots, *experts), UNWRITTEN, dtype=torch.int16)

    def write(self, context: PagedContext) -> None:
        """Note what a pass has chosen."""
        slots_T = context.slots_T.cpu()
        if self.kept:
            kept = [context.kept(n, self._topk) for n in range(self._num_layers)]
            self._kept_SNK[slots_T] = torch.stack(kept, 1).to("cpu", self._kept_SNK.dtype)
        if self._experts_SNE.numel():
            found = [r.experts_TE for _, r in sorted(context.records.items()) if r.experts_TE is not None]
            self._experts_SNE[slots_T] = torch.stack(found, 1).to("cpu", torch.int16)

    def read(self, blocks: list[int], num_tokens: int) -> tuple[NDArray[Any] | None, NDArray[np.int16] | None]:
        """Kept keys [N, L, K] and experts [N, L, E] of a sequence's first tokens; None where not recorded."""
        at_L = torch.arange(num_tokens)
        slots_L = torch.tensor(blocks)[at_L // self._block_size] * self._block_size + at_L % self._block_size
        found = []
        for records in (self._kept_SNK, self._experts_SNE):
            rows: Tensor = records[slots_L]
            assert not (rows == UNWRITTEN).any(), "a cache entry without its records"
            found.append(rows.transpose(0, 1).contiguous().numpy() if rows.numel() else None)
        return found[0], found[1]
