"""One new token per row: the function of arch.py with the weights laid out for few tokens.

In generation on small models the price is the number of operations and of Python calls, not arithmetic:
projections of the same input lie side by side, matrices are stored the way products read them, masks are made
once per step, and no module is called. Every product is one that arch.py makes too, so that engine and learner
differ by rounding only (tests/test_engine.py). Next: ../rollouts/torch_engine.py.

Shape letters: B rows, D hidden, C query latent, R latent, P rotary, E entry = R + P, H heads, N no-position
size, V value size, J indexer heads, I indexer head size, L keys, K kept, X experts, F MLP width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.kernels import reference
from posttrain.kernels.pointwise import swiglu
from posttrain.model.arch import DeepseekV32ForCausalLM, DsaDecoderLayer
from posttrain.model.attention import DsaAttention
from posttrain.model.context import AttentionMode, LayerRecord, StaticCache
from posttrain.model.indexer import hadamard
from posttrain.model.moe import DsaMoE, route, run_padded
from posttrain.model.rope import Rope, rotate, unit_circle


@dataclass(slots=True)
class _Mlp:
    """A gated MLP, its matrices [in, out]; X of them for experts."""

    gate_up: Tensor
    down: Tensor

    def hidden(self, x_BD: Tensor) -> Tensor:
        gate, up = (x_BD @ self.gate_up).chunk(2, dim=-1)
        return swiglu(gate, up)


@dataclass(slots=True)
class _Routed:
    """The routed experts of a block."""

    router: hf.DeepseekV32TopkRouter
    scores: Tensor
    """[D, X], fp32."""
    experts: _Mlp


@dataclass(slots=True)
class _Layer:
    """One block; matrices are [in, out]."""

    attention: DsaAttention
    norm: Tensor
    from_hidden: Tensor
    """[D, C + E + I]: query latent, key-value latent and rotary key, indexer key."""
    index_weights: Tensor
    """[D, J], fp32, times J^-1/2 and I^-1/2."""
    from_latent: Tensor
    """[C, H (N + P) + J I]: queries of attention and indexer."""
    absorb_HNR: Tensor
    values_HRV: Tensor
    out: Tensor
    mlp_norm: Tensor
    mlp: _Mlp
    """Dense, or the shared experts."""
    routed: _Routed | None


@dataclass(slots=True)
class _Step:
    """What all layers of one step share."""

    rope: Rope
    slots_B: Tensor
    num_keys: int
    unseen_B1L: Tensor
    """True where a key lies after the query."""
    select: bool
    """Whether there are more keys than top-k, in any row."""
    rows_B1: Tensor
    """First cache slot of each row."""
    record_kept: bool
    missing_B1K: Tensor | None
    """True beyond the keys of a row with fewer than top-k; None without such a row."""


class Decoder:
    """Decoding steps of one model; call refresh() before a row of steps."""

    def __init__(self, model: DeepseekV32ForCausalLM, attention: AttentionMode) -> None:
        self.model, self.attention = model, attention
        config = model.config
        self.eps: float = config.rms_norm_eps
        self.topk: int = config.index_topk
        self.layers: list[_Layer] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay the model's present weights out (autograd's version counters do not see every optimizer)."""
        self.layers = [_lay_out(block) for block in self.model.model.layers]
        self.head = _turned(self.model.lm_head)

    @torch.inference_mode()
    def step(
        self,
        tokens_B: Tensor,
        positions_B: Tensor,
        cache: StaticCache,
        *,
        keys: tuple[int, int],
        record_kept: bool,
    ) -> tuple[Tensor, dict[int, LayerRecord]]:
        """Logits fp32 [B, V] after the given tokens, which enter the cache at their positions.

        keys is the least and the greatest number of keys of a row (position + 1). The records hold what
        PackedContext's do: kept_BQK with Q = 1 (ascending, -1 beyond) and experts_TE.
        """
        step = self._prepare(positions_B, cache, keys, record_kept)
        x_BD = F.embedding(tokens_B, self.model.model.embed_tokens.weight)
        records = {}
        for n, layer in enumerate(self.layers):
            records[n] = record = LayerRecord()
            x_BD = self._attend(layer, x_BD, step, cache.layers[n], record)
            x_BD = self._mlp(layer, x_BD, record)
        x_BD = self._norm(x_BD, self.model.model.norm.weight)
        return (x_BD @ self.head).float(), records

    def _prepare(
        self, positions_B: Tensor, cache: StaticCache, keys: tuple[int, int], record_kept: bool
    ) -> _Step:
        least, most = keys
        device = positions_B.device
        select = self.attention == "sparse" and most > self.topk
        missing = select and least < self.topk
        rows_B1 = torch.arange(len(positions_B), device=device)[:, None] * cache.length
        positions_B11 = positions_B[:, None, None]
        return _Step(
            rope=unit_circle(self.model.model.rotary_emb, positions_B),
            slots_B=rows_B1[:, 0] + positions_B,
            num_keys=most,
            unseen_B1L=torch.arange(most, device=device) > positions_B11,
            select=select,
            rows_B1=rows_B1,
            record_kept=record_kept,
            missing_B1K=torch.arange(self.topk, device=device) > positions_B11 if missing else None,
        )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attend(
        self, layer: _Layer, x_BD: Tensor, step: _Step, cache_BLE: Tensor, record: LayerRecord
    ) -> Tensor:
        """x plus its attention."""
        a, num_rows = layer.attention, len(x_BD)
        R, P, H, I = a.kv_lora_rank, a.qk_rope_head_dim, a.num_heads, a.indexer.head_dim
        h_BD = self._norm(x_BD, layer.norm)
        latent_BC, kv_BR, k_rot_BP, k_index_BI = (h_BD @ layer.from_hidden).split(
            (layer.from_latent.shape[0], R, P, I), -1
        )
        latent_BC = self._norm(latent_BC, a.q_a_layernorm.weight)
        q_B, q_index_B = (latent_BC @ layer.from_latent).split((H * a.qk_head_dim, a.indexer.n_heads * I), -1)
        q_nope_BHN, q_rot_BHP = q_B.view(num_rows, H, -1).split((a.qk_nope_head_dim, P), -1)
        rotated = rotate(torch.cat((q_rot_BHP, k_rot_BP[:, None]), 1), step.rope)
        index = self._index_heads(layer, q_index_B.view(num_rows, -1, I), k_index_BI, step.rope)
        entry = torch.cat((self._norm(kv_BR, a.kv_a_layernorm.weight), rotated[:, H], index[:, -1]), -1)
        cache_BLE.flatten(0, 1).index_copy_(0, step.slots_B, entry)
        absorbed_BHR = torch.bmm(q_nope_BHN.transpose(0, 1), layer.absorb_HNR).transpose(0, 1)
        q_BHE = torch.cat((absorbed_BHR, rotated[:, :H]), -1)
        if step.select:
            w_BJ = h_BD.float() @ layer.index_weights
            keys_BKE = self._select(index[:, :-1], w_BJ, step, cache_BLE, record, R + P)
            hidden = step.missing_B1K
        else:
            keys_BKE, hidden = cache_BLE[:, : step.num_keys], step.unseen_B1L
            if step.record_kept and self.attention == "sparse":
                record.kept_BQK = torch.arange(step.num_keys, device=x_BD.device).masked_fill(hidden, -1)
        logits_BHK = torch.bmm(q_BHE, keys_BKE[..., : R + P].transpose(1, 2)).float() * a.scaling
        if hidden is not None:
            logits_BHK.masked_fill_(hidden, float("-inf"))
        o_BHR = torch.bmm(logits_BHK.softmax(-1).to(x_BD.dtype), keys_BKE[..., :R])
        o_HBV = torch.bmm(o_BHR.transpose(0, 1), layer.values_HRV)
        return torch.addmm(x_BD, o_HBV.transpose(0, 1).flatten(1), layer.out)

    def _index_heads(self, layer: _Layer, q_BJI: Tensor, k_BI: Tensor, rope: Rope) -> Tensor:
        """[B, J + 1, I]: rotated queries and, last, the rotated key."""
        indexer = layer.attention.indexer
        norm: nn.LayerNorm = indexer.k_norm
        k_BI = F.layer_norm(
            k_BI.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        ).to(k_BI.dtype)
        heads = torch.cat((q_BJI, k_BI[:, None]), 1)
        rotary = heads[..., : indexer.qk_rope_head_dim]
        rotary.copy_(rotate(rotary, rope, halves=True))
        return hadamard(heads) if indexer.use_hadamard else heads

    def _select(
        self, q_BJI: Tensor, w_BJ: Tensor, step: _Step, cache_BLE: Tensor, record: LayerRecord, entry: int
    ) -> Tensor:
        """The kept entries [B, K, E + I]; reference.index_scores and reference.select_topk for one query."""
        keys_BIL = cache_BLE[:, : step.num_keys, entry:].transpose(1, 2).float()
        scores_BJL = torch.bmm(q_BJI.float(), keys_BIL).relu_()
        scores_B1L = torch.bmm(w_BJ[:, None], scores_BJL).masked_fill_(step.unseen_B1L, float("-inf"))
        kept_BK = scores_B1L[:, 0].sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]
        if step.record_kept:
            record.kept_BQK = reference.ascending(kept_BK[:, None], step.missing_B1K)
        flat = (kept_BK + step.rows_B1).view(-1)
        return cache_BLE.flatten(0, 1).index_select(0, flat).view(*kept_BK.shape, -1)

    def _mlp(self, layer: _Layer, x_BD: Tensor, record: LayerRecord) -> Tensor:
        """x plus its MLP."""
        h_BD = self._norm(x_BD, layer.mlp_norm)
        out_BD = torch.addmm(x_BD, layer.mlp.hidden(h_BD), layer.mlp.down)
        if layer.routed is None:
            return out_BD
        weights_BE, record.experts_TE = route(h_BD.float() @ layer.routed.scores, layer.routed.router)
        experts = layer.routed.experts
        return out_BD + run_padded(h_BD, record.experts_TE, weights_BE, experts.gate_up, experts.down)


