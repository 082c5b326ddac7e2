"""The indexer's sparse KL in Triton against its definition in fp64: in the interpreter without a GPU, compiled with one."""

import pytest
import torch

from posttrain.kernels import reference
from posttrain.kernels.indexer_kl_triton import Shape, indexer_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
NUM, HEADS, SIZE, KEPT, KEYS = 9, 3, 10, 20, 40
SMALL = Shape(keys=16)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _inputs() -> list[torch.Tensor]:
    """q, k, w, slots, p, weight: an empty row, holes, slots beyond the end, a key twice, NaN in a key nobody keeps."""
    make = torch.Generator().manual_seed(0)
    slots = torch.full((NUM, KEPT), -1, dtype=torch.int32)
    for row in range(1, NUM):
        count = min(KEPT, 3 * row)
        slots[row, :count] = (torch.randperm(KEYS - 1, generator=make)[:count] + 1).sort().values.int()
    slots[4, ::3] = -1
    slots[7, 0] = KEYS + 5
    slots[8, 1] = slots[8, 0]
    valid = (slots >= 0) & (slots < KEYS)
    p = torch.rand(NUM, KEPT, generator=make) * valid
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
    p[3, 2] = 0.0
    p[~valid] = NAN  # not read
    k = _random(KEYS, SIZE, seed=1)
    k[0] = NAN
    weight = torch.rand(NUM, generator=make)
    return [
        _random(NUM, HEADS, SIZE, seed=0), k, _random(NUM, HEADS, seed=2), slots.to(DEVICE), p.to(DEVICE),
        weight.to(DEVICE),
    ]  # fmt: skip


def _definition(q, k, w, slots, p, weight):  # type: ignore[no-untyped-def]
    """KL, dq, dk, dw in fp64; an entry that is kept twice is two entries."""
    valid = (slots >= 0) & (slots < len(k))
    leaves = [x.double().nan_to_num(0.0).requires_grad_() for x in (q, k, w)]
    gathered = leaves[1][torch.where(valid, slots, 1).long()]
    products = torch.einsum("nji,nki->njk", leaves[0], gathered).relu()
    scores = torch.einsum("njk,nj->nk", products, leaves[2])
    some = valid.any(-1)
    kl = torch.zeros(len(q), dtype=torch.float64, device=DEVICE)
    kl[some] = reference.indexer_kl(p.double().nan_to_num(0.0)[some], scores[some], valid[some])
    return [kl.detach(), *torch.autograd.grad((kl * weight.double()).sum(), leaves)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_value_and_gradients(deterministic: bool) -> None:
    inputs = _inputs()
    found = indexer_kl(*inputs, deterministic=deterministic, shape=SMALL)
    for name, ours, true in zip(("kl", "dq", "dk", "dw"), found, _definition(*inputs), strict=True):
        torch.testing.assert_close(
            ours.double(), true, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    kl, dq, dk, dw = found
    assert kl[0] == 0 and dq[0].eq(0).all() and dw[0].eq(0).all(), "an empty row"
    assert dk[0].eq(0).all(), "a key nobody keeps"


def test_a_query_alone_has_the_same_bits() -> None:
    q, k, w, slots, p, weight = _inputs()
    together = indexer_kl(q, k, w, slots, p, weight, deterministic=False, shape=SMALL)
    row = slice(6, 7)
    alone = indexer_kl(
        q[row].clone(), k, w[row].clone(), slots[row].clone(), p[row].clone(), weight[row].clone(),
        deterministic=False, shape=SMALL,
    )  # fmt: skip
    for index in (0, 1, 3):
        assert torch.equal(together[index][row], alone[index])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_what_is_not_finite_is_not_hidden(deterministic: bool) -> None:
    q, k, w, slots, p, weight = _inputs()
    q[5, 1, 2] = NAN
    w[6, 0] = float("inf")
    kl, dq, dk, dw = indexer_kl(q, k, w, slots, p, weight, deterministic=deterministic, shape=SMALL)
    assert kl[5].isnan() and dw[5].isnan().any() and not dk.isfinite().all()
    assert not kl[6].isfinite() and not dq[6].isfinite().all()
    assert kl[[1, 2, 3, 4, 7, 8]].isfinite().all()


def test_refuses_what_does_not_fit() -> None:
    q, k, w, slots, p, weight = _inputs()
    with pytest.raises(ValueError, match="w is not contiguous float32"):
        indexer_kl(q, k, w.double(), slots, p, weight, deterministic=False)
    with pytest.raises(ValueError, match="do not fit"):
        indexer_kl(q, k[:, :8], w, slots, p, weight, deterministic=False)
    with pytest.raises(ValueError, match=r"slots are .*, not int32"):
        indexer_kl(q, k, w, slots.long(), p, weight, deterministic=False)
