"""The rotary kernel against its definition, in fp64: values, gradients, in place; what is not rotated stays as it is."""

import pytest
import tiny
import torch

from posttrain.model import rope as rope_module
from posttrain.model.rope import rotate, rotate_into

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_module, "has_kernel", lambda x: True)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _turns(num: int, size: int) -> torch.Tensor:
    """Of lengths other than 1, as YaRN's attention factor makes them."""
    return torch.polar(_random(num, size // 2, seed=7).abs() + 0.5, _random(num, size // 2, seed=8))


def _exact(x: torch.Tensor, turns: torch.Tensor, start: int, halves: bool) -> torch.Tensor:
    """In fp64, number by number."""
    size, x = 2 * turns.shape[-1], x.double()
    part, turns = x[..., start : start + size], turns.to(torch.complex128)
    first, second = (
        (part[..., : size // 2], part[..., size // 2 :]) if halves else (part[..., ::2], part[..., 1::2])
    )
    while turns.dim() < x.dim():
        turns = turns[:, None]
    cos, sin = turns.real, turns.imag
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    return torch.cat((x[..., :start], pairs, x[..., start + size :]), -1)


SHAPES = {
    "queries": ((67, 3, 20), 12, 8),
    "one token": ((1, 5, 20), 12, 8),
    "index queries": ((9, 7, 24), 0, 8),
    "in the middle": ((3, 2, 25), 6, 12),
    "keys": ((130, 8), 0, 8),
    "index keys": ((63, 20), 0, 6),
}


@pytest.mark.parametrize(("shape", "start", "size"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
def test_values_and_gradients(shape: tuple[int, ...], start: int, size: int, halves: bool) -> None:
    x, turns, dout = _random(*shape, seed=1), _turns(shape[0], size), _random(*shape, seed=2)
    exact = x.double().requires_grad_()
    wanted = _exact(exact, turns, start, halves)
    wanted.backward(dout.double())
    before = x.clone()
    leaf = x.clone().requires_grad_()
    found = rotate(leaf, turns, start=start, halves=halves, overwrite=True)
    found.backward(dout)
    assert torch.equal(leaf, before), "what has a gradient is not overwritten"
    assert leaf.grad is not None and exact.grad is not None
    for name, ours, true in (("values", found, wanted), ("gradients", leaf.grad, exact.grad)):
        torch.testing.assert_close(
            ours.double(), true, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    plain = rotate(x, turns, start=start, halves=halves)
    assert torch.equal(plain, found) and torch.equal(x, before)
    taken = rotate(x, turns, start=start, halves=halves, overwrite=True)
    assert taken.data_ptr() == x.data_ptr() and torch.equal(x, found)


def test_the_kernel_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, turns = _random(11, 4, 20, seed=1), _turns(11, 8)
    found = [rotate(x, turns, start=s, halves=h) for s, h in ((0, False), (12, False), (0, True), (5, True))]
    monkeypatch.setattr(rope_module, "has_kernel", lambda x: False)
    wanted = [rotate(x, turns, start=s, halves=h) for s, h in ((0, False), (12, False), (0, True), (5, True))]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
def test_rows_of_any_distance_and_nothing_beside_them(halves: bool) -> None:
    """Views of wider rows, an expanded gradient; what lies around is poison before and after."""
    wide, turns = torch.full((13, 5, 40), float("nan"), device=DEVICE), _turns(13, 8)
    x = wide[:, 1:4, 7:27]
    x.copy_(_random(13, 3, 20, seed=3))
    wanted = _exact(x, turns, 4, halves)
    out = rotate(x, turns, start=4, halves=halves)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-6)
    place = torch.full((13, 5, 40), float("nan"), device=DEVICE)
    rotate_into(place[:, 1:4, 7:15], x[..., 4:12], turns)
    torch.testing.assert_close(
        place[:, 1:4, 7:15].double(), _exact(x, turns, 4, False)[..., 4:12], atol=1e-6, rtol=1e-6
    )
    assert int(place.isnan().sum()) == place.numel() - 13 * 3 * 8
    rotate(x, turns, start=4, halves=halves, overwrite=True)
    torch.testing.assert_close(x.double(), wanted, atol=1e-6, rtol=1e-6)
    assert int(wide.isnan().sum()) == wide.numel() - x.numel()
    leaf = _random(13, 3, 20, seed=3).requires_grad_()
    rotate(leaf, turns, start=4, halves=halves).sum().backward()  # a gradient of stride 0
    exact = leaf.detach().double().requires_grad_()
    _exact(exact, turns, 4, halves).sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
def test_bf16_is_rounded_once(halves: bool) -> None:
    x, turns = _random(33, 2, 12, seed=4).bfloat16(), _turns(33, 8)
    found = rotate(x, turns, start=2, halves=halves)
    rounded = _exact(x, turns, 2, halves).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, rounded, atol=1e-5, rtol=2**-7)
    if DEVICE == "cuda":  # the interpreter cuts where the hardware rounds
        assert (found != rounded).float().mean() < 0.01, "only where fp32 lies beside fp64 at the middle"


def test_nothing_to_rotate_and_what_does_not_fit() -> None:
    turns = _turns(3, 8)
    assert rotate(_random(3, 4, 8, seed=0)[:0], turns[:0]).shape == (0, 4, 8)
    x = _random(3, 2, 12, seed=0)
    for bad in (
        lambda: rotate(x, turns, start=5),
        lambda: rotate(x[:2], turns),
        lambda: rotate(x, turns.real),
        lambda: rotate(x.transpose(1, 2), turns[:, :1]),
        lambda: rotate_into(x[..., :6], x[..., :8], turns),
    ):
        with pytest.raises(ValueError, match=r"rotat|strides"):
            bad()


@pytest.mark.skipif(
    DEVICE == "cuda", reason="a model on the CPU needs the interpreter; tests/gpu has one on the GPU"
)
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_model_trains_and_generates_as_by_the_definition(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    model, tokens = tiny.model(topk=7, num_hidden_layers=2), tiny.tokens(30)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        context = tiny.packed([19, 11], attention, indexer_loss="sparse" if attention == "sparse" else "none")
        logits = model(tokens, context)
        losses = [record.kl for record in context.records.values() if record.kl is not None]
        (logits.square().mean() + sum(losses)).backward()
        with torch.no_grad():
            found = {"no grad": model(tokens, tiny.packed([19, 11], attention))}
        found |= {"logits": logits.detach()}
        return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    ours = run()
    monkeypatch.setattr(rope_module, "has_kernel", lambda x: False)
    wanted = run()
    assert ours.keys() == wanted.keys()
    torch.testing.assert_close(ours["no grad"], ours["logits"], atol=1e-5, rtol=1e-5)
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
