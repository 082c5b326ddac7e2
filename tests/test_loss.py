"""The policy losses by hand (against TRL: test_trl_losses.py), the KL estimators against exact gradients, weights of packed batches."""

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from posttrain import config, loss, packing
from posttrain.advantage import advantages, overlong_penalty

F64 = torch.float64


def _loss(
    logp: torch.Tensor, settings: dict[str, Any] | None = None, **changes: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One sequence, old log-probs of 0, weights 1 / M, advantages of 1, no KL; `old` is also the engine's."""
    num = len(logp)
    cfg = config.Loss(**(settings or {}))
    old = changes.pop("old", torch.zeros(num, dtype=F64))
    fields: dict[str, Any] = {
        "engine_M": old,
        "old_M": old,
        "ref_M": None,
        "entropy_M": None,
        "advantage_M": torch.ones(num, dtype=F64),
        "weight_M": torch.full((num,), 1 / num, dtype=F64),
        "kl_coef_M": torch.zeros(num, dtype=F64),
        "low_M": torch.full((num,), cfg.clip, dtype=F64),
        "high_M": torch.full((num,), cfg.clip if cfg.clip_high is None else cfg.clip_high, dtype=F64),
        "sequence_M": torch.zeros(num, dtype=torch.long),
    }
    return loss.policy_loss(loss.Values(logp_M=logp, **(fields | changes)), cfg)


def _f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def _logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=F64).log().requires_grad_()


def _gradient(value: torch.Tensor, of: torch.Tensor) -> list[float]:
    (found,) = torch.autograd.grad(value, of)
    return found.tolist()


def test_three_tokens_by_hand() -> None:
    """Ratios 1.5, 0.9, 0.5 with advantages 2, 2, -1 and clip 0.2.

    Token 1: min(1.5 * 2, 1.2 * 2) = 2.4, clipped, no gradient. Token 2: 0.9 * 2 = 1.8.
    Token 3: min(-0.5, -0.8) = -0.8, clipped, no gradient. Weights 1/2, 1/4, 1/4.
    """
    logp = _logs(1.5, 0.9, 0.5)
    value, figures = _loss(logp, advantage_M=_f64(2, 2, -1), weight_M=_f64(0.5, 0.25, 0.25))
    assert value.item() == pytest.approx(-(1.2 + 0.45 - 0.2))
    assert _gradient(value, logp) == pytest.approx([0.0, -0.25 * 1.8, 0.0])
    assert figures["clipped"] == 2


def test_negative_advantage_with_a_large_ratio_is_not_clipped() -> None:
    value, _ = _loss(_logs(3.0), advantage_M=_f64(-1))
    assert value.item() == pytest.approx(3.0)


def test_clip_higher_lets_rising_tokens_rise_further() -> None:
    """Ratio 1.25 is above 1.2 and below 1.28: clipped to 1.2, or kept (DAPO Eq. 8). 0.75 is below 0.8 in both."""
    for high, wanted, gradient in ((None, 1.2, 0.0), (0.28, 1.25, -1.25)):
        logp = _logs(1.25)
        value, _ = _loss(logp, {"clip_high": high})
        assert value.item() == pytest.approx(-wanted)
        assert _gradient(value, logp) == pytest.approx([gradient])
    value, _ = _loss(_logs(0.75), {"clip_high": 0.28}, advantage_M=_f64(-1))
    assert value.item() == pytest.approx(0.8)


def test_gspo_by_hand() -> None:
    """Sequence 1 has ratios 2 and 0.5, s = sqrt(1) = 1; sequence 2 has 1.44 and 1, s = 1.2, clipped at 1.1.

    Weights 1/2 per token (1/|o|): min(s A, clip(s) A) = 3 for A = 3 and 1.1 for A = 1. The gradient of s A is
    s A / |o| at each token: 3 / 2 times 1/2 summed over two tokens.
    """
    logp = _logs(2.0, 0.5, 1.44, 1.0)
    value, figures = _loss(
        logp,
        {"policy": "gspo", "clip": 0.1},
        advantage_M=_f64(3, 3, 1, 1),
        weight_M=_f64(0.5, 0.5, 0.5, 0.5),
        sequence_M=torch.tensor([0, 0, 1, 1]),
    )
    assert value.item() == pytest.approx(-(3 + 1.1))
    assert _gradient(value, logp) == pytest.approx([-1.5, -1.5, 0.0, 0.0])
    assert figures["clipped"] == 2


def test_cispo_by_hand() -> None:
    """sg(min(r, 1.2)) A log pi with r = pi: 1.2 * 2 * log 1.5 and 0.5 * -1 * log 0.5; both keep a gradient."""
    logp = _logs(1.5, 0.5)
    value, figures = _loss(logp, {"policy": "cispo"}, advantage_M=_f64(2, -1), weight_M=_f64(1, 1))
    assert value.item() == pytest.approx(-(2.4 * math.log(1.5) - 0.5 * math.log(0.5)))
    assert _gradient(value, logp) == pytest.approx([-2.4, 0.5])
    assert figures["clipped"] == 1


