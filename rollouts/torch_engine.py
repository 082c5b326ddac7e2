"""The embedded rollout engine: our own model, batched, with a static cache of latents and indexer keys.

Prompts are prefilled once per task, rows finished early are dropped from the batch, tool results are fed
as forced tokens without prefilling the conversation again, and every sampled token's log-prob is that of
the processed distribution. Left out: continuous batching across waves. Next: pool.py.

Shape letters: B rows, Q queries per row, L tokens of a row, V vocabulary, N layers, K kept, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.kernels.backend import Choice
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.context import AttentionMode, LayerRecord, StaticCache, StaticContext
from posttrain.model.decode import Decoder
from posttrain.model.entry import Entry
from posttrain.model.weights import Asleep, Weights, take
from posttrain.rollouts import chat, sampling
from posttrain.rollouts.dialogue import Dialogue, end_turns
from posttrain.rollouts.environment import Failed
from posttrain.rollouts.request import Request, Sampling
from posttrain.schema import Rollout, SamplingMask, Stop

COMPACT_BELOW = 0.75
"""Finished rows are dropped when fewer than this share of the rows is alive (measured: +56 to +72 % tokens/s)."""


@dataclass(slots=True)
class _Row(Dialogue):
    """One sequence of a wave."""

    order: int = field(kw_only=True)
    forced: list[int] = field(default_factory=list)
    kept: list[NDArray[Any]] = field(default_factory=list)
    experts: list[NDArray[np.int16]] = field(default_factory=list)
    mask_ids: list[NDArray[np.int32]] = field(default_factory=list)


class TorchEngine:
    """Generates rollouts with a DSA model on one device."""

    def __init__(
        self,
        model: DeepseekV32ForCausalLM,
        tokenizer: chat.Tokenizer,
        attention: AttentionMode = "sparse",
        *,
        backend: Choice = "auto",
    ) -> None:
        self.model = model.eval()
        self.backend = model.backend(backend)
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id  # transformers looks it up anew every time
        self.attention: AttentionMode = attention
        self.version = 0
        self._asleep: Asleep | None = None
        self._unfit = False
        """Awake, and the weights were refused."""
        self.device = next(model.parameters()).device
        self.decoder = Decoder(self.model, attention)

    @classmethod
    def open(
        cls,
        path: Path,
        attention: AttentionMode,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        backend: Choice = "auto",
    ) -> Self:
        """An engine for a checkpoint with the tokenizer beside it."""
        load: Any = checkpoint.load_dense if attention == "dense" else checkpoint.load
        model = load(path, dtype=dtype, device=device)
        return cls(model, checkpoint.load_tokenizer(path), attention, backend=backend)

    def load(self, version: int, weights: Weights) -> None:
        """Take the learner's weights of that version; ValueError, and nothing changes, if they are not whole."""
        if self._asleep is not None:
            self._asleep.wake()
            self._asleep, self._unfit = None, True
        take(self.model, weights)
        self._unfit, self.version = False, version

    def sleep(self) -> None:
        """Give up the memory of the weights until the next load."""
        if self._asleep is None:
            self.decoder = Decoder(self.model, self.attention)  # the old one has copies
            self._asleep = Asleep(self.model)

    def close(self) -> None:
        """The memory goes with the object."""

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], settings: Sampling, *, max_rows: int = 256
    ) -> list[Rollout]:
        """One rollout per request, in order. Requests of one task should stand together: they share a prefill."""
        if self._asleep is not None or self._unfit:
            raise RuntimeError(
                "the engine has no weights to serve: it gave them up to sleep; load them again"
            )
        self.decoder.refresh()
        tasks = {r.task.id: r.task for r in requests}
        prompts = {id: chat.encode_prompt(self.tokenizer, task) for id, task in tasks.items()}
        done: dict[int, Rollout] = {}
        for start in range(0, len(requests), max_rows):
            wave = enumerate(requests[start : start + max_rows], start)
            rows = [_Row(r, prompts[r.task.id], order=i) for i, r in wave]
            why = [row.request.obstacle(self.model.config.vocab_size) for row in rows]
            done |= {row.order: self._refused(row, text) for row, text in zip(rows, why, strict=True) if text}
            served = [row for row in rows if row.order not in done]
            if served:
                done |= _Wave(self, served, settings).run()
        return [done[i] for i in range(len(requests))]

    def _refused(self, row: _Row, why: str) -> Rollout:
        """What a request gets that cannot be served."""
        stop, outcome, text = row.end(self.tokenizer, row.prompt, Failed("error", why), cut=False)
        return Rollout(
            task_id=row.request.task.id,
            index=row.request.index,
            tokens=np.array(row.prompt, np.int32),
            sampled=np.zeros(len(row.prompt), np.bool_),
            logprobs=np.zeros(len(row.prompt), np.float32),
            text=text,
            messages=(),
            stop=stop,
            outcome=outcome,
            policy_version=self.version,
        )

    def cache(self, rows: int, length: int) -> StaticCache:
        """An empty cache for all layers."""
        config = self.model.config
        return StaticCache(
            num_layers=config.num_hidden_layers,
            num_rows=rows,
            length=length,
            entry=Entry.of(config),
            like=self.model.lm_head.weight,
        )

    def context(
        self, cache: StaticCache, positions_BQ: Tensor, num_keys: int, settings: Sampling
    ) -> StaticContext:
        """A pass of the model over new tokens at these positions."""
        return StaticContext(
            attention=self.attention,
            backend=self.backend,
            record_kept=settings.record_kept,
            cache=cache,
            query_positions_BQ=positions_BQ,
            num_keys=num_keys,
        )


