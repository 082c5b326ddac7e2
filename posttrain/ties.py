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
from posttrain.kernels.lanes import send
from posttrain.model.context import PackedContext
from posttrain.model.indexer import LightningIndexer
from posttrain.model.shared import SharedContext

SAMPLE = 64
"""Queries of a pass that are looked at, evenly spread over those that leave a key out."""


class Ties:
    """Watches the indexers of a model while a packed pass runs in its `with` block."""

    def __init__(self, model: Any, context: PackedContext) -> None:
        """Of a pass of the model in this context."""
        device, lengths_D = context.positions_T.device, torch.tensor(context.host_lengths)
        starts_F = (lengths_D.cumsum(0) - lengths_D).repeat_interleave(lengths_D)
        place_T = token_F = torch.arange(len(starts_F))
        if isinstance(context, SharedContext):
            token_F, place_T = context.on_host()
        topk = int(model.config.index_topk)
        # Which and how many queries are known on the host: nobody waits for the device.
        choosing = (place_T - starts_F[place_T] >= topk).nonzero()[:, 0]
        step = -(-len(choosing) // SAMPLE) or 1
        queries_S = choosing[::step]
        place_S, start_S = place_T[queries_S], starts_F[place_T[queries_S]]
        self._queries_S, place_S, start_S = (send(x, device) for x in (queries_S, place_S, start_S))
        self._topk, at_F = topk, torch.arange(len(starts_F), device=device)
        seen_SF = (at_F <= place_S[:, None]) & (at_F >= start_S[:, None])
        seen_ST = torch.zeros(len(place_S), len(place_T), device=device)
        self._seen_ST = seen_ST.index_add_(1, send(token_F, device), seen_SF.float()) > 0
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
