"""Mixture of experts: transformers' weights and router, sorted expert execution, recorded and replayed routing.

Load balancing is the published bias update (DeepSeek-V3, auxiliary-loss-free): after a step the bias of
an overloaded expert falls by a fixed amount and that of an underloaded one rises. transformers never
updates it. Next: arch.py.

Shape letters: T tokens, D hidden, X experts, E experts chosen per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.model.context import Context


class DsaMoE(hf.DeepseekV32MoE):
    """Routed plus shared experts on packed tokens."""

    layer_idx: int

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:  # type: ignore[override]  # needs the context
        """[T, D] -> [T, D]; leaves the chosen experts and the load in the context's record."""
        logits_TX, weights_TE, experts_TE = self.gate(x_TD)
        if context.replay_experts is not None:
            # Keep Routing (V3.2 3.1): the engine's choice, gates from the current weights.
            experts_TE = context.replay_experts[self.layer_idx]
            weights_TE = self._gate_weights(logits_TX, experts_TE)
        record = context.record(self.layer_idx)
        record.experts_TE = experts_TE
        record.load_X = torch.bincount(experts_TE.reshape(-1), minlength=self.gate.num_experts)
        routed_TD = run_experts(x_TD, experts_TE, weights_TE, record.load_X, self.experts)
        return routed_TD + self.shared_experts(x_TD)  # type: ignore[no-any-return]  # nn.Module call

    def _gate_weights(self, logits_TX: Tensor, experts_TE: Tensor) -> Tensor:
        weights_TE = logits_TX.sigmoid().gather(1, experts_TE)
        if self.gate.norm_topk_prob:
            weights_TE = weights_TE / (weights_TE.sum(-1, keepdim=True) + 1e-20)
        return weights_TE * self.gate.routed_scaling_factor


def run_experts(
    x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, load_X: Tensor, experts: hf.DeepseekV32Experts
) -> Tensor:
    """Sort tokens by expert, one pair of matrix products per expert, sort back, weighted sum."""
    per_token = experts_TE.shape[1]
    order = experts_TE.reshape(-1).argsort(stable=True)
    inputs = x_TD.index_select(0, order // per_token).split(load_X.tolist())
    outputs = []
    for x, gate_up, down in zip(inputs, experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(experts.act_fn(gate) * up, down))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    out_TED = torch.cat(outputs).index_select(0, back).view(*experts_TE.shape, -1)
    return (out_TED * weights_TE[..., None].to(out_TED.dtype)).sum(1)


@torch.no_grad()
def update_bias(moe: hf.DeepseekV32MoE, load_X: Tensor, speed: float) -> None:
    """b_e += speed * sign(mean load - load_e) (DeepSeek-V3 2.1.2, gamma = 0.001 there)."""
    bias_X: Tensor = moe.gate.e_score_correction_bias
    load_X = load_X.to(bias_X)
    bias_X += speed * torch.sign(load_X.mean() - load_X)
