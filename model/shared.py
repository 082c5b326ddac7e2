"""Packed documents with common beginnings, which are run once: the completions of one prompt.

Everything but attention sees each common token once. Attention sees whole documents: what is copied for it is a latent
entry and an indexer key per token, for all heads, so that every query still has one range of keys. Sums over queries count a
common token as often as it stands in documents. Next: context.py, ../posttrain/prefixes.py.

Shape letters: T tokens that are run, F places in documents, S documents, N places of the grid.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.model.context import KeyName, PackedContext, Plan, Split


@dataclass(slots=True)
class SharedContext(PackedContext):
    """cu_seqlens_S cuts the places; two documents have the same token where all before it are the same, too."""

    token_F: Tensor = field(kw_only=True)
    """Which token stands in each place."""
    place_T: Tensor = field(kw_only=True)
    """The first place of each token, ascending."""

    def __post_init__(self) -> None:
        PackedContext.__post_init__(self)
        self.positions_T = self.positions_T[self.place_T]
        self._to_grid, self._to_flat = self.token_F[self._to_grid], self._to_flat[self.place_T]
        counts_T = torch.zeros(len(self.place_T), device=self.token_F.device)
        self.query_weights_T = counts_T.index_add_(
            0, self.token_F, torch.ones_like(self.token_F, dtype=torch.float32)
        )

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        # Unlike queries, of which one place is read, keys have a gradient from every document.
        return x_T.index_select(0, self._to_grid).view(*self._shape, *x_T.shape[1:])

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return x_T.index_select(0, self.token_F)

    def plan(self, num_early: int) -> Plan:
        if num_early not in self._plans:
            self._plans[num_early] = self._make_plan(num_early)
        return self._plans[num_early]

    def _make_plan(self, num_early: int) -> Plan:
        from posttrain.kernels.index_topk_triton import key_ranges  # triton exists on Linux only

        device = self.token_F.device
        place_T, positions_T = self.place_T.cpu(), self.positions_T.cpu()
        begin_T, end_T = place_T - positions_T, place_T + 1
        if not num_early:
            return Plan(key_ranges(begin_T, end_T, device))
        is_early_T = positions_T < num_early
        early_T, late_T = is_early_T.nonzero()[:, 0], (~is_early_T).nonzero()[:, 0]
        lengths_S = self.cu_seqlens_S.cpu().diff()
        position_F = torch.arange(len(self.token_F)) - (lengths_S.cumsum(0) - lengths_S).repeat_interleave(
            lengths_S
        )
        is_early_F = position_F < num_early
        # Numbers among early tokens and among early places.
        token_T, place_F = is_early_T.cumsum(0) - 1, is_early_F.cumsum(0) - 1
        early_place_T = place_F[place_T[early_T]]
        early = SharedContext(
            attention="dense",
            cu_seqlens_S=F.pad(lengths_S.clamp(max=num_early).cumsum(0), (1, 0)).to(device),
            token_F=token_T[self.token_F.cpu()[is_early_F]].to(device),
            place_T=early_place_T.to(device),
        )
        split = Split(
            early_T=early_T.to(device),
            late_T=late_T.to(device),
            back_T=torch.cat((early_T, late_T)).argsort().to(device),
            early=early,
            early_ranges=key_ranges(early_place_T - positions_T[early_T], early_place_T + 1, device),
        )
        return Plan(key_ranges(begin_T[late_T], end_T[late_T], device) if len(late_T) else None, split)
