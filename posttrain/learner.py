"""The learner: one model, one optimizer, language-model steps and GRPO steps on packed batches.

A plain class; cluster.py makes it a Ray actor, or several of which each holds a part of the model (group.py): then
every method is called on all of them at once, with the same arguments. Gradients of all micro-batches of a step are
summed, with every weight fixed beforehand (packing.py). A step that is not finite moves nothing (optimizer.py).
Next: loss.py.

Shape letters: T tokens of a batch, M valid (predicted) tokens of it, X experts.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain import config, diagnosis, logprob, loss, teachers, training_state
from posttrain.device_batch import DeviceBatch, on_device
from posttrain.group import Group, Pass, in_order, total
from posttrain.kernels.backend import Choice
from posttrain.model import checkpoint, lora
from posttrain.model.context import AttentionMode, IndexerLoss, PackedContext, PartContext
from posttrain.model.moe import update_bias
from posttrain.model.shared import SharedContext
from posttrain.model.transport import Audience, Offer, Sender
from posttrain.optimizer import Optimizers
from posttrain.publisher import Publisher
from posttrain.readings import Reading, read
from posttrain.schema import Batch
from posttrain.ties import Ties

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
    lora: config.Lora | None = None
    """Train adapters in place of the model's weights."""
    reference: bool = False
    """Keep the starting policy for the KL: a frozen copy, or the model with its adapters off."""
    mopd: config.Mopd | None = None
    teachers: tuple[Path, ...] = ()
    """What batches with a teacher are distilled from."""
    sharding: config.Sharding = field(default_factory=config.Sharding)
    device: str = "cpu"
    dtype: str = "float32"
    backend: Choice = "auto"
    deterministic: bool = False
    max_logits: int = logprob.MAX_LOGITS
    """That exist together, at most."""
    share_prompts: bool = True
    """Run the prompt of a group once per batch, and not once per completion."""
    seed: int = 0
    host: str = "127.0.0.1"
    """Where engines reach this process."""
    sync_folder: Path | None = None
    """For weights that go by disk."""
    timeout_s: float = 1800
    """For engines to come for weights."""

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
        if self.lora is not None and trains:
            raise ValueError(
                'lora with indexers that train: adapters alone train there; set indexer = "freeze" or leave lora out'
            )
        if (self.mopd is None) != (not self.teachers):
            raise ValueError(f"mopd={self.mopd} with {len(self.teachers)} teachers; give both or neither")
        if self.sharding.offload and self.device == "cpu":
            raise ValueError("sharding.offload = true on the CPU: parameters are in host memory as it is")


