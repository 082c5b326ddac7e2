"""Experts spread over ranks: tokens travel to the ranks that have their experts, and the results back.

Every rank keeps a share of the routed experts of each layer, whole, and never the others: nothing of them is collected,
and their gradients are complete where they are, since the tokens of all ranks come by. Gates stay where the
token is. Left out: balance between ranks, which is that of the experts. Next: group.py.

Shape letters: T tokens, E experts per token, S = T E rows to send, R rows that came, D hidden, X experts, F MLP width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from posttrain.kernels.experts import run_experts
from posttrain.model.arch import DeepseekV32ForCausalLM

_WEIGHTS = ("gate_up_proj", "down_proj")


def spread_experts(model: DeepseekV32ForCausalLM, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave each rank its share of every layer's experts; returns their parameters.

    Raises ValueError if the experts cannot be shared out evenly.
    """
    found: set[nn.Parameter] = set()
    rank, size = mesh.get_local_rank(), mesh.size()
    for moe in model.moe_layers().values():
        num_experts = moe.gate.num_experts
        if num_experts % size:
            raise ValueError(
                f"spread_experts: {num_experts} experts cannot be shared out to {size} ranks evenly"
            )
        for name in _WEIGHTS:
            weight = getattr(moe.experts, name)
            own = weight.detach().chunk(size)[rank].to(mesh.device_type, copy=True)
            part = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)]), requires_grad=weight.requires_grad)
            setattr(moe.experts, name, part)
            found.add(part)
        moe.run = Dispatch(mesh.get_group(), size)
    return found


class Dispatch:
    """As run_experts, for experts of which this rank has a share."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group, self._size = group, size

    def __call__(
        self, x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, gate_up_XDF: Tensor, down_XFD: Tensor
    ) -> Tensor:
        """Weighted sum of the gated MLPs of each token's experts, [T, D]; the weights are cut over the experts."""
        per_token, own = experts_TE.shape[1], len(gate_up_XDF) // self._size
        order_S = experts_TE.reshape(-1).argsort(stable=True)
        counts_GX = torch.bincount(experts_TE.reshape(-1), minlength=len(gate_up_XDF)).view(self._size, own)
        came_GX = torch.empty_like(counts_GX)
        dist.all_to_all_single(came_GX, counts_GX, group=self._group)
        sent, came = counts_GX.sum(1).tolist(), came_GX.sum(1).tolist()
        x_RD = _Exchange.apply(x_TD.index_select(0, order_S // per_token), self._group, sent, came)
        expert_R = torch.arange(own, device=x_TD.device).repeat(self._size)
        expert_R1 = expert_R.repeat_interleave(came_GX.reshape(-1))[:, None]
        weights = (_own(w, x_TD.dtype) for w in (gate_up_XDF, down_XFD))
        out_RD = run_experts(x_RD, expert_R1, x_RD.new_ones(len(x_RD), 1), *weights)
        out_SD = _Exchange.apply(out_RD, self._group, came, sent)
        out_TED = out_SD.index_select(0, order_S.argsort()).view(len(x_TD), per_token, -1)
        out_TD: Tensor = (out_TED * weights_TE.to(out_TED.dtype)[..., None]).sum(1)
        return out_TD


def _own(weight: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(weight, DTensor), "experts that are not cut"
    return weight.to_local().to(dtype)


class _Exchange(torch.autograd.Function):
    """Rows to the ranks, so many to each; gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, ctx.group, ctx.sent, ctx.came = args
        return _exchange(x, ctx.group, ctx.sent, ctx.came)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _exchange(grads[0], ctx.group, ctx.came, ctx.sent), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, sent: list[int], came: list[int]) -> Tensor:
    out = x.new_empty(sum(came), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), came, sent, group=group)
    return out
