"""The losses of post-training on the log-probs of valid tokens: GRPO with its stabilisers.

Every function is the paper's equation and nothing else; weights (1/G, 1/|o|, domain) come in from
packing.py, so that a loss is a plain weighted sum. Next: learner.py.

Shape letters: M valid tokens of a batch.
"""

from typing import Literal

import torch
from torch import Tensor


def kl_unbiased(logp_M: Tensor, old_M: Tensor, ref_M: Tensor) -> Tensor:
    """V3.2 Eq. 7: (pi / pi_old) (pi_ref / pi - log(pi_ref / pi) - 1), per token.

    The ratio pi / pi_old is *not* detached: its gradient is what makes the estimator's expected gradient
    equal to that of KL(pi || pi_ref), even where the ratio is 1.
    """
    delta_M = ref_M - logp_M
    return (logp_M - old_M).exp() * (delta_M.exp() - delta_M - 1.0)


def kl_k3(logp_M: Tensor, ref_M: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1: the biased estimator of the original GRPO, for comparison."""
    delta_M = ref_M - logp_M
    return delta_M.exp() - delta_M - 1.0


def clipped_objective(logp_M: Tensor, old_M: Tensor, advantage_M: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A), V3.2 Eq. 5."""
    ratio_M = (logp_M - old_M).exp()
    return torch.minimum(ratio_M * advantage_M, ratio_M.clamp(1 - clip, 1 + clip) * advantage_M)


def offpolicy_mask(
    logp_M: Tensor, old_M: Tensor, advantage_M: Tensor, sequence_M: Tensor, delta: float
) -> Tensor:
    """V3.2 Eq. 9: 0 for every token of a sequence with A < 0 and mean log(pi_old / pi) > delta, else 1.

    old_M are the engine's log-probs, so that staleness and engine mismatch both count. Detached.
    """
    gap_M = (old_M - logp_M).detach()
    num = int(sequence_M.max()) + 1 if len(sequence_M) else 0
    total_S = gap_M.new_zeros(num).index_add(0, sequence_M, gap_M)
    count_S = gap_M.new_zeros(num).index_add(0, sequence_M, torch.ones_like(gap_M))
    mean_M = (total_S / count_S.clamp(min=1))[sequence_M]
    return ~((advantage_M < 0) & (mean_M > delta))


def grpo(
    logp_M: Tensor,
    old_M: Tensor,
    ref_M: Tensor | None,
    *,
    advantage_M: Tensor,
    weight_M: Tensor,
    kl_coef_M: Tensor,
    sequence_M: Tensor,
    clip: float,
    kl: Literal["unbiased", "k3"],
    offpolicy_delta: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (a weighted sum over tokens) and figures, each a sum over the tokens.

    The off-policy mask multiplies the policy term only; the KL term stays (V3.2 Eq. 8).
    """
    objective_M = clipped_objective(logp_M, old_M, advantage_M, clip)
    figures = {}
    if offpolicy_delta is not None:
        keep_M = offpolicy_mask(logp_M, old_M, advantage_M, sequence_M, offpolicy_delta)
        objective_M = objective_M * keep_M
        figures["offpolicy_masked"] = (~keep_M).sum()
    if ref_M is not None:
        kl_M = kl_unbiased(logp_M, old_M, ref_M) if kl == "unbiased" else kl_k3(logp_M, ref_M)
        objective_M = objective_M - kl_coef_M * kl_M
        figures["kl"] = kl_M.detach().sum()
    gap_M = (logp_M - old_M).detach()
    figures["logprob_gap"] = gap_M.abs().sum()
    figures["clipped"] = ((gap_M.exp() - 1).abs() > clip).sum()
    return -(weight_M * objective_M).sum(), figures