def test_kl_term_by_hand() -> None:
    """pi = 0.5, pi_old = 0.4, pi_ref = 0.25: ratio 1.25 times (0.5 - log 0.5 - 1)."""
    logp, old, ref = (_logs(x).detach() for x in (0.5, 0.4, 0.25))
    wanted = 1.25 * (0.5 - math.log(0.5) - 1)
    assert loss.kl_unbiased(logp, old, ref).item() == pytest.approx(wanted)
    assert loss.kl_k3(logp, ref).item() == pytest.approx(0.5 - math.log(0.5) - 1)
    assert loss.kl_k1(logp, ref).item() == pytest.approx(math.log(2))
    assert loss.kl_k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    value, figures = _loss(logp, {"clip": 10.0}, old=old, ref_M=ref, kl_coef_M=_f64(0.1))
    assert value.item() == pytest.approx(-(1.25 - 0.1 * wanted))
    assert figures["kl"].item() == pytest.approx(wanted)


def test_the_unbiased_kl_is_against_the_engine_whatever_the_old_policy() -> None:
    logp, engine, old, ref = (_logs(x).detach() for x in (0.5, 0.4, 0.8, 0.25))
    for policy in ("grpo", "gspo", "cispo"):
        _, figures = _loss(
            logp,
            {"policy": policy, "old_policy": "recomputed"},
            engine_M=engine,
            old_M=old,
            ref_M=ref,
            kl_coef_M=_f64(0.1),
        )
        assert figures["kl"].item() == pytest.approx(1.25 * (0.5 - math.log(0.5) - 1))


@pytest.mark.parametrize("on_policy", [True, False])
def test_expected_gradients_of_the_kl_estimators(on_policy: bool) -> None:
    """Sum over the vocabulary with the probabilities that samples are drawn with, in fp64.

    "unbiased" is exact always, k2 on-policy only, k3 never, and k1 has none on-policy.
    """
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=F64, requires_grad=True)
    ref = torch.randn(7, dtype=F64).log_softmax(0)
    drawn = logits.detach() if on_policy else logits.detach() + 0.5 * torch.randn(7, dtype=F64)
    old = drawn.log_softmax(0)
    logp = logits.log_softmax(0)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        return found

    exact = gradient((logp.exp() * (logp - ref)).sum())
    errors = {
        kind: float((gradient((old.exp() * loss.kl(kind, logp, old, ref)).sum()) - exact).abs().max())
        for kind in ("unbiased", "k1", "k2", "k3")
    }
    assert errors["unbiased"] < 1e-12
    assert errors["k3"] > 1e-2
    assert (errors["k2"] < 1e-12) == on_policy
    if on_policy:
        assert gradient((old.exp() * loss.kl_k1(logp, ref)).sum()).abs().max() < 1e-12


def test_offpolicy_mask_drops_stale_sequences_with_negative_advantage_only() -> None:
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    logp = torch.tensor([-1.0, -0.2, -1.0, -0.2, -0.1, -0.3])  # gaps of 0.6, 0.6 and 0.2 on average
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    advantage = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    keep = loss.offpolicy_mask(logp, old, advantage, sequence, 0.5)
    assert keep.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("policy", ["grpo", "gspo", "cispo"])
def test_masked_sequences_keep_their_kl(policy: str) -> None:
    """Masked by the engine's log-prob (0), though the old policy (-2) is the current one."""
    value, figures = _loss(
        _f64(-2),
        {"policy": policy, "old_policy": "recomputed", "offpolicy_delta": 0.5},
        engine_M=_f64(0),
        old_M=_f64(-2),
        ref_M=_f64(-1),
        kl_coef_M=_f64(1),
        advantage_M=_f64(-1),
    )
    assert value.item() == pytest.approx(math.exp(-2.0) * (math.e - 1 - 1))
    assert figures["offpolicy_masked"] == 1


def test_corrections_by_hand() -> None:
    """pi_old / pi_engine = 3, 0.4, 0.9 with cap 2: truncated to 2, 0.4, 0.9; masked to 0, 0, 0.9."""
    old, engine = _logs(0.9, 0.2, 0.45).detach(), _logs(0.3, 0.5, 0.5).detach()
    assert loss.truncated_correction(old, engine, 2.0).tolist() == pytest.approx([2.0, 0.4, 0.9])
    assert loss.masked_correction(old, engine, 2.0).tolist() == pytest.approx([0.0, 0.0, 0.9])


def test_the_correction_weighs_the_policy_term_alone() -> None:
    """Ratio 1 everywhere, advantage 1: the term is the correction, 2 of 3 capped; k1's KL of log 2 stays whole."""
    logp = _logs(0.9)
    value, figures = _loss(
        logp,
        {"old_policy": "recomputed", "correction": "truncate", "kl": "k1"},
        old_M=logp.detach(),
        engine_M=_logs(0.3).detach(),
        ref_M=_logs(0.45).detach(),
        kl_coef_M=_f64(0.5),
    )
    assert value.item() == pytest.approx(-(2 - 0.5 * math.log(2)))
    assert _gradient(value, logp) == pytest.approx([-(2 - 0.5)]), "the correction has no gradient"
    assert figures["correction"].item() == pytest.approx(2.0)


