"""What the projections make of the tokens of a pass, and pieces of it: what one layer's attention hands around.

Next: attention.py.

Shape letters: T tokens, H heads, E size of a head's query, P rotary, J indexer heads, I indexer head size, K kept entries,
X numbers of a stored key; of entries E is that of latent and rotary key.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.model.plan import Split
from posttrain.model.rope import Rope


@dataclass(slots=True)
class Tokens:
    """What the projections make of each token; the indexer's part only where it is used."""

    q_THE: Tensor
    """[own | rotary], which is not yet rotated."""
    rope_TP: Rope
    entries_TE: Tensor
    q_index_TJI: Tensor | None = None
    k_index_TI: Tensor | None = None
    w_TJ: Tensor | None = None
    k_stored_TX: Tensor | None = None
    """The keys as caches hold them; without e4m3 they are k_index_TI."""

    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and head weights of the indexer."""
        assert self.q_index_TJI is not None and self.k_index_TI is not None and self.w_TJ is not None, (
            "unused"
        )
        return self.q_index_TJI, self.k_index_TI, self.w_TJ

    def stored(self) -> Tensor:
        """Keys of the indexer that select."""
        assert self.k_stored_TX is not None, "unused"
        return self.k_stored_TX

    def rows(self, rows: slice) -> "Tokens":
        """Some of them."""
        parts = (
            self.q_THE,
            self.rope_TP,
            self.entries_TE,
            self.q_index_TJI,
            self.k_index_TI,
            self.w_TJ,
            self.k_stored_TX,
        )
        return Tokens(*(part if part is None else part[rows] for part in parts))  # type: ignore[arg-type]  # the first three are there


Pieces = tuple[Tensor, ...]
"""Rows of a tensor, in runs that stand together."""


def join(pieces: Pieces) -> Tensor:
    """Rows of all of them: a view, if there is one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the Triton path knows of each query."""

    q_THE: Pieces
    """As in Tokens."""
    rope_TP: Pieces
    q_index_TJI: Pieces
    w_TJ: Pieces
    """With every factor."""
    kept_TK: Pieces | None
    """Positions in the document to keep instead of the indexer's choice."""
    weight_T: Pieces | None
    """How often each counts in the indexer's loss; None: once."""

    def parts(self, split: Split) -> list["Rows"]:
        """Those of each dense part, and as the last the kernels', of rows in one piece."""
        whole = (self.q_THE, self.rope_TP, self.q_index_TJI, self.w_TJ, self.kept_TK, self.weight_T)
        num = len(split.dense) + 1
        cut: list[Any] = [[None] * num if pieces is None else split.parts(*pieces) for pieces in whole]
        return [Rows(*parts) for parts in zip(*cut, strict=True)]
