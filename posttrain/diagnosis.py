"""What a conversion has cost, on held-out batches. Next: stages/lm.py, which shows it.

Shape letters: M valid tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from posttrain.device_batch import DeviceBatch
from posttrain.kernels.backend import Backend
from posttrain.model.context import PackedContext


def measure(
    batches: Iterable[DeviceBatch],
    run: Callable[[DeviceBatch, PackedContext], Tensor],
    backend: Backend,
    *,
    topk: int,
) -> dict[str, Any]:
    """LM loss dense and sparse, KL and top-k recall per layer; run gives the log-probs [M] of a batch.

    Losses and recall count only tokens predicted from a query with more than top-k causal keys.
    """
    sums = {"lm_loss_dense": 0.0, "lm_loss_sparse": 0.0}
    kl: defaultdict[int, float] = defaultdict(float)
    recall: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(2))
    load: dict[int, Tensor] = {}
    counted = targets = queries = 0
    for tensors in batches:
        for mode in ("dense", "sparse"):
            context = PackedContext(
                attention=mode,
                backend=backend,
                indexer_loss="dense" if mode == "dense" else "none",
                diagnose=mode == "sparse",
                cu_seqlens_S=tensors.cu_seqlens_S,
            )
            logp_M = run(tensors, context)
            long_M = context.positions_T[tensors.at_M] >= topk
            sums[f"lm_loss_{mode}"] -= float(logp_M[long_M].sum())
            for layer, record in context.records.items():
                if record.kl_value is not None:
                    kl[layer] += float(record.kl_value)
                if record.recall is not None:
                    recall[layer] += record.recall.cpu()
                if record.load_X is not None and mode == "sparse":
                    load[layer] = load.get(layer, 0) + record.load_X.cpu()
        targets += int(long_M.sum())
        counted += int((context.positions_T >= topk).sum())
        queries += len(tensors.tokens_T)
    layers = [
        {
            "layer": n,
            "kl": kl[n] / queries,
            "recall": float(recall[n][0]) / max(counted, 1),
            "recall_oracle": float(recall[n][1]) / max(counted, 1),
            "recall_ratio": float(recall[n][0] / recall[n][1].clamp(min=1e-30)),
        }
        for n in sorted(recall)
    ]
    means = {name: value / max(targets, 1) for name, value in sums.items()}
    return means | {
        "layers": layers,
        "expert_load": {n: (x / x.sum()).tolist() for n, x in sorted(load.items())},
        "heldout_tokens": queries,
        "counted_queries": counted,
        "counted_targets": targets,
    }
