"""Which way each row (token) of a pass goes under the Triton backend: dense attention, or the kernels.

Made once per pass on the host, used by every layer. Next: context.py, rows.py, attention.py.

Shape letters: T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:  # triton exists on Linux only, and contexts make plans
    from posttrain.kernels.index_topk_triton import Ranges
    from posttrain.model.context import PackedContext

KERNELS = -1
"""The way of rows that the kernels attend to."""


@dataclass(frozen=True, slots=True)
class Split:
    """The first rows of documents, which keep all their keys, and the others, as runs of rows that go one way."""

    sizes: tuple[int, ...]
    """Rows of each run, in the order of the pass."""
    ways: tuple[int, ...]
    """Where each run goes: to the dense part of that number, or KERNELS."""
    dense: tuple["PackedContext", ...]
    """The rows of each dense part as documents of their own."""

    def parts(self, x_T: Tensor) -> list[tuple[Tensor, ...]]:
        """What each dense part gets of x, run by run, and as the last the kernels."""
        runs = list(zip(self.ways, x_T.split(self.sizes), strict=True))
        return [tuple(run for way, run in runs if way == part) for part in (*range(len(self.dense)), KERNELS)]

    def whole(self, found: Sequence[Tensor]) -> Tensor:
        """The rows of the pass from those of each dense part, and as the last, if there are any, the kernels'."""
        parts = []
        for part, x in zip((*range(len(self.dense)), KERNELS), found, strict=False):
            parts.append(
                iter(x.split([n for n, way in zip(self.sizes, self.ways, strict=True) if way == part]))
            )
        return torch.cat([next(parts[way]) for way in self.ways])


@dataclass(frozen=True, slots=True)
class Plan:
    """The way of each row (token) under the Triton backend."""

    ranges: "Ranges | None"
    """Slots that the rows of the kernels may see; None without such rows."""
    split: Split | None = None
    """Which rows are dense and which are the kernels'; None if all are the kernels'."""


def plan_rows(
    begin_T: NDArray[Any],
    positions_T: NDArray[Any],
    way_T: NDArray[Any],
    device: torch.device,
    dense: Callable[[], "Sequence[PackedContext]"],
) -> Plan:
    """The plan for rows at these positions of documents that begin at these slots, on the host; which way each goes.

    dense makes the contexts of the dense parts; asked for only where there are any. In numpy, whose small calls cost a
    fraction of torch's: the device waits for this.
    """
    end_T = begin_T + positions_T + 1
    late_T = way_T == KERNELS
    if late_T.all():
        return Plan(_ranges(begin_T, end_T, device))
    first = np.concatenate(([0], np.flatnonzero(way_T[1:] != way_T[:-1]) + 1))
    sizes = np.diff(first, append=len(way_T))
    split = Split(tuple(sizes.tolist()), tuple(way_T[first].tolist()), tuple(dense()))
    return Plan(_ranges(begin_T[late_T], end_T[late_T], device) if late_T.any() else None, split)


def _ranges(begin_N: NDArray[Any], end_N: NDArray[Any], device: torch.device) -> "Ranges":
    from posttrain.kernels.index_topk_triton import key_ranges  # triton exists on Linux only

    return key_ranges(torch.from_numpy(begin_N), torch.from_numpy(end_N), device)
