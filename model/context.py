"""Attention contexts: how the tokens of one forward pass find their keys.

The same modules run in training and in generation; what differs is the context. `PackedContext` is
for training: documents packed into [T], laid out as a grid [B, L] of documents inside attention only; `PartContext`
is the same where several processes share the tokens.
`StaticContext` is for the torch engine: one preallocated cache of latents and indexer keys.
`PagedContext` (paged.py) is for vLLM's. Only the torch backend works on grids [B, Q] and [B, L]; Triton's
kernels see tokens [T] and slots [S], the rows of slotted(). Next: attention.py.

Shape letters: T tokens, B rows, Q queries per row, L keys per row, S slots, N layers, K kept, E experts per token.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.kernels import e4m3, reference
from posttrain.kernels.backend import TORCH, Backend
from posttrain.kernels.dense import LONG, padded
from posttrain.kernels.lanes import send
from posttrain.kernels.pages import Pages
from posttrain.model.entry import Entry
from posttrain.model.plan import KERNELS, Plan, plan_rows
from posttrain.model.regrid import to_flat, to_grid

AttentionMode = Literal["dense", "sparse"]
IndexerLoss = Literal["none", "dense", "sparse"]
KeyName = Literal["entries", "index"]


@dataclass(slots=True)
class LayerRecord:
    """What one layer leaves behind in one forward pass, for losses and reports."""

    kl: Tensor | None = None
    """Sum over queries of D_KL(p || softmax I), differentiable for the indexer; for its number see kl_value."""
    kl_values: list[Tensor] = field(default_factory=list)
    """kl in numbers, a sum of these. Triton knows some after the backward pass only: NaN before."""
    recall: Tensor | None = None
    """[2] attention mass caught by the indexer's top-k and by the oracle's, summed over the queries counted."""
    kept_BQK: Tensor | None = None
    experts_TE: Tensor | None = None
    load_X: Tensor | None = None
    """[num_experts] tokens routed to each expert."""

    def add_kl(self, loss: Tensor, value: Tensor) -> None:
        """Of some of the layer's queries."""
        self.kl = loss if self.kl is None else self.kl + loss
        self.kl_values.append(value)

    @property
    def kl_value(self) -> Tensor | None:
        """kl in numbers; None without an indexer that trains."""
        return torch.stack(self.kl_values).sum() if self.kl_values else None


