"""The dense warm-up loss in Triton against its definition in fp64: in the interpreter without a GPU, compiled with one."""

import pytest
import torch

from posttrain.kernels import dense_probs_triton, index_topk_triton, reference, warmup_kl_triton
from posttrain.kernels.warmup_kl_triton import Attention, Shape, Shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [11, 1, 24]
HEADS, OWN, ROTARY, INDEX_HEADS, INDEX_SIZE = 3, 10, 6, 5, 12
SMALL = Shapes(
    probs=dense_probs_triton.Tiles(queries=16, keys=16, warps=4, stages=1),
    scores=Shape(keys=16, queries=4, warps=4, stages=1),
    grad_q=Shape(keys=16, queries=2, warps=4, stages=1),
    grad_k=Shape(keys=16, warps=4, stages=1, queries=32),  # two queries together
)
NAN = float("nan")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _small_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments of keys and parts of queries."""
    monkeypatch.setattr(warmup_kl_triton, "SEGMENT", 16)
    monkeypatch.setattr(warmup_kl_triton, "PROGRAMS", 4)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _inputs(lengths: list[int]) -> tuple[Attention, list[torch.Tensor], torch.Tensor]:
    """The attention, q, k, w of the indexer and the weights of the queries' losses; keys 0 .. S - 1, one NaN beyond."""
    total = sum(lengths)
    q, kv = _random(total, HEADS, OWN + ROTARY, seed=0), _random(total + 1, HEADS, OWN + 4, seed=1)
    k_rot, index_k = _random(total + 1, ROTARY, seed=2), _random(total + 1, INDEX_SIZE, seed=3)
    for tensor in (kv, k_rot, index_k):
        tensor[total] = NAN
    index_q, w = _random(total, INDEX_HEADS, INDEX_SIZE, seed=4), _random(total, INDEX_HEADS, seed=5)
    weight = torch.rand(total, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    lse = torch.full((total, HEADS), NAN, device=DEVICE)
    return Attention(q, kv[..., :OWN], k_rot, lse, 0.3), [index_q, index_k, w], weight


def _definition(
    attention: Attention, index: list[torch.Tensor], weight: torch.Tensor, lengths: list[int]
) -> list[torch.Tensor]:
    """KL, dq, dk, dw document by document in fp64; the definition takes one key for all heads, so head by head."""
    leaves = [x.double().nan_to_num(0.0).requires_grad_() for x in index]
    parts, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        mask = reference.causal_mask(torch.arange(length, device=DEVICE)[None], length)
        rotary = attention.k_rot_SP[part].double()
        p = sum(
            reference.dense_probs(
                attention.q_NHE[None, part, h : h + 1].double(),
                torch.cat((attention.k_SHC[part, h].double(), rotary), -1)[None], mask, attention.scale,
            )
            for h in range(HEADS)
        )  # fmt: skip
        assert isinstance(p, torch.Tensor)
        q, k, w = (x[None, part] for x in leaves)
        products = torch.einsum("bqji,bki->bqjk", q, k).relu()
        scores = torch.einsum("bqjk,bqj->bqk", products, w)
        parts.append(reference.indexer_kl(p / HEADS, scores, mask)[0])
        start += length
    kl = torch.cat(parts)
    grads = torch.autograd.grad((kl * weight.double()).sum(), leaves)
    return [kl.detach(), grads[0], grads[1], grads[2]]


def _ranges(lengths: list[int]) -> index_topk_triton.Ranges:
    return index_topk_triton.packed(lengths, DEVICE)


def _with_lse(attention: Attention, ranges: index_topk_triton.Ranges) -> Attention:
    lse = dense_probs_triton.attention_lse(
        attention.q_NHE, attention.k_SHC, attention.k_rot_SP, ranges, attention.scale, tiles=SMALL.probs
    )
    return Attention(attention.q_NHE, attention.k_SHC, attention.k_rot_SP, lse, attention.scale)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [32 * 9, 8 << 20], ids=["many chunks", "one chunk"])
