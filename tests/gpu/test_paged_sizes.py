"""A pass of an engine's model over a paged cache on a GPU at V3.2's attention geometry: prompts, chunks and steps together."""

import pytest
import real
import torch

from posttrain.kernels.backend import Backend
from posttrain.kernels.experts import run_groups
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.context import PackedContext
from posttrain.model.entry import Entry
from posttrain.model.paged import NewTokens, PagedCache, PagedContext, paged

BLOCK = 64
COUNTS, ENDS = [1, 1, 1500, 3000, 700], [4000, 9, 5500, 3000, 700]
"""Two that decode, a chunk that follows 4000 tokens, two prompts of which one is longer than top-k."""


class _Sequences:
    """Documents, and the cache that holds their tokens in scattered blocks."""

    def __init__(self, model: DeepseekV32ForCausalLM) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self.documents = [torch.randint(512, (end,), generator=generator).cuda() for end in ENDS]
        most = -(-max(ENDS) // BLOCK)
        places = torch.randperm(len(ENDS) * most, generator=generator) + 1
        self.table = places.int().view(len(ENDS), most).cuda()
        entry = Entry.of(model.config)
        shape = (len(places) + 1, BLOCK, entry.width(2))
        pools = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        self.cache = PagedCache(pools_PSX=pools, entry=entry)

    def new(self, counts: list[int], ends: list[int]) -> tuple[torch.Tensor, NewTokens]:
        """Tokens of a pass, and where they go."""
        pairs = list(zip(counts, ends, strict=True))
        positions = torch.cat([torch.arange(end - count, end) for count, end in pairs]).cuda()
        sequence = torch.arange(len(ends)).repeat_interleave(torch.tensor(counts)).cuda()
        block = self.table[sequence, positions // BLOCK].long()
        tokens = [
            document[end - count : end] for document, (count, end) in zip(self.documents, pairs, strict=True)
        ]
        lengths = torch.tensor(ends, dtype=torch.int32).cuda()
        slots = block * BLOCK + positions % BLOCK
        return torch.cat(tokens), NewTokens(
            counts_B=counts, ends_B=ends, positions_T=positions, table_BM=self.table, lengths_B=lengths, slots_T=slots
        )  # fmt: skip

    def context(self, new: NewTokens, backend: Backend, *, record_kept: bool) -> PagedContext:
        """The context of a pass."""
        return paged(
            new, self.cache, attention="sparse", backend=backend, max_length=max(ENDS), record_kept=record_kept
        )  # fmt: skip


@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
@torch.inference_mode()
def test_a_mixed_pass_keeps_what_packed_documents_keep_and_waits_for_nobody(index_dtype: str) -> None:
    """Deterministic: every row by the kernels, whose selections do not depend on what they are cut into."""
    model = real.model(index_dtype=index_dtype).eval()
    backend = Backend(name="triton", reason="test", deterministic=True)
    sequences = _Sequences(model)
    begun = [end - count for count, end in zip(COUNTS, ENDS, strict=True)]
    for b, end in enumerate(begun):
        if end:
            counts = [end if i == b else 0 for i in range(len(ENDS))]
            ends = [end if i == b else 0 for i in range(len(ENDS))]
            tokens, new = sequences.new(counts, ends)
            model.model(tokens, sequences.context(new, backend, record_kept=True))
    tokens, new = sequences.new(COUNTS, ENDS)
    fast = Backend(name="triton", reason="test")
    model.model(tokens, sequences.context(new, fast, record_kept=False))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.model(tokens, sequences.context(new, fast, record_kept=False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    context = sequences.context(new, backend, record_kept=True)
    model.model(tokens, context)
    cuts = torch.tensor([0, *ENDS]).cumsum(0).cuda()
    packed = PackedContext(attention="sparse", backend=backend, cu_seqlens_S=cuts, record_kept=True)
    model.model(torch.cat(sequences.documents), packed)
    wanted = packed.records[0].kept_BQK
    assert wanted is not None
    found = context.kept(0, 2048).split(COUNTS)
    for b, (rows, count, end) in enumerate(zip(found, COUNTS, ENDS, strict=True)):
        assert torch.equal(rows, wanted[b, end - count : end]), f"sequence {b}"


@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
def test_a_deterministic_engine_has_the_bits_of_a_training_pass(index_dtype: str) -> None:
    """Prompts and three steps of each sequence, against packed documents with gradients."""
    model = real.model(dense_layers=1, index_dtype=index_dtype).eval()
    for moe in model.moe_layers().values():
        moe.run = run_groups
    backend = Backend(name="triton", reason="test", deterministic=True)
    sequences = _Sequences(model)
    found: list[list[torch.Tensor]] = [[] for _ in ENDS]
    with torch.inference_mode():
        for left in (3, 2, 1, 0):
            ends = [end - left for end in ENDS]
            counts = ends if left == 3 else [1] * len(ENDS)
            tokens, new = sequences.new(counts, ends)
            hidden = model.model(tokens, sequences.context(new, backend, record_kept=False))
            for rows, part in zip(found, hidden.split(counts), strict=True):
                rows.append(part)
    cuts = torch.tensor([0, *ENDS]).cumsum(0).cuda()
    packed = PackedContext(attention="sparse", backend=backend, cu_seqlens_S=cuts)
    wanted = model.model(torch.cat(sequences.documents), packed)
    assert wanted.requires_grad
    for b, rows in enumerate(wanted.detach().split(ENDS)):
        ours = torch.cat(found[b])
        differ = (ours != rows).any(1).nonzero()[:, 0].tolist()
        assert not differ, f"sequence {b} of {len(rows)}: {len(differ)} rows differ, first {differ[:5]}"
