"""Which way each row (token) of a pass goes under the Triton backend: dense attention, or the kernels.

Made once per pass on the host, used by every layer. Next: context.py, attention.py.

Shape letters: T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.kernels.lanes import send

if TYPE_CHECKING:  # triton exists on Linux only, and contexts make plans
    from posttrain.kernels.index_topk_triton import Ranges
    from posttrain.model.context import PackedContext


@dataclass(frozen=True, slots=True)
class Split:
    """The first rows of every document, which keep all their keys, and the others."""

    early_T: Tensor
    late_T: Tensor
    """Rows of the pass, ascending, as are early_T."""
    back_T: Tensor
    """Where each row stands in [early | late]."""
    early: "PackedContext"
    """The early rows as documents of their own."""
    early_ranges: "Ranges"
    """Keys of each early row, among the early rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The way of each row (token) under the Triton backend."""

    ranges: "Ranges | None"
    """Slots that the rows of the kernels may see; None without such rows."""
    split: Split | None = None
    """Which rows are dense and which are the kernels'; None if all are the kernels'."""


def plan_rows(
    begin_T: Tensor,
    positions_T: Tensor,
    is_early_T: Tensor,
    device: torch.device,
    early: Callable[[], "tuple[PackedContext, Ranges]"],
) -> Plan:
    """The plan for rows at these positions of documents that begin at these slots, on the host; which of them are dense.

    early makes the dense rows' own context and their keys among them; asked for only where there are any.
    """
    from posttrain.kernels.index_topk_triton import key_ranges  # triton exists on Linux only

    end_T = begin_T + positions_T + 1
    if not is_early_T.any():
        return Plan(key_ranges(begin_T, end_T, device))
    early_T, late_T = is_early_T.nonzero()[:, 0], (~is_early_T).nonzero()[:, 0]
    context, ranges = early()
    split = Split(
        early_T=send(early_T, device),
        late_T=send(late_T, device),
        back_T=send(torch.cat((early_T, late_T)).argsort(), device),
        early=context,
        early_ranges=ranges,
    )
    return Plan(key_ranges(begin_T[late_T], end_T[late_T], device) if len(late_T) else None, split)
