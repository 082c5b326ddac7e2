"""One new token per row: the function of arch.py with the weights laid out for few tokens.

In generation on small models the price is the number of operations and of Python calls, not arithmetic:
projections of the same input lie side by side, matrices are stored the way products read them, everything
that is rotated is rotated at once, masks are made once per step, and no module is called. Every product is one
that arch.py makes too, so that engine and learner differ by rounding only (tests/test_engine.py).
Next: ../rollouts/torch_engine.py.

Shape letters: B rows, D hidden, C query latent, R latent, P rotary, E entry = R + P, H heads, N no-position
size, V value size, J indexer heads, I indexer head size, L keys, K kept, X experts, F MLP width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.kernels import e4m3, reference
from posttrain.kernels.pointwise import swiglu
from posttrain.model.arch import DeepseekV32ForCausalLM, DsaDecoderLayer
from posttrain.model.context import AttentionMode, LayerRecord, StaticCache
from posttrain.model.entry import Entry
from posttrain.model.indexer import hadamard
from posttrain.model.moe import DsaMoE, route, run_padded
from posttrain.model.rope import unit_circle


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
class _IndexNorm:
    """The layer norm of the indexer's keys, fp32 [I], in the order of `from_hidden`."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(slots=True)
class _Layer:
    """One block; matrices are [in, out]."""

    norm: Tensor
    latent_norm: Tensor
    kv_norm: Tensor
    scale: float
    """Of the attention's logits."""
    from_hidden: Tensor
    """[D, C + R + P + I]: query latent, key-value latent, rotary key, indexer key."""
    index_weights: Tensor
    """[D, J], fp32, times J^-1/2 and I^-1/2."""
    from_latent: Tensor
    """[C, H N + H P + J I]: queries without position, rotary queries, queries of the indexer."""
    index_norm: _IndexNorm
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

    rope: Tensor
    """Rotations [B, (H P + J I + P + I) / 2] of all that is rotated; 1 where a head is not."""
    slots_B: Tensor
    num_keys: int
    unseen_BL: Tensor
    """True where a key lies after the query."""
    select: bool
    """Whether there are more keys than top-k, in any row."""
    rows_B1: Tensor
    """First cache slot of each row."""
    record_kept: bool
    missing_BK: Tensor | None
    """True beyond the keys of a row with fewer than top-k; None without such a row."""