class Learner:
    """Owns the training state of one stage."""

    def __init__(self, setup: Setup, group: Group | None = None) -> None:
        torch.manual_seed(setup.seed)
        self.setup, self.group = setup, group
        self._sharing = None if group is None else group.sharing
        self._counts = group is None or group.counts
        dtype = getattr(torch, setup.dtype)
        self.model = checkpoint.load(
            setup.checkpoint,
            dtype=torch.float32 if setup.sharding.mixed_precision else dtype,
            device=setup.device if group is None else "cpu",  # the shards alone reach the device
        )
        self.model.train()
        self.backend = self.model.backend(
            setup.backend, deterministic=setup.deterministic, device=torch.device(setup.device), dtype=dtype
        )
        for layer in self.model.model.layers:
            layer.recompute = setup.sharding.recompute
        self.reference: Any = None
        if setup.lora is not None:
            lora.inject(self.model, rank=setup.lora.rank, alpha=setup.lora.alpha)
        elif setup.reference:
            self.reference = deepcopy(self.model).requires_grad_(False)
        if group is not None:
            for model in filter(None, (self.model, self.reference)):
                group.shard(model, setup.sharding, dtype)
        self._teachers = teachers.load(
            setup.teachers, self.model, setup.checkpoint, dtype=dtype, device=setup.device
        )
        self.optimizers = Optimizers(
            self.model, setup.optimizer, train=set(setup.train), total_steps=setup.total_steps
        )
        self.version = 0
        sender = Sender(
            torch.device(setup.device), host=setup.host, folder=setup.sync_folder, timeout_s=setup.timeout_s
        )
        self.publisher = Publisher(self.model, group, setup.lora, sender, dtype=dtype)
        self._writer = training_state.Writer(None if group is None else group.snapshots)
        self._load: dict[int, Any] = {}
        self._nonfinite_ids: list[str] = []
        self._nonfinite_steps = 0

    def lm_step(self, batches: Sequence[Batch]) -> Figures:
        """One optimizer step on language-model batches; the indexer's KL is added where it trains.

        With only the indexer training (warm-up) there is no LM gradient at all.
        """
        readings: list[Reading] = []
        with_lm = "model" in self.setup.train
        for each in self._passes(batches):
            tensors = self._on_device(each.batch)
            context = self._context(tensors, self.setup.indexer_loss)
            logp_M = self._logprobs(self.model, tensors, context)
            lm_loss = -(tensors.weight_M * logp_M).sum()
            total = lm_loss if with_lm else lm_loss.detach()
            readings.append(self._backward(total, lm_loss, each, context, share=self._share(batches)))
        return self._finish(readings, batches)

    def grpo_step(
        self, batches: Sequence[Batch], settings: config.Loss, temperature: float
    ) -> tuple[Figures, list[NDArray[np.float32]]]:
        """One optimizer step on a policy loss; also the log-probs [M] of each batch before the update.

        What batches carry of the engine's choices (kept entries, experts, sampling mask) replaces the model's own,
        for the policy and for the reference.
        """
        seen: dict[int, Tensor] = {}
        readings: list[Reading] = []
        for each in self._passes(batches):
            batch, tensors = each.batch, self._on_device(each.batch, share_prompts=True)
            context = self._context(tensors, self.setup.indexer_loss)
            with_entropy = settings.entropy_coef > 0
            teacher, teacher_M = self._taught(batch, tensors, temperature)
            looks = self._sharing is None and each.index == len(batches) - 1  # the longest; a part lacks keys
            ties = Ties(self.model, context) if looks else None
            with ties or nullcontext():
                policy = self._policy(
                    self.model, tensors, context, temperature, with_entropy=with_entropy, teacher=teacher
                )
            ref_M = None if settings.kl == "none" else self._reference_logprobs(tensors, temperature)
            coef = 0.0 if self.setup.mopd is None else self.setup.mopd.coef
            values = loss.values(
                batch, tensors, policy, settings, ref_M=ref_M, teacher_M=teacher_M, teacher_coef=coef
            )
            objective, figures = loss.policy_loss(values, settings)
            if each.index is not None:
                seen[each.index] = policy.logp_M.detach()
            reading = self._backward(objective, objective, each, context, share=self._share(batches))
            readings.append(replace(reading, figures={} if each.index is None else figures, ties=ties))
        return self._finish(readings, batches), self._fetched(seen)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """Log-probs of the valid tokens of each batch under the current weights and what the batch replays."""
        found: dict[int, Tensor] = {}
        for each in self._passes(batches):
            tensors = self._on_device(each.batch, share_prompts=True)
            logp_M = self._logprobs(self.model, tensors, self._context(tensors), temperature)
            if each.index is not None:
                found[each.index] = logp_M
        return self._fetched(found)

    @torch.no_grad()
    def diagnose(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Held-out figures of the DSA conversion (diagnosis.py). Every rank runs all batches."""
        found = (on_device(batch, self.setup.device) for batch in batches)

        def run(tensors: DeviceBatch, context: PackedContext) -> Tensor:
            return self._logprobs(self.model, tensors, context)

        return diagnosis.measure(found, run, self.backend, topk=int(self.model.config.index_topk))

    def weights(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, adapters merged, on the CPU; of several ranks the first has it."""
        return self.publisher.weights()

    def offer(self, audience: Audience) -> Offer | None:
        """The same for engines."""
        return self.publisher.offer(audience)

    def save(self, path: Path, *, dense: bool = False) -> None:
        """Write a Hugging Face checkpoint; dense drops the indexers and writes deepseek_v3."""
        model = self.model
        if self.group is not None or self.setup.lora is not None:
            weights = self.weights()
            if not self._first:
                return
            model = checkpoint.from_weights(self.model.config, weights)
        tokenizer = checkpoint.load_tokenizer(self.setup.checkpoint)
        write = checkpoint.save_dense if dense else checkpoint.save
        write(model, path, tokenizer)

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
        group = None if self.group is None else self.group.snapshots
        counters = training_state.read(folder, self.model, self.optimizers, group)
        self.version = counters.version
        self._nonfinite_steps, self._nonfinite_ids = counters.nonfinite_steps, list(counters.nonfinite_ids)
        self.optimizers.restore(counters.schedule_step, counters.norms)

    def finish(self, path: Path, *, dense: bool = False) -> dict[str, str]:
        """Save the checkpoint; in deterministic mode also tell the hash of weights and optimizer, to compare runs by."""
        self.save(path, dense=dense)
        if not self.setup.deterministic:
            return {}
        return {"state_sha256": training_state.digest(self.model, self.optimizers)}

    @property
    def _first(self) -> bool:
        """Whether this process speaks for all ranks."""
        return self.group is None or self.group.rank == 0

    def _passes(self, batches: Sequence[Batch]) -> list[Pass]:
        if self.group is None:
            return [Pass(batch, i) for i, batch in enumerate(batches)]
        return self.group.passes(batches)

    def _fetched(self, found: dict[int, Tensor]) -> list[NDArray[np.float32]]:
        """Log-probs of the batches of all ranks, in their order; waits for the device."""
        own = {index: logp_M.cpu().numpy() for index, logp_M in found.items()}
        return in_order([own] if self.group is None else self.group.collect(own))

    def _context(self, tensors: DeviceBatch, indexer_loss: IndexerLoss = "none") -> PackedContext:
        """The one way to run a batch: policy, old policy and reference replay the same choices."""
        common: dict[str, Any] = {
            "attention": self.setup.attention,
            "backend": self.backend,
            "indexer_loss": indexer_loss,
            "cu_seqlens_S": tensors.cu_seqlens_S,
            "host_lengths": tensors.lengths,
        }
        part, tensors = tensors.part, tensors.own()
        context: PackedContext
        if tensors.shared is not None:
            token_F, place_T = tensors.shared
            common["host_places"] = tensors.host_shared
            context = SharedContext(**common, token_F=token_F, place_T=place_T)
        elif part is None or self._sharing is None:
            context = PackedContext(**common)
        else:
            gather = partial(self._sharing.keys, part=part)
            context = PartContext(**common, begin=part.begin, end=part.end, gather=gather)
        if tensors.kept_NTK is not None:
            context.replay_kept = dict(enumerate(tensors.kept_NTK))
        if tensors.experts_NTE is not None:
            layers = sorted(self.model.moe_layers())
            context.replay_experts = dict(zip(layers, tensors.experts_NTE, strict=True))
        return context

    def _on_device(self, batch: Batch, *, share_prompts: bool = False) -> DeviceBatch:
        """Ranks that share each batch cut it by places: they run every prompt as often as it stands there."""
        share_prompts = share_prompts and self.setup.share_prompts and self._sharing is None
        return on_device(batch, self.setup.device, self._sharing, share_prompts=share_prompts)

    def _logprobs(
        self, model: Any, tensors: DeviceBatch, context: PackedContext, temperature: float = 1.0
    ) -> Tensor:
        return self._policy(model, tensors, context, temperature).logp_M

    def _policy(
        self,
        model: Any,
        tensors: DeviceBatch,
        context: PackedContext,
        temperature: float,
        *,
        with_entropy: bool = False,
        teacher: logprob.Hidden | None = None,
    ) -> logprob.Read:
        """What is read off the logits [M], of the whole batch also where ranks share it; the teacher's are the part's."""
        part = tensors.part
        tensors = tensors.own()

        def read(x_MD: Tensor, head_VD: Tensor) -> logprob.Read:
            hidden, limit = logprob.Hidden(x_MD, head_VD), self.setup.max_logits
            given = (hidden, tensors.targets_M, temperature, tensors.kept_ids)
            return logprob.head_logprobs(
                *given,
                with_entropy=with_entropy,
                teacher=teacher,
                max_logits=limit,
                invariant=context.backend.invariant,
            )

        found: logprob.Read = model(tensors.tokens_T, context, tensors.at_M, read)
        if part is None or self._sharing is None:
            return found
        sharing = self._sharing
        return logprob.Read._make(None if x_M is None else sharing.valid(x_M, part) for x_M in found)

    @torch.no_grad()
    def _taught(
        self, batch: Batch, tensors: DeviceBatch, temperature: float
    ) -> tuple[logprob.Hidden | None, Tensor | None]:
        """What the batch's teacher makes of the tokens: hidden states (form "full") or log-probs ("sampled")."""
        if self.setup.mopd is None or batch.teacher is None:
            return None, None
        model = self._teachers[batch.teacher]
        tensors = replace(tensors, experts_NTE=None, kept_NTK=None)  # its own choices
        context = self._context(tensors)
        if self.setup.mopd.form == "sampled":
            return None, self._logprobs(model, tensors, context, temperature)
        tensors = tensors.own()
        return model(tensors.tokens_T, context, tensors.at_M, logprob.Hidden), None

    @torch.no_grad()
    def _reference_logprobs(self, tensors: DeviceBatch, temperature: float) -> Tensor | None:
        if not self.setup.reference:
            return None
        context = self._context(tensors)
        if self.setup.lora is None:
            return self._logprobs(self.reference, tensors, context, temperature)
        with lora.without(self.model):
            return self._logprobs(self.model, tensors, context, temperature)

    def _share(self, batches: Sequence[Batch]) -> float:
        """1 / tokens of the whole step: the indexer's KL is a mean over all query tokens."""
        return 1.0 / sum(len(b.tokens_T) for b in batches)

    def _backward(
        self,
        total: Tensor,
        shown: Tensor,
        each: Pass,
        context: PackedContext,
        *,
        share: float,
    ) -> Reading:
        """Add the gradients of total and of the indexers' KL; `shown` is the loss in the figures."""
        if each.index is None:
            share = 0.0
        for _, record in sorted(context.records.items()):
            if record.kl is not None:
                # Disjoint parameters and detached inputs: adding the losses mixes no gradients.
                total = total + record.kl * share
        total.backward()
        kl: dict[int, Tensor] = {}
        for layer, record in sorted(context.records.items()) if each.index is not None else ():
            if (value := record.kl_value) is not None:  # known only now
                kl[layer] = value
            if record.load_X is not None:
                self._load[layer] = self._load.get(layer, 0) + record.load_X
        return Reading(loss=shown.detach(), ids=each.batch.ids, kl=kl)

    def _finish(self, readings: Sequence[Reading], batches: Sequence[Batch]) -> Figures:
        valid = sum(int(b.mask_T.sum()) for b in batches)
        sums, self._nonfinite_ids = read(
            readings, counts=self._counts, valid=valid, share=self._share(batches)
        )
        if self.group is not None:
            load = {layer: load_X.cpu() for layer, load_X in self._load.items()}
            known = self.group.collect((dict(sums), load, self._nonfinite_ids))
            sums.update(total([figures for figures, _, _ in known]))
            self._load = total([part for _, part, _ in known])
            self._nonfinite_ids = list(dict.fromkeys(id for _, _, ids in known for id in ids))
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