class _Wave:
    """Rows generated together, from prefill to the last token."""

    def __init__(self, engine: TorchEngine, rows: list[_Row], settings: Sampling) -> None:
        self.engine, self.rows, self.settings = engine, rows, settings
        self.capacity = max(len(r.prompt) + r.request.max_new_tokens for r in rows)
        self.tokens_BL = np.zeros((len(rows), self.capacity), np.int32)
        self.sampled_BL = np.zeros((len(rows), self.capacity), bool)
        self.logprobs_BL = np.zeros((len(rows), self.capacity), np.float32)
        self.mask_counts_BL = np.zeros((len(rows), self.capacity), np.int32)
        self.lengths_B = np.array([len(r.prompt) for r in rows])
        self.limits_B = self.lengths_B + [r.request.max_new_tokens for r in rows]
        seeds_B1 = np.array([[r.request.seed % 2**64] for r in rows], np.uint64)
        self.uniforms_BL = sampling.uniforms(seeds_B1, np.arange(self.capacity + 1))
        self.alive_B = np.ones(len(rows), bool)
        for i, row in enumerate(rows):
            self.tokens_BL[i, : len(row.prompt)] = row.prompt
        self.done: dict[int, Rollout] = {}

    def run(self) -> dict[int, Rollout]:
        """Generate until every row has stopped; rollouts by the order of their request."""
        logits_BV = self._prefill()
        while True:
            self._extend(logits_BV)
            if not self.alive_B.any():
                return self.done
            if self.alive_B.mean() < COMPACT_BELOW:
                self._compact()
            # Rows that have stopped but are not dropped yet repeat their last token, harmlessly.
            position_B = np.minimum(self.lengths_B, self.capacity) - 1
            tokens_B = self.tokens_BL[np.arange(len(self.rows)), position_B]
            logits_BV = self._decode(tokens_B, position_B)

    def _decode(self, tokens_B: NDArray[np.int32], positions_B: NDArray[np.int64]) -> Tensor:
        """Logits [B, V] after one more token of every row."""
        engine = self.engine
        tokens = torch.from_numpy(tokens_B).to(engine.device)
        positions = torch.from_numpy(positions_B).to(engine.device)
        least, most = int(positions_B.min()) + 1, int(positions_B.max()) + 1
        if engine.backend.name == "triton" and engine.attention == "sparse":
            context = engine.context(self.cache, positions[:, None], most, self.settings)
            logits_BV: Tensor = engine.model(tokens, context)
            records = context.records
        else:
            record_kept = self.settings.record_kept
            logits_BV, records = engine.decoder.step(
                tokens, positions, self.cache, keys=(least, most), record_kept=record_kept
            )
        self._record(records, np.ones_like(positions_B))
        return logits_BV

    def _prefill(self) -> Tensor:
        """Run every distinct prompt once, then give each of its completions a copy of the cache."""
        first: dict[str, int] = {}
        for i, row in enumerate(self.rows):
            first.setdefault(row.request.task.id, i)
        unique = list(first.values())
        width = int(self.lengths_B.max())
        self.cache = self.engine.cache(len(unique), self.capacity)
        every, self.rows = self.rows, [self.rows[i] for i in unique]
        lengths_B, self.lengths_B = self.lengths_B, self.lengths_B[unique]
        device = self.engine.device
        positions_BQ = torch.arange(width, device=device).expand(len(unique), width)
        context = self.engine.context(self.cache, positions_BQ, width, self.settings)
        tokens_T = torch.from_numpy(self.tokens_BL[unique, :width].astype(np.int64).reshape(-1)).to(device)
        last_B = torch.from_numpy(np.arange(len(unique)) * width + self.lengths_B - 1).to(device)
        logits_BV: Tensor = self.engine.model(tokens_T, context, last_B)
        self._record(context.records, self.lengths_B)
        slot = {self.rows[i].request.task.id: i for i in range(len(unique))}
        copies = [slot[row.request.task.id] for row in every]
        for row, i in zip(every, copies, strict=True):
            row.kept, row.experts = list(self.rows[i].kept), list(self.rows[i].experts)
        self.rows, self.lengths_B = every, lengths_B
        copies_B = torch.tensor(copies, device=device)
        self.cache.select(copies_B)
        return logits_BV.index_select(0, copies_B)

    def _extend(self, logits_BV: Tensor) -> None:
        """Append one token to every row that is alive: sampled, or forced by a tool result."""
        settings = self.settings
        # Of rows that have stopped, too; a full one's length is the capacity.
        uniform_B = self.uniforms_BL[np.arange(len(self.rows)), self.lengths_B]
        logp_BV = sampling.processed_logprobs(logits_BV, settings.temperature, settings.top_p, settings.top_k)
        chosen = sampling.choose(
            logp_BV, torch.from_numpy(uniform_B).to(logp_BV.device), greedy=settings.temperature == 0
        )
        logp_B = logp_BV.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        token_B = chosen.to(torch.int32).cpu().numpy()
        sampled_B = np.ones(len(self.rows), bool)
        for i, row in enumerate(self.rows):
            if row.forced and self.alive_B[i]:
                token_B[i], logp_B[i], sampled_B[i] = row.forced.pop(0), 0.0, False
        live = np.flatnonzero(self.alive_B)
        at = self.lengths_B[live]
        self.tokens_BL[live, at] = token_B[live]
        self.sampled_BL[live, at] = sampled_B[live]
        self.logprobs_BL[live, at] = logp_B[live]
        if settings.record_mask:
            self._record_mask(logp_BV, sampled_B & self.alive_B)
        self.lengths_B[live] += 1
        ended_B = token_B == self.engine.eos_token_id
        if any(row.request.stop_ids for row in self.rows):
            ended_B |= [int(t) in row.request.stop_ids for t, row in zip(token_B, self.rows, strict=True)]
        ended_B &= sampled_B & (not settings.ignore_eos)
        full_B = self.lengths_B >= self.limits_B
        ended = [int(i) for i in live[ended_B[live]]]
        stops = dict(zip(ended, self._end_turns(ended), strict=True))
        for i in live[(ended_B | full_B)[live]]:
            stop = stops.get(int(i)) or ("length" if full_B[i] else None)
            if stop is not None:
                self._finish(int(i), stop)

    def _tokens(self, i: int) -> list[int]:
        tokens: list[int] = self.tokens_BL[i, : self.lengths_B[i]].tolist()
        return tokens

    def _end_turns(self, ended: Sequence[int]) -> list[Stop | Failed | None]:
        """Close an assistant turn of these rows; None where tool results make the rollout go on."""
        found = end_turns(self.engine.tokenizer, [(self.rows[i], self._tokens(i)) for i in ended])
        stops: list[Stop | Failed | None] = []
        for i, what in zip(ended, found, strict=True):
            if isinstance(what, list):
                self.rows[i].forced = what
            stops.append(None if isinstance(what, list) else what)
        return stops

    def _finish(self, i: int, why: Stop | Failed) -> None:
        row, length = self.rows[i], int(self.lengths_B[i])
        cut = why == "length" and not row.forced
        stop, outcome, text = row.end(self.engine.tokenizer, self._tokens(i), why, cut=cut)
        self.alive_B[i] = False
        self.done[row.order] = Rollout(
            task_id=row.request.task.id,
            index=row.request.index,
            tokens=self.tokens_BL[i, :length].copy(),
            sampled=self.sampled_BL[i, :length].copy(),
            logprobs=self.logprobs_BL[i, :length].copy(),
            text=text,
            messages=tuple(row.messages),
            stop=stop,
            outcome=outcome,
            policy_version=self.engine.version,
            kept=_joined(row.kept)[:, : length - 1] if row.kept else None,
            experts=np.concatenate(row.experts, axis=1)[:, : length - 1] if row.experts else None,
            sampling_mask=self._sampling_mask(i) if self.settings.record_mask else None,
        )

    def _sampling_mask(self, i: int) -> SamplingMask:
        counts = self.mask_counts_BL[i, : self.lengths_B[i]].copy()
        none = np.zeros(0, np.int32)
        return SamplingMask(counts=counts, ids=np.concatenate([none, *self.rows[i].mask_ids]))

    def _compact(self) -> None:
        """Drop finished rows from the batch and the cache."""
        keep = np.flatnonzero(self.alive_B)
        self.rows = [self.rows[i] for i in keep]
        arrays = ("tokens_BL", "sampled_BL", "logprobs_BL", "mask_counts_BL", "uniforms_BL")
        for name in (*arrays, "lengths_B", "limits_B", "alive_B"):
            setattr(self, name, getattr(self, name)[keep])
        self.cache.select(torch.from_numpy(keep).to(self.engine.device))

    def _record(self, records: dict[int, LayerRecord], counts_B: NDArray[np.int64]) -> None:
        """Note the kept entries and experts of each row's first counts_B tokens of this pass, [N, tokens, K or E]."""
        settings, layers = self.settings, sorted(records)
        if settings.record_kept and self.engine.attention == "sparse":
            kept = [records[n].kept_BQK for n in layers]
            small = np.int16 if self.capacity <= np.iinfo(np.int16).max else np.int32
            stacked_NBQK = torch.stack([k for k in kept if k is not None]).cpu().numpy().astype(small)
            for i, row in enumerate(self.rows):
                row.kept.append(stacked_NBQK[:, i, : counts_B[i]])
        experts = [e for e in (records[n].experts_TE for n in layers) if e is not None]
        if settings.record_experts and experts:
            stacked_NBQE = (
                torch.stack(experts).unflatten(1, (len(self.rows), -1)).cpu().numpy().astype(np.int16)
            )
            for i, row in enumerate(self.rows):
                row.experts.append(stacked_NBQE[:, i, : counts_B[i]])

    def _record_mask(self, logp_BV: Tensor, sampled_B: NDArray[np.bool_]) -> None:
        """Note what each row's next token was drawn from, where something was cut."""
        counts_B, ids_R = sampling.kept_tokens(logp_BV)
        for i, ids in enumerate(np.split(ids_R, np.cumsum(counts_B)[:-1])):
            if sampled_B[i] and len(ids):
                self.mask_counts_BL[i, self.lengths_B[i]] = len(ids)
                self.rows[i].mask_ids.append(ids)


def _joined(kept: list[NDArray[Any]]) -> NDArray[Any]:
    """[N, tokens, K] from passes with fewer keys than K in some: -1 where there are none."""
    width = max(part.shape[2] for part in kept)
    padded = [np.pad(k, ((0, 0), (0, 0), (0, width - k.shape[2])), constant_values=-1) for k in kept]
    return np.concatenate(padded, axis=1)
