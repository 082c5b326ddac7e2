"""The GRPO loss by hand, the KL estimators against exact gradients, weights of packed batches."""

import math

import numpy as np
import pytest
import tiny
import torch

from posttrain import loss, packing
from posttrain.advantage import advantages

F64 = torch.float64


def _grpo(logp: torch.Tensor, **changes: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    num = len(logp)
    fields: dict[str, object] = {
        "advantage_M": torch.ones(num, dtype=F64),
        "weight_M": torch.full((num,), 1 / num, dtype=F64),
        "kl_coef_M": torch.zeros(num, dtype=F64),
        "sequence_M": torch.zeros(num, dtype=torch.long),
        "clip": 0.2,
        "kl": "unbiased",
        "offpolicy_delta": None,
    }
    old = torch.zeros(num, dtype=F64)
    ref = None
    changes = dict(changes)
    old = changes.pop("old", old)  # type: ignore[assignment]
    ref = changes.pop("ref", ref)
    return loss.grpo(logp, old, ref, **(fields | changes))  # type: ignore[arg-type]


def test_three_tokens_by_hand() -> None:
    """Ratios 1.5, 0.9, 0.5 with advantages 2, 2, -1 and clip 0.2.

    Token 1: min(1.5 * 2, 1.2 * 2) = 2.4, clipped, no gradient. Token 2: 0.9 * 2 = 1.8.
    Token 3: min(-0.5, -0.8) = -0.8, clipped, no gradient. Weights 1/2, 1/4, 1/4.
    """
    logp = torch.tensor([math.log(1.5), math.log(0.9), math.log(0.5)], dtype=F64, requires_grad=True)
    value, figures = _grpo(
        logp,
        advantage_M=torch.tensor([2.0, 2.0, -1.0], dtype=F64),
        weight_M=torch.tensor([0.5, 0.25, 0.25], dtype=F64),
    )
    assert value.item() == pytest.approx(-(1.2 + 0.45 - 0.2))
    value.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0.0, -0.25 * 1.8, 0.0])
    assert figures["clipped"] == 2
    wanted = math.log(1.5) - math.log(0.9) - math.log(0.5)
    assert figures["logprob_gap"].item() == pytest.approx(wanted)


def test_negative_advantage_with_a_large_ratio_is_not_clipped() -> None:
    logp = torch.tensor([math.log(3.0)], dtype=F64, requires_grad=True)
    value, _ = _grpo(logp, advantage_M=torch.tensor([-1.0], dtype=F64))
    assert value.item() == pytest.approx(3.0)


def test_kl_term_by_hand() -> None:
    """pi = 0.5, pi_old = 0.4, pi_ref = 0.25: ratio 1.25 times (0.5 - log 0.5 - 1)."""
    logp, old, ref = (torch.tensor([math.log(x)], dtype=F64) for x in (0.5, 0.4, 0.25))
    wanted = 1.25 * (0.5 - math.log(0.5) - 1)
    assert loss.kl_unbiased(logp, old, ref).item() == pytest.approx(wanted)
    assert loss.kl_k3(logp, ref).item() == pytest.approx(0.5 - math.log(0.5) - 1)
    coef = torch.tensor([0.1], dtype=F64)
    value, figures = _grpo(logp, old=old, ref=ref, kl_coef_M=coef, clip=10.0)
    assert value.item() == pytest.approx(-(1.25 - 0.1 * wanted))
    assert figures["kl"].item() == pytest.approx(wanted)


@pytest.mark.parametrize("on_policy", [True, False])
def test_expected_gradient_of_the_unbiased_kl_is_exact(on_policy: bool) -> None:
    """Sum over the vocabulary with the probabilities that samples are drawn with, in fp64."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=F64, requires_grad=True)
    ref = torch.randn(7, dtype=F64).log_softmax(0)
    drawn = logits.detach() if on_policy else logits.detach() + 0.5 * torch.randn(7, dtype=F64)
    old = drawn.log_softmax(0)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        return found

    logp = logits.log_softmax(0)
    exact = gradient((logp.exp() * (logp - ref)).sum())
    unbiased = gradient((old.exp() * loss.kl_unbiased(logp, old, ref)).sum())
    torch.testing.assert_close(unbiased, exact, atol=1e-12, rtol=0)
    biased = gradient((old.exp() * loss.kl_k3(logp, ref)).sum())
    assert (biased - exact).abs().max() > 1e-2, "k3 is not expected to be exact"


def test_offpolicy_mask_drops_stale_sequences_with_negative_advantage_only() -> None:
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    logp = torch.tensor([-1.0, -0.2, -1.0, -0.2, -0.1, -0.3])  # gaps of 0.6, 0.6 and 0.2 on average
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    advantage = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    keep = loss.offpolicy_mask(logp, old, advantage, sequence, 0.5)
    assert keep.tolist() == [False, False, True, True, True, True]


def test_masked_sequences_keep_their_kl() -> None:
    logp, ref = torch.tensor([-2.0], dtype=F64), torch.tensor([-1.0], dtype=F64)
    coef = torch.tensor([1.0], dtype=F64)
    advantage = torch.tensor([-1.0], dtype=F64)
    value, figures = _grpo(logp, ref=ref, kl_coef_M=coef, advantage_M=advantage, offpolicy_delta=0.5)
    wanted = math.exp(-2.0) * (math.e - 1 - 1)
    assert value.item() == pytest.approx(wanted)
    assert figures["offpolicy_masked"] == 1


def test_advantage_is_reward_minus_group_mean() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([1.0, 1.0, 1.0]) is None
    assert advantages([0.3]) is None


def test_weights_by_hand() -> None:
    long, short = tiny.sample("a", 20, group_size=2), tiny.sample("b", 8, group_size=2, weight=3.0)
    assert [int(s.mask.sum()) for s in (long, short)] == [10, 4]
    sequence = packing.token_weights([long, short], "sequence", num_groups=5)
    assert sequence == pytest.approx([1 / (5 * 2 * 10), 3 / (5 * 2 * 4)])
    token = packing.token_weights([long, short], "token", num_groups=5)
    assert token == pytest.approx([1 / 14, 3 / 14])


def test_packing_loses_and_doubles_nothing() -> None:
    samples = [tiny.sample(str(i), 3 + (7 * i) % 29, seed=i) for i in range(23)]
    batches = packing.pack(samples, [float(i) for i in range(23)], tokens_per_batch=64)
    assert sorted(id for b in batches for id in b.ids) == sorted(s.id for s in samples)
    by_id = {s.id: s for s in samples}
    for batch in batches:
        starts = batch.cu_seqlens_S
        assert starts[-1] == len(batch.tokens_T)
        longest = int(np.diff(starts).max())
        assert len(batch.ids) == 1 or len(batch.ids) * longest <= 64
        for id, start, end in zip(batch.ids, starts[:-1], starts[1:], strict=True):
            sample = by_id[id]
            assert (batch.tokens_T[start:end] == sample.tokens).all()
            assert (batch.positions_T[start:end] == np.arange(end - start)).all()
            assert (batch.weight_T[start:end] == int(id) * sample.mask).all()


def test_a_sample_longer_than_the_limit_gets_its_own_batch() -> None:
    batches = packing.pack([tiny.sample("long", 100), tiny.sample("short", 5)], [1, 1], tokens_per_batch=64)
    assert sorted(len(b.tokens_T) for b in batches) == [5, 100]