class Context(Protocol):
    """What attention and MoE need to know about a forward pass."""

    attention: AttentionMode
    backend: Backend
    indexer_loss: IndexerLoss
    diagnose: bool
    record_kept: bool
    positions_T: Tensor
    query_weights_T: Tensor | None
    query_positions_BQ: Tensor
    records: dict[int, LayerRecord]
    replay_experts: dict[int, Tensor] | None
    replay_kept: dict[int, Tensor] | None
    parts: Sequence["Part"]
    """The pieces of a mixed pass, which attend one by one when add() has put the keys of all into the cache."""

    @property
    def square(self) -> bool:
        """Whether the keys of each row are its queries' own tokens, so that the mask is the causal square."""
        ...

    def grid(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [B, Q, ...]."""
        ...

    def flat(self, x_BQ: Tensor) -> Tensor:
        """[B, Q, ...] -> [T, ...]."""
        ...

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        """Add this pass's keys [T, ...] of one layer; return all keys the queries may see, [B, L, ...]."""
        ...

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        """Add this pass's keys of one layer; return all there are, one per slot, [S, ...]."""
        ...

    def slots(self, kept_BQK: Tensor) -> Tensor:
        """Kept key positions of each query's document as slots, [T, K]; -1 stays."""
        ...

    def plan(self, num_early: int) -> "Plan":
        """Which rows go where under the Triton backend: the first num_early of each document dense; made once."""
        ...

    def pages(self, layer: int) -> Pages | None:
        """The layer's cache if this pass continues sequences in it; None if its documents start here."""
        ...

    def mask(self) -> Tensor:
        """[B, Q, L] True where the query may see the key; computed once per pass."""
        ...

    def query_mask(self) -> Tensor:
        """[B, Q] True where the query is a real token."""
        ...

    def record(self, layer: int) -> LayerRecord:
        """The record of a layer, made on first use."""
        ...

    def add(self, layer: int, entries_TE: Tensor, k_stored_TX: Tensor | None) -> None:
        """Put the keys of a pass in parts into one layer's cache."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a mixed pass."""

    rows: slice
    """Its tokens."""
    context: Context


@dataclass(slots=True)
class Base:
    """What all contexts have."""

    attention: AttentionMode
    backend: Backend = TORCH
    indexer_loss: IndexerLoss = "none"
    diagnose: bool = False
    record_kept: bool = False
    """Leave kept_BQK in the records (the torch backend, which has it anyway, always does)."""
    records: dict[int, LayerRecord] = field(default_factory=dict)
    replay_experts: dict[int, Tensor] | None = None
    """Per MoE layer [T, E], any integer type: experts to use instead of the router's choice, in rows without -1."""
    replay_kept: dict[int, Tensor] | None = None
    """Per layer [T, K], any integer type: positions in the document, ascending, -1 = none at the end, to use instead
    of the indexer's top-k. Rows that could keep all their keys must do so."""
    query_weights_T: Tensor | None = None
    """For how many tokens of the documents each one that is run stands, in sums over queries (shared.py); None: one."""
    query_positions_BQ: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_keys: int = 0
    parts: Sequence[Part] = ()
    _mask: Tensor | None = None
    _plans: dict[int, Plan] = field(default_factory=dict)

    def mask(self) -> Tensor:
        if self._mask is None:
            self._mask = reference.causal_mask(self.query_positions_BQ, self.num_keys)
        return self._mask

    def record(self, layer: int) -> LayerRecord:
        return self.records.setdefault(layer, LayerRecord())

    def add(self, layer: int, entries_TE: Tensor, k_stored_TX: Tensor | None) -> None:
        raise AssertionError("a pass without parts has nothing to add")


@dataclass(slots=True)
class PackedContext(Base):
    """Packed documents; no key crosses a document because each row of the grid is one document."""

    cu_seqlens_S: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    host_lengths: tuple[int, ...] | None = None
    """Lengths of the documents; None: they are on the device only, which is waited for."""
    positions_T: Tensor = field(init=False)
    _to_grid: Tensor = field(init=False)
    _to_flat: Tensor = field(init=False)
    _shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        starts_S, ends_S = self.cu_seqlens_S[:-1], self.cu_seqlens_S[1:]
        lengths_S = ends_S - starts_S
        if self.host_lengths is None:
            self.host_lengths = tuple(lengths_S.tolist())
        lengths = self.host_lengths
        rows, width, num_tokens = len(lengths), max(lengths), sum(lengths)
        self._shape, self.num_keys = (rows, width), width
        columns_L = torch.arange(width, device=starts_S.device)
        self.query_positions_BQ = columns_L.expand(rows, width)
        if rows == 1:
            self.positions_T = self._to_grid = self._to_flat = columns_L
            return
        # Padding repeats the document's last token: finite numbers that no real query can see.
        self._to_grid = (starts_S[:, None] + columns_L.minimum(lengths_S[:, None] - 1)).reshape(-1)
        rows_S = torch.arange(rows, device=starts_S.device)
        row_T = torch.repeat_interleave(rows_S, lengths_S, output_size=num_tokens)
        self.positions_T = torch.arange(num_tokens, device=starts_S.device) - starts_S[row_T]
        self._to_flat = row_T * width + self.positions_T

    def grid(self, x_T: Tensor) -> Tensor:
        x_N = x_T if self._full else to_grid(x_T, self._to_grid, self._to_flat)
        return x_N.view(*self._shape, *x_T.shape[1:])

    def flat(self, x_BQ: Tensor) -> Tensor:
        x_N = x_BQ.flatten(0, 1)
        return x_N if self._full else to_flat(x_N, self._to_flat)

    @property
    def _full(self) -> bool:
        """Whether all rows have the same length, so that grid and tokens are the same numbers in the same order."""
        return len(self._to_grid) == len(self._to_flat)

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return self.grid(x_T)

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return x_T

    def slots(self, kept_BQK: Tensor) -> Tensor:
        return self.flat(_shift(kept_BQK, self.cu_seqlens_S[:-1]))

    def plan(self, num_early: int) -> Plan:
        if num_early not in self._plans:
            assert self.host_lengths is not None, "known since the context was made"
            lengths = self.host_lengths
            starts = [0, *itertools.accumulate(lengths)][:-1]
            early = [min(length, num_early) for length in lengths]
            self._plans[num_early] = plan_documents(starts, lengths, early, self.cu_seqlens_S.device)
        return self._plans[num_early]

    @property
    def square(self) -> bool:
        return True

    def pages(self, layer: int) -> None:
        return None

    def query_mask(self) -> Tensor:
        rows, width = self._shape
        mask = torch.zeros(rows * width, dtype=torch.bool, device=self._to_flat.device)
        return mask.index_fill(0, self._to_flat, True).view(rows, width)


@dataclass(slots=True)
class PartContext(PackedContext):
    """Some tokens of packed documents; the others are other processes', and all see the keys of all.

    What is handed round per layer is a latent entry and an indexer key per token, for all heads: small.
    """

    begin: int = 0
    end: int = 0
    """The own tokens are begin .. end - 1."""
    gather: Callable[[Tensor], Tensor] = field(kw_only=True)
    """Of this pass's [T, ...] that of all tokens; every process must ask for it."""
    _to_keys: Tensor = field(init=False)
    _starts_B: Tensor = field(init=False)
    """Where the documents of the grid's rows begin."""

    def __post_init__(self) -> None:
        device, cuts = self.cu_seqlens_S.device, self.cu_seqlens_S
        first = int(torch.searchsorted(cuts, self.begin, right=True)) - 1
        last = int(torch.searchsorted(cuts, self.end))
        starts_B, ends_B = cuts[first:last], cuts[first + 1 : last + 1]
        mine_B = starts_B.clamp(min=self.begin)
        counts_B, lengths_B = ends_B.clamp(max=self.end) - mine_B, ends_B - starts_B
        rows, width, self.num_keys = last - first, int(counts_B.max()), int(lengths_B.max())
        columns_Q, columns_L = (torch.arange(n, device=device) for n in (width, self.num_keys))
        row_T = torch.repeat_interleave(torch.arange(rows, device=device), counts_B)
        own_T = torch.arange(self.begin, self.end, device=device)
        self.positions_T = own_T - starts_B[row_T]
        self._to_grid = (mine_B[:, None] - self.begin + columns_Q.minimum(counts_B[:, None] - 1)).reshape(-1)
        self._to_flat = row_T * width + own_T - mine_B[row_T]
        self._to_keys = (starts_B[:, None] + columns_L.minimum(lengths_B[:, None] - 1)).reshape(-1)
        self.query_positions_BQ = (mine_B - starts_B)[:, None] + columns_Q
        self._shape, self._starts_B = (rows, width), starts_B

    @property
    def square(self) -> bool:
        return False

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        all_T = self.gather(x_T)
        return all_T.index_select(0, self._to_keys).view(len(self._starts_B), -1, *x_T.shape[1:])

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return self.gather(x_T)

    def slots(self, kept_BQK: Tensor) -> Tensor:
        return self.flat(_shift(kept_BQK, self._starts_B))

    def plan(self, num_early: int) -> Plan:
        """No row is dense: the first rows of a document may be another process'."""
        if 0 not in self._plans:
            from posttrain.kernels.index_topk_triton import key_ranges  # triton exists on Linux only

            end_T = torch.arange(self.begin, self.end) + 1
            begin_T = end_T - 1 - self.positions_T.cpu()
            self._plans[0] = Plan(key_ranges(begin_T, end_T, self.cu_seqlens_S.device))
        return self._plans[0]


def entry_part(name: KeyName, entries: Tensor, entry: Entry) -> Tensor:
    """Of cache entries [..., E + X] the latents and rotary keys, or the indexer keys as they are stored; a view."""
    return entries[..., : entry.latent] if name == "entries" else entries[..., entry.latent :]


def entry_keys(stored: Tensor, entry: Entry) -> tuple[Tensor, Tensor | None]:
    """Stored indexer keys [..., X] as kernels read them: [..., I], and their scales if they are e4m3; views."""
    return e4m3.unpack(stored, entry.index) if entry.e4m3 else (stored, None)


class StaticCache:
    """One entry per token and layer, preallocated: [B, L, E + X] per layer."""

    def __init__(self, *, num_layers: int, num_rows: int, length: int, entry: Entry, like: Tensor) -> None:
        self.length, self.entry = length, entry
        width = entry.width(like.element_size())
        self.layers = [like.new_zeros(num_rows, length, width) for _ in range(num_layers)]

    def part(self, name: KeyName, entries: Tensor) -> Tensor:
        """The part of that name of entries [..., E + X]."""
        return entry_part(name, entries, self.entry)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.layers = [entries.index_select(0, rows) for entries in self.layers]


@dataclass(slots=True)
class StaticContext(Base):
    """One step of generation: B rows with Q new tokens each, keys in a StaticCache."""

    cache: StaticCache = field(kw_only=True)
    positions_T: Tensor = field(init=False)
    _starts_B: Tensor = field(init=False)
    """First slot of each row."""
    _slots_T: Tensor = field(init=False)
    _table: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.positions_T = self.query_positions_BQ.reshape(-1)
        self.num_keys = self.num_keys or int(self.query_positions_BQ.max()) + 1
        rows = len(self.query_positions_BQ)
        self._starts_B = torch.arange(rows, device=self.positions_T.device) * self.cache.length
        self._slots_T = (self._starts_B[:, None] + self.query_positions_BQ).reshape(-1)

    @property
    def square(self) -> bool:
        return self.query_positions_BQ.shape[1] == self.num_keys

    def grid(self, x_T: Tensor) -> Tensor:
        return x_T.view(*self.query_positions_BQ.shape, *x_T.shape[1:])

    def flat(self, x_BQ: Tensor) -> Tensor:
        return x_BQ.flatten(0, 1)

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        self._add(layer, name, x_T)
        return self.cache.part(name, self.cache.layers[layer][:, : self.num_keys])

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return self._add(layer, name, x_T)

    def slots(self, kept_BQK: Tensor) -> Tensor:
        return self.flat(_shift(kept_BQK, self._starts_B))

    def plan(self, num_early: int) -> Plan:
        assert self.pages(0) is None, "documents start in an earlier pass"
        if num_early not in self._plans:
            rows, width = self.query_positions_BQ.shape
            starts = [row * self.cache.length for row in range(rows)]
            early = [min(width, num_early)] * rows
            self._plans[num_early] = plan_documents(starts, [width] * rows, early, self.positions_T.device)
        return self._plans[num_early]

    def pages(self, layer: int) -> Pages | None:
        if self.square:
            return None
        entries = self.cache.layers[layer]
        if self._table is None:  # a row of the cache is one block
            rows = torch.arange(len(entries), dtype=torch.int32, device=entries.device)
            self._table = (rows[:, None], (self.query_positions_BQ[:, -1] + 1).int())
        table_B1, lengths_B = self._table
        keys_PSI, scale_PS = entry_keys(self.cache.part("index", entries), self.cache.entry)
        return Pages(
            entries_PSE=self.cache.part("entries", entries),
            index_PSI=keys_PSI,
            scale_PS=scale_PS,
            table_BM=table_B1,
            lengths_B=lengths_B,
            max_length=self.num_keys,
        )

    def _add(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        part = self.cache.part(name, self.cache.layers[layer].flatten(0, 1))
        return part.index_copy_(0, self._slots_T, x_T)

    def query_mask(self) -> Tensor:
        return torch.ones_like(self.query_positions_BQ, dtype=torch.bool)


def _shift(kept_BQK: Tensor, starts_B: Tensor) -> Tensor:
    return torch.where(kept_BQK < 0, kept_BQK, kept_BQK + starts_B[:, None, None])


def plan_documents(
    starts: Sequence[int],
    lengths: Sequence[int],
    early: Sequence[int],
    device: torch.device,
    *,
    begun: Sequence[int] | None = None,
    apart: bool = False,
) -> Plan:
    """The plan for documents with these first slots and so many rows each, of which the first `early` ones are dense.

    Dense parts are all short documents together, padded to the longest, and long ones of about one length; or with `apart`
    each long one by itself, whose rows stand together, so that nothing is copied. Of a document that an earlier pass has
    begun, with so many tokens, no row may be dense: its keys are not all here.
    """
    groups: dict[int, list[int]] = {}
    for b, num in enumerate(early):
        if num:
            kind = 0 if num < LONG else -b - 1 if apart else padded(num)
            groups.setdefault(kind, []).append(b)
    parts = [tuple(early[b] for b in documents) for documents in groups.values()]
    part_B = np.full(len(early), KERNELS)
    for part, documents in enumerate(groups.values()):
        part_B[documents] = part
    sizes = np.array(lengths, np.int64)
    row_T = np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)
    positions_T = row_T if begun is None else row_T + np.array(begun, np.int64).repeat(sizes)
    begin_T = np.array(starts, np.int64).repeat(sizes)
    way_T = np.where(row_T < np.array(early, np.int64).repeat(sizes), part_B.repeat(sizes), KERNELS)

    def dense() -> list[PackedContext]:
        cuts = (send(torch.tensor([0, *itertools.accumulate(part)]), device) for part in parts)
        return [
            PackedContext(attention="dense", cu_seqlens_S=cut_S, host_lengths=part)
            for cut_S, part in zip(cuts, parts, strict=True)
        ]

    return plan_rows(begin_T, positions_T, way_T, device, dense)
