"""Several learner processes as one: FSDP2 shards the model, every rank takes a part of each step's batches.

Every rank is handed all batches of a step and picks its own, so that all know the totals that losses are divided by
before the first forward pass. Gradients are *summed* over ranks: the weights of the tokens are those of the whole step
(packing.py). Several ranks may share each batch (sharing.py), and experts may stay where they are (dispatch.py). One
rank alone has no group, and none of this runs, unless it offloads: FSDP2 is what keeps parameters in host memory.
Next: learner.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from posttrain.config import Sharding
from posttrain.dispatch import spread_experts
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.schema import Batch
from posttrain.sharing import Sharing

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of the processes this one is."""

    rank: int
    size: int
    address: str
    """Where rank 0 listens, "tcp://host:port"."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass of this rank."""

    batch: Batch
    index: int | None
    """Of the batch in the step. None: the rank has no more batches, and only keeps the others company."""


class Group:
    """This process among the ranks of a learner."""

    def __init__(self, place: Place, *, device: str, timeout_s: float, context: int = 1) -> None:
        """Meet the others; they must come within timeout_s, as to everything they do together.

        `context` ranks next to each other share their batches.
        """
        self.rank, self.size = place.rank, place.size
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend, init_method=place.address, rank=place.rank, world_size=place.size, timeout=timeout
        )
        self._mesh: DeviceMesh = init_device_mesh(device, (place.size,))
        # Objects and snapshots go by the CPU, and a snapshot's thread must not meet what training says.
        self._objects, self.snapshots = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        self.sharing: Sharing | None = None
        if context > 1:
            blocks = [list(range(first, first + context)) for first in range(0, place.size, context)]
            groups = [dist.new_group(block, timeout=timeout) for block in blocks]  # each asks all ranks
            self.sharing = Sharing(groups[place.rank // context], place.rank % context, context)
        self._context = context

    @property
    def counts(self) -> bool:
        """Whether this rank's figures of a batch count: of those that share one, the first's."""
        return self.sharing is None or self.sharing.index == 0

    def passes(self, batches: Sequence[Batch]) -> list[Pass]:
        """The batches that this rank, or those it shares them with, run."""
        return passes(batches, self.rank // self._context, self.size // self._context)

    def close(self) -> None:
        """Leave; the process may join another group afterwards."""
        dist.destroy_process_group()

    def shard(self, model: DeepseekV32ForCausalLM, settings: Sharding, dtype: torch.dtype) -> None:
        """Cut every parameter over the ranks; a layer is whole, and in dtype, while it computes."""
        common: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if settings.offload else OffloadPolicy(),
            "ignored_params": spread_experts(model, self._mesh) if settings.spread_experts else None,
        }
        for layer in model.model.layers:
            fully_shard(layer, reshard_after_forward=settings.reshard, **common)
        # The head is wanted again at once: backward begins with it.
        fully_shard(model, reshard_after_forward=False, **common)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def collect(self, value: Value) -> list[Value]:
        """What every rank gives, in their order, on every rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._objects)
        return found


def passes(batches: Sequence[Batch], rank: int, size: int) -> list[Pass]:
    """A rank's batches, by tokens about as much as every other rank has; the same number for every rank.

    Longest first to the rank with the least: the fullest then has at most a third more than it had to have.
    """
    tokens = [len(batch.tokens_T) for batch in batches]
    parts: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for i in sorted(range(len(batches)), key=lambda i: (-tokens[i], i)):
        least = load.index(min(load))
        parts[least].append(i)
        load[least] += tokens[i]
    mine = [Pass(batches[i], i) for i in sorted(parts[rank])]
    idle = Pass(_weightless(batches[tokens.index(min(tokens))]), None)
    return mine + [idle] * (max(map(len, parts)) - len(mine))


def in_order(parts: Sequence[Mapping[int, Value]]) -> list[Value]:
    """One list from what the ranks know of their batches, by index."""
    merged = {index: value for part in parts for index, value in part.items()}
    return [merged[index] for index in range(len(merged))]


def total(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """The sum of every figure (or tensor) over the ranks, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def _weightless(batch: Batch) -> Batch:
    return replace(batch, weight_T=np.zeros_like(batch.weight_T), ids=())
