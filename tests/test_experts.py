"""Experts by grouped products against experts one after another, in fp64: values, gradients, experts without tokens.

On a CPU torch's grouped product takes fp32 with rows of whole 16 bytes, so sizes are multiples of four.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels import experts, experts_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides, grouped products leave NaN where a group is empty, as they do on some GPUs."""
    product = F.grouped_mm

    def poisoned(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        out = product(a, b, offs=offs)
        if b.dim() == 2:
            empty = offs.diff(prepend=offs.new_zeros(1)) == 0
            out[empty] = NAN
        return out

    monkeypatch.setattr(F, "grouped_mm", poisoned)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _inputs(tokens: int, per_token: int, hidden: int, width: int, used: list[int], num: int) -> list[Any]:
    """x, chosen experts (only `used` ones), weights and the model's matrices [X, 2 F, D] and [X, D, F]."""
    make = torch.Generator().manual_seed(0)
    picked = torch.stack([torch.randperm(len(used), generator=make)[:per_token] for _ in range(tokens)])
    return [
        _random(tokens, hidden, seed=1),
        torch.tensor(used)[picked].to(DEVICE),
        _random(tokens, per_token, seed=2),
        _random(num, 2 * width, hidden, seed=3),
        _random(num, hidden, width, seed=4),
    ]


def _run(run: Any, inputs: list[Any], grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, weights and matrices."""
    x, chosen, weights, gate_up, down = inputs
    leaves = [t.detach().requires_grad_() for t in (x, weights, gate_up, down)]
    out = run(leaves[0], chosen, leaves[1], leaves[2].transpose(1, 2), leaves[3].transpose(1, 2))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize(
    ("tokens", "per_token", "hidden", "width", "used", "num"),
    [
        (37, 3, 12, 20, [1, 2, 4], 6),  # the first, one in between and the last have no token
        (1, 1, 4, 4, [0], 1),
        (130, 2, 4, 1028, [0, 1, 2], 3),  # more columns than a program holds at once
        (5, 2, 1028, 4, [3, 1], 4),
    ],
)
def test_grouped_experts_are_those_one_after_another(
    tokens: int, per_token: int, hidden: int, width: int, used: list[int], num: int
) -> None:
    inputs = _inputs(tokens, per_token, hidden, width, used, num)
    grad = _random(tokens, hidden, seed=5)
    ours = _run(experts.run_groups, inputs, grad)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    for a, b in zip(ours, _run(experts.run_experts, exact, grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    unused = [x for x in range(num) if x not in used]
    assert not any(d[unused].any() for d in ours[3:])


def test_gradients_have_the_layout_of_the_matrices() -> None:
    """Otherwise autograd would copy them."""
    inputs = _inputs(9, 2, 8, 12, [0, 2], 3)
    *_, dgate_up, ddown = _run(experts.run_groups, inputs, _random(9, 8, seed=5))
    assert dgate_up.stride() == inputs[3].stride() and ddown.stride() == inputs[4].stride()


def test_frozen_matrices_have_no_gradient_and_change_nothing_else() -> None:
    x, chosen, weights, gate_up, down = _inputs(9, 2, 8, 12, [0, 2], 3)
    grad = _random(9, 8, seed=5)
    wanted = _run(experts.run_groups, [x, chosen, weights, gate_up, down], grad)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    out = experts.run_groups(x, chosen, weights, gate_up.transpose(1, 2), down.transpose(1, 2))
    assert torch.equal(out, wanted[0])
    for a, b in zip(torch.autograd.grad(out, leaves, grad), wanted[1:3], strict=True):
        assert torch.equal(a, b)


def test_a_second_pass_backward_is_an_error() -> None:
    """Gate and up are overwritten by the first."""
    x, chosen, weights, gate_up, down = _inputs(9, 2, 8, 12, [0, 2], 3)
    out = experts.run_groups(
        x.requires_grad_(), chosen, weights, gate_up.transpose(1, 2), down.transpose(1, 2)
    )
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_weights_keep_their_type() -> None:
    """fp32 gates of a model in bf16, and their gradient."""
    gate_up, weights = _random(6, 8, seed=0).bfloat16(), _random(3, 2, seed=1)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=DEVICE)
    h = experts_triton.gate(gate_up, weights, order)
    left, right = gate_up.double().chunk(2, -1)
    plain = F.silu(left) * right
    wanted = plain * weights.reshape(-1, 1).double()[order]
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(h.double(), wanted, rtol=2**-7, atol=0)
    dh = _random(6, 4, seed=2).bfloat16()
    dots = (plain * dh.double()).sum(-1)
    dweights = experts_triton.gate_backward_(gate_up, dh, weights, order)
    assert dweights.dtype == torch.float32
    torch.testing.assert_close(dweights.reshape(-1)[order].double(), dots, rtol=1e-5, atol=1e-6)


def test_groups_are_left_alone_where_torch_would_wait_for_the_device() -> None:
    down = _inputs(9, 2, 8, 12, [0, 2], 3)[-1]
    assert not experts.takes_groups(down)
