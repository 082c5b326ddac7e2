"""The share of queries whose last kept key has the score of the next one."""

import pytest
import tiny
import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.model.shared import SharedContext
from posttrain.ties import SAMPLE, Ties

TOKENS = torch.arange(150) % 200


def _share(model: torch.nn.Module, lengths: list[int], topk: int) -> float:
    context = tiny.packed(lengths)
    assert model.config.index_topk == topk  # type: ignore[union-attr]
    with torch.no_grad(), Ties(model, context) as ties:
        model(TOKENS[: sum(lengths)], context)
    return ties.share


def _by_hand(model: torch.nn.Module, lengths: list[int], topk: int) -> float:
    """Every query that leaves a key out, one by one."""
    seen: list[tuple[Tensor, ...]] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda *found: seen.append(found[2]))
        for layer in model.model.layers  # type: ignore[attr-defined]
    ]
    with torch.no_grad():
        model(TOKENS[: sum(lengths)], tiny.packed(lengths))
    for hook in hooks:
        hook.remove()
    tied = []
    for q, k, w in seen:
        start = 0
        for length in lengths:
            for i in range(topk, length):
                at, keys = slice(start + i, start + i + 1), slice(start, start + i + 1)
                scores = reference.index_scores(q[None, at], k[None, keys], w[None, at])[0, 0]
                ordered = scores.sort(descending=True).values
                tied.append(float(ordered[topk - 1] == ordered[topk]))
            start += length
    return sum(tied) / len(tied)


def test_ties_are_counted_in_each_document() -> None:
    model = tiny.model(topk=7, seed=1, index_heads=2)
    lengths = [40, 5, 19]
    assert SAMPLE >= 33 + 12
    assert _share(model, [40], 7) == pytest.approx(_by_hand(model, [40], 7))
    found = _share(model, lengths, 7)
    assert 0 < found < 1 and found == pytest.approx(_by_hand(model, lengths, 7))
    for layer in model.model.layers:  # all scores 0: every one is a tie
        layer.self_attn.indexer.weights_proj.weight.data.zero_()
    assert _share(model, lengths, 7) == 1.0


def test_a_common_query_is_looked_at_once() -> None:
    """Documents of 20 tokens and of the first 12 of them."""
    model = tiny.model(topk=7, seed=1, index_heads=2)
    token_F, place_T = torch.tensor([*range(20), *range(12)]), torch.arange(20)
    cuts = torch.tensor([0, 20, 32])
    context = SharedContext(attention="sparse", cu_seqlens_S=cuts, token_F=token_F, place_T=place_T)
    with torch.no_grad(), Ties(model, context) as ties:
        model(TOKENS[:20], context)
    assert 0 < ties.share < 1 and ties.share == pytest.approx(_by_hand(model, [20], 7))


def test_without_a_choice_there_is_no_tie_and_the_hooks_go() -> None:
    model = tiny.model(topk=7, seed=1)
    assert _share(model, [7, 3], 7) == 0.0
    assert _share(model, [9], 7) >= 0
    assert not any(module._forward_hooks for module in model.modules())
