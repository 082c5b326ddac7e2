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

from posttrain.kernels.lanes import send
from posttrain.model.context import KeyName, PackedContext
from posttrain.model.plan import KERNELS, Plan, plan_rows


@dataclass(slots=True)
class SharedContext(PackedContext):
    """cu_seqlens_S cuts the places; two documents have the same token where all before it are the same, too."""

    token_F: Tensor = field(kw_only=True)
    """Which token stands in each place."""
    place_T: Tensor = field(kw_only=True)
    """The first place of each token, ascending."""
    host_places: tuple[Tensor, Tensor] | None = None
    """Both in host memory; None: they are on the device only, which a plan waits for."""

    def __post_init__(self) -> None:
        PackedContext.__post_init__(self)
        self.positions_T = self.positions_T[self.place_T]
        self._to_grid, self._to_flat = self.token_F[self._to_grid], self._to_flat[self.place_T]
        # Not bincount, which waits for the device.
        ones_F = torch.ones(len(self.token_F), device=self.token_F.device)
        self.query_weights_T = torch.zeros_like(ones_F[: len(self.place_T)]).index_add_(
            0, self.token_F, ones_F
        )

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        # Unlike queries, of which one place is read, keys have a gradient from every document.
        return x_T.index_select(0, self._to_grid).view(*self._shape, *x_T.shape[1:])

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return x_T.index_select(0, self.token_F)

    def on_host(self) -> tuple[Tensor, Tensor]:
        """token_F and place_T in host memory."""
        return self.host_places or (self.token_F.cpu(), self.place_T.cpu())

    def plan(self, num_early: int) -> Plan:
        if num_early not in self._plans:
            token_F, place_T = self.on_host()
            lengths_S = torch.tensor(self.host_lengths)
            starts_F = (lengths_S.cumsum(0) - lengths_S).repeat_interleave(lengths_S)
            positions_T = place_T - starts_F[place_T]

            def dense() -> list[PackedContext]:
                return [self._early(token_F, place_T, positions_T, num_early)]

            way_T = torch.where(positions_T < num_early, 0, KERNELS)
            device = self.token_F.device
            begin_T = place_T - positions_T
            self._plans[num_early] = plan_rows(
                begin_T.numpy(), positions_T.numpy(), way_T.numpy(), device, dense
            )
        return self._plans[num_early]

    def _early(
        self, token_F: Tensor, place_T: Tensor, positions_T: Tensor, num_early: int
    ) -> "SharedContext":
        """The first num_early tokens of each document; what is given is on the host."""
        device = self.token_F.device
        lengths_S = torch.tensor(self.host_lengths).clamp(max=num_early)
        is_early_T = positions_T < num_early
        is_early_F = is_early_T[token_F]
        # Numbers among early tokens and among early places.
        token_T, place_F = is_early_T.cumsum(0) - 1, is_early_F.cumsum(0) - 1
        places = token_T[token_F[is_early_F]], place_F[place_T[is_early_T]]
        return SharedContext(
            attention="dense",
            cu_seqlens_S=send(F.pad(lengths_S.cumsum(0), (1, 0)), device),
            host_lengths=tuple(lengths_S.tolist()),
            token_F=send(places[0], device),
            place_T=send(places[1], device),
            host_places=places,
        )
