"""What is around a prompt's kernels, at real sizes on a GPU: rotations, copies, dense rows by cuDNN, products in fp32."""

import pytest
import real
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from posttrain.kernels import copy_triton, dense, pointwise, rope_triton
from posttrain.kernels.backend import Backend
from posttrain.model.arch import target_logprobs
from posttrain.model.context import PackedContext
from posttrain.model.rope import _turned

TOKENS = 8191


def _random(*shape: int, seed: int) -> torch.Tensor:
    make = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=make, device="cuda").bfloat16()


def _turns(num: int) -> torch.Tensor:
    angle = torch.rand(num, 32, generator=torch.Generator("cuda").manual_seed(0), device="cuda") * 6
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize(
    ("width", "start", "halves"), [(192, 128, False), (128, 0, True)], ids=["q", "index q"]
)
def test_rotations(width: int, start: int, halves: bool) -> None:
    """In place, for training and by the definition; a place written twice or read late would show."""
    x, turns = _random(TOKENS, 64, width, seed=1), _turns(TOKENS)
    wanted = x.clone()
    wanted[..., start : start + 64] = _turned(x[..., start : start + 64], turns, halves)
    leaf = x.clone().requires_grad_()
    found = rope_triton.rotate(leaf, turns, start=start, halves=halves, overwrite=True)
    for _ in range(5):
        taken = x.clone()
        assert rope_triton.rotate(taken, turns, start=start, halves=halves, overwrite=True) is taken
        assert torch.equal(taken, found)
    assert (found != wanted).float().mean() < 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=2**-7)
    found.backward(found.detach())  # a rotation there and back
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, x, atol=0.04, rtol=0.02)


def test_copies() -> None:
    pool, slots = _random(200, 64, 656, seed=2), torch.randperm(200 * 64, device="cuda")[:TOKENS]
    for part in (pool[..., :576], pool[..., 576:]):
        x = _random(TOKENS, part.shape[2], seed=3)
        wanted = pool.clone()
        wanted.view(-1, 656)[slots, part.storage_offset() : part.storage_offset() + part.shape[2]] = x
        copy_triton.write(part, slots, x)
        assert torch.equal(pool, wanted) and torch.equal(copy_triton.read(part, slots), x)
    kv, entries = _random(TOKENS, 64, 256, seed=4), _random(TOKENS, 576, seed=5)
    wanted = torch.cat((kv[..., :128], entries[:, None, 512:].expand(-1, 64, -1)), -1)
    assert torch.equal(copy_triton.keys(kv[..., :128], entries[:, 512:]), wanted)


@pytest.mark.parametrize("length", [700, 2048])
def test_long_dense_rows_are_cudnns_even_where_a_process_turns_it_off(length: int) -> None:
    q, k, v = (
        _random(2, length, 16, size, seed=i).requires_grad_() for i, size in enumerate((192, 192, 128))
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as watched:
            found = dense.causal(q, k, v, 0.07)
            torch.cuda.synchronize()
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "the process's setting is as it was"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    names = [event.key for event in watched.key_averages()]
    assert any("cudnn" in name for name in names) and not any("fmha_cutlass" in name for name in names), names
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    heads = (x.transpose(1, 2) for x in exact)
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.07).transpose(1, 2)
    torch.testing.assert_close(found.double(), wanted, atol=0.02, rtol=0.02)
    dout = _random(*wanted.shape, seed=6)
    grads = torch.autograd.grad(found, (q, k, v), dout), torch.autograd.grad(wanted, exact, dout.double())
    for ours, true in zip(*grads, strict=True):
        assert float((ours.double() - true).norm() / true.norm()) < 0.02


def test_products_in_fp32_and_the_norm_of_index_keys() -> None:
    x, w, dout = _random(TOKENS, 1024, seed=7), _random(64, 1024, seed=8), _random(TOKENS, 64, seed=9).float()
    leaves = [t.requires_grad_() for t in (x, w)]
    found = pointwise.linear_fp32(*leaves)
    assert found.dtype == torch.float32
    wanted = x.double() @ w.double().t()
    assert float((found.detach().double() - wanted.detach()).abs().max()) < 2e-4
    grads = torch.autograd.grad(found, leaves, dout)
    exact = dout.double() @ w.double(), dout.double().t() @ x.double()
    for ours, true in zip(grads, exact, strict=True):
        assert float((ours.double() - true).norm() / true.norm()) < 4e-3
    indexer = real.model().model.layers[0].self_attn.indexer
    torch.nn.init.normal_(indexer.k_norm.weight)
    torch.nn.init.normal_(indexer.k_norm.bias)
    k, norm = _random(TOKENS, 128, seed=10), indexer.k_norm
    plain = F.layer_norm(k.float(), (128,), norm.weight.float(), norm.bias.float(), norm.eps).bfloat16()
    assert (indexer._normed(k) != plain).float().mean() < 1e-3
    torch.testing.assert_close(indexer._normed(k), plain, atol=1e-3, rtol=2**-7)


def test_a_pass_without_gradients_is_the_one_with() -> None:
    """Long and short documents, some rows dense: parts in their places, rotations in place."""
    model, lengths = real.model(), [3000, 300, 1, 2048, 700, 2500]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")
    tokens = torch.randint(512, (sum(lengths),), generator=torch.Generator().manual_seed(1)).cuda()

    def run() -> torch.Tensor:
        context = PackedContext(
            attention="sparse", cu_seqlens_S=starts, backend=Backend(name="triton", reason="test")
        )
        return target_logprobs(model(tokens, context)[:-1], tokens[1:])

    with_gradients = run().detach()
    with torch.no_grad():
        without = run()
    torch.testing.assert_close(without, with_gradients, atol=0.05, rtol=0.02)
    assert float((without - with_gradients).abs().mean()) < 5e-3
