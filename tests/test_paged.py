"""Decoding against a paged cache: the definition's selection and output, the packed kernels' bits, in any batch.

Blocks are scattered over the pool; what is not in use (entries, blocks, table entries) is poisoned.
"""

import dataclasses

import pytest
import torch

from posttrain.kernels import (
    e4m3,
    index_topk_triton,
    paged_index_topk_triton,
    paged_mla_triton,
    reference,
    sparse_mla_triton,
)
from posttrain.kernels.e4m3 import pack
from posttrain.kernels.fp8_triton import quantize_e4m3
from posttrain.kernels.pages import Pages
from posttrain.model.context import entry_keys
from posttrain.model.entry import Entry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, VALUE, ROTARY, INDEX_HEADS, INDEX = 3, 12, 4, 2, 20
KEPT, SCALE = 20, 0.3
LENGTHS = [0, 1, 70, 16, 19, 33]
"""Empty, one, more than one span, whole blocks, fewer and more than KEPT."""
SHAPE = index_topk_triton.Shape(keys=16, queries=4)
TILES = sparse_mla_triton.Tiles(heads=16, keys=16, warps=4, stages=1)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Cache:
    """Sequences of latent entries and index keys, and the pool that holds them in scattered blocks.

    With e4m3 the keys are that, and have a scale of their own behind them.
    """

    def __init__(
        self, lengths: list[int], block_size: int, *, coarse: bool = False, e4m3_keys: bool = False
    ) -> None:
        size = VALUE + ROTARY + INDEX
        self.rows = [_random(n, size, seed=i) for i, n in enumerate(lengths)]
        if coarse:  # few different values: ties everywhere, sums exact in any order
            self.rows = [(row * 2).round() / 2 for row in self.rows]
        self.entry = Entry(latent=VALUE + ROTARY, index=INDEX, e4m3=e4m3_keys)
        if e4m3_keys:
            self.rows = [
                torch.cat((row[:, : VALUE + ROTARY], pack(row[:, VALUE + ROTARY :], self.entry.stored(4))), 1)
                for row in self.rows
            ]
        size = self.entry.width(4)
        most = -(-max(lengths) // block_size) + 1
        self.pool = torch.full((len(lengths) * most + 2, block_size, size + 4), float("nan"), device=DEVICE)
        self.table = torch.full((len(lengths), most), -(2**30), dtype=torch.int32, device=DEVICE)
        places = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(9)).tolist()
        for b, row in enumerate(self.rows):
            for m, part in enumerate(row.split(block_size)):
                self.table[b, m] = places.pop()
                self.pool[self.table[b, m], : len(part), :size] = part
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.max_length = most * block_size

    def pages(self, part: slice = slice(None)) -> Pages:
        """These sequences, or some of them."""
        keys, scale = self.keys(self.pool)
        return Pages(
            self.pool[..., : VALUE + ROTARY],
            keys,
            self.table[part],
            self.lengths[part],
            self.max_length,
            scale,
        )

    def keys(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Index keys of entries, and scales if they are e4m3."""
        return entry_keys(entries[..., VALUE + ROTARY : self.entry.width(4)], self.entry)


def _queries(num: int, new: int, *, coarse: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention queries, index queries and index weights."""
    q, q_index = (
        _random(num, new, HEADS, VALUE + ROTARY, seed=11),
        _random(num, new, INDEX_HEADS, INDEX, seed=12),
    )
    w = _random(num, new, INDEX_HEADS, seed=13)
    return (q, (q_index * 2).round() / 2, (w * 2).round() / 2) if coarse else (q, q_index, w)


def _select(pages: Pages, q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return paged_index_topk_triton.topk(q, w, pages, KEPT, shape=SHAPE)


def _attend(pages: Pages, q: torch.Tensor, kept: torch.Tensor, part: int = 16) -> tuple[torch.Tensor, ...]:
    return paged_mla_triton.attend(q, pages, kept, SCALE, VALUE, part=part, tiles=TILES)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_index_topk_triton, "SPANS", (32,))


def test_spans_are_a_matter_of_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs of 32 keys or six of 16: both where few programs are enough and where more are wanted."""
    cache = Cache(LENGTHS, 16)
    _, q, w = _queries(len(LENGTHS), 1)
    found = []
    for enough in (1, 10**6):
        monkeypatch.setattr(paged_index_topk_triton, "SPANS", (64, 32))
        monkeypatch.setattr(paged_index_topk_triton, "ENOUGH", enough)
        found.append(_select(cache.pages(), q, w))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("rows", "heads", "kept", "part"),
    [(64, 128, 2048, 2048), (64, 64, 2048, 1024), (36, 64, 2048, 512), (1, 128, 2048, 512), (256, 16, 2048, 2048),
     (256, 128, 1000, 1024), (256, 128, 40, 512)],
)  # fmt: skip
def test_parts_are_as_large_as_leaves_few_multiprocessors_idle(
    rows: int, heads: int, kept: int, part: int
) -> None:
    """A GPU of 132: 64 rows of two groups of heads are 128 programs, of one group 64, so that two parts each make 128."""
    assert paged_mla_triton.part_size(rows, heads, kept) == part


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_step_is_its_definition(block_size: int, new: int) -> None:
    cache = Cache(LENGTHS, block_size, coarse=True)
    q, q_index, w = _queries(len(LENGTHS), new, coarse=True)
    kept = _select(cache.pages(), q_index, w)
    positions = cache.lengths[:, None] - new + torch.arange(new, device=DEVICE)
    mask = reference.causal_mask(positions, cache.max_length)
    assert (positions < 0).any() and (positions >= KEPT).any()
    keys = reference.paged(cache.pages().index_PSI, cache.table, cache.max_length).nan_to_num(0.0)
    scores = reference.index_scores(q_index, keys, w * INDEX**0.5)
    wanted = reference.select_topk(scores, mask, KEPT)
    assert torch.equal(kept, wanted.int())
    out, lse = _attend(cache.pages(), q, kept)
    entries = (
        reference.paged(cache.pages().entries_PSE, cache.table, cache.max_length).nan_to_num(0.0).double()
    )
    exact, _ = reference.sparse_mla(q.double(), entries, wanted, SCALE, VALUE)
    empty = positions < 0
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    torch.testing.assert_close(out[~empty].double(), exact[~empty], atol=1e-5, rtol=1e-5)
    logits = torch.einsum("bqhe,ble->bqhl", q.double(), entries) * SCALE
    of_kept = logits.gather(-1, wanted.clamp(min=0)[:, :, None].expand(-1, -1, HEADS, -1))
    exact_lse = of_kept.masked_fill((wanted < 0)[:, :, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse[~empty].double(), exact_lse[~empty], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("e4m3_keys", [False, True], ids=["fp32", "e4m3"])
def test_a_step_selects_what_the_packed_kernel_selects(e4m3_keys: bool) -> None:
    """Scores that differ in the last bits only would order neighbours differently: all bits are the same."""
    cache, new = Cache(LENGTHS, 16, e4m3_keys=e4m3_keys), 3
    _, q, w = _queries(len(LENGTHS), new)
    if e4m3_keys:
        q, scale = quantize_e4m3(q)
        w = w * scale
    kept = _select(cache.pages(), q, w)
    for b, length in enumerate(LENGTHS):
        ends = (length - new + 1 + torch.arange(new)).clamp(min=0)
        ranges = index_topk_triton.key_ranges(torch.zeros_like(ends), ends, DEVICE)
        keys, k_scale = cache.keys(cache.rows[b] if length else torch.zeros_like(cache.rows[1]))
        packed = index_topk_triton.topk(
            q[b], keys.contiguous(), w[b], ranges, KEPT, shape=SHAPE,
            k_scale_S=None if k_scale is None else k_scale.contiguous(),
        )  # fmt: skip
        assert torch.equal(kept[b], packed), f"sequence of {length}"


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_step_from_e4m3_is_its_definition(block_size: int) -> None:
    """Sums exact in any order, ties everywhere; what is scored are the rounded numbers."""
    cache, new = Cache(LENGTHS, block_size, coarse=True, e4m3_keys=True), 2
    _, q, w = _queries(len(LENGTHS), new, coarse=True)
    q = q * 1.0625  # which e4m3 does not hold
    values, scale = quantize_e4m3(q)
    kept = _select(cache.pages(), values, w * scale)
    positions = cache.lengths[:, None] - new + torch.arange(new, device=DEVICE)
    stored = reference.paged(cache.pool[..., VALUE + ROTARY :], cache.table, cache.max_length)
    keys = e4m3.values(stored.nan_to_num(0.0), INDEX)
    scores = reference.index_scores(reference.round_e4m3(q), keys, w * INDEX**0.5)
    wanted = reference.select_topk(scores, reference.causal_mask(positions, cache.max_length), KEPT)
    assert torch.equal(kept, wanted.int())
    plain = reference.index_scores(q, keys, w * INDEX**0.5)
    assert not torch.equal(plain, scores), "nothing was rounded"


def test_a_rows_bits_do_not_depend_on_its_batch_or_place() -> None:
    together = Cache(LENGTHS, 16)
    q, q_index, w = _queries(len(LENGTHS), 1)
    kept = _select(together.pages(), q_index, w)
    out, lse = _attend(together.pages(), q, kept)
    for b in (2, 4):
        mine = slice(b, b + 1)
        alone = Cache(LENGTHS, 64).pages(mine)  # other blocks, other places
        kept_alone = _select(alone, q_index[mine], w[mine])
        assert torch.equal(kept_alone, kept[mine])
        out_alone, lse_alone = _attend(alone, q[mine], kept_alone)
        assert torch.equal(out_alone, out[mine]) and torch.equal(lse_alone, lse[mine])


@pytest.mark.parametrize("part", [16, 32, 64])
def test_parts_of_any_size_give_the_same_function(part: int) -> None:
    cache = Cache([70, 19], 16)
    q, q_index, w = _queries(2, 1)
    kept = _select(cache.pages(), q_index, w)
    kept[0, 0, 3:9] = -1  # holes
    kept[0, 0, 16:] = -1  # an empty part
    out, lse = _attend(cache.pages(), q, kept, part)
    whole, whole_lse = _attend(cache.pages(), q, kept, 64)
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    cache = Cache([5, 7], 16)
    q, q_index, w = _queries(2, 1)
    pages = cache.pages()
    for changes, message in (
        ({"scale_PS": cache.pool[..., 0]}, "e4m3 has one in fp32 per token, others none"),
        ({"index_PSI": cache.pool.to(torch.float8_e4m3fn)}, "e4m3 has one in fp32 per token"),
        ({"max_length": 33}, "holds 1 to 32 tokens"),
        ({"table_BM": cache.table.long()}, "both are int32"),
        ({"lengths_B": cache.lengths[:1]}, "1 lengths for 2 rows"),
        ({"index_PSI": cache.pool[:1]}, "the same blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(pages, **changes)
    kept = _select(pages, q_index, w)
    with pytest.raises(ValueError, match="do not fit together"):
        _select(pages, q_index[:1], w[:1])
    with pytest.raises(ValueError, match="part=24 is not a power of two"):
        _attend(pages, q, kept, 24)
    with pytest.raises(ValueError, match="do not fit together"):
        _attend(pages, q[..., :-1], kept)
    with pytest.raises(ValueError, match="not int32"):
        _attend(pages, q, kept.long())
