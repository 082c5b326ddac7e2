"""Tensors that are cut over ranks, and those that are not: one way to the whole and back. Next: muon.py, group.py."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """A tensor from all its shards; every rank must ask for it. One that is not cut is itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards wait in host memory, and are collected on the device.
    on_device = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(on_device, DTensor), "moving it keeps it cut"
    return on_device.full_tensor()


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank has whole, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    part = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim).redistribute(
        placements=like.placements
    )
    return part.to(like.device)
