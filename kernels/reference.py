"""Every DSA operation in plain PyTorch: the definition that faster kernels are tested against.

Works on rectangular grids of queries and keys. Memory is O(B Q L) for the index scores (never times
the number of heads) and O(B Q K) for the sparse attention. Next: model/attention.py.

Shape letters: B rows (documents or sequences), Q queries per row, L keys per row, H heads,
J indexer heads, I indexer head size, E entry size (latent + rotary), R latent size, K kept entries.
Query b, q stands at position positions_BQ[b, q] and may see the keys 0 .. positions_BQ[b, q] of its row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(positions_BQ: Tensor, num_keys: int) -> Tensor:
    """[B, Q, L] bool, True where key index <= query position."""
    keys_L = torch.arange(num_keys, device=positions_BQ.device)
    return keys_L <= positions_BQ[..., None]


def index_scores(q_BQJI: Tensor, k_BLI: Tensor, w_BQJ: Tensor) -> Tensor:
    """Lightning indexer, V3.2-Exp Eq. 1: I[t, s] = sum_j w[t, j] I^-1/2 ReLU(q[t, j] . k[s]), fp32 [B, Q, L].

    w must carry the factor J^-1/2 already. One head at a time, so that no [B, Q, L, J] tensor exists.
    """
    w_BQJ = w_BQJ.float() * q_BQJI.shape[-1] ** -0.5
    k_BIL = k_BLI.float().transpose(1, 2)
    scores_BQL: Tensor | None = None
    for head in range(q_BQJI.shape[2]):
        part_BQL, w_BQ1 = torch.relu_(q_BQJI[:, :, head].float() @ k_BIL), w_BQJ[:, :, head, None]
        scores_BQL = part_BQL * w_BQ1 if scores_BQL is None else torch.addcmul(scores_BQL, part_BQL, w_BQ1)
    assert scores_BQL is not None, "the indexer has no heads"
    return scores_BQL


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I] as float8_e4m3fn and one fp32 scale per row [...], a power of two (ue8m0): x is about e4m3 * scale.

    The scale is the least power of two with which no element exceeds 448, the largest e4m3 number, and none
    is below 2^-23: rows of zeros. A row that is not finite has the scale NaN.
    """
    largest = x.float().abs().amax(-1).clamp(min=448 * 2.0**-23)
    mantissa, exponent = torch.frexp(largest / 448)  # mantissa in [0.5, 1)
    scale = torch.exp2((exponent - (mantissa == 0.5).int()).float())
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def round_e4m3(x: Tensor) -> Tensor:
    """x [..., I] as the numbers that its e4m3 and scales stand for, in fp32: what index scores see of q and k in e4m3.

    It has no gradient: the scores select, and nothing is learned through a selection.
    """
    values, scale = quantize_e4m3(x)
    return values.float() * scale[..., None]


def select_topk(scores_BQL: Tensor, mask_BQL: Tensor, k: int) -> Tensor:
    """Indices of the k best allowed keys, ordered (score descending, index ascending), returned ascending.

    [B, Q, min(k, L)] int64; -1 fills rows with fewer allowed keys, at the end. The tie rule matters:
    ReLU makes exact zeros common, and an arbitrary choice among them differs between prefill and decode.
    """
    num_keys = scores_BQL.shape[-1]
    k = min(k, num_keys)
    masked_BQL = scores_BQL.masked_fill(~mask_BQL, float("-inf"))
    # A stable descending sort keeps equal scores in index order: exactly the rule.
    best_BQK = torch.sort(masked_BQL, dim=-1, descending=True, stable=True).indices[..., :k]
    return ascending(best_BQK, ~mask_BQL.expand_as(masked_BQL).gather(-1, best_BQK))


