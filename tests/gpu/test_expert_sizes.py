"""Experts by grouped products on a GPU at real sizes: errors, experts without tokens, no waiting for the device."""

from typing import Any

import pytest
import torch

from posttrain.kernels import experts

HOPPER = torch.cuda.get_device_capability()[0] in (9, 10)


def _inputs(tokens: int, per_token: int, hidden: int, width: int, num: int, unused: list[int]) -> list[Any]:
    torch.manual_seed(0)
    scores = torch.rand(tokens, num, device="cuda")
    scores[:, unused] = -1
    return [
        torch.randn(tokens, hidden, device="cuda"),
        scores.topk(per_token, dim=-1, sorted=False).indices,
        torch.rand(tokens, per_token, device="cuda"),
        torch.randn(num, 2 * width, hidden, device="cuda") / hidden**0.5,
        torch.randn(num, hidden, width, device="cuda") / width**0.5,
    ]


def _run(inputs: list[Any], dtype: torch.dtype, grad: torch.Tensor, *, by_groups: bool) -> list[torch.Tensor]:
    x, chosen, weights, gate_up, down = inputs
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    weights = weights.clone().requires_grad_()
    matrices = gate_up.transpose(1, 2), down.transpose(1, 2)
    assert experts.takes_groups(matrices[1]) == (dtype == torch.bfloat16)
    run = experts.run_experts if by_groups else _one_by_one
    out = run(x, chosen, weights, *matrices)
    return [out.detach(), *torch.autograd.grad(out, (x, weights, gate_up, down), grad.to(dtype))]


def _one_by_one(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, *rest: torch.Tensor) -> Any:
    return experts._Experts.apply(x, chosen, weights.to(x.dtype), *rest)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.skipif(not HOPPER, reason="torch has no kernel for grouped products of this GPU")
@pytest.mark.parametrize(
    ("tokens", "per_token", "hidden", "width", "num", "unused"),
    [
        (24_681, 4, 1024, 512, 16, [0, 7, 15]),
        (333, 1, 512, 128, 8, [1, 2, 3]),
        (4097, 8, 7168, 256, 64, list(range(30))),
    ],
)
def test_grouped_experts_err_no_more_than_those_one_after_another(
    tokens: int, per_token: int, hidden: int, width: int, num: int, unused: list[int]
) -> None:
    inputs = _inputs(tokens, per_token, hidden, width, num, unused)
    inputs[0], inputs[3], inputs[4] = (t.bfloat16().float() for t in (inputs[0], inputs[3], inputs[4]))
    grad = torch.randn(tokens, hidden, device="cuda").bfloat16().float()
    poison = torch.full((1 << 28,), float("nan"), device="cuda")  # what is freed is allocated next
    del poison
    ours = _run(inputs, torch.bfloat16, grad, by_groups=True)
    loop = _run(inputs, torch.bfloat16, grad, by_groups=False)
    exact = _run(inputs, torch.float32, grad, by_groups=False)
    for a, b, true in zip(ours, loop, exact, strict=True):
        assert _distance(a, true) <= 1.1 * _distance(b, true) + 2**-9
    assert not any(d[unused].any() for d in ours[3:])


@pytest.mark.skipif(not HOPPER, reason="torch has no kernel for grouped products of this GPU")
def test_grouped_experts_do_not_wait_for_the_device() -> None:
    inputs = _inputs(2048, 4, 1024, 512, 16, [3])
    grad = torch.randn(2048, 1024, device="cuda")
    first = _run(inputs, torch.bfloat16, grad, by_groups=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = _run(inputs, torch.bfloat16, grad, by_groups=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "not the same bits"