def _turned(*linears: nn.Linear) -> Tensor:
    """Weights of layers with the same input side by side, [in, sum of out]."""
    return torch.cat([linear.weight for linear in linears]).t().contiguous()


def _lay_out(block: DsaDecoderLayer) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    indexer = attention.indexer
    absorb_HNR, values_HVR = attention.up_projections()
    routed = mlp if isinstance(mlp, DsaMoE) else None
    dense = mlp.shared_experts if isinstance(mlp, DsaMoE) else mlp
    return _Layer(
        attention=attention,
        norm=block.input_layernorm.weight,
        from_hidden=_turned(attention.q_a_proj, attention.kv_a_proj_with_mqa, indexer.wk),
        index_weights=_turned(indexer.weights_proj).float() * indexer.n_heads**-0.5 * indexer.head_dim**-0.5,
        from_latent=_turned(attention.q_b_proj, indexer.wq_b),
        absorb_HNR=absorb_HNR,
        values_HRV=values_HVR.transpose(1, 2),
        out=_turned(attention.o_proj),
        mlp_norm=block.post_attention_layernorm.weight,
        mlp=_Mlp(_turned(dense.gate_proj, dense.up_proj), _turned(dense.down_proj)),
        routed=None if routed is None else _lay_out_experts(routed),
    )


def _lay_out_experts(moe: DsaMoE) -> _Routed:
    experts = moe.experts
    matrices = (w.transpose(1, 2).contiguous() for w in (experts.gate_up_proj, experts.down_proj))
    return _Routed(router=moe.gate, scores=moe.gate.weight.float().t().contiguous(), experts=_Mlp(*matrices))
