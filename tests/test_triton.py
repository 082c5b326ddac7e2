"""Triton kernels against their definitions in fp64: in the interpreter without a GPU, compiled with one.

Odd sizes, missing entries at the end and in between, empty rows, duplicates, poison in everything nobody kept,
outputs and workspaces that start as NaN.
"""

from dataclasses import replace

import pytest
import torch

from posttrain.kernels import sparse_mla_backward_triton as sparse_mla_backward
from posttrain.kernels import sparse_mla_triton as sparse_mla

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
NAN = float("nan")
TILES = sparse_mla.Tiles(heads=16, keys=16, warps=4, stages=1)
_SMALL = sparse_mla_backward.Tiles(keys=16, columns=16, warps=4, stages=1, heads=16)
LAUNCH = sparse_mla_backward.Launch(pairs=_SMALL, dq=_SMALL, dkv=_SMALL)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN."""
    for name in ("new_empty",):
        make = getattr(torch.Tensor, name)

        def poisoned(
            self: torch.Tensor, *args: object, _make: object = make, **kwargs: object
        ) -> torch.Tensor:
            out: torch.Tensor = _make(self, *args, **kwargs)  # type: ignore[operator]
            return out.fill_(NAN) if out.is_floating_point() else out

        monkeypatch.setattr(torch.Tensor, name, poisoned)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _slots(num: int, kept: int, keys: int) -> torch.Tensor:
    """Rows of every kind; slot 0 is in none of them."""
    make = torch.Generator().manual_seed(num)
    slots = torch.full((num, kept), -1, dtype=torch.int32)
    for row in range(num):
        count = min(kept, keys - 1, 3 * row)  # the first row is empty
        slots[row, :count] = (torch.randperm(keys - 1, generator=make)[:count] + 1).sort().values.int()
    slots[num // 2, ::3] = -1  # holes
    slots[num - 1, 1] = slots[num - 1, 0]  # a duplicate
    slots[num - 2, 0] = keys + 5  # beyond the end
    return slots.to(DEVICE)


def _definition(
    q: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor, value_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and probabilities in the dtype of the inputs; rows of zeros where nothing is kept."""
    valid = (slots >= 0) & (slots < len(kv))
    entries = kv[torch.where(valid, slots, 1).long()]
    logits = (q @ entries.transpose(1, 2) * SCALE).masked_fill(~valid[:, None], float("-inf"))
    probs = logits.softmax(-1).nan_to_num(0.0)
    return probs @ entries[..., :value_size], probs


SIZES = {
    "odd": (9, 5, 24, 8, 20, 40),
    "one head": (7, 1, 10, 6, 5, 33),
    "two tiles of heads": (5, 19, 16, 16, 33, 70),
    "heads as rows": (6, 40, 16, 16, 33, 70),
}