def test_value_and_gradients_over_packed_documents(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(index_topk_triton, "WIDE_CHUNK_BYTES", 4 * cells)
    monkeypatch.setattr(index_topk_triton, "WIDE_CHUNK_STEP", 4)
    attention, index, weight = _inputs(LENGTHS)
    ranges = _ranges(LENGTHS)
    assert (len(ranges.wide_chunks) > 1) == (cells < 1000)
    found = warmup_kl_triton.warmup_kl(_with_lse(attention, ranges), *index, ranges, weight, shapes=SMALL)
    for name, ours, true in zip(
        ("kl", "dq", "dk", "dw"), found, _definition(attention, index, weight, LENGTHS), strict=True
    ):
        torch.testing.assert_close(
            ours.double(), true, atol=2e-5, rtol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
def test_a_query_alone_has_the_same_bits() -> None:
    """The last query of a document in the middle of a pack, and alone with the keys of its document."""
    attention, index, weight = _inputs(LENGTHS)
    together = warmup_kl_triton.warmup_kl(
        _with_lse(attention, _ranges(LENGTHS)), *index, _ranges(LENGTHS), weight, shapes=SMALL
    )
    keys, row = slice(12, 36), slice(35, 36)
    alone = Attention(
        attention.q_NHE[row].clone(), attention.k_SHC[keys], attention.k_rot_SP[keys].clone(),
        attention.lse_NH[row].clone(), attention.scale,
    )  # fmt: skip
    ranges = index_topk_triton.key_ranges(torch.tensor([0]), torch.tensor([24]), DEVICE)
    found = warmup_kl_triton.warmup_kl(
        _with_lse(alone, ranges), index[0][row].clone(), index[1][keys].clone(), index[2][row].clone(), ranges,
        weight[row].clone(), shapes=SMALL,
    )  # fmt: skip
    for number in (0, 1, 3):
        assert torch.equal(together[number][row], found[number])


def test_one_key_and_equal_keys_by_hand() -> None:
    """One key: both distributions are 1. Equal keys: both are uniform. Either way no loss and no gradient of w."""
    attention, index, weight = _inputs([3])
    attention.k_SHC[:3], attention.k_rot_SP[:3], index[1][:3] = 0.25, 0.5, 1.0
    ranges = _ranges([3])
    attention = _with_lse(attention, ranges)
    logits = torch.einsum(
        "he,e->h", attention.q_NHE[2], torch.tensor([0.25] * OWN + [0.5] * ROTARY, device=DEVICE)
    )
    torch.testing.assert_close(attention.lse_NH[2], logits * 0.3 + torch.log(torch.tensor(3.0)).item())
    kl, dq, dk, dw = warmup_kl_triton.warmup_kl(attention, *index, ranges, weight, shapes=SMALL)
    for name, tensor in (("kl", kl), ("dq", dq), ("dw", dw)):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=1e-6, rtol=0, msg=name)
    assert dk[3].eq(0).all(), "a key nobody sees"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_what_is_not_finite_is_not_hidden() -> None:
    attention, index, weight = _inputs([4])
    ranges = _ranges([4])
    attention = _with_lse(attention, ranges)
    index[0][2, 1, 3] = NAN
    kl, _, dk, dw = warmup_kl_triton.warmup_kl(attention, *index, ranges, weight, shapes=SMALL)
    assert kl[2].isnan() and dw[2].isnan().any() and dk.isnan().any() and kl[[0, 1, 3]].isfinite().all()


def test_empty_ranges_lose_nothing() -> None:
    attention, index, weight = _inputs([2])
    ranges = index_topk_triton.key_ranges(torch.tensor([1, 0]), torch.tensor([1, 2]), DEVICE)
    attention = _with_lse(attention, ranges)
    assert attention.lse_NH[0].eq(float("-inf")).all()
    kl, dq, _, dw = warmup_kl_triton.warmup_kl(attention, *index, ranges, weight, shapes=SMALL)
    assert kl[0] == 0 and dq[0].eq(0).all() and dw[0].eq(0).all() and kl[1] > 0


def test_refuses_what_does_not_fit() -> None:
    attention, (q, k, w), weight = _inputs([3])
    ranges = _ranges([3])
    for wrong, match in (
        ((attention, q, k[:, :8], w, ranges, weight), "do not fit together"),
        ((attention, q, k, w, _ranges([2]), weight), "ranges of 2 queries"),
        ((attention, q, k, w.double(), ranges, weight), "w is not contiguous float32"),
        ((Attention(attention.q_NHE, attention.k_SHC[:, :2], attention.k_rot_SP, attention.lse_NH, 0.3), q, k, w,
          ranges, weight), "do not fit together"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            warmup_kl_triton.warmup_kl(*wrong)
