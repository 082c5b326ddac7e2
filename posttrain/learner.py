"""The learner: one model, one optimizer, language-model steps and GRPO steps on packed batches.

A plain class; cluster.py makes it a Ray actor. Gradients of all micro-batches of a step are summed, with
every weight fixed beforehand (packing.py). A step that is not finite moves nothing (optimizer.py). Left out here:
sharding over several GPUs. Next: loss.py.

Shape letters: T tokens of a batch, M valid (predicted) tokens of it, X experts.
"""

import math
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

from posttrain import config, logprob, loss, training_state
from posttrain.kernels.backend import Choice
from posttrain.model import checkpoint
from posttrain.model.context import AttentionMode, IndexerLoss, PackedContext
from posttrain.model.moe import update_bias
from posttrain.optimizer import Optimizers
from posttrain.schema import Batch

Figures = dict[str, float]

MAX_NONFINITE = 3
"""Steps in a row with a loss or gradient that is not finite, after which training stops."""


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
    max_logits: int = logprob.MAX_LOGITS
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError where an indexer would silently stay untrained, or its loss be computed for nothing."""
        trains, has_loss = "indexer" in self.train, self.indexer_loss != "none"
        if trains != has_loss:
            raise ValueError(
                f"train={sorted(self.train)} with indexer_loss={self.indexer_loss!r}: only its KL trains an "
                "indexer; ask for both or for neither"
            )
        if self.indexer_loss == "sparse" and self.attention == "dense":
            raise ValueError(
                'indexer_loss="sparse" with attention="dense": nothing is selected, so the indexers would stay '
                'as they are; use attention="sparse" or indexer_loss="dense"'
            )


@dataclass(slots=True)
class _Tensors:
    """A batch on the device, its valid tokens singled out."""

    tokens_T: Tensor
    cu_seqlens_S: Tensor
    at_M: Tensor
    targets_M: Tensor
    weight_M: Tensor
    sequence_M: Tensor
    experts_NTE: Tensor | None
    kept_NTK: Tensor | None
    kept_ids: logprob.KeptIds | None


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
        self._writer = training_state.Writer()
        self._load: dict[int, Any] = {}
        self._nonfinite_ids: list[str] = []
        self._nonfinite_steps = 0

    def lm_step(self, batches: Sequence[Batch]) -> Figures:
        """One optimizer step on language-model batches; the indexer's KL is added where it trains.

        With only the indexer training (warm-up) there is no LM gradient at all.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        with_lm = "model" in self.setup.train
        for batch in batches:
            tensors = self._tensors(batch)
            context = self._context(tensors, self.setup.indexer_loss)
            logp_M = self._logprobs(self.model, tensors, context)
            lm_loss = -(tensors.weight_M * logp_M).sum()
            total = lm_loss if with_lm else lm_loss.detach()
            self._backward(total, lm_loss, batch, context, sums, share=self._share(batches))
        return self._finish(sums, batches)

    def grpo_step(
        self, batches: Sequence[Batch], settings: config.Loss, temperature: float
    ) -> tuple[Figures, list[NDArray[np.float32]]]:
        """One optimizer step on a policy loss; also the log-probs [M] of each batch before the update.

        What batches carry of the engine's choices (kept entries, experts, sampling mask) replaces the model's own,
        for the policy and for the reference.
        """
        seen: list[NDArray[np.float32]] = []
        sums: defaultdict[str, float] = defaultdict(float)
        valid = sum(int(b.mask_T.sum()) for b in batches)
        for batch in batches:
            tensors = self._tensors(batch)
            context = self._context(tensors, self.setup.indexer_loss)
            with_entropy = settings.entropy_coef > 0
            policy = self._policy(self.model, tensors, context, temperature, with_entropy=with_entropy)
            seen.append(policy[0].detach().cpu().numpy())
            values = self._values(batch, tensors, policy, settings, temperature)
            objective, figures = loss.policy_loss(values, settings)
            for name, value in figures.items():
                sums[name] += float(value) / valid
            self._backward(objective, objective, batch, context, sums, share=self._share(batches))
        return self._finish(sums, batches), seen

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """Log-probs of the valid tokens of each batch under the current weights and what the batch replays."""
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

    def snapshot(self, folder: Path) -> None:
        """Begin to write everything that restore needs; training may go on at once."""
        counters = training_state.Counters(
            version=self.version,
            nonfinite_steps=self._nonfinite_steps,
            nonfinite_ids=tuple(self._nonfinite_ids),
            schedule_step=self.optimizers.step_count,
            norms=self.optimizers.norms,
        )
        self._writer.start(folder, self.model, self.optimizers, counters)

    def snapshot_written(self) -> bool:
        """Whether the snapshot is written; raises what went wrong."""
        if self._writer.ready():
            self._writer.finish()
            return True
        return False

    def snapshot_finish(self) -> None:
        """Wait until the snapshot is written."""
        self._writer.finish()

    def restore(self, folder: Path) -> None:
        """Go on from a snapshot of a learner with the same setup."""
        counters = training_state.read(folder, self.model, self.optimizers)
        self.version = counters.version
        self._nonfinite_steps, self._nonfinite_ids = counters.nonfinite_steps, list(counters.nonfinite_ids)
        self.optimizers.restore(counters.schedule_step, counters.norms)

    def finish(self, path: Path, *, dense: bool = False) -> dict[str, str]:
        """Save the checkpoint; in deterministic mode also tell the hash of weights and optimizer, to compare runs by."""
        self.save(path, dense=dense)
        if not self.setup.deterministic:
            return {}
        return {"state_sha256": training_state.digest(self.model, self.optimizers)}

    def _context(self, tensors: _Tensors, indexer_loss: IndexerLoss = "none") -> PackedContext:
        """The one way to run a batch: policy, old policy and reference replay the same choices."""
        context = PackedContext(
            attention=self.setup.attention,
            backend=self.backend,
            indexer_loss=indexer_loss,
            cu_seqlens_S=tensors.cu_seqlens_S,
        )
        if tensors.kept_NTK is not None:
            context.replay_kept = dict(enumerate(tensors.kept_NTK))
        if tensors.experts_NTE is not None:
            layers = sorted(self.model.moe_layers())
            context.replay_experts = dict(zip(layers, tensors.experts_NTE, strict=True))
        return context

    def _tensors(self, batch: Batch) -> _Tensors:
        device = self.setup.device
        valid_M = np.flatnonzero(batch.mask_T)
        lengths_S = np.diff(batch.cu_seqlens_S)
        sequence_T = np.repeat(np.arange(len(lengths_S)), lengths_S)

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        kept_ids = None
        if batch.sampling_mask is not None:
            counts_M = batch.sampling_mask.counts[valid_M]
            masked_N = np.flatnonzero(counts_M)
            rows_R = np.repeat(np.arange(len(masked_N)), counts_M[masked_N])
            ids_R = batch.sampling_mask.ids.astype(np.int64)
            kept_ids = logprob.KeptIds(tensor(masked_N), tensor(rows_R), tensor(ids_R))
        return _Tensors(
            tokens_T=tensor(batch.tokens_T),
            cu_seqlens_S=tensor(batch.cu_seqlens_S),
            at_M=tensor(valid_M - 1),
            targets_M=tensor(batch.tokens_T[valid_M]),
            weight_M=tensor(batch.weight_T[valid_M]),
            sequence_M=tensor(sequence_T[valid_M]),
            experts_NTE=None if batch.experts_NTE is None else tensor(batch.experts_NTE),
            kept_NTK=None if batch.kept_NTK is None else tensor(batch.kept_NTK),
            kept_ids=kept_ids,
        )

    def _values(
        self,
        batch: Batch,
        tensors: _Tensors,
        policy: tuple[Tensor, Tensor | None],
        settings: config.Loss,
        temperature: float,
    ) -> loss.Values:
        logp_M, entropy_M = policy

        def valid(values_T: NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(values_T[batch.mask_T]).to(logp_M.device)

        engine_M = valid(batch.logprobs_T)
        if settings.old_policy == "engine":
            old_M = engine_M
        else:  # before the first update the old policy is the current one
            old_M = logp_M.detach() if batch.old_logprobs_T is None else valid(batch.old_logprobs_T)
        high = settings.clip if settings.clip_high is None else settings.clip_high
        clip_S2 = np.where(
            np.isnan(batch.clip_S2), np.array([settings.clip, high], np.float32), batch.clip_S2
        )
        clip_2M = torch.from_numpy(clip_S2).to(logp_M.device)[tensors.sequence_M].T
        return loss.Values(
            logp_M=logp_M,
            engine_M=engine_M,
            old_M=old_M,
            ref_M=None if settings.kl == "none" else self._reference_logprobs(tensors, temperature),
            entropy_M=entropy_M,
            advantage_M=valid(batch.advantage_T),
            weight_M=tensors.weight_M,
            kl_coef_M=valid(batch.kl_coef_T),
            low_M=clip_2M[0],
            high_M=clip_2M[1],
            sequence_M=tensors.sequence_M,
        )

    def _logprobs(
        self, model: Any, tensors: _Tensors, context: PackedContext, temperature: float = 1.0
    ) -> Tensor:
        return self._policy(model, tensors, context, temperature)[0]

    def _policy(
        self,
        model: Any,
        tensors: _Tensors,
        context: PackedContext,
        temperature: float,
        *,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and, if wanted, entropies [M]."""

        def read(x_MD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor | None]:
            given = (tensors.targets_M, temperature, tensors.kept_ids)
            limit = self.setup.max_logits
            return logprob.head_logprobs(x_MD, head_VD, *given, with_entropy=with_entropy, max_logits=limit)

        found: tuple[Tensor, Tensor | None] = model(tensors.tokens_T, context, tensors.at_M, read)
        return found

    @torch.no_grad()
    def _reference_logprobs(self, tensors: _Tensors, temperature: float) -> Tensor | None:
        if self.reference is None:
            return None
        return self._logprobs(self.reference, tensors, self._context(tensors), temperature)

    def _share(self, batches: Sequence[Batch]) -> float:
        """1 / tokens of the whole step: the indexer's KL is a mean over all query tokens."""
        return 1.0 / sum(len(b.tokens_T) for b in batches)

    def _backward(
        self,
        total: Tensor,
        shown: Tensor,
        batch: Batch,
        context: PackedContext,
        sums: defaultdict[str, float],
        *,
        share: float,
    ) -> None:
        """Add the gradients of total and of the indexers' KL; `shown` is the loss in the figures."""
        value = float(shown.detach())
        sums["loss"] += value
        if not math.isfinite(value):
            self._nonfinite_ids.extend(batch.ids)
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
        figures = dict(sums) | self.optimizers.step(finite=math.isfinite(sums["loss"]))
        self._count_nonfinite("nonfinite" in figures, batches)
        moved = "skipped" not in figures
        for layer, moe in self.model.moe_layers().items():
            load_X = self._load[layer]
            figures[f"expert_min/{layer}"] = float(load_X.min() / load_X.sum())
            figures[f"expert_max/{layer}"] = float(load_X.max() / load_X.sum())
            if self.setup.balance_speed and moved:
                update_bias(moe, load_X, self.setup.balance_speed)
        self._load.clear()
        kl = [v for k, v in sums.items() if k.startswith("indexer_kl/")]
        if kl:
            figures["indexer_kl"] = sum(kl) / len(kl)
        self.version += moved
        return figures | {"tokens": float(sum(len(b.tokens_T) for b in batches))}

    def _count_nonfinite(self, nonfinite: bool, batches: Sequence[Batch]) -> None:
        """FloatingPointError after three steps in a row whose loss or gradient was not finite."""
        self._nonfinite_steps = self._nonfinite_steps + 1 if nonfinite else 0
        if self._nonfinite_steps == MAX_NONFINITE:
            ids = self._nonfinite_ids or [id for batch in batches for id in batch.ids]
            raise FloatingPointError(
                f"{MAX_NONFINITE} steps in a row had a loss or gradient that is not finite; nothing was updated "
                f"since. Samples: {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}"
            )
        self._nonfinite_ids = []
