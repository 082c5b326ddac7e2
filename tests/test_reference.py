"""kernels/reference.py against loops in fp64, with odd sizes, ties and poison behind the mask."""

import math

import pytest
import torch

from posttrain.kernels import reference

B, Q, L, H, J, I, R, P = 2, 5, 11, 3, 2, 6, 7, 4
NAN = float("nan")


def _positions() -> torch.Tensor:
    return torch.tensor([[6, 7, 8, 9, 10], [0, 1, 2, 3, 4]])


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_index_scores_are_equation_1() -> None:
    q, k, w = _random(B, Q, J, I), _random(B, L, I, seed=1), _random(B, Q, J, seed=2)
    scores = reference.index_scores(q, k, w)
    assert scores.shape == (B, Q, L)
    for b in range(B):
        for t in range(Q):
            for s in range(L):
                wanted = sum(
                    float(w[b, t, j]) / math.sqrt(I) * max(0.0, float(q[b, t, j] @ k[b, s])) for j in range(J)
                )
                assert scores[b, t, s] == pytest.approx(wanted, abs=1e-5)


def test_topk_breaks_ties_by_the_lower_index_and_returns_ascending() -> None:
    scores = torch.tensor([[[0.0, 2.0, 0.0, 0.0, 3.0, 2.0]]])
    mask = torch.ones(1, 1, 6, dtype=torch.bool)
    assert reference.select_topk(scores, mask, 3).tolist() == [[[1, 4, 5]]]
    assert reference.select_topk(scores, mask, 4).tolist() == [[[0, 1, 4, 5]]]
    assert reference.select_topk(torch.zeros(1, 1, 6), mask, 3).tolist() == [[[0, 1, 2]]]


def test_topk_fills_short_rows_with_minus_one_and_ignores_what_is_masked() -> None:
    scores = torch.tensor([[[1.0, 5.0, 9.0, NAN, math.inf]]])
    mask = torch.tensor([[[True, True, False, False, False]]])
    assert reference.select_topk(scores, mask, 4).tolist() == [[[0, 1, -1, -1]]]


def test_topk_never_asks_for_more_keys_than_there_are() -> None:
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert reference.select_topk(torch.zeros(1, 1, 2), mask, 16).tolist() == [[[0, 1]]]


def test_sparse_attention_is_softmax_over_the_kept_entries() -> None:
    q, entries = _random(B, Q, H, R + P), _random(B, L, R + P, seed=1)
    mask = reference.causal_mask(_positions(), L)
    kept = reference.select_topk(_random(B, Q, L, seed=2), mask, 4)
    poisoned = entries.clone()
    poisoned[1, 5:] = NAN  # no query of row 1 may see these
    out, probs = reference.sparse_mla(q, poisoned, kept, 0.3, R)
    assert out.isfinite().all()
    for b in range(B):
        for t in range(Q):
            keys = [int(i) for i in kept[b, t] if i >= 0]
            for h in range(H):
                weights = torch.stack([0.3 * q[b, t, h] @ entries[b, s] for s in keys]).softmax(0)
                wanted = sum(p * entries[b, s, :R] for p, s in zip(weights, keys, strict=True))
                torch.testing.assert_close(out[b, t, h], wanted, atol=1e-6, rtol=0)
                torch.testing.assert_close(probs[b, t, h, : len(keys)].double(), weights, atol=1e-6, rtol=0)
                assert (probs[b, t, h, len(keys) :] == 0).all()


def test_dense_probs_are_the_mean_over_heads() -> None:
    q, entries = _random(B, Q, H, R + P), _random(B, L, R + P, seed=1)
    mask = reference.causal_mask(_positions(), L)
    p = reference.dense_probs(q, entries, mask, 0.3)
    logits = torch.einsum("bqhe,ble->bqhl", q, entries) * 0.3
    wanted = logits.masked_fill(~mask[:, :, None], -math.inf).softmax(-1).mean(2)
    torch.testing.assert_close(p.double(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, Q))


def test_indexer_kl_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    scores = torch.tensor([[[1.0, 0.0, 2.0, 50.0]]])
    mask = torch.tensor([[[True, True, True, False]]])
    normaliser = math.log(math.e + 1 + math.e**2)
    logq = [1 - normaliser, -normaliser, 2 - normaliser]
    wanted = sum(x * (math.log(x) - y) for x, y in zip([0.5, 0.25, 0.25], logq, strict=True))
    assert float(reference.indexer_kl(p, scores, mask)) == pytest.approx(wanted, rel=1e-6)


def test_gradient_of_the_kl_is_softmax_minus_p() -> None:
    mask = reference.causal_mask(_positions(), L)
    p = _random(B, Q, L).abs().masked_fill(~mask, 0.0)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_()
    scores = _random(B, Q, L, seed=1).requires_grad_()
    reference.indexer_kl(p, scores, mask).sum().backward()
    wanted = scores.detach().masked_fill(~mask, -math.inf).softmax(-1) - p.detach()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, wanted, atol=1e-12, rtol=0)
    assert (scores.grad[~mask] == 0).all()
    assert p.grad is None, "the target is no path for gradients"


def test_a_head_weight_below_zero_still_follows_the_relu() -> None:
    q, k = torch.ones(1, 1, 1, 4), torch.stack([torch.ones(4), -torch.ones(4)])[None]
    scores = reference.index_scores(q, k, torch.tensor([[[-3.0]]]))
    assert scores.tolist() == [[[-6.0, 0.0]]]  # -3 * 4 / sqrt(4); ReLU before the weight
