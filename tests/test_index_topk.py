"""Indexer scores, selection and e4m3 in Triton against their definitions: in the interpreter without a GPU.

Scores are sums of few different values, exact in any order, so that ties and zeros are everywhere and the
selection must agree index by index.
"""

import pytest
import torch

from posttrain.kernels import fp8_triton, index_topk_triton, kth_triton, reference, topk_triton
from posttrain.kernels.index_topk_triton import Chunk, Ranges, Shape, key_ranges, packed, topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")
SMALL = topk_triton.Shape(sample=32, narrow=32, wide=64, warps=1)
LENGTHS = [23, 1, 40]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _coarse(*shape: int, seed: int) -> torch.Tensor:
    """Multiples of 0.5."""
    return (_random(*shape, seed=seed) * 2).round() / 2


def _integers(scores: torch.Tensor) -> torch.Tensor:
    """What the score kernel stores."""
    bits = scores.view(torch.int32)
    keys = torch.where(scores == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return torch.where(scores.isnan(), torch.iinfo(torch.int32).min, keys)


def _select(
    scores: torch.Tensor, ranges: list[tuple[int, int]], num_kept: int, shape: topk_triton.Shape = SMALL
) -> torch.Tensor:
    """The selection alone, with a workspace full of rubbish."""
    rows, width = scores.shape
    begin, end = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in zip(*ranges, strict=True))
    out = torch.full((rows, num_kept), -9, dtype=torch.int32, device=DEVICE)
    work = torch.full((rows * shape.workspace(num_kept, width),), -7, dtype=torch.int32, device=DEVICE)
    topk_triton.topk_rows(
        _integers(scores),
        begin,
        end,
        work,
        out,
        first_row=0,
        rows=rows,
        first_key=0,
        width=width,
        shape=shape,
    )
    return out


def test_selection_of_hard_scores_by_hand() -> None:
    """Negative, tiny, -0.0, infinite, NaN, equal: of the zeros 0, 1 and 13 the lowest is kept."""
    hard = [-0.0, 0.0, 1e-45, -1e-45, 3.0, INF, NAN, -2.0, -2.0, 3.0, 1e38, -1e38, -INF, 0.0]
    found = _select(torch.tensor([hard], device=DEVICE), [(0, len(hard))], 6)
    assert found.tolist() == [[0, 2, 4, 5, 9, 10]]
    found = _select(torch.tensor([hard], device=DEVICE), [(0, len(hard))], 13)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13]], "NaN is lower than -inf"