class Decoder:
    """Decoding steps of one model; call refresh() before a row of steps."""

    def __init__(self, model: DeepseekV32ForCausalLM, attention: AttentionMode) -> None:
        self.model, self.attention = model, attention
        config = model.config
        if config.index_head_dim % 2:
            raise ValueError(f"index_head_dim={config.index_head_dim}: decoding needs an even number")
        self.topk: int = config.index_topk
        self.entry = Entry.of(config)
        self.use_hadamard: bool = model.model.layers[0].self_attn.indexer.use_hadamard
        self.sizes: tuple[int, int, int, int, int, int] = (
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.index_n_heads,
            config.index_head_dim,
        )
        """R, P, H, N, J, I."""
        self.layers: list[_Layer] = []
        self.rotations_LP = torch.empty(0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay the model's present weights out (autograd's version counters do not see every optimizer)."""
        self.layers = [_lay_out(block) for block in self.model.model.layers]
        self.head = _turned(self.model.lm_head.weight)
        self.eps_11 = torch.full((1, 1), self.model.config.rms_norm_eps, device=self.head.device)

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
        x_BD = self.model.model.embed_tokens.weight.index_select(0, tokens_B)
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
        if len(self.rotations_LP) < cache.length:
            self.rotations_LP = self._rotations(torch.arange(cache.length, device=device))
        select = self.attention == "sparse" and most > self.topk
        missing = select and least < self.topk
        rows_B = torch.arange(0, len(positions_B) * cache.length, cache.length, device=device)
        positions_B1 = positions_B[:, None]
        return _Step(
            rope=self.rotations_LP.index_select(0, positions_B),
            slots_B=rows_B + positions_B,
            num_keys=most,
            unseen_BL=torch.arange(most, device=device) > positions_B1,
            select=select,
            rows_B1=rows_B[:, None],
            record_kept=record_kept,
            missing_BK=torch.arange(self.topk, device=device) > positions_B1 if missing else None,
        )

    def _rotations(self, positions_L: Tensor) -> Tensor:
        """The rope of a step, for every position."""
        config = self.model.config
        rope = unit_circle(self.model.model.rotary_emb, positions_L)
        still = rope.new_ones(len(rope), (config.index_head_dim - config.qk_rope_head_dim) // 2)
        heads = [rope] * config.num_attention_heads + [rope, still] * config.index_n_heads
        return torch.cat((*heads, rope, rope, still), dim=1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """F.rms_norm in fewer operations."""
        norm_B1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale_B1 = torch.addcmul(self.eps_11, norm_B1, norm_B1, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale_B1).to(x.dtype).mul_(weight)

    def _attend(
        self, layer: _Layer, x_BD: Tensor, step: _Step, cache_BLE: Tensor, record: LayerRecord
    ) -> Tensor:
        """x plus its attention."""
        num_rows, (R, P, H, N, J, I) = len(x_BD), self.sizes
        h_BD = self._norm(x_BD, layer.norm)
        latent_BC, kv_BR, k_rot_BP, k_index_BI = (h_BD @ layer.from_hidden).split_with_sizes(
            (len(layer.from_latent), R, P, I), -1
        )
        q_B = self._norm(latent_BC, layer.latent_norm) @ layer.from_latent
        q_nope, q_turned = q_B.split_with_sizes((H * N, H * P + J * I), -1)
        turned = torch.cat((q_turned, k_rot_BP, _layer_norm(k_index_BI, layer.index_norm)), -1)
        q_rot, q_index, key = _turn(turned, step.rope).split_with_sizes((H * P, J * I, P + I), -1)
        q_index_BJI = q_index.view(num_rows, J, I)
        if self.use_hadamard:
            q_index_BJI = hadamard(q_index_BJI)
            key = torch.cat((key[:, :P], hadamard(key[:, P:])), -1)
        if self.entry.e4m3:
            q_index_BJI = reference.round_e4m3(q_index_BJI)
            key = torch.cat((key[:, :P], e4m3.pack(key[:, P:], cache_BLE.shape[-1] - R - P)), -1)
        entry = torch.cat((self._norm(kv_BR, layer.kv_norm), key), -1)
        cache_BLE.flatten(0, 1).index_copy_(0, step.slots_B, entry)
        absorbed_HBR = torch.bmm(q_nope.view(num_rows, H, N).transpose(0, 1), layer.absorb_HNR)
        q_BHE = torch.cat((absorbed_HBR.transpose(0, 1), q_rot.view(num_rows, H, P)), -1)
        if step.select:
            w_BJ = h_BD.float() @ layer.index_weights
            keys_BKE = self._select(q_index_BJI, w_BJ, step, cache_BLE, record)
            hidden_BK = step.missing_BK
        else:
            keys_BKE, hidden_BK = cache_BLE[:, : step.num_keys], step.unseen_BL
            if step.record_kept and self.attention == "sparse":
                every_L = torch.arange(step.num_keys, device=x_BD.device)
                record.kept_BQK = every_L.masked_fill(hidden_BK, -1)[:, None]
        logits_BHK = torch.bmm(q_BHE, keys_BKE[..., : R + P].transpose(1, 2)).float().mul_(layer.scale)
        if hidden_BK is not None:
            logits_BHK.masked_fill_(hidden_BK[:, None], float("-inf"))
        o_BHR = torch.bmm(logits_BHK.softmax(-1).to(x_BD.dtype), keys_BKE[..., :R])
        o_HBV = torch.bmm(o_BHR.transpose(0, 1), layer.values_HRV)
        return torch.addmm(x_BD, o_HBV.transpose(0, 1).flatten(1), layer.out)

    def _select(
        self, q_BJI: Tensor, w_BJ: Tensor, step: _Step, cache_BLE: Tensor, record: LayerRecord
    ) -> Tensor:
        """The kept entries [B, K, E + I]; reference.index_scores and reference.select_topk for one query."""
        keys_BLI = cache_BLE[:, : step.num_keys, self.entry.latent :]
        keys_BIL = (e4m3.values(keys_BLI, self.entry.index) if self.entry.e4m3 else keys_BLI).transpose(1, 2)
        scores_BJL = torch.bmm(q_BJI.float(), keys_BIL.float()).relu_()
        scores_BL = scores_BJL.mul_(w_BJ[..., None]).sum(1).masked_fill_(step.unseen_BL, float("-inf"))
        kept_BK = scores_BL.sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]
        if step.record_kept:
            record.kept_BQK = reference.ascending(kept_BK, step.missing_BK)[:, None]
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


def _turn(x_BP: Tensor, rope: Tensor) -> Tensor:
    """Pairs of the last dimension rotated in fp32; returns x's dtype."""
    pairs = torch.view_as_complex(x_BP.float().contiguous().view(*rope.shape, 2))
    return torch.view_as_real(pairs * rope).flatten(1).to(x_BP.dtype)


