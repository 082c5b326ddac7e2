"""The attention context of an engine with a paged cache: our model inside vLLM.

A pass holds the new tokens of many sequences. Those with one new token, the decoding ones, are a grid [B, 1] that
reads the pool through the block table. The others, prompts or chunks of them, take the very path that packed training takes on a
copy of their keys: under Triton all together, as packed documents some of whose tokens came before; under torch, whose
grids would be padded, each as a grid [1, Q] of its own. All keys of a pass are in the pool before any part reads it: a sequence
may share blocks with one that is still being filled. Next: context.py, ../kernels/pages.py, ../rollouts/vllm/.

Shape letters: T tokens, B sequences, Q new tokens of each, L keys, F keys of all sequences, P blocks in the pool, S tokens of a
block, M blocks of a sequence, E entry size, X numbers of a stored key, I indexer head size, K kept.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.kernels import pages, reference
from posttrain.kernels.backend import Backend
from posttrain.kernels.dense import LONG
from posttrain.kernels.pages import Pages
from posttrain.model.context import (
    AttentionMode,
    Base,
    KeyName,
    Part,
    entry_keys,
    entry_part,
    plan_documents,
)
from posttrain.model.entry import Entry
from posttrain.model.plan import Plan

KEYS_TOGETHER = 1 << 18
"""Keys that the sequences of one part may have: what is copied of a layer is 0.3 GB at the size of DeepSeek-V3.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedCache:
    """The pools of all layers: one entry per token."""

    pools_PSX: Sequence[Tensor]
    """One per layer, [P, S, entry.width], the last stride 1; finite everywhere, since the torch backend multiplies what
    nobody may see by 0."""
    entry: Entry

    def part(self, layer: int, name: KeyName) -> Tensor:
        """Latents and rotary keys [P, S, E] of a layer, or stored indexer keys [P, S, X]."""
        return entry_part(name, self.pools_PSX[layer], self.entry)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """New tokens of sequences: those with one new token come first."""

    counts_B: Sequence[int]
    """New tokens of each sequence, known to the host."""
    ends_B: Sequence[int]
    """Tokens of each sequence, its new ones included, known to the host."""
    positions_T: Tensor
    table_BM: Tensor
    """int32."""
    lengths_B: Tensor
    """int32, ends_B on the device."""
    slots_T: Tensor
    """int64 place of each new token in the pool, block times S plus offset; several may share one nobody reads."""


@dataclass(slots=True)
class PagedContext(Base):
    """A pass over new tokens of many sequences; its parts do the attention."""

    cache: PagedCache = field(kw_only=True)
    slots_T: Tensor = field(kw_only=True)
    positions_T: Tensor = field(kw_only=True)

    def add(self, layer: int, entries_TE: Tensor, k_stored_TX: Tensor | None) -> None:
        pages.write(self.cache.part(layer, "entries"), self.slots_T, entries_TE)
        if k_stored_TX is not None:
            pages.write(self.cache.part(layer, "index"), self.slots_T, k_stored_TX)

    def kept(self, layer: int, num_kept: int) -> Tensor:
        """Recorded key positions of every token, [T, K], -1 beyond."""
        found = []
        for part in self.parts:
            kept_BQK = part.context.record(layer).kept_BQK
            assert kept_BQK is not None, "not recorded"
            kept_TK = kept_BQK.flatten(0, 1)
            found.append(torch.nn.functional.pad(kept_TK, (0, num_kept - kept_TK.shape[1]), value=-1))
        return torch.cat(found)


def paged(
    new: NewTokens,
    cache: PagedCache,
    *,
    attention: AttentionMode,
    backend: Backend,
    max_length: int,
    record_kept: bool = False,
) -> PagedContext:
    """The context of a pass; no sequence is longer than max_length, which decides the grid of Triton's kernels.

    With a deterministic backend no sequence's bits depend on the others: torch's attention, which would pad all that
    decode to the longest, takes them one by one.
    """
    num_single = next((i for i, count in enumerate(new.counts_B) if count != 1), len(new.counts_B))
    by_triton = backend.name == "triton" and attention == "sparse"
    if backend.deterministic and not by_triton:
        num_single = 0
    groups = [slice(0, num_single)] if num_single else []
    groups += _groups(new, num_single, KEYS_TOGETHER if by_triton else 0)
    parts, start = [], 0
    for group in groups:
        counts, ends = new.counts_B[group], new.ends_B[group]
        rows = slice(start, start + sum(counts))
        start = rows.stop
        chunks = by_triton and group.start >= num_single
        fixed = backend.name == "triton" and counts[0] == 1
        context = (_Chunks if chunks else _Rows)(
            attention=attention,
            backend=backend,
            record_kept=record_kept,
            query_positions_BQ=new.positions_T[rows].view(1 if chunks else len(counts), -1),
            num_keys=max_length if fixed else max(ends),
            cache=cache,
            counts_B=counts,
            ends_B=ends,
            table_BM=new.table_BM[group],
            lengths_B=new.lengths_B[group],
        )
        parts.append(Part(rows, context))
    assert start == len(new.positions_T), f"{start} tokens in parts, {len(new.positions_T)} in the pass"
    return PagedContext(
        attention=attention,
        backend=backend,
        record_kept=record_kept,
        parts=parts,
        cache=cache,
        slots_T=new.slots_T,
        positions_T=new.positions_T,
    )


