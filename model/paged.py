"""The attention context of an engine with a paged cache: our model inside vLLM.

A pass holds the new tokens of many sequences. Those with one new token, the decoding ones, are a grid [B, 1] that
reads the pool through the block table; each of the others, a prompt or a chunk of one, is a grid [1, Q] of its own on
a copy of its keys, so that it takes the very path that packed training takes. All keys of a pass are in the pool
before any part reads it: a sequence may share blocks with one that is still being filled. Next: context.py,
../kernels/pages.py, ../rollouts/vllm/.

Shape letters: T tokens, B sequences, Q new tokens of each, L keys, P blocks in the pool, S tokens of a block, M blocks
of a sequence, E entry size, I indexer head size, K kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.backend import Backend
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
        size = self.cache.pools_PSX[layer].shape[1]
        at = (self.slots_T // size, self.slots_T % size)
        self.cache.part(layer, "entries")[at] = entries_TE
        if k_stored_TX is not None:
            self.cache.part(layer, "index")[at] = k_stored_TX

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
    if backend.deterministic and (backend.name == "torch" or attention == "dense"):
        num_single = 0
    shapes = [(0, num_single, 1)] if num_single else []
    shapes += [(i, 1, new.counts_B[i]) for i in range(num_single, len(new.counts_B)) if new.counts_B[i]]
    parts, start = [], 0
    for first, num, count in shapes:
        rows, sequences = slice(start, start + num * count), slice(first, first + num)
        start = rows.stop
        longest = max_length if backend.name == "triton" and count == 1 else max(new.ends_B[sequences])
        context = _Rows(
            attention=attention,
            backend=backend,
            record_kept=record_kept,
            query_positions_BQ=new.positions_T[rows].view(num, count),
            num_keys=longest,
            cache=cache,
            table_BM=new.table_BM[sequences],
            lengths_B=new.lengths_B[sequences],
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


@dataclass(slots=True)
class _Rows(Base):
    """Sequences with equally many new tokens, whose keys are in the cache already: either B or Q is 1."""

    cache: PagedCache = field(kw_only=True)
    table_BM: Tensor = field(kw_only=True)
    lengths_B: Tensor = field(kw_only=True)
    positions_T: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.positions_T = self.query_positions_BQ.reshape(-1)

    def grid(self, x_T: Tensor) -> Tensor:
        return x_T.view(*self.query_positions_BQ.shape, *x_T.shape[1:])

    def flat(self, x_BQ: Tensor) -> Tensor:
        return x_BQ.flatten(0, 1)

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
        kept_TK = self.flat(kept_BQK)
        size = self.cache.pools_PSX[0].shape[1]
        blocks_TK = self.table_BM.gather(1, kept_TK.clamp(min=0) // size)
        return torch.where(kept_TK < 0, kept_TK, blocks_TK * size + kept_TK % size)

    def plan(self, num_early: int) -> Plan:
        if num_early not in self._plans:
            count = self.query_positions_BQ.shape[1]
            begun = self.num_keys - count
            device = self.positions_T.device
            self._plans[num_early] = plan_documents([0], [count], num_early, device, begun=begun)
        return self._plans[num_early]

    def pages(self, layer: int) -> Pages | None:
        if not self._single:
            return None
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

    def query_mask(self) -> Tensor:
        return torch.ones_like(self.query_positions_BQ, dtype=torch.bool)

    @property
    def _single(self) -> bool:
        return self.query_positions_BQ.shape[1] == 1