def _sampled(width: int, sample: int) -> torch.Tensor:
    """Which keys of a row from 0 on are in its sample: groups of four."""
    at, seen = torch.arange(width), (width - 4) * torch.arange(sample // 4) // (sample // 4) // 4 * 4
    return ((at[:, None] >= seen) & (at[:, None] < seen + 4)).any(1).to(DEVICE)


def _hard_rows(width: int) -> torch.Tensor:
    """Random, rising, falling, deceiving high and low, of one value, of two, of zeros, with NaN and infinities, smooth."""
    scores = _random(14, width, seed=0)
    scores[1], scores[2] = torch.arange(width), -torch.arange(width)
    sampled = _sampled(width, SMALL.sample)
    scores[3], scores[4] = sampled.float(), torch.where(sampled, scores[4] - 9, scores[4])
    scores[5] = 2.5
    scores[6] = (scores[6] > 0).float()
    scores[7] = torch.where(scores[7] > 0.5, 0.0, -0.0)
    scores[8, ::2] = NAN
    scores[9] = NAN
    scores[10, ::3], scores[11, ::4], scores[12, 5:] = -INF, INF, -INF
    scores[13] = scores[13].cumsum(0)
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("kept", [5, 13])
@pytest.mark.parametrize(
    ("begin", "end"), [(0, 301), (3, 33), (7, 57), (41, 301), (0, 64), (1, 65)],
    ids=["long", "narrow", "wide", "begins late", "all of wide", "one too many"],
)  # fmt: skip
def test_selection_equals_a_stable_sort(begin: int, end: int, kept: int) -> None:
    """Rows held in 32 or 64 registers, and longer ones, of which a sample of 32 is taken."""
    scores = _hard_rows(end - begin)
    scores = torch.nn.functional.pad(scores, (begin, 320 - end), value=INF)  # what no row may see
    found = _select(scores, [(begin, end)] * len(scores), kept)
    for row, of_row in enumerate(scores[:, begin:end]):
        best = _integers(of_row).long().sort(descending=True, stable=True).indices[:kept]
        assert found[row].tolist() == sorted((best + begin).tolist()), f"row {row}"


@pytest.mark.slow
def test_deceived_samples_take_another_floor_or_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice marked is a second floor; the whole row is searched where that deceives, too."""
    ways: list[str] = []

    def watched(name: str) -> None:
        step = getattr(topk_triton, name)
        monkeypatch.setattr(topk_triton, name, lambda *args: ways.append(name) or step(*args))

    watched("_mark")
    watched("_threshold_in_memory")
    shape, width = topk_triton.Shape(sample=256, narrow=64, wide=128, warps=1), 1001
    normal, sampled = _random(width, seed=0), _sampled(width, 256)
    for name, scores, wanted in (
        ("random", normal, ["_mark"]),
        ("sample highest", torch.where(sampled, normal + 20, normal), ["_mark", "_mark"]),
        (
            "sample lowest",
            torch.where(sampled, normal - 20, normal),
            ["_mark", "_mark", "_threshold_in_memory"],
        ),
        ("one value", normal * 0, ["_mark", "_mark", "_threshold_in_memory"]),
        ("equal in the middle", normal.clamp(max=1.0), ["_mark", "_mark", "_threshold_in_memory"]),
    ):
        ways.clear()
        found = _select(scores[None], [(0, width)], 30, shape)
        best = _integers(scores).long().sort(descending=True, stable=True).indices[:30]
        assert found[0].tolist() == sorted(best.tolist()), name
        assert ways == wanted, name


def test_rounds_of_the_search_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search by thirds alone takes 21 rounds among equal keys, ten among others."""
    rounds: list[int] = []
    count = kth_triton._counts
    monkeypatch.setattr(kth_triton, "_counts", lambda *args: rounds.append(1) or count(*args))
    shape = topk_triton.Shape(narrow=2048, wide=4096, warps=4)
    normal = _random(2000, seed=3)
    for name, scores, most in (
        ("normal", normal, 9),
        ("mostly zeros", (normal - 0.5).relu(), 7),
        ("twenty values", (normal * 4).round(), 7),
        ("one value", normal * 0, 0),
        ("spread over all exponents", normal.sign() * torch.exp2(normal * 30), 34),
        ("infinite", torch.where(normal > 0, normal, -INF), 34),
    ):
        rounds.clear()
        found = _select(scores[None], [(0, 2000)], 900, shape)
        assert found[0].unique().numel() == 900 and len(rounds) <= most, f"{name}: {len(rounds)} rounds"


def test_short_and_empty_rows_keep_everything() -> None:
    found = _select(_random(4, 40, seed=1), [(7, 7), (3, 4), (30, 36), (2, 7)], 5)
    assert found[:2].tolist() == [[-1] * 5, [3, -1, -1, -1, -1]]
    assert found[3].tolist() == [2, 3, 4, 5, 6]
    assert len(set(found[2].tolist()) & set(range(30, 36))) == 5


def _by_definition(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, kept: int) -> torch.Tensor:
    rows, start = [], 0
    for n in LENGTHS:
        part = slice(start, start + n)
        scores = reference.index_scores(q[None, part], k[None, part], w[None, part] * q.shape[-1] ** 0.5)
        mask = reference.causal_mask(torch.arange(n, device=DEVICE)[None], n)
        found = reference.select_topk(scores, mask, kept)[0]
        found = torch.nn.functional.pad(found, (0, kept - found.shape[1]), value=-1)
        rows.append(torch.where(found < 0, found, found + start).int())
        start += n
    return torch.cat(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_bytes", "columns"), [(2000, 16), (4000, 64), (32 << 20, 32)], ids=["few rows", "more", "all"]
)
def test_topk_over_packed_documents_with_ties(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, columns: int
) -> None:
    monkeypatch.setattr(index_topk_triton, "CHUNK_BYTES", chunk_bytes)
    q, k, w = (_coarse(*shape, seed=i) for i, shape in enumerate([(64, 3, 10), (65, 10), (64, 3)]))
    k[64] = NAN  # nobody sees it
    shape = Shape(keys=16, queries=8, columns=columns)
    found = topk(q, k, w, packed(LENGTHS, DEVICE), 7, shape=shape, select=SMALL)
    assert torch.equal(found, _by_definition(q, k, w, 7))


@pytest.mark.slow
def test_a_query_alone_keeps_the_same_keys() -> None:
    """Sums that do round: the bits of a score may not depend on what else is in the pack."""
    q, k, w = (_random(*shape, seed=i) for i, shape in enumerate([(41, 5, 12), (41, 12), (41, 5)]))
    shape = Shape(keys=16, queries=4, columns=32)
    together = topk(q, k, w, packed([7, 34], DEVICE), 6, shape=shape, select=SMALL)
    begin, end = torch.tensor([0]), torch.tensor([30])
    alone = topk(q[36:37], k[7:], w[36:37], key_ranges(begin, end, DEVICE), 6, shape=shape, select=SMALL)
    assert torch.equal(together[36], alone[0] + 7)


def test_nan_scores_lose() -> None:
    q, k, w = (
        torch.ones(1, 2, 10, device=DEVICE),
        _coarse(9, 10, seed=1).abs(),
        torch.ones(1, 2, device=DEVICE),
    )
    k[[2, 5]] = NAN
    ranges = key_ranges(torch.tensor([0]), torch.tensor([9]), DEVICE)
    found = topk(q, k, w, ranges, 7, shape=Shape(keys=16, queries=4), select=SMALL)
    assert found.tolist() == [[0, 1, 3, 4, 6, 7, 8]]


@pytest.mark.slow
def test_topk_of_e4m3_equals_that_of_the_numbers_they_stand_for() -> None:
    q, k = _coarse(64, 3, 10, seed=0), _coarse(64, 10, seed=1) * torch.exp2(_random(64, 1, seed=3).round())
    w = _coarse(64, 3, seed=2)
    (q8, q_scale), (k8, k_scale) = reference.quantize_e4m3(q), reference.quantize_e4m3(k)
    assert torch.equal(q8.float() * q_scale[..., None], q) and torch.equal(k8.float() * k_scale[:, None], k)
    found = topk(
        q8, k8, w * q_scale, packed(LENGTHS, DEVICE), 7, k_scale_S=k_scale,
        shape=Shape(keys=16, queries=8, columns=32), select=SMALL,
    )  # fmt: skip
    assert torch.equal(found, _by_definition(q, k, w, 7))


def test_e4m3_by_hand() -> None:
    x = torch.tensor(
        [[448.0, 1.0, -3.0], [449.0, 1.0, -3.0], [0.0, -0.0, 0.0], [7.0, 3.5, 1e-9]], device=DEVICE
    )
    values, scale = reference.quantize_e4m3(x)
    assert scale.tolist() == [1.0, 2.0, 2.0**-23, 2.0**-6]
    assert values.float().tolist() == [[448, 1, -3], [224, 0.5, -1.5], [0, 0, 0], [448, 224, 0]]
    error = (values.float() * scale[:, None] - x).abs()
    assert (error <= x.abs() / 16 + scale[:, None] / 1024).all()


def test_e4m3_in_triton_equals_the_definition() -> None:
    """Values of every size, ties between two e4m3 numbers, numbers below the least one."""
    sizes = torch.exp2((_random(53, 3, 1, seed=1) * 20).round().clamp(min=-20))
    x = _random(53, 3, 20, seed=0) * sizes
    x[6], x[7, :, 1:] = (x[6] / sizes[6] * 64).round() / 64 * sizes[6], x[7, :, 1:] * 2.0**-13
    x[0], x[1, 0, 3], x[2, 1, 0], x[3, 1, 2], x[4, 0] = 0.0, 448.0 * sizes[1, 0, 0], INF, NAN, 1e-40
    x[5, 0], x[5, 0, 0], x[5, 1], x[5, 1, 0] = 0.0, 448.5, 0.0, 1.75
    values, scale = fp8_triton.quantize_e4m3(x)
    wanted, wanted_scale = reference.quantize_e4m3(x)
    torch.testing.assert_close(scale, wanted_scale, equal_nan=True, atol=0, rtol=0)
    assert scale[5].tolist()[:2] == [2.0, 2.0**-8] and scale[2, 1].isnan() and scale[3, 1].isnan()
    finite = wanted_scale.isfinite()
    weight = _random(53, 3, seed=2)
    again, weighted = fp8_triton.quantize_e4m3(x, weight=weight)
    assert torch.equal(weighted[finite], (weight * wanted_scale)[finite])
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    with pytest.raises(ValueError, match=r"weights \(53, 2\)"):
        fp8_triton.quantize_e4m3(x, weight=weight[:, :2])
    assert torch.equal(values.view(torch.uint8)[finite], wanted.view(torch.uint8)[finite])


def test_ranges_of_packed_documents_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_topk_triton, "CHUNK_BYTES", 4 * 32 * 3)
    ranges = packed([2, 1, 3], "cpu")
    assert ranges.begin_N.tolist() == [0, 0, 2, 3, 3, 3] and ranges.end_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert ranges.chunks == (Chunk(0, 3, 0, 32), Chunk(3, 3, 3, 32)) and ranges.num_keys == 6
    apart = key_ranges(torch.tensor([5, 9, 100]), torch.tensor([5, 20, 140]), "cpu")
    assert apart.chunks == (Chunk(0, 2, 9, 32), Chunk(2, 1, 100, 64)), "an empty range widens no window"
    assert key_ranges(torch.tensor([4]), torch.tensor([4]), "cpu").chunks == (Chunk(0, 1, 0, 32),)
    assert packed([], "cpu").chunks == ()
    monkeypatch.setattr(index_topk_triton, "WIDE_CHUNK_BYTES", 4 * 32 * 7)
    monkeypatch.setattr(index_topk_triton, "WIDE_CHUNK_STEP", 4)
    wide = packed([11], "cpu").wide_chunks
    assert wide == (Chunk(0, 4, 0, 32), Chunk(4, 7, 0, 32)), "a multiple of 4, except at the end"
    with pytest.raises(ValueError, match="begin <= end"):
        key_ranges(torch.tensor([3]), torch.tensor([2]), "cpu")


def test_topk_refuses_what_does_not_fit() -> None:
    q, k, w = _random(3, 2, 10, seed=0), _random(5, 10, seed=1), _random(3, 2, seed=2)
    ranges = packed([3], DEVICE)
    for q_, k_, w_, ranges_, scale, match in (
        (q, k[:, :8], w, ranges, None, "do not fit together"),
        (q, k, w.double(), ranges, None, "do not fit together"),
        (q, k[:2], w, ranges, None, "ranges of 3 queries over 3 keys"),
        (q, k, w, packed([2], DEVICE), None, "ranges of 2 queries"),
        (q, k, w, ranges, torch.ones(5, device=DEVICE), "quantised keys need scales"),
        (q.transpose(0, 2).contiguous().transpose(0, 2), k, w, ranges, None, "q is not contiguous"),
        (q, k.t().contiguous().t(), w, ranges, None, "not contiguous rows"),
    ):
        with pytest.raises(ValueError, match=match):
            topk(q_, k_, w_, ranges_, 2, k_scale_S=scale)
    assert isinstance(ranges, Ranges)
