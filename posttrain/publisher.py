"""A learner's weights as others want them: whole, adapters merged, for a checkpoint or for engines.

Every rank takes part, because shards are gathered from all. Next: model/transport.py, learner.py.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from posttrain.config import Lora
from posttrain.group import Group
from posttrain.model import lora
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.transport import Audience, Offer, Sender
from posttrain.shards import whole


class Publisher:
    """Of one rank."""

    def __init__(
        self,
        model: DeepseekV32ForCausalLM,
        group: Group | None,
        adapters: Lora | None,
        sender: Sender,
        *,
        dtype: torch.dtype,
    ) -> None:
        """dtype is that of the engines' parameters; a learner may have finer ones (mixed precision)."""
        self._model, self._adapters, self._sender, self._dtype = model, adapters, sender, dtype
        self._buffers = {name for name, _ in model.named_buffers()}
        self._rank = 0 if group is None else group.rank

    def weights(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, on the CPU; of several ranks the first has it."""
        gathered = self._gathered(keep=self._rank == 0)
        return dict(self._merged((name, tensor.cpu()) for name, tensor in gathered))

    def offer(self, audience: Audience) -> Offer | None:
        """The same for engines, by the ways that are theirs; None from a rank that no engine takes it from."""
        wanted = self._sender.wants(audience, rank=self._rank)
        tensors: Iterable[tuple[str, Tensor]] = self._gathered(keep=wanted)
        if not wanted:
            assert not list(tensors), "gathered for the others"
            return None
        like = self._model.state_dict()
        if self._adapters is not None:
            like = dict(self._merged(tensors))
            tensors = like.items()
        empty = {
            name: torch.empty(tensor.shape, dtype=self._type(name, tensor), device="meta")
            for name, tensor in like.items()
        }
        cast = ((name, tensor.to(self._type(name, tensor))) for name, tensor in tensors)
        return self._sender.offer(empty, cast, audience, rank=self._rank)

    def _type(self, name: str, tensor: Tensor) -> torch.dtype:
        """An engine's; buffers, the biases of routers, keep theirs in every model."""
        return tensor.dtype if name in self._buffers else self._dtype

    @property
    def gpu(self) -> str:
        """The GPU's id; "" without one."""
        return self._sender.gpu

    def close(self) -> None:
        """Give up what engines read from."""
        self._sender.close()

    def _gathered(self, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """Every tensor from all its shards, one after another; those ranks that keep have them."""
        for name, tensor in self._model.state_dict().items():
            weight = whole(tensor.detach())
            if keep:
                yield name, weight

    def _merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        found = dict(tensors)
        if self._adapters is None or not found:
            return found.items()
        return lora.merged(found, rank=self._adapters.rank, alpha=self._adapters.alpha).items()
