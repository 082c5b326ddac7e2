"""Log-probs of tokens, over the whole vocabulary or over what top-p and top-k had left, entropy, KL to a teacher.

Keep Sampling Mask (V3.2 3.1): a token that was drawn from a cut distribution has the probability that it had
there, for the policy, the old policy and the reference alike; the set is the engine's and is not found anew, since
another policy would cut elsewhere. The logits [M, V] of many tokens never exist together: those of a few at a time
do, and again in the backward pass. Next: loss.py.

Shape letters: M valid tokens, D hidden, V vocabulary, R kept vocabulary entries of all tokens together.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.kernels.invariant import products
from posttrain.model.arch import target_logprobs

MAX_LOGITS = 1 << 26
"""Logits that exist together: 256 MiB in fp32, three times that in the backward pass. More tokens at a time
gain nothing: 519 rows of a vocabulary of 129,280 are a product that keeps a GPU busy."""


@dataclass(frozen=True, slots=True)
class KeptIds:
    """Ragged: which vocabulary entries some tokens of a batch were drawn from."""

    masked_N: Tensor
    """Those of the M tokens that have a set, ascending, int64."""
    rows_R: Tensor
    """Where in masked_N the owner of each entry stands, int64."""
    ids_R: Tensor
    """int64."""

    def part(self, begin: int, end: int) -> "KeptIds | None":
        """Those of the tokens begin .. end - 1, counted from begin; None if none of them has a set."""
        first, last = torch.searchsorted(self.masked_N, self.masked_N.new_tensor([begin, end])).tolist()
        if first == last:
            return None
        low, high = torch.searchsorted(self.rows_R, self.rows_R.new_tensor([first, last])).tolist()
        return KeptIds(self.masked_N[first:last] - begin, self.rows_R[low:high] - first, self.ids_R[low:high])


class Hidden(NamedTuple):
    """Where a model's logits of the valid tokens come from."""

    x_MD: Tensor
    head_VD: Tensor


class Read(NamedTuple):
    """What is read off the logits, fp32 [M] each."""

    logp_M: Tensor
    """log pi(target)."""
    entropy_M: Tensor | None = None
    teacher_kl_M: Tensor | None = None
    """D_KL(pi || teacher) of the token's whole distribution."""


def head_logprobs(
    hidden: Hidden,
    targets_M: Tensor,
    temperature: float,
    kept: KeptIds | None,
    *,
    with_entropy: bool = False,
    teacher: Hidden | None = None,
    max_logits: int = MAX_LOGITS,
    invariant: bool = False,
) -> Read:
    """Log-probs of the targets, entropies if wanted, and the KL to the teacher where there is one.

    With `invariant` a token's bits do not depend on the others (kernels/invariant.py).
    """
    x_MD, head_VD = hidden
    models = 1 if teacher is None else 2
    rows = max(1, max_logits // (models * len(head_VD)))
    if len(x_MD) <= rows:
        return _of_rows(hidden, targets_M, temperature, kept, with_entropy, teacher, invariant)
    parts: list[Read] = []
    for begin in range(0, len(x_MD), rows):
        end = min(begin + rows, len(x_MD))
        kept_part = None if kept is None else kept.part(begin, end)
        teacher_part = None if teacher is None else Hidden(teacher.x_MD[begin:end], teacher.head_VD)
        own = Hidden(x_MD[begin:end], head_VD)
        given = (own, targets_M[begin:end], temperature, kept_part, with_entropy, teacher_part, invariant)
        parts.append(checkpoint(_of_rows, *given, use_reentrant=False, preserve_rng_state=False))
    return Read._make(None if some[0] is None else torch.cat(some) for some in zip(*parts, strict=True))


def _of_rows(
    hidden: Hidden,
    targets_M: Tensor,
    temperature: float,
    kept: KeptIds | None,
    with_entropy: bool,
    teacher: Hidden | None,
    invariant: bool,
) -> Read:
    with products(invariant=invariant):  # here: it is made again in the backward pass
        logits_MV = F.linear(*hidden)
    if not logits_MV.is_cuda:  # a GPU reads them as they are, and nothing writes them once more
        logits_MV = _at_least_fp32(logits_MV)
    return Read(
        sampled_logprobs(logits_MV, targets_M, temperature, kept),
        entropy(logits_MV, temperature) if with_entropy else None,
        None if teacher is None else reverse_kl(logits_MV, F.linear(*teacher), temperature),
    )


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
    picked = _at_least_fp32(logits_MV.reshape(-1).index_select(0, wanted)) / temperature
    kept_R, target_N = picked.split((len(kept.ids_R), num_masked))
    largest_N = kept_R.new_full((num_masked,), float("-inf"))
    largest_N = largest_N.scatter_reduce(0, kept.rows_R, kept_R.detach(), "amax")
    total_N = kept_R.new_zeros(num_masked).index_add(0, kept.rows_R, (kept_R - largest_N[kept.rows_R]).exp())
    logp_N: Tensor = target_N - largest_N - total_N.log()
    return logp_N


def entropy(logits_MV: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), fp32 [M], of the whole vocabulary: what a cut hides counts."""
    logp_MV = torch.log_softmax(_at_least_fp32(logits_MV) / temperature, dim=-1)
    return -(logp_MV.exp() * logp_MV).sum(-1)


def reverse_kl(logits_MV: Tensor, teacher_MV: Tensor, temperature: float) -> Tensor:
    """sum_v pi(v) log(pi(v) / teacher(v)), fp32 [M], both at the temperature and over the whole vocabulary.

    Exact, and so is its gradient: no token has to be drawn for it. What a cut hides counts, as in the entropy.
    """
    logp_MV = torch.log_softmax(_at_least_fp32(logits_MV) / temperature, dim=-1)
    teacher_logp_MV = torch.log_softmax(_at_least_fp32(teacher_MV) / temperature, dim=-1)
    return (logp_MV.exp() * (logp_MV - teacher_logp_MV)).sum(-1)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # softmax in fp32; fp64 is for tests
