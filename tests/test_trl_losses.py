"""Our policy losses against those of TRL 1.16.0 on the same log-probs, in fp64: values and gradients.

The numbers in trl_losses.json are TRL's own, made by benchmarks/trl_losses.py. TRL knows one old policy for ratio, KL and
off-policy mask, so that ours has the engine's log-probs for all three. Where the two differ on purpose, the test says how.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from posttrain import config, loss, packing

F64 = torch.float64
SAVED: dict[str, Any] = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
INPUTS: dict[str, Any] = SAVED["inputs"]
ENTROPY = {"entropy_coef": SAVED["entropy_coef"]}
MASK = {"offpolicy_delta": 0.1}
GSPO = {"policy": "gspo", "clip": 0.1, "clip_high": 0.15}
CISPO = {
    "policy": "cispo",
    "clip_high": 0.28,
    "norm": "token",
}  # TRL's epsilon_high is the bound itself, 1.28
DAPO = {"clip_high": 0.28, "norm": "token"}
OURS: dict[str, dict[str, Any]] = {
    "grpo": {"kl": "none"},
    "grpo, clip higher": {"kl": "none", "clip_high": 0.28},
    "grpo, k3": {"kl": "k3"},
    "grpo, unbiased": {"kl": "unbiased"},
    "grpo, mask": {"kl": "none"} | MASK,
    "grpo, unbiased, mask": {"kl": "unbiased"} | MASK,
    "dr_grpo": {"kl": "none", "norm": "constant"},
    "dr_grpo, k3": {"kl": "k3", "norm": "constant"},
    "dapo": {"kl": "none"} | DAPO,
    "dapo, k3, entropy": {"kl": "k3"} | DAPO | ENTROPY,
    "gspo": {"kl": "none"} | GSPO,
    "gspo, k3, mask": {"kl": "k3"} | GSPO | MASK,
    "cispo": {"kl": "none"} | CISPO,
    "cispo, unbiased, mask": {"kl": "unbiased"} | CISPO | MASK,
}
DIFFERENT: dict[str, dict[str, Any]] = {
    "grpo, entropy": {"kl": "none"} | ENTROPY,
    "gspo, unbiased": {"kl": "unbiased"} | GSPO,
}


def _ours(settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, log-probs and entropies; weights are those that packing gives to one group of five completions."""
    cfg = config.Loss(**settings)
    lengths = [len(row) for row in INPUTS["current"]]
    samples = [
        tiny.sample(str(i), 2 * n, group_size=len(lengths), length_budget=SAVED["budget"])
        for i, n in enumerate(lengths)
    ]
    assert [int(s.mask.sum()) for s in samples] == lengths
    weight_S = torch.tensor(packing.token_weights(samples, cfg.norm, num_groups=1), dtype=F64)
    sequence_M = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = {name: _flat(INPUTS[name]) for name in ("current", "old", "ref", "entropy")}
    logp_M, entropy_M = tokens["current"].requires_grad_(), tokens["entropy"].requires_grad_()
    values = loss.Values(
        logp_M=logp_M,
        engine_M=tokens["old"],
        old_M=tokens["old"],
        ref_M=None if cfg.kl == "none" else tokens["ref"],
        entropy_M=entropy_M if cfg.entropy_coef else None,
        advantage_M=torch.tensor(INPUTS["advantage"], dtype=F64)[sequence_M],
        weight_M=weight_S[sequence_M],
        kl_coef_M=torch.full_like(logp_M, 0.1),
        low_M=torch.full_like(logp_M, cfg.clip),
        high_M=torch.full_like(logp_M, cfg.clip if cfg.clip_high is None else cfg.clip_high),
        sequence_M=sequence_M,
    )
    return loss.policy_loss(values, cfg)[0], logp_M, entropy_M


def _flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=F64)


def test_every_case_is_compared() -> None:
    assert SAVED["made"].startswith("benchmarks/trl_losses.py, trl 1.16.0")
    assert SAVED["cases"].keys() == OURS.keys() | DIFFERENT.keys()


@pytest.mark.parametrize("name", OURS)
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    theirs = SAVED["cases"][name]
    value, logp_M, entropy_M = _ours(OURS[name])
    value.backward()
    assert value.item() == pytest.approx(theirs["loss"], abs=1e-12)
    torch.testing.assert_close(logp_M.grad, _flat(theirs["gradient"]), rtol=0, atol=1e-12)
    if theirs["entropy_gradient"] is None:
        assert entropy_M.grad is None
    else:
        torch.testing.assert_close(entropy_M.grad, _flat(theirs["entropy_gradient"]), rtol=0, atol=1e-12)


def test_the_inputs_clip_mask_and_tell_the_cases_apart() -> None:
    """Else the comparison would show little: both bounds bite, the mask takes some sequences, no two losses agree."""
    ratio_M = (_flat(INPUTS["current"]) - _flat(INPUTS["old"])).exp()
    assert (ratio_M < 0.8).any() and (ratio_M > 1.28).any()
    losses = sorted(case["loss"] for case in SAVED["cases"].values())
    assert min(b - a for a, b in pairwise(losses)) > 1e-5
    drifts = [
        sum(old) / len(old) - sum(now) / len(now)
        for old, now in zip(INPUTS["old"], INPUTS["current"], strict=True)
    ]
    masked = [a < 0 and d > 0.1 for a, d in zip(INPUTS["advantage"], drifts, strict=True)]
    assert 0 < sum(masked) < sum(a < 0 for a in INPUTS["advantage"])


def test_an_entropy_bonus_is_weighted_as_the_loss_is() -> None:
    """Ours counts in each token as the policy term does, 1 / (G |o|); TRL's is the mean over all tokens whatever the norm.

    With norm = "token" the two are one ("dapo, k3, entropy").
    """
    value, _, _ = _ours(DIFFERENT["grpo, entropy"])
    plain, theirs = SAVED["cases"]["grpo"]["loss"], SAVED["cases"]["grpo, entropy"]["loss"]
    rows, coef = INPUTS["entropy"], SAVED["entropy_coef"]
    assert theirs == pytest.approx(plain - coef * float(_flat(rows).mean()), abs=1e-12)
    of_sequences = sum(sum(row) / len(row) for row in rows) / len(rows)
    assert value.item() == pytest.approx(plain - coef * of_sequences, abs=1e-12)


def test_the_unbiased_kl_beside_gspo_has_the_tokens_own_ratio() -> None:
    """Eq. 7 is an expectation over tokens: pi / pi_engine of the token. TRL takes the sequence's ratio there (GSPO Eq. 7)."""
    value, _, _ = _ours(DIFFERENT["gspo, unbiased"])
    plain = SAVED["cases"]["gspo"]["loss"]
    own = theirs = 0.0
    for now, old, ref in zip(INPUTS["current"], INPUTS["old"], INPUTS["ref"], strict=True):
        of_sequence = math.exp((sum(now) - sum(old)) / len(now))
        for pi, pi_old, pi_ref in zip(now, old, ref, strict=True):
            k3 = math.exp(pi_ref - pi) - (pi_ref - pi) - 1
            own += math.exp(pi - pi_old) * k3 / (5 * len(now))
            theirs += of_sequence * k3 / (5 * len(now))
    assert value.item() == pytest.approx(plain + 0.1 * own, abs=1e-12)
    assert SAVED["cases"]["gspo, unbiased"]["loss"] == pytest.approx(plain + 0.1 * theirs, abs=1e-12)
    assert abs(own - theirs) > 1e-3
