"""Mixture of experts: transformers' weights and router, sorted expert execution, recorded and replayed routing.

Load balancing is the published bias update (DeepSeek-V3, auxiliary-loss-free): after a step the bias of
an overloaded expert falls by a fixed amount and that of an underloaded one rises. transformers never
updates it. Next: arch.py.

Shape letters: T tokens, D hidden, X experts, E experts chosen per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.kernels.experts import run_experts as run_each
from posttrain.kernels.pointwise import linear_fp32, swiglu
from posttrain.model.context import Context

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""What runs routed experts: of x [T, D], experts and weights [T, E], and both matrices [X, in, out], [T, D]."""


class DsaMoE(hf.DeepseekV32MoE):
    """Routed plus shared experts on packed tokens."""

    layer_idx: int
    run: Experts | None = None
    """What runs the routed experts where not all of them are here, or an engine has its own kernel; None: moe.py."""

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:  # type: ignore[override]  # needs the context
        """[T, D] -> [T, D]; leaves the chosen experts and, but in generation, the load in the context's record."""
        logits_TX = linear_fp32(x_TD, self.gate.weight)
        weights_TE, experts_TE = route(logits_TX, self.gate)
        if context.replay_experts is not None:
            # Keep Routing (V3.2 3.1): the engine's choice, gates from the current weights.
            replayed_TE = context.replay_experts[self.layer_idx].long()
            experts_TE = torch.where(replayed_TE < 0, experts_TE, replayed_TE)
            weights_TE = _gate_weights(logits_TX.sigmoid(), experts_TE, self.gate)
        record = context.record(self.layer_idx)
        record.experts_TE = experts_TE
        generates = torch.is_inference_mode_enabled()
        if not generates:  # whose load nobody balances
            chosen = experts_TE.reshape(-1)
            counts = torch.ones_like(chosen)
            if context.query_weights_T is not None:
                counts = context.query_weights_T.to(chosen.dtype).repeat_interleave(experts_TE.shape[1])
            record.load_X = chosen.new_zeros(self.gate.num_experts).index_add_(0, chosen, counts)
        # Few tokens, as in generation, cost least in one batched product; many, as in training, one by one.
        run = self.run or (run_padded if generates else run_each)
        gate_up, down = (w.transpose(1, 2) for w in (self.experts.gate_up_proj, self.experts.down_proj))
        routed_TD = run(x_TD, experts_TE, weights_TE, gate_up, down)
        return routed_TD + self.shared_experts(x_TD)  # type: ignore[no-any-return]  # nn.Module call


def route(logits_TX: Tensor, gate: hf.DeepseekV32TopkRouter) -> tuple[Tensor, Tensor]:
    """Weights fp32 and experts int64, both [T, E]: sigmoid scores, chosen with the balancing bias, in groups.

    transformers' router without its work on groups where there is one group.
    """
    scores_TX = logits_TX.sigmoid()
    choice_TX = scores_TX + gate.e_score_correction_bias
    if gate.num_group > 1:
        grouped_TGX = choice_TX.view(len(choice_TX), gate.num_group, -1)
        best_TG = (
            grouped_TGX.topk(2, dim=-1).values.sum(-1).topk(gate.topk_group, dim=-1, sorted=False).indices
        )
        allowed_TG = torch.zeros_like(grouped_TGX[..., 0], dtype=torch.bool).scatter_(1, best_TG, True)
        choice_TX = grouped_TGX.masked_fill(~allowed_TG[..., None], float("-inf")).flatten(1)
    experts_TE = choice_TX.topk(gate.top_k, dim=-1, sorted=False).indices
    return _gate_weights(scores_TX, experts_TE, gate), experts_TE


def _gate_weights(scores_TX: Tensor, experts_TE: Tensor, gate: hf.DeepseekV32TopkRouter) -> Tensor:
    weights_TE = scores_TX.gather(1, experts_TE)
    if gate.norm_topk_prob:
        weights_TE = weights_TE / (weights_TE.sum(-1, keepdim=True) + 1e-20)
    return weights_TE if gate.routed_scaling_factor == 1 else weights_TE * gate.routed_scaling_factor


def run_padded(x_TD: Tensor, experts_TE: Tensor, weights_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same in one batched product over all experts, each padded to the largest load. No gradients."""
    num_experts, (num_tokens, per_token) = len(gate_up), experts_TE.shape
    chosen_TX = experts_TE.new_zeros(num_tokens, num_experts).scatter_(1, experts_TE, 1)
    rank_TX = chosen_TX.cumsum(0)
    most = int(rank_TX[-1].max())
    slot_TE = (rank_TX - 1).gather(1, experts_TE).add_(experts_TE, alpha=most)
    token_T1 = torch.arange(num_tokens, device=x_TD.device)[:, None]
    # Slots without a token compute the first one once more; nobody reads them.
    token_S = experts_TE.new_zeros(num_experts * most)
    token_S.index_copy_(0, slot_TE.view(-1), token_T1.expand(-1, per_token).reshape(-1))
    padded = x_TD.index_select(0, token_S).view(num_experts, most, -1)
    gate, up = torch.bmm(padded, gate_up).chunk(2, dim=-1)
    out_SD = torch.bmm(swiglu(gate, up), down).flatten(0, 1)
    out_TED = out_SD.index_select(0, slot_TE.view(-1)).view(num_tokens, per_token, -1)
    return out_TED.mul_(weights_TE.to(out_TED.dtype)[..., None]).sum(1)


@torch.no_grad()
def update_bias(moe: hf.DeepseekV32MoE, load_X: Tensor, speed: float) -> None:
    """b_e += speed * sign(mean load - load_e) (DeepSeek-V3 2.1.2, gamma = 0.001 there)."""
    bias_X: Tensor = moe.gate.e_score_correction_bias
    load_X = load_X.to(bias_X)
    bias_X += speed * torch.sign(load_X.mean() - load_X)