@pytest.mark.parametrize(
    ("num", "heads", "value", "rotary", "kept", "keys"), SIZES.values(), ids=SIZES.keys()
)
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_sparse_mla(
    monkeypatch: pytest.MonkeyPatch, num: int, heads: int, value: int, rotary: int, kept: int, keys: int,
    deterministic: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        sparse_mla_backward, "WORKSPACE_BYTES", 2 * 4 * heads * kept * 4
    )  # four queries at a time
    q, kv, do = _random(num, heads, value + rotary, seed=0), _random(keys, value + rotary, seed=1), None
    slots = _slots(num, kept, keys)
    kv[0] = NAN
    do = _random(num, heads, value, seed=2)
    tiles = replace(TILES, heads=64) if heads > 32 else TILES
    out, lse = sparse_mla.forward(q, kv, slots, SCALE, value, tiles)
    dq, dkv, target = sparse_mla_backward.backward(
        q, kv, slots, out, lse, do, SCALE, deterministic=deterministic, with_target=True, launch=LAUNCH
    )
    exact_q, exact_kv = q.double().requires_grad_(), kv.double().nan_to_num(0.0).requires_grad_()
    wanted, probs = _definition(exact_q, exact_kv, slots, value)
    wanted.backward(do.double())
    assert exact_q.grad is not None and exact_kv.grad is not None and target is not None
    for name, ours, true in (
        ("o", out, wanted.detach()),
        ("dq", dq, exact_q.grad),
        ("dkv", dkv, exact_kv.grad),
        ("p", target, probs.detach().mean(1)),
    ):
        torch.testing.assert_close(
            ours.double(), true, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert lse[0].eq(float("-inf")).all() and out[0].eq(0).all() and dq[0].eq(0).all(), "an empty row"
    logits = torch.einsum("he,se->hs", q[1], kv[slots[1, :3].long()]) * SCALE
    torch.testing.assert_close(lse[1], logits.logsumexp(-1))


def _neighbours(num: int, kept: int, keys: int) -> torch.Tensor:
    """Up to 11 rows that share most of their slots with the next one, and what does not merge; slot 0 is in none."""
    make = torch.Generator().manual_seed(kept)
    chosen = torch.randperm(keys - 1, generator=make)[: kept + 11] + 1
    slots = torch.stack([chosen[row : row + kept].sort().values for row in range(11)]).int()
    slots[[1, 3], kept - 2 :] = -1
    slots[[2, 6, 7]] = -1  # beside one with entries, beside each other
    slots[[4, 10], 1::3] = -1  # holes
    slots[8] = slots[8].flip(0)
    slots[9, 1], slots[9, 3] = slots[9, 0], keys + 5  # a duplicate; beyond the end
    return slots[:num].to(DEVICE)


@pytest.mark.parametrize("heads", [4, 16, 32])
@pytest.mark.parametrize(
    ("num", "kept", "in_chunk"), [(1, 5, 9), (10, 33, 16), (11, 21, 5)], ids=["alone", "even", "odd"]
)
def test_merged_gradients_of_entries(
    monkeypatch: pytest.MonkeyPatch, heads: int, num: int, kept: int, in_chunk: int
) -> None:
    """Those of one query at a time, and exact ones; queries without entries hold NaN. Chunks end between neighbours."""
    monkeypatch.setattr(sparse_mla_backward, "WORKSPACE_BYTES", 2 * 4 * 2 * heads * kept * in_chunk)
    keys, value, rotary = 60, 20, 8
    q, kv = _random(num, heads, value + rotary, seed=0), _random(keys, value + rotary, seed=1)
    do, slots = _random(num, heads, value, seed=2), _neighbours(num, kept, keys)
    kv[0] = NAN
    exact_q, exact_kv = q.double(), kv.double().nan_to_num(0.0).requires_grad_()
    _definition(exact_q, exact_kv, slots, value)[0].backward(do.double())
    empty = (slots < 0).all(1)
    q[empty], do[empty] = NAN, NAN
    out, lse = sparse_mla.forward(q, kv, slots, SCALE, value, replace(TILES, heads=32, keys=64))
    wide = replace(_SMALL, keys=64, columns=32, heads=32)
    found = []
    for merged in (_SMALL, None):
        launch = replace(LAUNCH, pairs=wide, dq=wide, dkv=wide, merged=merged)
        found.append(
            sparse_mla_backward.backward(
                q, kv, slots, out, lse, do, SCALE, deterministic=False, with_target=False, launch=launch
            )
        )
    assert exact_kv.grad is not None and torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1].double(), exact_kv.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-6, rtol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_a_gradient_that_is_not_finite_shows(deterministic: bool) -> None:
    q, kv, do = _random(3, 2, 12, seed=0), _random(9, 12, seed=1), _random(3, 2, 8, seed=2)
    slots = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32, device=DEVICE)
    do[1, 0, 0] = float("inf")
    out, lse = sparse_mla.forward(q, kv, slots, SCALE, 8, TILES)
    _, dkv, _ = sparse_mla_backward.backward(
        q, kv, slots, out, lse, do, SCALE, deterministic=deterministic, with_target=False, launch=LAUNCH
    )
    assert not dkv[3:5].isfinite().all() and dkv[[1, 2, 5, 6]].isfinite().all()


def test_sparse_mla_refuses_what_does_not_fit() -> None:
    q, kv = _random(3, 2, 12, seed=0), _random(9, 12, seed=1)
    with pytest.raises(ValueError, match="int32"):
        sparse_mla.forward(q, kv, torch.zeros(3, 4, dtype=torch.long, device=DEVICE), SCALE, 8)
    with pytest.raises(ValueError, match="do not fit"):
        sparse_mla.forward(q, kv[:, :10], torch.zeros(3, 4, dtype=torch.int32, device=DEVICE), SCALE, 8)
    with pytest.raises(ValueError, match="contiguous"):
        sparse_mla.forward(q.transpose(0, 1).contiguous().transpose(0, 1), kv,
                           torch.zeros(3, 4, dtype=torch.int32, device=DEVICE), SCALE, 8)  # fmt: skip
