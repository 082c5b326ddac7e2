"""The indexer's part of kernels.py: scores and top-k, the sparse KL, the dense warm-up loss."""

from typing import Any

import kernel_peers as peers
import torch
from kernel_cases import KEPT, QUERIES, Case, Table, kept_keys, normal
from torch import Tensor

from posttrain.kernels import dense_probs_triton, fp8_triton, index_topk_triton, indexer_kl_triton
from posttrain.kernels import warmup_kl_triton as warmup_kl

HEADS, SIZE = 64, 128
PER_PAIR = 2.0 * HEADS * SIZE
NOPE, ROPE = 128, 64


def _inputs(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    w = normal(QUERIES, HEADS, seed=5, dtype=torch.float32) * (HEADS * SIZE) ** -0.5
    return normal(QUERIES, HEADS, SIZE, seed=3), normal(keys, SIZE, seed=4), w


def _ranges(keys: int, rows: slice = slice(None)) -> index_topk_triton.Ranges:
    ends = torch.arange(keys - QUERIES + 1, keys + 1)[rows]
    return index_topk_triton.key_ranges(torch.zeros_like(ends), ends, "cuda")


def topk(keys: list[int], _: list[str]) -> dict[str, Any]:
    """Scores and exact top-k, from bf16 and from e4m3."""
    report = {}
    for num in keys:
        q, k, w = _inputs(num)
        table = Table(f"top-k {num // 1024}k")
        q8, q_scale = fp8_triton.quantize_e4m3(q)
        k8, k_scale = fp8_triton.quantize_e4m3(k)
        for name, args, scale in (("bf16", (q, k, w), None), ("fp8", (q8, k8, w * q_scale), k_scale)):
            _time_topk(table, name, num, args, scale)
        report[table.name] = table.rows
    return report


def _time_topk(
    table: Table, name: str, num: int, args: tuple[Tensor, Tensor, Tensor], scale: Tensor | None
) -> None:
    q, k, w = args
    ranges, flop = _ranges(num), PER_PAIR * QUERIES * (num - (QUERIES - 1) / 2)

    def run(rows: slice = slice(None)) -> Tensor:
        part = ranges if rows == slice(None) else _ranges(num, rows)
        return index_topk_triton.topk(
            q[rows].contiguous(), k, w[rows].contiguous(), part, KEPT, k_scale_S=scale
        )

    found, rows = run(), slice(0, QUERIES, 257)
    scores = torch.zeros(len(range(QUERIES)[rows]), num, device="cuda")
    keys32 = k.float() if scale is None else k.float() * scale[:, None]
    for head in range(HEADS):
        scores += (q[rows, head].float() @ keys32.T).relu() * w[rows, head, None]
    scores.masked_fill_(torch.arange(num, device="cuda") >= ranges.end_N[rows, None], float("-inf"))
    hit = torch.zeros_like(scores).scatter_(1, scores.topk(KEPT).indices, 1.0).gather(1, found[rows].long())
    print(f"{table.name} {name}: least overlap with fp32 {float(hit.mean(1).min()):.4f}", flush=True)
    assert hit.mean(1).min() > 0.995, "the selection is wrong"
    assert (found[:, 1:] > found[:, :-1]).all(), "not ascending"
    assert torch.equal(found, run()), "not repeatable"
    assert torch.equal(found[1000:2003], run(slice(1000, 2003))), "depends on the chunking"
    table.add(f"scores + top-k, {name}", run, flop, sustained=True)
    dense = torch.empty(0)
    if name == "bf16" and (score := peers.cudnn_scores(q, k, w)) is not None:
        table.add("cuDNN scores, bf16", score, flop, sustained=True)
        dense = score()["scores"][0]
    begins = torch.zeros_like(ranges.end_N)
    if name == "fp8" and (score := peers.deep_gemm_scores(q, k, scale, w, begins, ranges.end_N)) is not None:
        table.add("DeepGEMM scores, fp8", score, flop, sustained=True)
        dense = score()
    if len(dense) and (select := peers.cudnn_topk(dense, ranges.end_N, KEPT)) is not None:
        table.add(f"cuDNN deterministic top-k, {name}", select, 0.0, sustained=True)


def sparse_kl(keys: list[int], kinds: list[str]) -> dict[str, Any]:
    """KL over the kept keys with its gradients."""
    report = {}
    for num in keys:
        for kind in kinds:
            q, k, w = _inputs(num)
            slots = kept_keys(Case(HEADS, num, kind))
            p = normal(QUERIES, KEPT, seed=6, dtype=torch.float32).softmax(-1)
            weight = torch.full((QUERIES,), 1 / QUERIES, device="cuda")
            table = Table(f"KL {num // 1024}k {kind}")
            flop = 3 * PER_PAIR * KEPT * QUERIES
            for name, deterministic in (("fast", False), ("deterministic", True)):
                table.add(
                    f"KL and gradients, {name}",
                    lambda q=q, k=k, w=w, slots=slots, p=p, weight=weight, d=deterministic: (
                        indexer_kl_triton.indexer_kl(q, k, w, slots, p, weight, deterministic=d)
                    ),
                    flop,
                    sustained=True,
                )
            if (run := peers.cudnn_indexer_backward(q, k, w, p.clone(), p, slots)) is not None:
                table.add("cuDNN indexer backward", run, flop, sustained=True)
            report[table.name] = table.rows
    return report


def warmup(keys: list[int], _: list[str]) -> dict[str, Any]:
    """The loss over all causal keys with its gradients, given the attention's log-sum-exp."""
    report = {}
    for num in keys:
        for heads in (64, 128):
            q, k, w = _inputs(num)
            ranges, scale = _ranges(num), (NOPE + ROPE) ** -0.5
            queries = normal(QUERIES, heads, NOPE + ROPE, seed=7)
            kv, rotary = normal(num, heads, 2 * NOPE, seed=8), normal(num, ROPE, seed=9)
            lse = dense_probs_triton.attention_lse(queries, kv[..., :NOPE], rotary, ranges, scale)
            attention = warmup_kl.Attention(queries, kv[..., :NOPE], rotary, lse, scale)
            weight = torch.full((QUERIES,), 1 / QUERIES, device="cuda")
            table = Table(f"warm-up {num // 1024}k H={heads}")
            pairs = QUERIES * (num - (QUERIES - 1) / 2)
            table.add(
                "loss and gradients",
                lambda a=attention, q=q, k=k, w=w, r=ranges, weight=weight: warmup_kl.warmup_kl(
                    a, q, k, w, r, weight
                ),
                pairs * (2.0 * heads * (NOPE + ROPE) + 4 * PER_PAIR),
                repeats=8,
            )
            report[table.name] = table.rows
    return report