def ascending(kept: Tensor, missing: Tensor | None) -> Tensor:
    """Kept indices [..., K] in ascending order, -1 for the missing ones at the end."""
    if missing is None:
        return kept.sort(dim=-1).values
    last = torch.iinfo(kept.dtype).max
    ordered = kept.masked_fill(missing, last).sort(dim=-1).values
    return ordered.masked_fill(ordered == last, -1)


def dense_probs(q_BQHE: Tensor, entries_BLE: Tensor, mask_BQL: Tensor, scale: float) -> Tensor:
    """Head-mean attention p[t, s], the L1-normalised target of the indexer, fp32 [B, Q, L].

    One head at a time: L x L, never L x L x heads.
    """
    p_BQL: Tensor | None = None
    entries_BEL = entries_BLE.transpose(1, 2)
    num_heads = q_BQHE.shape[2]
    for head in range(num_heads):
        logits_BQL = (q_BQHE[:, :, head] @ entries_BEL).float() * scale
        part_BQL = logits_BQL.masked_fill(~mask_BQL, float("-inf")).softmax(-1)
        p_BQL = part_BQL if p_BQL is None else p_BQL + part_BQL
    assert p_BQL is not None, "the attention has no heads"
    return p_BQL / num_heads


def sparse_mla(
    q_BQHE: Tensor, entries_BLE: Tensor, kept_BQK: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    """MQA-absorbed attention over the kept entries; the value is the first `value_size` dims of an entry.

    q_BQHE = [absorbed query | rotary query]. Returns the latent output [B, Q, H, R] and the
    probabilities [B, Q, H, K] in fp32 (0 at -1 entries).
    """
    num_rows, num_keys, size = entries_BLE.shape
    rows_B = torch.arange(num_rows, device=kept_BQK.device).view(-1, 1, 1) * num_keys
    flat = (kept_BQK.clamp(min=0) + rows_B).reshape(-1)
    # index_select: its backward (index_add) is three times faster on CPU than that of advanced indexing
    kept_BQKE = entries_BLE.reshape(-1, size).index_select(0, flat).view(*kept_BQK.shape, size)
    logits_BQHK = (q_BQHE @ kept_BQKE.transpose(-1, -2)).float() * scale
    logits_BQHK = logits_BQHK.masked_fill((kept_BQK < 0)[:, :, None], float("-inf"))
    probs_BQHK = logits_BQHK.softmax(-1)
    return probs_BQHK.to(q_BQHE.dtype) @ kept_BQKE[..., :value_size], probs_BQHK


def paged(pool_PSX: Tensor, table_BM: Tensor, num_keys: int) -> Tensor:
    """Keys 0 .. num_keys - 1 of every sequence of a paged cache, [B, L, X].

    Key t of sequence b is token t mod S of block table[b, t div S] of the pool [P, S, X]. Table entries of
    blocks that are not in use may be anything: what they give is not to be seen by any query.
    """
    keys_L = torch.arange(num_keys, device=pool_PSX.device)
    blocks_BL = table_BM[:, keys_L // pool_PSX.shape[1]].long().clamp(0, len(pool_PSX) - 1)
    return pool_PSX[blocks_BL, keys_L % pool_PSX.shape[1]]


def indexer_kl(p_BQL: Tensor, scores_BQL: Tensor, mask_BQL: Tensor) -> Tensor:
    """D_KL(p || softmax(I)) per query over the allowed keys, V3.2-Exp Eq. 3 and 4, fp32 [B, Q].

    p is detached here: the gradient with respect to I is softmax(I) - p on the support, 0 elsewhere.
    For Eq. 4 hand in p, I and the mask gathered at the selected keys.
    """
    p_BQL = p_BQL.detach()
    logq_BQL = F.log_softmax(scores_BQL.masked_fill(~mask_BQL, float("-inf")), dim=-1)
    terms_BQL = torch.xlogy(p_BQL, p_BQL) - p_BQL * logq_BQL.masked_fill(~mask_BQL, 0.0)
    return terms_BQL.sum(-1)
