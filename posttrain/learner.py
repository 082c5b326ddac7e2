"""The learner: one model, one optimizer, language-model steps and GRPO steps on packed batches.

A plain class; cluster.py makes it a Ray actor. Gradients of all micro-batches of a step are summed, with
every weight fixed beforehand (packing.py). Left out here: sharding over several GPUs. Next: loss.py.

Shape letters: T tokens of a batch, M valid (predicted) tokens of it, X experts.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain import config, loss
from posttrain.kernels.backend import Choice
from posttrain.model import checkpoint
from posttrain.model.arch import target_logprobs
from posttrain.model.context import AttentionMode, IndexerLoss, PackedContext
from posttrain.model.moe import update_bias
from posttrain.optimizer import Optimizers
from posttrain.schema import Batch

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a learner is made of."""

    checkpoint: Path
    attention: AttentionMode
    optimizer: config.Optimizer
    total_steps: int
    train: frozenset[str]
    """"model", "indexer" or both."""
    indexer_loss: IndexerLoss = "none"
    balance_speed: float = 0.0
    reference: bool = False
    """Keep a frozen copy of the starting policy for the KL."""
    device: str = "cpu"
    dtype: str = "float32"
    backend: Choice = "auto"
    deterministic: bool = False
    seed: int = 0


@dataclass(slots=True)
class _Tensors:
    """A batch on the device, its valid tokens singled out."""

    tokens_T: Tensor
    cu_seqlens_S: Tensor
    at_M: Tensor
    targets_M: Tensor
    weight_M: Tensor
    sequence_M: Tensor
    num_tokens: int


