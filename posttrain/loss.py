"""The losses of reinforcement learning on the log-probs of valid tokens: policy terms, KL estimators, masks.

Every function is one equation and nothing else; weights (1/G, 1/|o|, domain) come in from packing.py, so that
a loss is a plain weighted sum. Five policies appear, and each function says which it takes:

    pi          the current weights; the only one with a gradient
    pi_engine   what the tokens were drawn from: the engine's log-probs, recorded with the rollout
    pi_old      pi_engine (loss.old_policy = "engine"), or the learner's own log-probs before the first update
                of the step ("recomputed"): the denominator of the policy ratio
    pi_ref      a frozen copy of the policy that the stage started from: the reference of the KL
    pi_teacher  the specialist of the token's domain, frozen: what on-policy distillation pulls towards

Next: logprob.py for where log-probs come from, learner.py.

Shape letters: M valid tokens of a batch, S sequences in it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain import config
from posttrain.device_batch import DeviceBatch
from posttrain.kernels.lanes import send
from posttrain.logprob import Read
from posttrain.schema import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """What is known of the valid tokens of a batch; everything [M] and fp32 but sequence_M (int64)."""

    logp_M: Tensor
    """log pi, with its gradient."""
    engine_M: Tensor
    old_M: Tensor
    ref_M: Tensor | None
    """None: no KL."""
    entropy_M: Tensor | None
    """Entropy of pi in nats, with its gradient; None: no bonus."""
    advantage_M: Tensor
    weight_M: Tensor
    kl_coef_M: Tensor
    low_M: Tensor
    """The ratio is clipped at 1 - low and 1 + high."""
    high_M: Tensor
    sequence_M: Tensor
    """Which sequence of the batch a token belongs to, 0 .. S - 1."""
    teacher_M: Tensor | None = None
    """log pi_teacher of the token: distillation by the sampled tokens."""
    teacher_kl_M: Tensor | None = None
    """D_KL(pi || pi_teacher) over the vocabulary, with its gradient: distillation by whole distributions."""
    teacher_coef: float = 0.0


def values(
    batch: Batch,
    tensors: DeviceBatch,
    policy: Read,
    settings: config.Loss,
    *,
    ref_M: Tensor | None,
    teacher_M: Tensor | None = None,
    teacher_coef: float = 0.0,
) -> Values:
    """The values of a batch of which the policy's log-probs were just read."""
    logp_M = policy.logp_M

    def valid(values_T: NDArray[np.float32]) -> Tensor:
        return send(torch.from_numpy(values_T[batch.mask_T]), logp_M.device)

    engine_M = valid(batch.logprobs_T)
    if settings.old_policy == "engine":
        old_M = engine_M
    else:  # before the first update the old policy is the current one
        old_M = logp_M.detach() if batch.old_logprobs_T is None else valid(batch.old_logprobs_T)
    high = settings.clip if settings.clip_high is None else settings.clip_high
    clip_S2 = np.where(np.isnan(batch.clip_S2), np.array([settings.clip, high], np.float32), batch.clip_S2)
    clip_2M = send(torch.from_numpy(clip_S2), logp_M.device)[tensors.sequence_M].T
    return Values(
        logp_M=logp_M,
        engine_M=engine_M,
        old_M=old_M,
        ref_M=ref_M,
        entropy_M=policy.entropy_M,
        advantage_M=valid(batch.advantage_T),
        weight_M=tensors.weight_M,
        kl_coef_M=valid(batch.kl_coef_T),
        low_M=clip_2M[0],
        high_M=clip_2M[1],
        sequence_M=tensors.sequence_M,
        teacher_M=teacher_M,
        teacher_kl_M=policy.teacher_kl_M,
        teacher_coef=teacher_coef,
    )


