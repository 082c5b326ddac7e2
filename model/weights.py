"""Handing the learner's weights to engines: a checksum says that what arrived, and what an engine holds, is what was sent.

An engine checks before it copies anything and again afterwards, so that it never serves a mixture. Left out: transports;
on one machine the tensors lie in Ray's shared memory. Next: ../rollouts/torch_engine.py, ../rollouts/vllm/engine.py.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PERIOD = 65_521
"""A prime: two rows of a matrix never have the same weights, so that swapping them is seen."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters and buffers that a checkpoint holds, and their checksum."""

    tensors: dict[str, Tensor]
    checksum: str


def pack(tensors: dict[str, Tensor]) -> Weights:
    """Weights as they are now, on the CPU."""
    return Weights({name: t.detach().cpu() for name, t in tensors.items()}, checksum(tensors))


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes, types and every bit; the same on every device."""
    names = sorted(tensors)
    sums = [_sums(tensors[name]) for name in names]
    told = [f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}" for name in names]
    return hashlib.sha256(repr((told, _on_host(sums))).encode()).hexdigest()


def verify(weights: Weights, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless the weights are all of those, as they were sent, and finite."""
    if differing := sorted(shapes.keys() ^ weights.tensors.keys()):
        raise ValueError(
            f"weights refused: {len(differing)} names differ from the engine's, {differing[0]} first"
        )
    if checksum(weights.tensors) != weights.checksum:
        raise ValueError("weights refused: their checksum is not the learner's; they changed on the way")
    for name, tensor in weights.tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"weights refused: {name} is {tuple(tensor.shape)}, the engine's {tuple(shapes[name])}"
            )
    floats = [name for name, tensor in weights.tensors.items() if tensor.is_floating_point()]
    finite = [weights.tensors[name].isfinite().all() for name in floats]
    for name, fine in zip(floats, _on_host(finite), strict=True):
        if not fine:
            raise ValueError(f"weights refused: {name} is not finite")


@torch.no_grad()
def take(model: nn.Module, weights: Weights) -> None:
    """Copy the weights into a model, and compare.

    Raises ValueError, with the model as it was, if they are incomplete, changed on the way or not finite; and
    RuntimeError if the model does not hold them afterwards.
    """
    held = model.state_dict()
    verify(weights, {name: tensor.shape for name, tensor in held.items()})
    for name, tensor in weights.tensors.items():
        held[name].copy_(tensor)
    if checksum(held) != weights.checksum:
        raise RuntimeError(
            "the engine does not hold the weights that it was sent; its types differ, or memory is bad"
        )


class Asleep:
    """A model without the memory of what a checkpoint holds, until wake(); its parameters stay the same objects."""

    def __init__(self, model: nn.Module) -> None:
        held = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        self._shapes = [(tensor, tensor.shape) for tensor in held.values()]
        for tensor, _ in self._shapes:
            tensor.data = tensor.data.new_empty(0)

    def wake(self) -> None:
        """Memory again, with whatever lies there."""
        for tensor, shape in self._shapes:
            tensor.data = tensor.data.new_empty(shape)


def _on_host(values: Sequence[Tensor]) -> list[Any]:
    """Small tensors of one shape as lists: one wait for the device, not one for each."""
    return torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []


def _sums(tensor: Tensor) -> Tensor:
    """Two sums of the bits, int64 [2]: plain, and weighted by place so that order counts. Wrapping adds are exact.

    Weights repeat after _PERIOD places, so that one pass sums the columns and no copy in int64 is made.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().reshape(-1).view(words)
    width = max(1, min(len(flat), _PERIOD))
    end = len(flat) // width * width
    columns = flat[:end].view(-1, width).sum(0, dtype=torch.int64)
    columns[: len(flat) - end] += flat[end:]
    place = torch.arange(1, width + 1, device=flat.device)
    return torch.stack((columns.sum(), (columns * place).sum()))
