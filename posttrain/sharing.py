"""Ranks that share every batch: each runs some of its tokens, all see the keys of all (context parallelism).

Per layer the latent entries and indexer keys of all tokens are collected, which for MLA is little: 576 + 128 numbers per
token at the size of DeepSeek-V3.2, whatever the number of heads. Losses are made of the log-probs of the whole batch
on every rank, since a sequence may lie on several; a rank's gradient is that of its own tokens. Next: group.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank runs of a batch of T tokens, M of which are predicted."""

    begin: int
    end: int
    """Its tokens are begin .. end - 1."""
    tokens: tuple[int, ...]
    """How many tokens each rank has."""
    first: int
    last: int
    """Of the M tokens first .. last - 1 are predicted from its own."""
    valid: tuple[int, ...]
    """How many of them each rank has."""


class Sharing:
    """This process among the ranks that share its batches."""

    def __init__(self, group: ProcessGroup, index: int, size: int) -> None:
        self._group, self.index, self.size = group, index, size

    def part(self, num_tokens: int, at_M: Tensor) -> Part:
        """The part of this rank; at_M are the tokens that the valid ones are predicted from, ascending.

        Raises ValueError for a batch with fewer tokens than ranks.
        """
        if num_tokens < self.size:
            raise ValueError(
                f"a batch of {num_tokens} tokens for {self.size} ranks; lower cluster.sharding.context"
            )
        cuts = [i * num_tokens // self.size for i in range(self.size + 1)]
        valid = torch.searchsorted(at_M, at_M.new_tensor(cuts)).tolist()
        (begin, end), (first, last) = (x[self.index : self.index + 2] for x in (cuts, valid))
        tokens, counts = (tuple(b - a for a, b in pairwise(x)) for x in (cuts, valid))
        return Part(begin, end, tokens, first, last, counts)

    def keys(self, x_T: Tensor, part: Part) -> Tensor:
        """Of every rank's tokens; a gradient goes back to the rank that the token is from, summed over all."""
        found: Tensor = _Collect.apply(x_T, self._group, part.tokens, self.index, True)
        return found

    def valid(self, x_M: Tensor, part: Part) -> Tensor:
        """Of every rank's valid tokens; the gradient of its own is that of this rank, since all have the same loss."""
        found: Tensor = _Collect.apply(x_M, self._group, part.valid, self.index, False)
        return found


class _Collect(torch.autograd.Function):
    """Pieces of several lengths, padded to the longest on their way."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, ctx.group, ctx.sizes, ctx.index, ctx.summed = args
        most = max(ctx.sizes)
        sent = x.new_zeros(most, *x.shape[1:])
        sent[: len(x)] = x
        got = [torch.empty_like(sent) for _ in ctx.sizes]
        dist.all_gather(got, sent, group=ctx.group)
        return torch.cat([piece[:n] for piece, n in zip(got, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pieces: Sequence[Tensor] = grads[0].split(ctx.sizes)
        own = pieces[ctx.index]
        if ctx.summed:
            most = max(ctx.sizes)
            sent = [own.new_zeros(most, *own.shape[1:], dtype=torch.float32) for _ in pieces]
            for piece, place in zip(pieces, sent, strict=True):
                place[: len(piece)] = piece
            got = torch.empty_like(sent[0])
            dist.reduce_scatter(got, sent, group=ctx.group)
            own = got[: len(own)].to(own.dtype)
        return own, None, None, None, None
