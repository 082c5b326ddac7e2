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


def _chosen(shape: Shape, context: PagedContext) -> tuple[Tensor | None, Tensor | None]:
    """Kept keys [T, N, K] and experts [T, N, E] of a pass's new tokens; None where the shape has none."""
    kept = [context.kept(n, shape.topk) for n in range(shape.num_layers if shape.topk else 0)]
    experts = [r.experts_TE for _, r in sorted(context.records.items()) if r.experts_TE is not None]
    wanted = bool(np.prod(shape.experts))
    return torch.stack(kept, 1) if kept else None, torch.stack(experts, 1) if wanted else None


class Stage:
    """What a decoding step chose, on the device: when a CUDA graph is replayed, nothing of Python runs."""

    def __init__(self, shape: Shape, rows: int, device: torch.device) -> None:
        self.shape = shape
        self.slots_T = torch.zeros(rows, dtype=torch.int64, device=device)
        self.kept_TNK = torch.zeros(rows, shape.num_layers, shape.topk, dtype=torch.int32, device=device)
        self.experts_TNE = torch.zeros(rows, *shape.experts, dtype=torch.int16, device=device)

    def write(self, context: PagedContext) -> None:
        """Part of the captured graph."""
        num_rows = len(context.slots_T)
        self.slots_T[:num_rows] = context.slots_T
        for place, found in zip((self.kept_TNK, self.experts_TNE), _chosen(self.shape, context), strict=True):
            if found is not None:
                place[:num_rows] = found


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
        self._store(context.slots_T, *_chosen(self.shape, context))

    def take(self, stage: Stage, num_rows: int) -> None:
        """Note what a replayed graph has left of its first rows."""
        kept_TNK = stage.kept_TNK[:num_rows] if self.shape.topk else None
        experts_TNE = stage.experts_TNE[:num_rows] if self._experts_SNE.numel() else None
        self._store(stage.slots_T[:num_rows], kept_TNK, experts_TNE)

    def _store(self, slots_T: Tensor, kept_TNK: Tensor | None, experts_TNE: Tensor | None) -> None:
        slots_T = slots_T.cpu()
        for records, found in ((self._kept_SNK, kept_TNK), (self._experts_SNE, experts_TNE)):
            if found is not None:
                records[slots_T] = found.to("cpu", records.dtype)

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