def policy_loss(values: Values, settings: config.Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (a weighted sum over tokens) and figures, each a sum over the tokens.

    The correction and the off-policy mask multiply the policy term only; the KL stays (V3.2 Eq. 8).
    """
    v = values if values.teacher_M is None else with_teacher_advantage(values)
    log_ratio_M = v.logp_M - v.old_M
    if settings.policy == "gspo":
        log_ratio_M = sequence_mean(log_ratio_M, v.sequence_M)
    ratio_M = log_ratio_M.exp()
    if settings.policy == "cispo":
        objective_M = cispo_objective(v.logp_M, ratio_M, v.advantage_M, v.high_M)
    else:
        objective_M = clipped_objective(ratio_M, v.advantage_M, v.low_M, v.high_M)
    figures = {
        "clipped": _clipped(ratio_M.detach(), v, settings).sum(),
        "surprise": -v.logp_M.detach().sum(),
    }
    if settings.correction != "none":
        correct = truncated_correction if settings.correction == "truncate" else masked_correction
        correction_M = correct(v.old_M, v.engine_M, settings.correction_cap)
        objective_M = objective_M * correction_M
        figures["correction"] = correction_M.sum()
    if settings.offpolicy_delta is not None:
        keep_M = offpolicy_mask(v.logp_M, v.engine_M, v.advantage_M, v.sequence_M, settings.offpolicy_delta)
        objective_M = objective_M * keep_M
        figures["offpolicy_masked"] = (~keep_M).sum()
    if v.ref_M is not None:
        kl_M = kl(settings.kl, v.logp_M, v.engine_M, v.ref_M)
        objective_M = objective_M - v.kl_coef_M * kl_M
        figures["kl"] = kl_M.detach().sum()
    if v.entropy_M is not None:
        objective_M = objective_M + settings.entropy_coef * v.entropy_M
        figures["entropy"] = v.entropy_M.detach().sum()
    if v.teacher_kl_M is not None:
        objective_M = objective_M - v.teacher_coef * v.teacher_kl_M
        figures["teacher_kl"] = v.teacher_kl_M.detach().sum()
    elif v.teacher_M is not None:
        figures["teacher_kl"] = (v.logp_M.detach() - v.teacher_M).sum()
    return -(v.weight_M * objective_M).sum(), figures


def with_teacher_advantage(v: Values) -> Values:
    """The advantage less coef * log(pi / pi_teacher) of the token, detached.

    On-policy the expected gradient of the policy term is then less that of coef * D_KL(pi || pi_teacher) at each token,
    since E[log(pi / q) grad log pi] = grad sum_v pi log(pi / q). Ratio, clip, correction and off-policy mask apply to it
    as to any advantage. Added to rewards it is a bonus of the token, not of the sequence.
    """
    assert v.teacher_M is not None, "a batch without a teacher"
    behind_M = v.logp_M.detach() - v.teacher_M
    return replace(v, advantage_M=v.advantage_M - v.teacher_coef * behind_M)


def clipped_objective(ratio_M: Tensor, advantage_M: Tensor, low_M: Tensor, high_M: Tensor) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A): V3.2 Eq. 5 where low = high; DAPO Eq. 8 where high > low.

    r = pi / pi_old of the token (GRPO, Dr.GRPO, DAPO) or of its sequence (GSPO).
    """
    clipped_M = torch.minimum(torch.maximum(ratio_M, 1 - low_M), 1 + high_M)
    return torch.minimum(ratio_M * advantage_M, clipped_M * advantage_M)


def sequence_mean(values_M: Tensor, sequence_M: Tensor) -> Tensor:
    """The mean over each token's sequence, at every token, with its gradient.

    Of log(pi / pi_old) it is the log of GSPO's ratio s_i = (pi(o) / pi_old(o))^(1/|o|), GSPO Eq. 7.
    """
    num = int(sequence_M.max()) + 1 if len(sequence_M) else 0
    total_S = values_M.new_zeros(num).index_add(0, sequence_M, values_M)
    count_S = values_M.new_zeros(num).index_add(0, sequence_M, torch.ones_like(values_M))
    return (total_S / count_S.clamp(min=1))[sequence_M]


def cispo_objective(logp_M: Tensor, ratio_M: Tensor, advantage_M: Tensor, high_M: Tensor) -> Tensor:
    """sg(min(r, 1 + high)) A log pi, r = pi / pi_old: no token loses its gradient (MiniMax-M1 Eq. 4 and 5).

    The bound below is left out, as there.
    """
    return torch.minimum(ratio_M, 1 + high_M).detach() * advantage_M * logp_M


def truncated_correction(old_M: Tensor, engine_M: Tensor, cap: float) -> Tensor:
    """min(w, cap) with w = pi_old / pi_engine, pi_old recomputed by the learner; detached (TIS)."""
    return (old_M - engine_M).detach().exp().clamp(max=cap)


def masked_correction(old_M: Tensor, engine_M: Tensor, cap: float) -> Tensor:
    """w = pi_old / pi_engine, pi_old recomputed by the learner, where 1 / cap <= w <= cap, else 0; detached (MIS)."""
    weight_M = (old_M - engine_M).detach().exp()
    return weight_M * ((weight_M >= 1 / cap) & (weight_M <= cap))


def offpolicy_mask(
    logp_M: Tensor, engine_M: Tensor, advantage_M: Tensor, sequence_M: Tensor, delta: float
) -> Tensor:
    """V3.2 Eq. 9: 0 for every token of a sequence with A < 0 and mean log(pi_engine / pi) > delta, else 1.

    Always against the engine's log-probs, so that staleness and engine mismatch both count. Detached.
    """
    mean_M = sequence_mean((engine_M - logp_M).detach(), sequence_M)
    return ~((advantage_M < 0) & (mean_M > delta))


def kl(kind: str, logp_M: Tensor, engine_M: Tensor, ref_M: Tensor) -> Tensor:
    """The estimator of D_KL(pi || pi_ref) of that name, per token."""
    if kind == "unbiased":
        return kl_unbiased(logp_M, engine_M, ref_M)
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[kind](logp_M, ref_M)


def kl_unbiased(logp_M: Tensor, engine_M: Tensor, ref_M: Tensor) -> Tensor:
    """V3.2 Eq. 7: (pi / pi_engine) (pi_ref / pi - log(pi_ref / pi) - 1), per token.

    The ratio is against what the tokens were drawn from, whatever pi_old the policy term has, and per token
    also beside GSPO. It is *not* detached: its gradient is what makes the estimator's expected gradient equal to
    that of KL(pi || pi_ref), even where the ratio is 1.
    """
    return (logp_M - engine_M).exp() * kl_k3(logp_M, ref_M)


def kl_k1(logp_M: Tensor, ref_M: Tensor) -> Tensor:
    """log(pi / pi_ref): unbiased as a number, but its gradient, that of log pi, is zero in expectation."""
    return logp_M - ref_M


def kl_k2(logp_M: Tensor, ref_M: Tensor) -> Tensor:
    """log(pi / pi_ref)^2 / 2: biased as a number; on-policy its expected gradient is that of KL(pi || pi_ref)."""
    return 0.5 * (logp_M - ref_M).square()


def kl_k3(logp_M: Tensor, ref_M: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1: the original GRPO's; on-policy unbiased as a number, not in its gradient."""
    delta_M = ref_M - logp_M
    return delta_M.exp() - delta_M - 1.0


def _clipped(ratio_M: Tensor, v: Values, settings: config.Loss) -> Tensor:
    above_M = ratio_M > 1 + v.high_M
    return above_M if settings.policy == "cispo" else above_M | (ratio_M < 1 - v.low_M)
