"""Decoding on a GPU at the sizes of real models: the packed kernels' selection, errors, batches, CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from posttrain.kernels import dsa, e4m3, paged_mla_triton, reference
from posttrain.kernels.index_topk_triton import key_ranges
from posttrain.kernels.pages import Pages
from posttrain.model.context import entry_keys
from posttrain.model.entry import Entry

KEPT, LATENT, SIZE, INDEX_HEADS, INDEX = 2048, 512, 576, 64, 128
PLAIN, E4M3 = Entry(latent=SIZE, index=INDEX), Entry(latent=SIZE, index=INDEX, e4m3=True)
SCALE = SIZE**-0.5
BLOCK = 64
LENGTHS = [0, 1, 2047, 2048, 2049, 5000, 33_000, 64]


def _normal(*shape: int, seed: int) -> Tensor:
    make = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)


def _entries(length: int, entry: Entry) -> Tensor:
    """A sequence's entries, which depend on its length alone."""
    numbers = _normal(length, SIZE + INDEX, seed=length)
    if not entry.e4m3:
        return numbers
    keys = e4m3.pack(numbers[:, SIZE:], entry.stored(2), by_triton=True)
    return torch.cat((numbers[:, :SIZE], keys), 1)


def _pages(lengths: list[int], entry: Entry = PLAIN) -> Pages:
    """Blocks scattered over a pool of NaN."""
    most = -(-max(lengths) // BLOCK)
    num_blocks = sum(-(-n // BLOCK) for n in lengths)
    width = entry.width(2)
    pool = torch.full((num_blocks + 1, BLOCK, width), float("nan"), device="cuda", dtype=torch.bfloat16)
    table = torch.full((len(lengths), most), -(2**30), dtype=torch.int32, device="cuda")
    places = iter(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist())
    for b, length in enumerate(lengths):
        for m, part in enumerate(_entries(length, entry).split(BLOCK)):
            if len(part):
                place = next(places)
                table[b, m] = place
                pool[place, : len(part)] = part
    sizes = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    keys, scale = entry_keys(pool[..., SIZE:], entry)
    return Pages(pool[..., :SIZE], keys, table, sizes, max(lengths), scale)


def _queries(num: int, new: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    w = _normal(num, new, INDEX_HEADS, seed=3).float() * (INDEX_HEADS * INDEX) ** -0.5
    return _normal(num, new, heads, SIZE, seed=1), _normal(num, new, INDEX_HEADS, INDEX, seed=2), w


def _decode(pages: Pages, q: Tensor, q_index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return dsa.decode(q, q_index, w, pages, num_kept=KEPT, scale=SCALE, value_size=LATENT, max_rows=64)


@pytest.mark.parametrize("entry", [PLAIN, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("new", [1, 3])
def test_a_step_selects_what_the_packed_kernel_selects(new: int, entry: Entry) -> None:
    pages = _pages(LENGTHS, entry)
    q, q_index, w = _queries(len(LENGTHS), new, 16)
    _, kept = _decode(pages, q, q_index, w)
    for b, length in enumerate(LENGTHS):
        if not length:
            assert (kept[b] == -1).all()
            continue
        ends = (length - new + 1 + torch.arange(new)).clamp(min=0)
        keys, scale = entry_keys(_entries(length, entry)[:, SIZE:], entry)
        ranges = key_ranges(torch.zeros_like(ends), ends, "cuda")
        packed = dsa.select(dsa.Index(q_index[b], keys, w[b], scale), ranges, KEPT)
        assert torch.equal(kept[b], packed), f"sequence of {length}"


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_step_errs_no_more_than_bf16_in_torch(heads: int) -> None:
    pages = _pages(LENGTHS)
    q, q_index, w = _queries(len(LENGTHS), 1, heads)
    ours, kept = _decode(pages, q, q_index, w)
    entries = reference.paged(pages.entries_PSE, pages.table_BM, pages.max_length).nan_to_num(0.0)
    full = pages.lengths_B > 0
    exact, plain = (
        reference.sparse_mla(q[full].to(t), entries[full].to(t), kept[full].long(), SCALE, LATENT)[0].double()
        for t in (torch.float64, torch.bfloat16)
    )
    assert (ours[~full] == 0).all()
    ours_error, plain_error = (ours[full].double() - exact).abs(), (plain - exact).abs()
    assert ours_error.max() <= 2 * plain_error.max()
    assert (ours_error.mean((1, 2, 3)) <= 2 * plain_error.mean((1, 2, 3)) + 1e-6).all()


@pytest.mark.parametrize("heads", [64, 128])
def test_a_rows_bits_do_not_depend_on_its_batch(heads: int) -> None:
    """64 sequences: programs that take several parts one after another; one: each part by itself."""
    many = LENGTHS * 8
    q, q_index, w = _queries(len(many), 1, heads)
    out, kept = _decode(_pages(many), q, q_index, w)
    for b in (4, 5, 11, 62):
        mine = slice(b, b + 1)
        alone, kept_alone = _decode(_pages([many[b]]), q[mine], q_index[mine], w[mine])
        assert torch.equal(kept_alone, kept[mine]) and torch.equal(alone, out[mine])


@pytest.mark.parametrize("entry", [PLAIN, E4M3], ids=["bf16", "e4m3"])
def test_one_captured_graph_serves_all_lengths(entry: Entry) -> None:
    pages = _pages(LENGTHS, entry)
    q, q_index, w = _queries(len(LENGTHS), 1, 64)
    _decode(pages, q, q_index, w)  # compiles
    graph = torch.cuda.CUDAGraph()
    lengths = pages.lengths_B.clone()
    captured = replace(pages, lengths_B=lengths)
    with torch.cuda.graph(graph):
        out, kept = _decode(captured, q, q_index, w)
    for change in (0, 1, 17):
        lengths.copy_((pages.lengths_B - change).clamp(min=0))
        graph.replay()
        eager, eager_kept = _decode(replace(pages, lengths_B=lengths.clone()), q, q_index, w)
        assert torch.equal(kept, eager_kept) and torch.equal(out, eager)


@pytest.mark.parametrize("part", [64, 256, 2048])
def test_parts_of_any_size_give_the_same_function(part: int) -> None:
    pages = _pages(LENGTHS)
    q, q_index, w = _queries(len(LENGTHS), 1, 128)
    _, kept = _decode(pages, q, q_index, w)
    whole, lse = paged_mla_triton.attend(q, pages, kept, SCALE, LATENT)
    out, other_lse = paged_mla_triton.attend(q, pages, kept, SCALE, LATENT, part=part)
    torch.testing.assert_close(out.float(), whole.float(), atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(lse, other_lse, atol=1e-4, rtol=1e-4)
