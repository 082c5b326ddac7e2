"""Log-probs of tokens, over the whole vocabulary or over what top-p and top-k had left, and entropy.

Keep Sampling Mask (V3.2 3.1): a token that was drawn from a cut distribution has the probability that it had
there, for the policy, the old policy and the reference alike; the set is the engine's and is not found anew, since
another policy would cut elsewhere. Next: loss.py.

Shape letters: M valid tokens, V vocabulary, R kept vocabulary entries of all tokens together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model.arch import target_logprobs


@dataclass(frozen=True, slots=True)
class KeptIds:
    """Ragged: which vocabulary entries some tokens of a batch were drawn from."""

    masked_N: Tensor
    """Those of the M tokens that have a set, ascending, int64."""
    rows_R: Tensor
    """Where in masked_N the owner of each entry stands, int64."""
    ids_R: Tensor
    """int64."""


def sampled_logprobs(
    logits_MV: Tensor, targets_M: Tensor, temperature: float, kept: KeptIds | None
) -> Tensor:
    """log pi(target), fp32 [M], under softmax(logits / temperature) cut to the kept entries where there are any."""
    if kept is None:
        return target_logprobs(logits_MV, targets_M, temperature)
    masked_N = kept.masked_N
    some = kept_logprobs(logits_MV, targets_M, temperature, kept)
    if len(masked_N) == len(targets_M):
        return some
    rest = torch.ones_like(targets_M, dtype=torch.bool).index_fill(0, masked_N, False).nonzero()[:, 0]
    whole = target_logprobs(logits_MV.index_select(0, rest), targets_M.index_select(0, rest), temperature)
    return torch.cat((some, whole)).index_select(0, torch.cat((masked_N, rest)).argsort())


def kept_logprobs(logits_MV: Tensor, targets_M: Tensor, temperature: float, kept: KeptIds) -> Tensor:
    """log softmax over each masked token's kept entries, at its target, fp32 [N]; no [M, V] mask exists."""
    num_masked, vocabulary = len(kept.masked_N), logits_MV.shape[1]
    at_N = kept.masked_N * vocabulary
    wanted = torch.cat((at_N[kept.rows_R] + kept.ids_R, at_N + targets_M[kept.masked_N]))
    picked = logits_MV.reshape(-1).index_select(0, wanted).float() / temperature
    kept_R, target_N = picked.split((len(kept.ids_R), num_masked))
    largest_N = kept_R.new_full((num_masked,), float("-inf"))
    largest_N = largest_N.scatter_reduce(0, kept.rows_R, kept_R.detach(), "amax")
    total_N = kept_R.new_zeros(num_masked).index_add(0, kept.rows_R, (kept_R - largest_N[kept.rows_R]).exp())
    logp_N: Tensor = target_N - largest_N - total_N.log()
    return logp_N


def entropy(logits_MV: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), fp32 [M], of the whole vocabulary: what a cut hides counts."""
    logp_MV = torch.log_softmax(logits_MV.float() / temperature, dim=-1)
    return -(logp_MV.exp() * logp_MV).sum(-1)