def test_a_correction_needs_a_recomputed_old_policy() -> None:
    with pytest.raises(ValueError, match="already is against the engine"):
        config.Loss(correction="mask")


def test_entropy_bonus_lowers_the_loss_by_its_weight() -> None:
    plain, _ = _loss(_logs(1.0, 1.0))
    value, figures = _loss(_logs(1.0, 1.0), {"entropy_coef": 0.25}, entropy_M=_f64(2.0, 1.0))
    assert (plain - value).item() == pytest.approx(0.25 * 1.5)
    assert figures["entropy"].item() == pytest.approx(3.0)


def test_a_step_is_the_papers_objective() -> None:
    """V3.2 Eq. 5 to 9 as nested sums over groups, completions and tokens, in plain numbers."""
    rng = np.random.default_rng(3)
    lengths = [[3, 5], [2, 4, 1]]  # two tasks with 2 and 3 completions
    rewards = [[1.0, 0.0], [0.0, 0.25, 1.0]]
    eps, beta, delta = 0.2, 0.3, 0.1
    logs = [[rng.normal(-1, 0.4, (3, n)) for n in row] for row in lengths]
    objective, masked = 0.0, 0
    for group, reward in zip(logs, rewards, strict=True):
        mean = sum(reward) / len(reward)
        for (pi, old, ref), r in zip(group, reward, strict=True):
            advantage, num = r - mean, len(pi)  # Eq. 5: no standard deviation
            drift = sum(old[t] - pi[t] for t in range(num)) / num
            keep = 0 if advantage < 0 and drift > delta else 1  # Eq. 9
            masked += num * (1 - keep)
            for t in range(num):
                ratio = math.exp(pi[t] - old[t])
                clipped = min(max(ratio, 1 - eps), 1 + eps)
                policy = min(ratio * advantage, clipped * advantage) * keep  # Eq. 5 and 8
                kl = ratio * (math.exp(ref[t] - pi[t]) - (ref[t] - pi[t]) - 1)  # Eq. 7
                objective += (policy - beta * kl) / (len(lengths) * len(reward) * num)
    samples = [
        tiny.sample(f"{i}/{j}", 2 * n, group_size=len(row), advantage=found[j])
        for i, (row, reward) in enumerate(zip(lengths, rewards, strict=True))
        for found in [advantages(reward)]
        if found is not None
        for j, n in enumerate(row)
    ]
    weights = packing.token_weights(samples, "sequence", num_groups=2)
    sizes = torch.tensor([int(s.mask.sum()) for s in samples])
    every = torch.from_numpy(np.concatenate([part for group in logs for part in group], axis=1))
    value, figures = _loss(
        every[0],
        {"clip": eps, "offpolicy_delta": delta},
        old=every[1],
        ref_M=every[2],
        kl_coef_M=torch.full((int(sizes.sum()),), beta, dtype=F64),
        advantage_M=_f64(*(s.advantage for s in samples)).repeat_interleave(sizes),
        weight_M=_f64(*weights).repeat_interleave(sizes),
        sequence_M=torch.arange(len(samples)).repeat_interleave(sizes),
    )
    assert 0 < masked < sizes.sum() and figures["offpolicy_masked"] == masked
    assert value.item() == pytest.approx(-objective, rel=1e-12)


def test_advantage_is_reward_minus_group_mean() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([1.0, 1.0, 1.0]) is None
    assert advantages([0.3]) is None


def test_advantage_over_the_standard_deviation() -> None:
    """Mean 0.3125, squares of the rest sum to 0.671875, std = sqrt(0.671875 / 3) = 0.473242; as TRL 1.16 has it."""
    found = advantages([1.0, 0.0, 0.0, 0.25], divide_by_std=True)
    assert found == pytest.approx([1.4524371, -0.6601987, -0.6601987, -0.1320397], abs=1e-7)


def test_overlong_penalty_by_hand() -> None:
    """Budget 100, buffer 20: nothing up to 80 tokens, -0.5 at 90, -1 at 100 and beyond (DAPO Eq. 13)."""
    penalties = [overlong_penalty(n, budget=100, buffer=20) for n in (1, 80, 81, 90, 100, 130)]
    assert penalties == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert overlong_penalty(100, budget=100, buffer=0) == 0


def test_weights_by_hand() -> None:
    fields: dict[str, Any] = {"group_size": 2, "length_budget": 16}
    long, short = tiny.sample("a", 20, **fields), tiny.sample("b", 8, weight=3.0, **fields)
    assert [int(s.mask.sum()) for s in (long, short)] == [10, 4]
    sequence = packing.token_weights([long, short], "sequence", num_groups=5)
    assert sequence == pytest.approx([1 / (5 * 2 * 10), 3 / (5 * 2 * 4)])
    token = packing.token_weights([long, short], "token", num_groups=5)
    assert token == pytest.approx([1 / 14, 3 / 14])
    constant = packing.token_weights([long, short], "constant", num_groups=5)
    assert constant == pytest.approx([1 / (5 * 2 * 16), 3 / (5 * 2 * 16)])


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
