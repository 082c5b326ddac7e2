"""Kept keys and experts of every token in the paged cache, stored beside it, block by block.

A token that the prefix cache supplies is not computed again; its records lie where its cache entry lies, and live as
long. Next: sampler.py.

Shape letters: P blocks, S tokens of a block, N layers, K kept, E experts per token, L tokens of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.model.paged import PagedContext

UNWRITTEN = -2
MAX_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """What is recorded of each token."""

    num_layers: int
    topk: int
    """0: no kept keys are wanted."""
    experts: tuple[int, int]
    """MoE layers, and experts per token; (0, 0): no experts are wanted."""


class Records:
    """Host arrays with a row per token of a pool [P, S, ...]."""

    def __init__(self, shape: Shape, pool: Tensor, *, max_length: int) -> None:
        """Raises ValueError if they do not fit into memory."""
        self.shape = shape
        self._block_size = pool.shape[1]
        num_slots = pool.shape[0] * pool.shape[1]
        dtype = torch.int16 if max_length <= torch.iinfo(torch.int16).max else torch.int32
        per_token = shape.num_layers * shape.topk * dtype.itemsize + shape.experts[0] * shape.experts[1] * 2
        if num_slots * per_token > MAX_BYTES:
            raise ValueError(
                f"recording {per_token} bytes for each of {num_slots} cache entries takes "
                f"{num_slots * per_token / 2**30:.0f} GiB, at most {MAX_BYTES >> 30} are allowed: set keep.topk = "
                "false, or make the engine's cache smaller"
            )
        self._kept_SNK = torch.full((num_slots, shape.num_layers, shape.topk), UNWRITTEN, dtype=dtype)
        self._experts_SNE = torch.full((num_slots, *shape.experts), UNWRITTEN, dtype=torch.int16)

    def write(self, context: PagedContext) -> None:
        """Note what a pass has chosen."""
        slots_T = context.slots_T.cpu()
        if self.shape.topk:
            kept = [context.kept(n, self.shape.topk) for n in range(self.shape.num_layers)]
            self._kept_SNK[slots_T] = torch.stack(kept, 1).to("cpu", self._kept_SNK.dtype)
        if self._experts_SNE.numel():
            found = [r.experts_TE for _, r in sorted(context.records.items()) if r.experts_TE is not None]
            self._experts_SNE[slots_T] = torch.stack(found, 1).to("cpu", torch.int16)

    def read(
        self, blocks: list[int], num_tokens: int
    ) -> tuple[NDArray[Any] | None, NDArray[np.int16] | None]:
        """Kept keys [N, L, K] and experts [N, L, E] of a sequence's first tokens; None where not recorded."""
        at_L = torch.arange(num_tokens)
        slots_L = torch.tensor(blocks)[at_L // self._block_size] * self._block_size + at_L % self._block_size
        found = []
        for records in (self._kept_SNK, self._experts_SNE):
            rows: Tensor = records[slots_L]
            assert not (rows == UNWRITTEN).any(), "a cache entry without its records"
            found.append(rows.transpose(0, 1).contiguous().numpy() if rows.numel() else None)
        return found[0], found[1]
