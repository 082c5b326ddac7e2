"""Kernels of the learner beside attention, against their definitions in fp64: values, gradients, odd sizes, what is not finite."""

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels import dense, heads_triton, logprob_triton, norm_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _leaf(x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    return (x.double() if exact else x).detach().requires_grad_()


@pytest.mark.parametrize(
    ("batch", "length", "heads", "own", "rotary", "value"),
    [(2, 3, 5, 6, 4, 7), (1, 1, 1, 16, 8, 16), (3, 7, 21, 12, 2, 5)],
)
def test_keys_and_values_are_their_parts(
    batch: int, length: int, heads: int, own: int, rotary: int, value: int
) -> None:
    """The rotary part is a view of entries; gradients come in whatever layout attention leaves them."""
    kv, entries = (
        _random(batch, length, heads, own + value, seed=1),
        _random(batch, length, 9 + rotary, seed=2),
    )
    dk = _random(batch, heads, length, own + rotary, seed=3).transpose(1, 2)
    dv = _random(batch, length, value, heads, seed=4).transpose(2, 3)  # numbers of a head lie apart
    found = []
    for run, exact in ((heads_triton.keys_and_values, False), (dense.keys_and_values, True)):
        leaves = _leaf(kv, exact=exact), _leaf(entries, exact=exact)
        if exact:
            k_own, v = leaves[0].split([own, value], dim=-1)
            k = torch.cat((k_own, leaves[1][:, :, None, 9:].expand(-1, -1, heads, -1)), dim=-1)
        else:
            k, v = run(leaves[0], leaves[1][..., 9:], own)
        grads = torch.autograd.grad((k, v), leaves, (dk.to(k.dtype), dv.to(v.dtype)))
        found.append([k.detach(), v.detach(), *grads])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][0].double(), found[1][0]) and torch.equal(found[0][1].double(), found[1][1])


def test_values_alone_have_a_gradient() -> None:
    kv, k_rot = _leaf(_random(1, 2, 3, 9, seed=1)), _leaf(_random(1, 2, 4, seed=2))
    heads_triton.keys_and_values(kv, k_rot, 4)[1].sum().backward()
    assert kv.grad is not None and k_rot.grad is not None
    assert not kv.grad[..., :4].any() and (kv.grad[..., 4:] == 1).all() and not k_rot.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 63), (3, 4097), (2, 9000)])
def test_log_probs_of_targets(rows: int, size: int, temperature: float) -> None:
    """Of rows that lie apart, and of logits far from 0."""
    wide = _random(rows, size + 3, seed=1) * 5 + torch.arange(rows, device=DEVICE)[:, None] * 300.0
    targets = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours, exact = _leaf(wide), _leaf(wide, exact=True)
    found = logprob_triton.target_logprobs(ours[:, :size], targets, temperature)
    wanted = -F.cross_entropy(exact[:, :size] / temperature, targets, reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-4)
    weight = _random(rows, seed=3)
    for run, out in ((ours, found), (exact, wanted)):
        out.backward(weight.to(out.dtype))
        assert run.grad is not None
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_log_probs_read_bf16_as_it_is() -> None:
    logits = (_random(4, 100, seed=1) * 3).bfloat16()
    targets = torch.tensor([0, 99, 5, 50], device=DEVICE)
    ours, exact = _leaf(logits), _leaf(logits, exact=True)
    found = logprob_triton.target_logprobs(ours, targets, 1.0)
    wanted = -F.cross_entropy(exact, targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    wanted.sum().backward()
    assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_log_probs_hide_nothing() -> None:
    """NaN and infinite logits, and a target that is no entry; logits of -inf elsewhere are probabilities of 0."""
    logits = _random(5, 70, seed=1)
    logits[0, 3], logits[1, 3], logits[4, 7:] = NAN, float("inf"), float("-inf")
    found = logprob_triton.target_logprobs(logits, torch.tensor([1, 1, 70, -1, 2], device=DEVICE), 1.0)
    assert found[:4].isnan().all()
    torch.testing.assert_close(found[4], torch.log_softmax(logits[4, :7], 0)[2])


def test_no_rows_have_no_log_probs() -> None:
    logits = _random(0, 7, seed=1).requires_grad_()
    found = logprob_triton.target_logprobs(logits, torch.zeros(0, dtype=torch.long, device=DEVICE), 1.0)
    found.sum().backward()
    assert found.shape == (0,) and logits.grad is not None and logits.grad.shape == (0, 7)


@pytest.mark.parametrize("shape", [(1, 1), (63, 40), (5, 7, 100), (3, 5000), (300, 16)])
def test_rms_norm_backward(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(norm_triton, "PROGRAMS", 3)  # several rows, or groups of them, each
    monkeypatch.setattr(norm_triton, "CELLS", 256)
    x, weight, dy = _random(*shape, seed=1), _random(shape[-1], seed=2), _random(*shape, seed=3)
    ours, exact = (_leaf(x), _leaf(weight)), (_leaf(x, exact=True), _leaf(weight, exact=True))
    found = norm_triton.rms_norm(*ours, 1e-5)
    wanted = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * exact[1]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(found, ours, dy),
        torch.autograd.grad(wanted, exact, dy.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_strided_rows_in_bf16() -> None:
    """A part of each row, as of latents beside rotary keys."""
    x, weight, dy = (
        _random(9, 24, seed=1).bfloat16(),
        _random(16, seed=2).bfloat16(),
        _random(9, 16, seed=3).bfloat16(),
    )
    ours, exact = (_leaf(x), _leaf(weight)), (_leaf(x, exact=True), _leaf(weight, exact=True))
    found = norm_triton.rms_norm(ours[0][:, :16], ours[1], 1e-5)
    part = exact[0][:, :16]
    wanted = part * (part.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * exact[1]
    for a, b in zip(
        torch.autograd.grad(found, ours, dy),
        torch.autograd.grad(wanted, exact, dy.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=2**-6)
