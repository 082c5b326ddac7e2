"""A row's bits are the same alone and in any company, and the product is the product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from posttrain.kernels import invariant, invariant_triton
from posttrain.kernels.invariant import Invariant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMS = (1, 8, 64, 65)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_does_not_see_the_others(dtype: torch.dtype) -> None:
    x, w, heads = (
        _random(65, 300, dtype=dtype),
        _random(77, 300, seed=1, dtype=dtype),
        _random(3, 100, 13, seed=2, dtype=dtype),
    )
    with Invariant():
        whole, headed = F.linear(x, w), torch.bmm(x.view(65, 3, 100).transpose(0, 1), heads)
        for num in NUMS:
            for start in (0, 65 - num):
                rows = x[start : start + num]
                assert torch.equal(F.linear(rows, w), whole[start : start + num])
                found = torch.bmm(rows.reshape(num, 3, 100).transpose(0, 1), heads)
                assert torch.equal(found, headed[:, start : start + num])
                wide = found.new_zeros(num, 3, 20)[..., :13].transpose(0, 1)  # a place among others
                torch.bmm(rows.reshape(num, 3, 100).transpose(0, 1), heads, out=wide)
                assert torch.equal(wide, found)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(whole.double(), x.double() @ w.double().t(), atol=tolerance, rtol=1e-2)
    wanted = torch.bmm(x.view(65, 3, 100).transpose(0, 1).double(), heads.double())
    torch.testing.assert_close(headed.double(), wanted, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("width", [4, 24, 221])
def test_a_row_of_a_layer_does_not_see_the_others(width: int) -> None:
    x, weight = _random(65, width), _random(width, seed=3)
    functions = {
        "rms_norm": lambda rows: F.rms_norm(rows, (width,), weight, 1e-6),
        "layer_norm": lambda rows: F.layer_norm(rows, (width,), weight),
        "silu": F.silu,
        "sigmoid": lambda rows: rows.sigmoid(),
        "complex": lambda rows: torch.complex(rows, rows) * torch.complex(rows, -3 * rows),
        "cos": lambda rows: rows.cos(),
        "sin": lambda rows: rows.sin(),
    }
    for name, function in functions.items():
        with Invariant():
            whole = function(x)
            for num in (1, 2, 8, 64):
                assert torch.equal(function(x[:num].contiguous()), whole[:num]), name
        torch.testing.assert_close(whole, function(x))


def test_modules_go_through_the_mode_and_only_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for function, name in list(invariant._REPLACED.items()):

        def spy(
            *args: object, _name: str = name.__name__, _function: object = name, **kwargs: object
        ) -> object:
            seen.append(_name)
            return _function(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setitem(invariant._REPLACED, function, spy)
    x = _random(5, 12)
    layer = nn.Linear(12, 7).to(DEVICE)
    norm, rms = nn.LayerNorm(12).to(DEVICE), nn.RMSNorm(12).to(DEVICE)

    def run() -> torch.Tensor:
        gated = F.silu(layer(rms(norm(x)))).sigmoid()
        return torch.bmm(gated[None], torch.ones(1, 7, 2, device=DEVICE))

    with torch.no_grad():
        plain = run()
        assert not seen
        with Invariant():
            torch.testing.assert_close(run(), plain)
    assert sorted(seen) == ["bmm", "layer_norm", "linear", "rms_norm", "sigmoid", "silu"]


@pytest.mark.parametrize(("T", "N", "K"), [(1, 1, 1), (65, 70, 130), (0, 5, 5), (3, 129, 64)])
def test_the_triton_product_is_the_product(T: int, N: int, K: int) -> None:
    x, w = _random(2, K, T), _random(2, N, K, seed=1)  # neither is contiguous below
    found = invariant_triton.product(x.transpose(1, 2), w.transpose(1, 2))
    wanted = torch.bmm(x.transpose(1, 2).double(), w.transpose(1, 2).double())
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    for t in range(T):
        assert torch.equal(
            invariant_triton.product(x[:, :, t : t + 1].transpose(1, 2), w.transpose(1, 2))[:, 0], found[:, t]
        )


def test_the_triton_product_has_the_gradients_of_torchs() -> None:
    x, w, grad = _random(2, 9, 70), _random(2, 70, 5, seed=1), _random(2, 9, 5, seed=2)
    found = []
    for product, dtype in ((invariant._Product.apply, torch.float32), (torch.bmm, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        found.append(torch.autograd.grad(product(*leaves), leaves, grad.to(dtype)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        invariant_triton.product(_random(1, 2, 3), _random(1, 4, 5))
    with pytest.raises(ValueError, match="do not fit together"):
        invariant_triton.product(_random(1, 2, 3), _random(1, 3, 5).bfloat16())
