"""MLA under DSA: the dense path and the sparse MQA-absorbed path, side by side, on one set of weights.

Dense is ordinary multi-head MLA. Sparse folds W_UK into the query and W_UV behind the attention, so that
one selected set of latent entries serves all heads (V3.2-Exp Eq. 2, mode "MQA"). Softmax scale is
qk_head_dim^-1/2 (times mscale^2 under YaRN) in both. The sparse path is written twice: on grids [B, Q, L] of
index scores for the torch backend, and for Triton, where no such grid exists; there the rows that keep all
their keys are dense attention, which costs 320 instead of 1088 multiplications per query, key and head
(832 instead of 2752 backward) at the size of DeepSeek-V3.2. Next: ../kernels/reference.py, ../kernels/dsa.py.

Shape letters: T tokens, S slots, B rows, Q queries, L keys, H heads, E entry size = R + P, R latent, P rotary,
N no-position size of a head, V value size, K kept entries, J indexer heads, I indexer head size, X of a stored key.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

from posttrain.kernels import reference
from posttrain.kernels.pages import Pages
from posttrain.kernels.sparse_mla import sparse_mla
from posttrain.model.context import Context, entry_keys
from posttrain.model.indexer import LightningIndexer
from posttrain.model.lora import weight_of
from posttrain.model.rope import Rope, rotate

if TYPE_CHECKING:  # triton exists on Linux only
    from posttrain.kernels.index_topk_triton import Ranges


class DsaAttention(hf.DeepseekV32Attention):
    """transformers' MLA weights, our forward."""

    indexer: LightningIndexer

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.indexer = LightningIndexer(config, layer_idx)
        self.index_topk: int = config.index_topk

    def forward(self, x_TD: Tensor, rope: Rope, context: Context) -> Tensor:  # type: ignore[override]  # packed, not padded
        """Attention of all tokens of the pass, [T, D] -> [T, D]."""
        tokens = self._project(x_TD, rope, context)
        if not context.parts:
            o_THV = self._attend(tokens, context)
        else:
            context.add(self.layer_idx, tokens.entries_TE, tokens.k_stored_TX)
            o_THV = torch.cat([self._attend(tokens.rows(part.rows), part.context) for part in context.parts])
        return self.o_proj(o_THV.flatten(1))  # type: ignore[no-any-return]  # nn.Module call

    def _project(self, x_TD: Tensor, rope: Rope, context: Context) -> "_Tokens":
        latent_TC = self.q_a_layernorm(self.q_a_proj(x_TD))
        q_THE = self.q_b_proj(latent_TC).view(len(x_TD), -1, self.qk_head_dim)
        q_nope_THN, q_rot_THP = q_THE.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        kv_TR, k_rot_TP = self.kv_a_proj_with_mqa(x_TD).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        entries_TE = torch.cat((self.kv_a_layernorm(kv_TR), rotate(k_rot_TP, rope)), dim=-1)
        tokens = _Tokens(q_nope_THN, rotate(q_rot_THP, rope), entries_TE)
        if context.attention == "sparse" or context.indexer_loss == "dense":
            with torch.set_grad_enabled(torch.is_grad_enabled() and context.indexer_loss != "none"):
                tokens.q_index_TJI, tokens.k_index_TI, tokens.w_TJ = self.indexer(x_TD, latent_TC, rope)
                tokens.k_stored_TX = self.indexer.stored(tokens.k_index_TI, context.backend)
        return tokens

    def _attend(self, tokens: "_Tokens", context: Context) -> Tensor:
        """[T, H, V]"""
        q_nope_THN, q_rot_THP, entries_TE = tokens.q_nope_THN, tokens.q_rot_THP, tokens.entries_TE
        sparse, warmup = context.attention == "sparse", context.indexer_loss == "dense"
        by_triton = context.backend.name == "triton"
        if sparse or warmup:
            q_index_TJI, k_index_TI, w_TJ = tokens.index()
        if by_triton and (sparse or warmup):
            kept_TK = None if context.replay_kept is None else context.replay_kept[self.layer_idx]
            scaled_TJ = w_TJ * self.indexer.head_dim**-0.5
            rows = _Rows(q_nope_THN, q_rot_THP, q_index_TJI, scaled_TJ, kept_TK, context.query_weights_T)
        if context.diagnose or ((sparse or warmup) and not by_triton):
            scores = self._index_scores(tokens, context)
            absorbed_THE = self._latent_queries(q_nope_THN, q_rot_THP)
            if warmup or context.diagnose:
                self._dense_indexer(absorbed_THE, entries_TE, scores, context)
        elif warmup:
            entries_SE = context.slotted(self.layer_idx, "entries", entries_TE)
            keys_SI = context.slotted(self.layer_idx, "index", k_index_TI)
            ranges = context.plan(0).ranges
            assert ranges is not None, "no rows"
            self._dense_kl_by_triton(rows, entries_SE, keys_SI, ranges, context)
        if not sparse:
            return self._dense(torch.cat((q_nope_THN, q_rot_THP), dim=-1), entries_TE, context)
        if by_triton:
            return self._sparse_by_triton(rows, tokens, context)
        return self._sparse(absorbed_THE, entries_TE, scores, context)

    def _index_scores(self, tokens: "_Tokens", context: Context) -> "_Scores":
        q_TJI, k_TI, w_TJ = tokens.index()
        q_BQJI, w_BQJ = context.grid(q_TJI), context.grid(w_TJ)
        learned_BQL: Tensor | None = None
        learns = context.indexer_loss != "none"
        rounds = self.indexer.entry.e4m3 and (context.attention == "sparse" or context.diagnose)
        if learns or not rounds:
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                k_BLI = context.keys(self.layer_idx, "index", k_TI)
                learned_BQL = reference.index_scores(q_BQJI, k_BLI, w_BQJ)
            if not rounds:
                return _Scores(learned_BQL, learned_BQL)
        with torch.no_grad():
            stored_BLX = context.keys(self.layer_idx, "index", tokens.stored())
            q_BQJI, k_BLI = self.indexer.scored(q_BQJI, stored_BLX)
            return _Scores(learned_BQL, reference.index_scores(q_BQJI, k_BLI, w_BQJ))

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, R] and W_UV [H, V, R], the two parts of kv_b_proj."""
        weight_HR = weight_of(self.kv_b_proj).view(
            -1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank
        )
        return weight_HR[:, : self.qk_nope_head_dim], weight_HR[:, self.qk_nope_head_dim :]

    def _latent_queries(self, q_nope_THN: Tensor, q_rot_THP: Tensor) -> Tensor:
        """[absorbed | rotary] queries [T, H, E]: q^A = W_UK^T q^C (V3.2-Exp Eq. 2)."""
        q_nope_HTN, up_HNR = q_nope_THN.transpose(0, 1), self.up_projections()[0]
        if torch.is_grad_enabled():
            return torch.cat((torch.bmm(q_nope_HTN, up_HNR).transpose(0, 1), q_rot_THP), dim=-1)
        # Each part goes straight to its place: of a long prompt this is the largest array there is.
        q_THE = q_rot_THP.new_empty(*q_rot_THP.shape[:2], self.kv_lora_rank + self.qk_rope_head_dim)
        absorbed_THR, rot_THP = q_THE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        torch.bmm(q_nope_HTN, up_HNR, out=absorbed_THR.transpose(0, 1))
        rot_THP.copy_(q_rot_THP)
        return q_THE

    def _sparse(self, q_THE: Tensor, entries_TE: Tensor, scores: "_Scores", context: Context) -> Tensor:
        with torch.no_grad():
            if context.replay_kept is None:
                kept_BQK = reference.select_topk(scores.select_BQL, context.mask(), self.index_topk)
            else:  # Keep Top-k: the engine's choice
                kept_BQK = context.grid(context.replay_kept[self.layer_idx].long())
        o_THR, p_TK = sparse_mla(
            q_THE,
            context.slotted(self.layer_idx, "entries", entries_TE),
            context.slots(kept_BQK),
            self.scaling,
            self.kv_lora_rank,
        )
        record = context.record(self.layer_idx)
        record.kept_BQK = kept_BQK
        if context.indexer_loss == "sparse":
            assert scores.learn_BQL is not None, "made where there is a loss"
            kept_scores_TK = context.flat(scores.learn_BQL.gather(-1, kept_BQK.clamp(min=0)))
            kl_T = reference.indexer_kl(p_TK, kept_scores_TK, context.flat(kept_BQK >= 0))
            kl = (kl_T if context.query_weights_T is None else kl_T * context.query_weights_T).sum()
            record.add_kl(kl, kl.detach())
        return self._values(o_THR)

    def _values(self, o_THR: Tensor) -> Tensor:
        """o = W_UV o^A: [T, H, R] -> [T, H, V]."""
        return torch.bmm(o_THR.transpose(0, 1), self.up_projections()[1].transpose(1, 2)).transpose(0, 1)

    def _dense_kl_by_triton(
        self, rows: "_Rows", entries_SE: Tensor, keys_SI: Tensor, ranges: "Ranges", context: Context
    ) -> None:
        """The indexer's loss of queries that keep all their keys (Eq. 3, and Eq. 4 where there are no more than top-k).

        Without a grid; the attention, which gives p, is multi-head.
        """
        from posttrain.kernels import dsa, warmup_kl_triton  # triton exists on Linux only
        from posttrain.kernels.dense_probs_triton import attention_lse

        with torch.no_grad():
            latent_SR, k_rot_SP = entries_SE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            kv_SH = self.kv_b_proj(latent_SR).unflatten(-1, (self.num_heads, -1))
            q_THE = torch.cat((rows.q_nope_THN, rows.q_rot_THP), dim=-1)
            keys = (kv_SH[..., : self.qk_nope_head_dim], k_rot_SP.contiguous())
            lse_TH = attention_lse(q_THE, *keys, ranges, self.scaling)
        attention = warmup_kl_triton.Attention(q_THE, *keys, lse_TH, self.scaling)
        index = dsa.Index(rows.q_index_TJI, keys_SI, rows.w_TJ)
        kl = dsa.warmup_loss(index, attention, ranges, rows.weight_T)
        context.record(self.layer_idx).add_kl(kl, kl.detach())

    def _sparse_by_triton(self, rows: "_Rows", tokens: "_Tokens", context: Context) -> Tensor:
        """The sparse path on queries [T] and slots [S]: dense, by kernels, or by kernels for a cache."""
        entries_TE, k_index_TI = tokens.entries_TE, tokens.index()[1]
        entries_SE = context.slotted(self.layer_idx, "entries", entries_TE)
        stored_SX = context.slotted(self.layer_idx, "index", tokens.stored())
        pages = context.pages(self.layer_idx)
        if pages is not None:
            return self._decode(rows, pages, context)
        plan = context.plan(self.index_topk if _has_dense_rows(context) else 0)
        ranges, split = plan.ranges, plan.split
        if split is None:
            assert ranges is not None, "no rows"
            return self._attend_kept(rows, tokens, entries_SE, stored_SX, ranges, context)
        early, early_entries_TE, early_keys_TI = rows, entries_TE, k_index_TI
        if ranges is not None:
            early = rows.select(split.early_T)
            early_entries_TE, early_keys_TI = (
                x.index_select(0, split.early_T) for x in (entries_TE, k_index_TI)
            )
        q_THE = torch.cat((early.q_nope_THN, early.q_rot_THP), dim=-1)
        early_THV = self._dense(q_THE, early_entries_TE, split.early)
        if context.indexer_loss == "sparse" and torch.is_grad_enabled():
            early_entries_SE = split.early.slotted(self.layer_idx, "entries", early_entries_TE)
            early_keys_SI = split.early.slotted(self.layer_idx, "index", early_keys_TI)
            self._dense_kl_by_triton(early, early_entries_SE, early_keys_SI, split.early_ranges, context)
        if ranges is None:
            return early_THV
        late_THV = self._attend_kept(
            rows.select(split.late_T), tokens, entries_SE, stored_SX, ranges, context
        )
        return torch.cat((early_THV, late_THV)).index_select(0, split.back_T)

    def _attend_kept(
        self,
        rows: "_Rows",
        tokens: "_Tokens",
        entries_SE: Tensor,
        stored_SX: Tensor,
        ranges: "Ranges",
        context: Context,
    ) -> Tensor:
        from posttrain.kernels import dsa  # triton exists on Linux only

        entry, index = self.indexer.entry, None
        if context.indexer_loss == "sparse":
            keys_SI = stored_SX
            if entry.e4m3:
                keys_SI = context.slotted(self.layer_idx, "index", tokens.index()[1])
            index = dsa.Index(rows.q_index_TJI, keys_SI, rows.w_TJ)
        if rows.kept_TK is None:
            keys_SI, scale_S = entry_keys(stored_SX, entry)
            slots_TK = dsa.select(
                dsa.Index(rows.q_index_TJI, keys_SI, rows.w_TJ, scale_S), ranges, self.index_topk
            )
        else:  # Keep Top-k: the engine's choice
            kept_TK = rows.kept_TK.int()
            slots_TK = torch.where(kept_TK < 0, kept_TK, kept_TK + ranges.begin_N[:, None])
        o_THR, kl = dsa.attend(
            self._latent_queries(rows.q_nope_THN, rows.q_rot_THP),
            entries_SE,
            slots_TK,
            scale=self.scaling,
            value_size=self.kv_lora_rank,
            deterministic=context.backend.deterministic,
            index=index,
            weight_T=rows.weight_T,
        )
        record = context.record(self.layer_idx)
        if kl is not None:
            record.add_kl(kl.loss, kl.value)
        if context.record_kept:
            kept_TK = torch.where(slots_TK < 0, slots_TK, slots_TK - ranges.begin_N[:, None])
            record.kept_BQK = context.grid(kept_TK)
        return self._values(o_THR)

    def _decode(self, rows: "_Rows", pages: Pages, context: Context) -> Tensor:
        from posttrain.kernels import dsa  # triton exists on Linux only

        q_THE = self._latent_queries(rows.q_nope_THN, rows.q_rot_THP)
        o_BQHR, kept_BQK = dsa.decode(
            context.grid(q_THE),
            context.grid(rows.q_index_TJI),
            context.grid(rows.w_TJ),
            pages,
            num_kept=self.index_topk,
            scale=self.scaling,
            value_size=self.kv_lora_rank,
        )
        if context.record_kept:
            context.record(self.layer_idx).kept_BQK = kept_BQK
        return self._values(context.flat(o_BQHR))

    def _dense(self, q_THE: Tensor, entries_TE: Tensor, context: Context) -> Tensor:
        q_BQHE, entries_BLE = context.grid(q_THE), context.keys(self.layer_idx, "entries", entries_TE)
        latent_BLR, k_rot_BLP = entries_BLE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_BLH = self.kv_b_proj(latent_BLR).unflatten(-1, (q_BQHE.shape[2], -1))
        k_nope_BLHN, v_BLHV = kv_BLH.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot_BLHP = k_rot_BLP[:, :, None].expand(-1, -1, q_BQHE.shape[2], -1)
        k_BHLE = torch.cat((k_nope_BLHN, k_rot_BLHP), dim=-1).transpose(1, 2)
        q_BHQE, v_BHLV = q_BQHE.transpose(1, 2), v_BLHV.transpose(1, 2)
        square = context.square  # the fused kernel knows it
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

    def _dense_indexer(self, q_THE: Tensor, entries_TE: Tensor, scores: "_Scores", context: Context) -> None:
        """Warm-up loss over all causal keys (Eq. 3) and the recall of attention mass by the top-k."""
        mask_BQL = context.mask()
        with torch.no_grad():
            entries_BLE = context.keys(self.layer_idx, "entries", entries_TE)
            p_BQL = reference.dense_probs(context.grid(q_THE), entries_BLE, mask_BQL, self.scaling)
        record = context.record(self.layer_idx)
        if context.indexer_loss == "dense":
            assert scores.learn_BQL is not None, "made where there is a loss"
            kl_BQ = reference.indexer_kl(p_BQL, scores.learn_BQL, mask_BQL)
            kl = (kl_BQ * context.query_mask()).sum()
            record.add_kl(kl, kl.detach())
        if context.diagnose:
            # Only queries that have something to leave out count.
            counted_BQ = context.query_mask() & (context.query_positions_BQ >= self.index_topk)
            kept_BQK = reference.select_topk(scores.select_BQL.detach(), mask_BQL, self.index_topk)
            caught_BQ = (p_BQL.gather(-1, kept_BQK.clamp(min=0)) * (kept_BQK >= 0)).sum(-1)
            oracle_BQ = p_BQL.topk(min(self.index_topk, p_BQL.shape[-1]), dim=-1).values.sum(-1)
            record.recall = torch.stack([(x * counted_BQ).sum() for x in (caught_BQ, oracle_BQ)])


@dataclass(slots=True)
class _Tokens:
    """What the projections make of each token; the indexer's part only where it is used."""

    q_nope_THN: Tensor
    q_rot_THP: Tensor
    entries_TE: Tensor
    q_index_TJI: Tensor | None = None
    k_index_TI: Tensor | None = None
    w_TJ: Tensor | None = None
    k_stored_TX: Tensor | None = None
    """The keys as caches hold them; without e4m3 they are k_index_TI."""

    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and head weights of the indexer."""
        assert self.q_index_TJI is not None and self.k_index_TI is not None and self.w_TJ is not None, (
            "unused"
        )
        return self.q_index_TJI, self.k_index_TI, self.w_TJ

    def stored(self) -> Tensor:
        """Keys of the indexer that select."""
        assert self.k_stored_TX is not None, "unused"
        return self.k_stored_TX

    def rows(self, rows: slice) -> "_Tokens":
        """Some of them."""
        parts = (
            self.q_nope_THN,
            self.q_rot_THP,
            self.entries_TE,
            self.q_index_TJI,
            self.k_index_TI,
            self.w_TJ,
            self.k_stored_TX,
        )
        return _Tokens(*(part if part is None else part[rows] for part in parts))  # type: ignore[arg-type]  # the first three are there


@dataclass(frozen=True, slots=True)
class _Scores:
    """Index scores of the torch backend, fp32 [B, Q, L]; one tensor twice unless there is a selection, by e4m3."""

    learn_BQL: Tensor | None
    """What the indexer's loss sees; None without one."""
    select_BQL: Tensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the Triton path knows of each query."""

    q_nope_THN: Tensor
    q_rot_THP: Tensor
    q_index_TJI: Tensor
    w_TJ: Tensor
    """With every factor."""
    kept_TK: Tensor | None
    """Positions in the document to keep instead of the indexer's choice."""
    weight_T: Tensor | None
    """How often each counts in the indexer's loss; None: once."""

    def select(self, at: Tensor) -> "_Rows":
        parts = (self.q_nope_THN, self.q_rot_THP, self.q_index_TJI, self.w_TJ, self.kept_TK, self.weight_T)
        return _Rows(*(part if part is None else part.index_select(0, at) for part in parts))  # type: ignore[arg-type]  # only the last two may be None


def _has_dense_rows(context: Context) -> bool:
    """Whether rows that keep all their keys may be dense: not where the kept keys are wanted.

    Nor where gradients must be the same bits: those of torch's attention are not.
    """
    return context.backend.dense_rows and not context.backend.deterministic and not context.record_kept
