"""`posttrain agree`: how far an engine is from the learner on the same checkpoint, as numbers.

The engine samples; one packed pass of the learner's model per rollout gives its log-probs, kept keys and experts for the
same tokens. Next: rollouts/vllm/engine.py, loss.py.

Shape letters: M sampled tokens, N layers, Q queries, K kept keys, E experts per token.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.gaps import gap_figures
from posttrain.generation import sample_seed
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.context import PackedContext
from posttrain.rollouts import sampling
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Rollout
from posttrain.table import columns
from posttrain.tasks import load_tasks
from posttrain.ties import Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """An engine against the learner; the first figures are those of gaps.gap_figures."""

    num_tokens: int
    gap_mean: float
    gap_p99: float
    gap_max: float
    kl_engine: float
    kl_learner: float
    ratio_min: float
    ratio_max: float
    ties: float
    """Share of queries whose k-th key has the score of the next one (ties.py)."""
    experts: float | None
    """Share of tokens and MoE layers with the same experts; None without any."""
    jaccard: tuple[float, ...]
    """Per layer: the mean overlap of the kept keys over their union, of queries that leave something out."""


def agree(
    path: Path,
    uri: str,
    *,
    engine: Literal["torch", "vllm"],
    num_tasks: int,
    new_tokens: int,
    seed: int,
    dtype: str,
    device: str,
) -> str:
    """Sample from an engine, measure, and print the table. Raises ValueError for what does not fit."""
    attention = checkpoint.attention_of(path)
    tasks = list(itertools.islice(load_tasks(uri, domain="agree", seed=seed), num_tasks))
    if not tasks:
        raise ValueError(f"{uri} has no task")
    requests = [
        Request(task=task, index=0, seed=sample_seed(seed, 0, task.id, 0), max_new_tokens=new_tokens)
        for task in tasks
    ]
    learner = TorchEngine.open(path, attention, dtype=getattr(torch, dtype), device=device)
    server: Any = learner
    if engine == "vllm":
        from posttrain.rollouts.vllm import launch

        launch.prepare()
        from posttrain.rollouts.vllm.engine import VllmEngine  # imports vLLM, an extra

        server = VllmEngine(path, learner.tokenizer, dtype=dtype)
    settings = Sampling(record_kept=True, record_experts=True)
    rollouts = [r for r in server.generate(requests, settings) if r.num_sampled]
    if not rollouts:
        raise ValueError(f"{path}: the engine has served none of the {len(tasks)} tasks")
    found = measure(learner.model, rollouts, attention=attention)
    head = (
        f"{path}: {engine} engine ({server.backend}) against the learner, {len(rollouts)} rollouts, {dtype}"
    )
    return f"{head}\n{_table(found)}"


def measure(
    model: DeepseekV32ForCausalLM,
    rollouts: Sequence[Rollout],
    *,
    attention: Literal["dense", "sparse"] = "sparse",
    temperature: float = 1.0,
) -> Agreement:
    """The agreement of rollouts, sampled without truncation, with a model; kept keys and experts where recorded."""
    gaps, same_experts, ties = [], [], []
    overlaps: dict[int, list[NDArray[Any]]] = {}
    for rollout in rollouts:
        logp, context, tied = _learner_pass(model, rollout, attention, temperature)
        if tied is not None:
            ties.append(tied)
        gaps.append((rollout.logprobs[1:] - logp)[rollout.sampled[1:]])
        num = len(rollout.tokens) - 1
        experts = [r.experts_TE for _, r in sorted(context.records.items()) if r.experts_TE is not None]
        if rollout.experts is not None:
            ours = torch.stack(experts)[:, :num].sort(-1).values.cpu().numpy()
            same_experts.append((ours == np.sort(rollout.experts, -1)).all(-1).ravel())
        for layer in range(0 if rollout.kept is None else len(rollout.kept)):
            kept_BQK = context.records[layer].kept_BQK
            assert kept_BQK is not None and rollout.kept is not None, "the learner selects too"
            some = slice(model.config.index_topk, num)  # queries before keep everything
            overlap = _jaccard(kept_BQK[0, some].cpu().numpy(), rollout.kept[layer][some])
            overlaps.setdefault(layer, []).append(overlap)
    log_M = np.concatenate(gaps)  # log(engine / learner)
    return Agreement(
        **gap_figures(log_M),
        num_tokens=len(log_M),
        ties=float(np.mean(ties)) if ties else 0.0,
        experts=float(np.concatenate(same_experts).mean()) if same_experts else None,
        jaccard=tuple(_mean(np.concatenate(overlaps[layer])) for layer in sorted(overlaps)),
    )


@torch.no_grad()
def _learner_pass(
    model: DeepseekV32ForCausalLM, rollout: Rollout, attention: Literal["dense", "sparse"], temperature: float
) -> tuple[NDArray[np.float32], PackedContext, float | None]:
    """Log-probs [L - 1] of every token but the first, the pass's records, and its ties if it leaves keys out."""
    device = model.lm_head.weight.device
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64)).to(device)
    context = PackedContext(
        attention=attention,
        backend=model.backend("auto"),
        record_kept=True,
        cu_seqlens_S=torch.tensor([0, len(tokens)], device=device),
    )
    with Ties(model, context) as ties:
        logits = model(tokens, context)[:-1]
    logp = sampling.processed_logprobs(logits, temperature, 1.0).gather(1, tokens[1:, None])[:, 0]
    found: NDArray[np.float32] = logp.cpu().numpy()
    chooses = attention == "sparse" and len(tokens) > model.config.index_topk
    return found, context, ties.share if chooses else None


def _jaccard(a_QK: NDArray[Any], b_QK: NDArray[Any]) -> NDArray[Any]:
    """Overlap over union of two sets of keys per query, [Q]; -1 is no key."""
    all_QK = np.sort(np.concatenate([a_QK, b_QK], 1), 1)  # a key of both stands twice, side by side
    both = ((all_QK[:, 1:] == all_QK[:, :-1]) & (all_QK[:, 1:] >= 0)).sum(-1)
    either: NDArray[Any] = (a_QK >= 0).sum(-1) + (b_QK >= 0).sum(-1) - both
    overlap: NDArray[Any] = both / np.maximum(either, 1)
    return overlap


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 1.0


def _table(found: Agreement) -> str:
    rows = [
        ["sampled tokens", str(found.num_tokens)],
        ["|log-prob gap| mean, p99, max", f"{found.gap_mean:.1e}, {found.gap_p99:.1e}, {found.gap_max:.1e}"],
        ["KL(engine || learner), KL(learner || engine)", f"{found.kl_engine:.1e}, {found.kl_learner:.1e}"],
        ["learner / engine, least and most", f"{found.ratio_min:.6f}, {found.ratio_max:.6f}"],
        ["queries with a tie at the last key kept", f"{found.ties:.4%}"],
    ]
    if found.experts is not None:
        rows.append(["same experts", f"{found.experts:.4%}"])
    rows += [[f"kept keys in common, layer {n}", f"{share:.4%}"] for n, share in enumerate(found.jaccard)]
    return columns(rows)
