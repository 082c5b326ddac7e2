"""How often the k-th and the next key of a query have the same score, so that a rule, not the indexer, chooses.

Where engine and learner broke such ties differently they would attend to other keys. Scores are made anew in fp32 for some
queries, since the kernels that select leave none. Next: agree.py, learner.py.

Shape letters: T tokens, F their places in D documents, S queries looked at, J indexer heads, I indexer head size.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.backend import TORCH
from posttrain.model.context import PackedContext
from posttrain.model.indexer import LightningIndexer
from posttrain.model.shared import SharedContext

SAMPLE = 64
"""Queries of a pass that are looked at, evenly spread over those that leave a key out."""


class Ties:
    """Watches the indexers of a model while a packed pass runs in its `with` block."""

    def __init__(self, model: Any, context: PackedContext) -> None:
        """Of a pass of the model in this context."""
        starts_D, lengths_D = context.cu_seqlens_S[:-1], context.cu_seqlens_S.diff()
        starts_F = starts_D.repeat_interleave(lengths_D)
        at_F = torch.arange(len(starts_F), device=starts_F.device)
        token_F = context.token_F if isinstance(context, SharedContext) else at_F
        place_T = context.place_T if isinstance(context, SharedContext) else at_F
        topk = int(model.config.index_topk)
        choosing = (place_T - starts_F[place_T] >= topk).nonzero()[:, 0]
        step = -(-len(choosing) // SAMPLE) or 1
        self._queries_S, self._topk = choosing[::step], topk
        place_S = place_T[self._queries_S]
        seen_SF = (at_F <= place_S[:, None]) & (at_F >= starts_F[place_S][:, None])
        seen_ST = torch.zeros(len(place_S), len(place_T), device=starts_F.device)
        self._seen_ST = seen_ST.index_add_(1, token_F, seen_SF.float()) > 0
        self._indexers = [module for module in model.modules() if isinstance(module, LightningIndexer)]
        self._tied: list[Tensor] = []
        self._hooks: list[Any] = []

    @property
    def share(self) -> float:
        """Of the queries looked at, in all layers; 0 where none leaves a key out."""
        return float(torch.stack(self._tied).float().mean()) if self._tied else 0.0

    def __enter__(self) -> Self:
        if len(self._queries_S):
            self._hooks = [indexer.register_forward_hook(self._look) for indexer in self._indexers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _look(self, indexer: LightningIndexer, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        q_TJI, k_TI, w_TJ = output
        q_SJI, w_SJ = q_TJI[self._queries_S], w_TJ[self._queries_S]
        q_SJI, k_TI = indexer.scored(q_SJI, indexer.stored(k_TI, TORCH))
        scores_ST = reference.index_scores(q_SJI[None], k_TI[None], w_SJ[None])[0]
        best = scores_ST.masked_fill(~self._seen_ST, float("-inf")).topk(self._topk + 1, dim=-1).values
        self._tied.append(best[:, -2] == best[:, -1])