class Learner:
    """Owns the training state of one stage."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(setup.seed)
        self.setup = setup
        dtype = getattr(torch, setup.dtype)
        self.model = checkpoint.load(setup.checkpoint, dtype=dtype, device=setup.device)
        self.model.train()
        self.backend = self.model.backend(setup.backend, deterministic=setup.deterministic)
        self.reference = deepcopy(self.model).requires_grad_(False) if setup.reference else None
        self.optimizers = Optimizers(
            self.model, setup.optimizer, train=set(setup.train), total_steps=setup.total_steps
        )
        self.version = 0
        self._load: dict[int, Any] = {}

    def lm_step(self, batches: Sequence[Batch]) -> Figures:
        """One optimizer step on language-model batches; the indexer's KL is added where it trains.

        With only the indexer training (warm-up) there is no LM gradient at all.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        with_lm = "model" in self.setup.train
        for batch in batches:
            tensors = self._tensors(batch)
            context = self._context(tensors)
            logp_M = self._logprobs(self.model, tensors, context)
            lm_loss = -(tensors.weight_M * logp_M).sum()
            sums["loss"] += float(lm_loss.detach())
            total = lm_loss if with_lm else lm_loss.detach()
            self._backward(total, context, tensors, sums, share=self._share(batch, batches))
        return self._finish(sums, batches)

    def grpo_step(
        self, batches: Sequence[Batch], settings: config.Loss, temperature: float
    ) -> tuple[Figures, list[NDArray[np.float32]]]:
        """One optimizer step of GRPO; also the log-probs [M] of each batch before the update."""
        seen: list[NDArray[np.float32]] = []
        sums: defaultdict[str, float] = defaultdict(float)
        valid = sum(int(b.mask_T.sum()) for b in batches)
        for batch in batches:
            tensors = self._tensors(batch)
            context = self._context(tensors)
            logp_M = self._logprobs(self.model, tensors, context, temperature)
            seen.append(logp_M.detach().cpu().numpy())
            objective, figures = loss.grpo(
                logp_M,
                self._valid(batch, batch.logprobs_T),
                self._reference_logprobs(tensors, temperature),
                advantage_M=self._valid(batch, batch.advantage_T),
                weight_M=tensors.weight_M,
                kl_coef_M=self._valid(batch, batch.kl_coef_T),
                sequence_M=tensors.sequence_M,
                clip=settings.clip,
                kl=settings.kl,
                offpolicy_delta=settings.offpolicy_delta,
            )
            for name, value in figures.items():
                sums[name] += float(value) / valid
            sums["loss"] += float(objective.detach())
            self._backward(objective, context, tensors, sums, share=self._share(batch, batches))
        return self._finish(sums, batches), seen

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """Log-probs of the valid tokens of each batch under the current weights."""
        tensors = [self._tensors(b) for b in batches]
        return [self._logprobs(self.model, t, self._context(t), temperature).cpu().numpy() for t in tensors]

    @torch.no_grad()
    def diagnose(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Held-out figures of the DSA conversion: LM loss dense and sparse, KL and top-k recall per layer.

        Losses and recall count only tokens predicted from a query with more than top-k causal keys.
        """
        topk = int(self.model.config.index_topk)
        sums = {"lm_loss_dense": 0.0, "lm_loss_sparse": 0.0}
        kl: defaultdict[int, float] = defaultdict(float)
        recall: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(2))
        load: dict[int, Tensor] = {}
        counted = targets = queries = 0
        for batch in batches:
            tensors = self._tensors(batch)
            for mode in ("dense", "sparse"):
                context = PackedContext(
                    attention=mode,
                    backend=self.backend,
                    indexer_loss="dense" if mode == "dense" else "none",
                    diagnose=mode == "sparse",
                    cu_seqlens_S=tensors.cu_seqlens_S,
                )
                logp_M = self._logprobs(self.model, tensors, context)
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
            queries += len(batch.tokens_T)
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

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers that a checkpoint holds, on the CPU."""
        return {name: t.detach().cpu() for name, t in self.model.state_dict().items()}

    def save(self, path: Path, *, dense: bool = False) -> None:
        """Write a Hugging Face checkpoint; dense drops the indexers and writes deepseek_v3."""
        tokenizer = checkpoint.load_tokenizer(self.setup.checkpoint)
        write = checkpoint.save_dense if dense else checkpoint.save
        write(self.model, path, tokenizer)

    def _context(self, tensors: _Tensors) -> PackedContext:
        return PackedContext(
            attention=self.setup.attention,
            backend=self.backend,
            indexer_loss=self.setup.indexer_loss,
            cu_seqlens_S=tensors.cu_seqlens_S,
        )

    def _tensors(self, batch: Batch) -> _Tensors:
        device = self.setup.device
        valid_M = np.flatnonzero(batch.mask_T)
        lengths_S = np.diff(batch.cu_seqlens_S)
        sequence_T = np.repeat(np.arange(len(lengths_S)), lengths_S)
        return _Tensors(
            tokens_T=torch.from_numpy(batch.tokens_T).to(device),
            cu_seqlens_S=torch.from_numpy(batch.cu_seqlens_S).to(device),
            at_M=torch.from_numpy(valid_M - 1).to(device),
            targets_M=torch.from_numpy(batch.tokens_T[valid_M]).to(device),
            weight_M=torch.from_numpy(batch.weight_T[valid_M]).to(device),
            sequence_M=torch.from_numpy(sequence_T[valid_M]).to(device),
            num_tokens=len(batch.tokens_T),
        )

    def _valid(self, batch: Batch, values_T: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values_T[batch.mask_T]).to(self.setup.device)

    def _logprobs(
        self, model: Any, tensors: _Tensors, context: PackedContext, temperature: float = 1.0
    ) -> Tensor:
        logits_MV = model(tensors.tokens_T, context, tensors.at_M)
        return target_logprobs(logits_MV, tensors.targets_M, temperature)

    @torch.no_grad()
    def _reference_logprobs(self, tensors: _Tensors, temperature: float) -> Tensor | None:
        if self.reference is None:
            return None
        context = PackedContext(
            attention=self.setup.attention, backend=self.backend, cu_seqlens_S=tensors.cu_seqlens_S
        )
        return self._logprobs(self.reference, tensors, context, temperature)

    def _share(self, batch: Batch, batches: Sequence[Batch]) -> float:
        """1 / tokens of the whole step: the indexer's KL is a mean over all query tokens."""
        return 1.0 / sum(len(b.tokens_T) for b in batches)

    def _backward(
        self,
        total: Tensor,
        context: PackedContext,
        tensors: _Tensors,
        sums: defaultdict[str, float],
        *,
        share: float,
    ) -> None:
        for _, record in sorted(context.records.items()):
            if record.kl is not None:
                # Disjoint parameters and detached inputs: adding the losses mixes no gradients.
                total = total + record.kl * share
        total.backward()
        for layer, record in sorted(context.records.items()):
            if record.kl_value is not None:  # known only now
                sums[f"indexer_kl/{layer}"] += float(record.kl_value) * share
            if record.load_X is not None:
                self._load[layer] = self._load.get(layer, 0) + record.load_X

    def _finish(self, sums: defaultdict[str, float], batches: Sequence[Batch]) -> Figures:
        figures = dict(sums) | self.optimizers.step()
        for layer, moe in self.model.moe_layers().items():
            load_X = self._load[layer]
            figures[f"expert_min/{layer}"] = float(load_X.min() / load_X.sum())
            figures[f"expert_max/{layer}"] = float(load_X.max() / load_X.sum())
            if self.setup.balance_speed:
                update_bias(moe, load_X, self.setup.balance_speed)
        self._load.clear()
        kl = [v for k, v in sums.items() if k.startswith("indexer_kl/")]
        if kl:
            figures["indexer_kl"] = sum(kl) / len(kl)
        self.version += 1
        return figures | {"tokens": float(sum(len(b.tokens_T) for b in batches))}