def _groups(new: NewTokens, first: int, num_keys: int) -> list[slice]:
    """Neighbours among the sequences from `first` on that have new tokens: as many as have so many keys, one at least."""
    groups: list[slice] = []
    keys = 0
    for i in range(first, len(new.counts_B)):
        if not new.counts_B[i]:
            continue
        if groups and groups[-1].stop == i and keys + new.ends_B[i] <= num_keys:
            groups[-1], keys = slice(groups[-1].start, i + 1), keys + new.ends_B[i]
        else:
            groups, keys = [*groups, slice(i, i + 1)], new.ends_B[i]
    return groups


@dataclass(slots=True)
class _Part(Base):
    """Some sequences of a pass, whose keys are in the cache already."""

    cache: PagedCache = field(kw_only=True)
    counts_B: Sequence[int] = field(kw_only=True)
    ends_B: Sequence[int] = field(kw_only=True)
    table_BM: Tensor = field(kw_only=True)
    lengths_B: Tensor = field(kw_only=True)
    positions_T: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.positions_T = self.query_positions_BQ.reshape(-1)

    def grid(self, x_T: Tensor) -> Tensor:
        return x_T.view(*self.query_positions_BQ.shape, *x_T.shape[1:])

    def flat(self, x_BQ: Tensor) -> Tensor:
        return x_BQ.flatten(0, 1)

    def query_mask(self) -> Tensor:
        return torch.ones_like(self.query_positions_BQ, dtype=torch.bool)


@dataclass(slots=True)
class _Chunks(_Part):
    """Sequences with any numbers of new tokens for Triton's kernels; their keys stand one sequence after another.

    There is no grid of them: "rows" of the pass are one row [1, T].
    """

    _slots_F: Tensor | None = None

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        raise AssertionError("a grid of keys is the torch backend's")

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        if self.counts_B == self.ends_B:  # all keys are the pass's own, in this order
            return x_T
        if self._slots_F is None:
            self._slots_F = self._make_slots()
        return pages.read(self.cache.part(layer, name), self._slots_F)

    def _make_slots(self) -> Tensor:
        """The slot of every key; made on the device, which nobody waits for."""
        device, size = self.table_BM.device, self.cache.pools_PSX[0].shape[1]
        num_keys, lengths_B = sum(self.ends_B), self.lengths_B.long()
        sequences_B = torch.arange(len(lengths_B), device=device)
        sequence_F = sequences_B.repeat_interleave(lengths_B, output_size=num_keys)
        starts_B = lengths_B.cumsum(0) - lengths_B
        position_F = torch.arange(num_keys, device=device) - starts_B[sequence_F]
        return self.table_BM[sequence_F, position_F // size].long() * size + position_F % size

    def slots(self, kept_BQK: Tensor) -> Tensor:
        raise AssertionError("kernels select slots")

    def plan(self, num_early: int) -> Plan:
        if num_early not in self._plans:
            begun = [end - count for count, end in zip(self.counts_B, self.ends_B, strict=True)]
            whole = [0 if old else min(end, num_early) for end, old in zip(self.ends_B, begun, strict=True)]
            # Short ones are padded to the longest of them: of less than half its length one costs less by the kernels.
            longest = max((num for num in whole if num < LONG), default=0)
            early = [num if 2 * num >= longest else 0 for num in whole]
            starts = [0, *itertools.accumulate(self.ends_B)][:-1]
            device = self.positions_T.device
            self._plans[num_early] = plan_documents(
                starts, self.counts_B, early, device, begun=begun, apart=True
            )
        return self._plans[num_early]

    def pages(self, layer: int) -> None:
        return None

    @property
    def square(self) -> bool:
        return False


@dataclass(slots=True)
class _Rows(_Part):
    """Sequences with equally many new tokens: either B or Q is 1."""

    def keys(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        return reference.paged(self.cache.part(layer, name), self.table_BM, self.num_keys)

    def slotted(self, layer: int, name: KeyName, x_T: Tensor) -> Tensor:
        """The pool's slots for sequences with one new token, else the sequence's own."""
        if self._single:
            part_PSX = self.cache.part(layer, name)
            return part_PSX.view(-1, part_PSX.shape[-1])
        return self.keys(layer, name, x_T)[0]

    def slots(self, kept_BQK: Tensor) -> Tensor:
        if not self._single:
            return self.flat(kept_BQK)
        return pages.slots_of(self.flat(kept_BQK), self.table_BM, self.cache.pools_PSX[0].shape[1])

    def plan(self, num_early: int) -> Plan:
        raise AssertionError("the kernels for a cache need none")

    def pages(self, layer: int) -> Pages | None:
        assert self._single, "chunks are for the kernels of packed documents"
        keys_PSI, scale_PS = entry_keys(self.cache.part(layer, "index"), self.cache.entry)
        return Pages(
            entries_PSE=self.cache.part(layer, "entries"),
            index_PSI=keys_PSI,
            scale_PS=scale_PS,
            table_BM=self.table_BM,
            lengths_B=self.lengths_B,
            max_length=self.num_keys,
        )

    @property
    def square(self) -> bool:
        return self.query_positions_BQ.shape[1] == self.num_keys

    @property
    def _single(self) -> bool:
        return self.query_positions_BQ.shape[1] == 1
