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

from posttrain.kernels import dense, reference
from posttrain.kernels.pages import Pages
from posttrain.kernels.sparse_mla import sparse_mla
from posttrain.model.context import Context, PackedContext, entry_keys
from posttrain.model.indexer import LightningIndexer
from posttrain.model.lora import weight_of
from posttrain.model.plan import Plan
from posttrain.model.rope import Rope, rotate, rotate_into
from posttrain.model.rows import Pieces, Rows, Tokens, join

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
        if context.parts:
            context.add(self.layer_idx, tokens.entries_TE, tokens.k_stored_TX)
        if len(context.parts) > 1:
            o_THV = self._room(tokens.q_THE)
            for part in context.parts:
                self._attend(tokens.rows(part.rows), part.context, o_THV[part.rows])
        else:
            o_THV = self._attend(tokens, context.parts[0].context if context.parts else context)
        return self.o_proj(o_THV.flatten(1))  # type: ignore[no-any-return]  # nn.Module call

    def _room(self, q_THE: Tensor) -> Tensor:
        """Where the outputs [T, H, V] of queries go."""
        return q_THE.new_empty(*q_THE.shape[:2], self.v_head_dim)

    def _project(self, x_TD: Tensor, rope: Rope, context: Context) -> Tokens:
        latent_TC = self.q_a_layernorm(self.q_a_proj(x_TD))
        q_THE = self.q_b_proj(latent_TC).view(len(x_TD), -1, self.qk_head_dim)
        kv_TR, k_rot_TP = self.kv_a_proj_with_mqa(x_TD).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        entries_TE = torch.cat((self.kv_a_layernorm(kv_TR), rotate(k_rot_TP, rope)), dim=-1)
        tokens = Tokens(q_THE, rope, entries_TE)
        if context.attention == "sparse" or context.indexer_loss == "dense":
            with torch.set_grad_enabled(torch.is_grad_enabled() and context.indexer_loss != "none"):
                tokens.q_index_TJI, tokens.k_index_TI, tokens.w_TJ = self.indexer(x_TD, latent_TC, rope)
                tokens.k_stored_TX = self.indexer.stored(tokens.k_index_TI, context.backend)
        return tokens

    def _attend(self, tokens: Tokens, context: Context, out_THV: Tensor | None = None) -> Tensor:
        """[T, H, V]; where a place is given, which has no gradient, there."""
        sparse, warmup = context.attention == "sparse", context.indexer_loss == "dense"
        by_triton = context.backend.name == "triton"
        q, turns = (tokens.q_THE,), (tokens.rope_TP,)
        if context.diagnose or ((sparse or warmup) and not by_triton):
            scores = self._index_scores(tokens, context)
            absorbed_THE = self._latent_queries(q, turns)
            if warmup or context.diagnose:
                self._dense_indexer(absorbed_THE, tokens.entries_TE, scores, context)
        warms = warmup and by_triton and not context.diagnose
        if warms or not sparse:
            own_THE = self._own_queries(q, turns, overwrite=not sparse)
        if warms:
            entries_SE = context.slotted(self.layer_idx, "entries", tokens.entries_TE)
            keys_SI = context.slotted(self.layer_idx, "index", tokens.index()[1])
            ranges = context.plan(0).ranges
            assert ranges is not None, "no rows"
            self._dense_kl_by_triton(
                own_THE, self._rows(tokens, context), entries_SE, keys_SI, ranges, context
            )
        if sparse and by_triton:
            return self._sparse_by_triton(tokens, context, out_THV)
        if sparse:
            found_THV = self._sparse(absorbed_THE, tokens.entries_TE, scores, context)
        else:
            found_THV = self._dense(own_THE, tokens.entries_TE, context)
        return found_THV if out_THV is None else out_THV.copy_(found_THV)

    def _rows(self, tokens: Tokens, context: Context) -> Rows:
        q_index_TJI, _, w_TJ = tokens.index()
        return Rows(
            (tokens.q_THE,),
            (tokens.rope_TP,),
            (q_index_TJI,),
            (w_TJ * self.indexer.head_dim**-0.5,),
            None if context.replay_kept is None else (context.replay_kept[self.layer_idx],),
            None if context.query_weights_T is None else (context.query_weights_T,),
        )

    def _index_scores(self, tokens: Tokens, context: Context) -> "_Scores":
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

    def _own_queries(self, q: Pieces, turns: Pieces, *, overwrite: bool) -> Tensor:
        """[own | rotated] queries [T, H, N + P] of multi-head attention."""
        return rotate(join(q), join(turns), start=self.qk_nope_head_dim, overwrite=overwrite)

    def _latent_queries(self, q: Pieces, turns: Pieces) -> Tensor:
        """[absorbed | rotated] queries [T, H, E]: q^A = W_UK^T q^C (V3.2-Exp Eq. 2)."""
        up_HNR, sizes = self.up_projections()[0], [self.qk_nope_head_dim, self.qk_rope_head_dim]
        if torch.is_grad_enabled():
            q_nope_THN, q_rot_THP = join(q).split(sizes, dim=-1)
            absorbed_THR = torch.bmm(q_nope_THN.transpose(0, 1), up_HNR).transpose(0, 1)
            return torch.cat((absorbed_THR, rotate(q_rot_THP, join(turns))), dim=-1)
        # Each part goes straight to its place: of a long prompt this is the largest array there is.
        E = self.kv_lora_rank + self.qk_rope_head_dim
        q_THE = q[0].new_empty(sum(map(len, q)), q[0].shape[1], E)
        for piece, turn, place in zip(q, turns, q_THE.split([len(piece) for piece in q]), strict=True):
            q_nope_THN, q_rot_THP = piece.split(sizes, dim=-1)
            absorbed_THR, rot_THP = place.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            torch.bmm(q_nope_THN.transpose(0, 1), up_HNR, out=absorbed_THR.transpose(0, 1))
            rotate_into(rot_THP, q_rot_THP, turn)
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

    def _values(self, o_THR: Tensor, places: Pieces | None = None) -> Tensor:
        """o = W_UV o^A: [T, H, R] -> [T, H, V]; where places for its rows are given, which have no gradient, there."""
        up_HRV = self.up_projections()[1].transpose(1, 2)
        if places is None:
            return torch.bmm(o_THR.transpose(0, 1), up_HRV).transpose(0, 1)
        for rows_THR, place_THV in zip(o_THR.split([len(place) for place in places]), places, strict=True):
            torch.bmm(rows_THR.transpose(0, 1), up_HRV, out=place_THV.transpose(0, 1))
        return places[0]

    def _dense_kl_by_triton(
        self,
        own_THE: Tensor,
        rows: Rows,
        entries_SE: Tensor,
        keys_SI: Tensor,
        ranges: "Ranges",
        context: Context,
    ) -> None:
        """The indexer's loss of queries that keep all their keys (Eq. 3, and Eq. 4 where there are no more than top-k).

        Without a grid; the attention, which gives p, is multi-head.
        """
        from posttrain.kernels import dsa, warmup_kl_triton  # triton exists on Linux only
        from posttrain.kernels.dense_probs_triton import attention_lse

        q_THE = own_THE.detach()
        with torch.no_grad():
            latent_SR, k_rot_SP = entries_SE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            k_SH = F.linear(latent_SR, self.up_projections()[0].flatten(0, 1))
            keys = (k_SH.unflatten(-1, (-1, self.qk_nope_head_dim)), k_rot_SP.contiguous())
            lse_TH = attention_lse(q_THE, *keys, ranges, self.scaling)
        attention = warmup_kl_triton.Attention(q_THE, *keys, lse_TH, self.scaling)
        index = dsa.Index(join(rows.q_index_TJI), keys_SI, join(rows.w_TJ))
        weight_T = None if rows.weight_T is None else join(rows.weight_T)
        kl = dsa.warmup_loss(index, attention, ranges, weight_T)
        context.record(self.layer_idx).add_kl(kl, kl.detach())

    def _sparse_by_triton(self, tokens: Tokens, context: Context, out_THV: Tensor | None) -> Tensor:
        """The sparse path on queries [T] and slots [S]: dense, by kernels, or by kernels for a cache."""
        entries_SE = context.slotted(self.layer_idx, "entries", tokens.entries_TE)
        stored_SX = context.slotted(self.layer_idx, "index", tokens.stored())
        pages, rows = context.pages(self.layer_idx), self._rows(tokens, context)
        if pages is not None:
            return self._decode(rows, pages, context, out_THV)
        plan = context.plan(self.index_topk if _has_dense_rows(context) else 0)
        is_dense = plan.split is not None and len(plan.split.sizes) == 1
        if out_THV is None and not torch.is_grad_enabled() and not is_dense:
            out_THV = self._room(tokens.q_THE)
        keys = (tokens, entries_SE, stored_SX)
        if plan.split is None:
            return self._attend_kept(rows, *keys, plan, context, None if out_THV is None else (out_THV,))
        return self._attend_parts(rows, *keys, plan, context, out_THV)

    def _attend_parts(
        self,
        rows: Rows,
        tokens: Tokens,
        entries_SE: Tensor,
        stored_SX: Tensor,
        plan: Plan,
        context: Context,
        out_THV: Tensor | None,
    ) -> Tensor:
        split, found = plan.split, []
        assert split is not None, "of rows that go different ways"
        parts = rows.parts(split)
        places = [None] * len(parts) if out_THV is None else split.parts(out_THV)
        of_parts = (split.parts(x) for x in (tokens.entries_TE, tokens.index()[1]))
        for documents, early, entries, keys, place in zip(
            split.dense, parts, *of_parts, places, strict=False
        ):
            found.append(self._attend_all(early, join(entries), join(keys), documents, context))
            if place is not None:
                for to_THV, rows_THV in zip(place, found.pop().split([len(x) for x in place]), strict=True):
                    to_THV.copy_(rows_THV)
        if plan.ranges is not None:
            late = self._attend_kept(parts[-1], tokens, entries_SE, stored_SX, plan, context, places[-1])
            found.append(late)
        if out_THV is not None:
            return out_THV
        return found[0] if len(split.sizes) == 1 else split.whole(found)

    def _attend_all(
        self, rows: Rows, entries_TE: Tensor, keys_TI: Tensor, documents: PackedContext, context: Context
    ) -> Tensor:
        """Rows that keep all their keys, in documents of their own."""
        own_THE = self._own_queries(rows.q_THE, rows.rope_TP, overwrite=True)
        if context.indexer_loss == "sparse" and torch.is_grad_enabled():
            entries_SE = documents.slotted(self.layer_idx, "entries", entries_TE)
            keys_SI = documents.slotted(self.layer_idx, "index", keys_TI)
            ranges = documents.plan(0).ranges
            assert ranges is not None, "no rows"
            self._dense_kl_by_triton(own_THE, rows, entries_SE, keys_SI, ranges, context)
        return self._dense(own_THE, entries_TE, documents)

    def _attend_kept(
        self,
        rows: Rows,
        tokens: Tokens,
        entries_SE: Tensor,
        stored_SX: Tensor,
        plan: Plan,
        context: Context,
        places: Pieces | None,
    ) -> Tensor:
        from posttrain.kernels import dsa  # triton exists on Linux only

        entry, index, ranges = self.indexer.entry, None, plan.ranges
        assert ranges is not None, "no rows"
        if context.indexer_loss == "sparse":
            keys_SI = stored_SX
            if entry.e4m3:
                keys_SI = context.slotted(self.layer_idx, "index", tokens.index()[1])
            index = dsa.Index(join(rows.q_index_TJI), keys_SI, join(rows.w_TJ))
        if rows.kept_TK is None:
            keys_SI, scale_S = entry_keys(stored_SX, entry)
            scored = (rows.q_index_TJI, rows.w_TJ)
            q_TJI, w_TJ = map(join, scored) if scale_S is None else dsa.quantized(*scored)
            slots_TK = dsa.select(dsa.Index(q_TJI, keys_SI, w_TJ, scale_S), ranges, self.index_topk)
        else:  # Keep Top-k: the engine's choice
            kept_TK = join(rows.kept_TK).int()
            slots_TK = torch.where(kept_TK < 0, kept_TK, kept_TK + ranges.begin_N[:, None])
        o_THR, kl = dsa.attend(
            self._latent_queries(rows.q_THE, rows.rope_TP),
            entries_SE,
            slots_TK,
            scale=self.scaling,
            value_size=self.kv_lora_rank,
            deterministic=context.backend.deterministic,
            index=index,
            weight_T=None if rows.weight_T is None else join(rows.weight_T),
        )
        record = context.record(self.layer_idx)
        if kl is not None:
            record.add_kl(kl.loss, kl.value)
        if context.record_kept:
            kept_TK = torch.where(slots_TK < 0, slots_TK, slots_TK - ranges.begin_N[:, None])
            record.kept_BQK = context.grid(kept_TK)
        return self._values(o_THR, places)

    def _decode(self, rows: Rows, pages: Pages, context: Context, out_THV: Tensor | None) -> Tensor:
        from posttrain.kernels import dsa  # triton exists on Linux only

        o_BQHR, kept_BQK = dsa.decode(
            context.grid(self._latent_queries(rows.q_THE, rows.rope_TP)),
            context.grid(join(rows.q_index_TJI)),
            context.grid(join(rows.w_TJ)),
            pages,
            num_kept=self.index_topk,
            scale=self.scaling,
            value_size=self.kv_lora_rank,
            max_rows=context.backend.max_rows,
            deterministic=context.backend.deterministic,
        )
        if context.record_kept:
            context.record(self.layer_idx).kept_BQK = kept_BQK
        o_THR = context.flat(o_BQHR)
        if out_THV is None and not torch.is_grad_enabled():
            out_THV = self._room(o_THR)
        return self._values(o_THR, None if out_THV is None else (out_THV,))

    def _dense(self, q_THE: Tensor, entries_TE: Tensor, context: Context) -> Tensor:
        q_BQHE, entries_BLE = context.grid(q_THE), context.keys(self.layer_idx, "entries", entries_TE)
        latent_BLR, k_rot_BLP = entries_BLE.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_BLH = self.kv_b_proj(latent_BLR).unflatten(-1, (q_BQHE.shape[2], -1))
        k_BLHE, v_BLHV = dense.keys_and_values(kv_BLH, k_rot_BLP, self.qk_nope_head_dim)
        if context.square:  # the fused kernels know it
            return context.flat(dense.causal(q_BQHE, k_BLHE, v_BLHV, self.scaling))
        mask_BQL = context.mask()
        o_BHQV = F.scaled_dot_product_attention(
            q_BQHE.transpose(1, 2),
            k_BLHE.transpose(1, 2),
            v_BLHV.transpose(1, 2),
            attn_mask=mask_BQL[:, None],
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


@dataclass(frozen=True, slots=True)
class _Scores:
    """Index scores of the torch backend, fp32 [B, Q, L]; one tensor twice unless there is a selection, by e4m3."""

    learn_BQL: Tensor | None
    """What the indexer's loss sees; None without one."""
    select_BQL: Tensor


def _has_dense_rows(context: Context) -> bool:
    """Whether rows that keep all their keys may be dense: not where the kept keys are wanted.

    Nor where gradients must be the same bits: those of torch's attention are not.
    """
    return context.backend.dense_rows and not context.backend.deterministic and not context.record_kept