def _layer_norm(x: Tensor, norm: _IndexNorm) -> Tensor:
    return F.layer_norm(x.float(), norm.weight.shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def _turned(*weights: Tensor) -> Tensor:
    """Weights [out, in] of the same input side by side, [in, sum of out]."""
    return torch.cat(weights).t().contiguous()


def _lay_out(block: DsaDecoderLayer) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    indexer = attention.indexer
    H, P, J = attention.num_heads, attention.qk_rope_head_dim, indexer.n_heads
    absorb_HNR, values_HVR = attention.up_projections()
    q_nope, q_rot = attention.q_b_proj.weight.unflatten(0, (H, -1)).split((attention.qk_nope_head_dim, P), 1)
    # The indexer rotates components i and i + P / 2; side by side they are pairs like the attention's.
    halves = torch.arange(indexer.head_dim, device=q_rot.device)
    pairs = torch.cat((halves[:P].view(2, -1).t().flatten(), halves[P:]))
    q_index = indexer.wq_b.weight.unflatten(0, (J, -1))[:, pairs]
    norm = indexer.k_norm
    routed = mlp if isinstance(mlp, DsaMoE) else None
    dense = mlp.shared_experts if isinstance(mlp, DsaMoE) else mlp
    return _Layer(
        norm=block.input_layernorm.weight,
        latent_norm=attention.q_a_layernorm.weight,
        kv_norm=attention.kv_a_layernorm.weight,
        scale=attention.scaling,
        from_hidden=_turned(
            attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight, indexer.wk.weight[pairs]
        ),
        index_weights=_turned(indexer.weights_proj.weight).float() * J**-0.5 * indexer.head_dim**-0.5,
        index_norm=_IndexNorm(norm.weight.float()[pairs], norm.bias.float()[pairs], norm.eps),
        from_latent=_turned(q_nope.flatten(0, 1), q_rot.flatten(0, 1), q_index.flatten(0, 1)),
        absorb_HNR=absorb_HNR,
        values_HRV=values_HVR.transpose(1, 2),
        out=_turned(attention.o_proj.weight),
        mlp_norm=block.post_attention_layernorm.weight,
        mlp=_Mlp(_turned(dense.gate_proj.weight, dense.up_proj.weight), _turned(dense.down_proj.weight)),
        routed=None if routed is None else _lay_out_experts(routed),
    )


def _lay_out_experts(moe: DsaMoE) -> _Routed:
    experts = _Mlp(_transposed(moe.experts.gate_up_proj), _transposed(moe.experts.down_proj))
    return _Routed(router=moe.gate, scores=moe.gate.weight.float().t().contiguous(), experts=experts)


def _transposed(matrices: Tensor) -> Tensor:
    """Contiguous [X, in, out]; one matrix at a time, for which PyTorch has a copy three times as fast."""
    out = matrices.new_empty(len(matrices), matrices.shape[2], matrices.shape[1])
    for a, b in zip(out, matrices, strict=True):
        a.copy_(b.t())
    return out
