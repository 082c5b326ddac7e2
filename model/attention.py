"""MLA under DSA: the dense path and the sparse MQA-absorbed path, side by side, on one set of weights.

Dense is ordinary multi-head MLA. Sparse folds W_UK into the query and W_UV behind the attention, so that
one selected set of latent entries serves all heads (V3.2-Exp Eq. 2, mode "MQA"). Softmax scale is
qk_head_dim^-1/2 (times mscale^2 under YaRN) in both. Next: ../kernels/reference.py.

Shape letters: T tokens, B rows, Q queries, L keys, H heads, E entry size = R + P, R latent, P rotary,
N no-position size of a head, V value size, K kept entries, J indexer heads, I indexer head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

from posttrain.kernels import reference
from posttrain.kernels.sparse_mla import sparse_mla
from posttrain.model.context import Context
from posttrain.model.indexer import LightningIndexer
from posttrain.model.rope import Rope, rotate


class DsaAttention(hf.DeepseekV32Attention):
    """transformers' MLA weights, our forward."""

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.indexer = LightningIndexer(config, layer_idx)
        self.index_topk: int = config.index_topk

    def forward(self, x_TD: Tensor, rope: Rope, context: Context) -> Tensor:  # type: ignore[override]  # packed, not padded
        """Attention of all tokens of the pass, [T, D] -> [T, D]."""
        latent_TC = self.q_a_layernorm(self.q_a_proj(x_TD))
        q_THE = self.q_b_proj(latent_TC).view(len(x_TD), -1, self.qk_head_dim)
        q_nope_THN, q_rot_THP = q_THE.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        kv_TR, k_rot_TP = self.kv_a_proj_with_mqa(x_TD).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        entries_TE = torch.cat((self.kv_a_layernorm(kv_TR), rotate(k_rot_TP, rope)), dim=-1)
        q_rot_THP = rotate(q_rot_THP, rope)
        sparse, warmup = context.attention == "sparse", context.indexer_loss == "dense"
        scores_BQL: Tensor | None = None
        if sparse or warmup:
            scores_BQL = self._index_scores(x_TD, latent_TC, rope, context)
        if sparse or warmup or context.diagnose:
            absorbed_THE = torch.cat((self._absorb(q_nope_THN), q_rot_THP), dim=-1)
        if warmup or context.diagnose:
            assert scores_BQL is not None, "diagnosis needs the indexer"
            self._dense_indexer(absorbed_THE, entries_TE, scores_BQL, context)
        if sparse:
            assert scores_BQL is not None
            o_THV = self._sparse(absorbed_THE, entries_TE, scores_BQL, context)
        else:
            o_THV = self._dense(torch.cat((q_nope_THN, q_rot_THP), dim=-1), entries_TE, context)
        return self.o_proj(o_THV.flatten(1))  # type: ignore[no-any-return]  # nn.Module call

    def _index_scores(self, x_TD: Tensor, latent_TC: Tensor, rope: Rope, context: Context) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.indexer_loss != "none"):
            q_TJI, k_TI, w_TJ = self.indexer(x_TD, latent_TC, rope)
            k_BLI = context.keys(self.layer_idx, "index", k_TI)
            return reference.index_scores(context.grid(q_TJI), k_BLI, context.grid(w_TJ))

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, R] and W_UV [H, V, R], views of kv_b_proj."""
        weight_HR = self.kv_b_proj.weight.view(-1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        return weight_HR[:, : self.qk_nope_head_dim], weight_HR[:, self.qk_nope_head_dim :]

    def _absorb(self, q_nope_THN: Tensor) -> Tensor:
        """q^A = W_UK^T q^C: [T, H, N] -> [T, H, R]."""
        return torch.bmm(q_nope_THN.transpose(0, 1), self.up_projections()[0]).transpose(0, 1)

    def _sparse(self, q_THE: Tensor, entries_TE: Tensor, scores_BQL: Tensor, context: Context) -> Tensor:
        with torch.no_grad():
            kept_BQK = context.replayed_kept(self.layer_idx)
            if kept_BQK is None:
                kept_BQK = reference.select_topk(scores_BQL, context.mask(), self.index_topk)
        o_THR, p_TK = sparse_mla(
            q_THE,
            context.entries(self.layer_idx, entries_TE),
            context.slots(kept_BQK),
            self.scaling,
            self.kv_lora_rank,
        )
        record = context.record(self.layer_idx)
        record.kept_BQK = kept_BQK
        if context.indexer_loss == "sparse":
            kept_scores_TK = context.flat(scores_BQL.gather(-1, kept_BQK.clamp(min=0)))
            record.kl = reference.indexer_kl(p_TK, kept_scores_TK, context.flat(kept_BQK >= 0)).sum()
        return torch.bmm(o_THR.transpose(0, 1), self.up_projections()[1].transpose(1, 2)).transpose(0, 1)

    def _dense(self, q_THE: Tensor, entries_TE: Tensor, context: Context) -> Tensor:
        q_BQHE, entries_BLE = context.grid(q_THE), context.keys(self.layer_idx, "entries", entries_TE)
        latent_BLR, k_rot_BLP = entries_BLE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_BLH = self.kv_b_proj(latent_BLR).unflatten(-1, (q_BQHE.shape[2], -1))
        k_nope_BLHN, v_BLHV = kv_BLH.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot_BLHP = k_rot_BLP[:, :, None].expand(-1, -1, q_BQHE.shape[2], -1)
        k_BHLE = torch.cat((k_nope_BLHN, k_rot_BLHP), dim=-1).transpose(1, 2)
        q_BHQE, v_BHLV = q_BQHE.transpose(1, 2), v_BLHV.transpose(1, 2)
        # With as many queries as keys the grid is a plain causal square: the fused kernel knows it.
        square = q_BHQE.shape[2] == k_BHLE.shape[2]
        mask = None if square else context.mask()
        o_BHQV = F.scaled_dot_product_attention(
            q_BHQE,
            k_BHLE,
            v_BHLV,
            attn_mask=None if mask is None else mask[:, None],
            is_causal=square,
            scale=self.scaling,
        )
        return context.flat(o_BHQV.transpose(1, 2))

    def _dense_indexer(self, q_THE: Tensor, entries_TE: Tensor, scores_BQL: Tensor, context: Context) -> None:
        """Warm-up loss over all causal keys (Eq. 3) and the recall of attention mass by the top-k."""
        mask_BQL = context.mask()
        with torch.no_grad():
            entries_BLE = context.keys(self.layer_idx, "entries", entries_TE)
            p_BQL = reference.dense_probs(context.grid(q_THE), entries_BLE, mask_BQL, self.scaling)
        record = context.record(self.layer_idx)
        if context.indexer_loss == "dense":
            kl_BQ = reference.indexer_kl(p_BQL, scores_BQL, mask_BQL)
            record.kl = (kl_BQ * context.query_mask()).sum()
        if context.diagnose:
            # Only queries that have something to leave out count.
            counted_BQ = context.query_mask() & (context.query_positions_BQ >= self.index_topk)
            kept_BQK = reference.select_topk(scores_BQL.detach(), mask_BQL, self.index_topk)
            caught_BQ = (p_BQL.gather(-1, kept_BQK.clamp(min=0)) * (kept_BQK >= 0)).sum(-1)
            oracle_BQ = p_BQL.topk(min(self.index_topk, p_BQL.shape[-1]), dim=-1).values.sum(-1)
            record.recall = torch.stack([(x * counted_BQ).sum() for x in (caught_BQ, oracle_BQ)])
