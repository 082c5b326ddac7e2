"""The vLLM rollout engine: the surface of TorchEngine over an LLMEngine in this process.

vLLM schedules (continuous batching, chunked prefill, prefix cache, preemption) and owns the cache; the model, the sampling
and the turns are ours, so that a request with a seed gives the same sample as in the torch engine. A turn after a tool
result is a new request with all tokens so far, of which the prefix cache supplies what was computed.
Next: model.py, sampler.py, ../torch_engine.py.

Shape letters: L tokens of a sequence.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from vllm import ModelRegistry, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from posttrain.model import checkpoint
from posttrain.model.weights import Weights
from posttrain.rollouts import chat
from posttrain.rollouts.dialogue import Dialogue, end_turns
from posttrain.rollouts.environment import Failed
from posttrain.rollouts.geometry import Geometry, engine_memory, need_device
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.vllm import compat, plugin, records, stock
from posttrain.rollouts.vllm.model import DsaForVllm
from posttrain.rollouts.vllm.sampler import Draws, SeededSampler
from posttrain.schema import Rollout, Stop

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""CUDA graphs of decoding steps, without torch.compile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an engine may use."""

    max_rows: int = 256
    """Sequences decoded at the same time."""
    max_batched_tokens: int = 2048
    """New tokens of one pass: a longer prompt is computed in chunks."""
    cache_bytes: int = 256 << 20
    """Of all layers' caches together; what does not fit is preempted and computed again."""
    block_size: int = 16
    """Tokens of a block: the grain of the prefix cache."""
    prefix_cache: bool = True
    eager: bool = True
    """No CUDA graphs."""
    deterministic: bool = False
    """A request's bits do not depend on its batch: prompts are computed whole and without the prefix cache, since a token
    that follows cached ones goes through other kernels, and products in tiles of one size. Not when preempted."""
    sleep: bool = False
    """Whether sleep() will be asked for: on a GPU, memory that can be given up is allocated otherwise."""
    stock: bool = False
    """vLLM's own model and sparse attention."""


@dataclass(slots=True)
class _Row(Dialogue):
    """One sequence, over all its turns."""

    order: int = field(kw_only=True)
    draws: Draws = field(kw_only=True)
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    full: bool = False
    """A tool result has filled it up; its last tokens are only computed for the records."""

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return len(self.prompt) + self.request.max_new_tokens - len(self.tokens)

    def extend(self, tokens: Sequence[int], *, sampled: bool) -> None:
        """Append tokens."""
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)


class VllmEngine:
    """Generates rollouts with vLLM on one device."""

    def __init__(
        self,
        path: Path,
        tokenizer: chat.Tokenizer,
        *,
        dtype: str = "float32",
        backend: str = "auto",
        limits: Limits = Limits(),
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.version = tokenizer, 0
        self.eos_token_id = tokenizer.eos_token_id
        self._unfit: str | None = None
        """Why the weights here are nobody's: nothing is generated until a load succeeds."""
        if limits.deterministic:
            limits = _whole_prompts(path, limits)
        self._asleep: Callable[[], None] | None = None
        """Wakes."""
        if limits.stock:
            stock.need(path, dtype)
        _need_memory(path, dtype, limits)
        self.limits = limits
        self._engine = LLMEngine.from_engine_args(_arguments(path, dtype, backend, limits, seed))
        self._runner = compat.runner(self._engine)
        # Not the wrapper that replays CUDA graphs: what is set on that does not reach the model.
        self._model: DsaForVllm | stock.Stock = self._runner.get_model()
        if limits.stock:
            self._model = stock.Stock(self._runner, path)
        self._sampler = self._runner.sampler = SeededSampler(self._runner, self._model.record)
        self._numbers = itertools.count()
        self.num_prefix_hits = 0
        """Tokens that the prefix cache supplied so far."""
        vocabulary = self._model.config.vocab_size
        if not 0 <= self.eos_token_id < vocabulary:
            self.close()
            raise ValueError(
                f"{path}: the tokenizer's stop token {self.eos_token_id} is not among the model's {vocabulary} tokens"
            )

    @property
    def backend(self) -> str:
        """Which kernels run, and why."""
        return f"{self._model.backend}, in vLLM"

    @property
    def num_preempted(self) -> int:
        """How often a sequence had to give up its blocks and was computed again, so far."""
        return int(self._sampler.num_preempted)

    def load(self, version: int, weights: Weights) -> None:
        """Take the learner's weights of that version; ValueError, and nothing changes, if they are not whole."""
        if self._asleep is not None:
            self._asleep()
            self._asleep = None
        try:
            self._model.take(weights)
        except ValueError:
            raise
        except BaseException:
            self._unfit = "a load of weights broke off"
            raise
        self._unfit = None
        # Its entries are the old weights'; without requests it cannot be busy.
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept cache entries of the old weights")
        self.version = version

    def sleep(self) -> None:
        """Give the memory of weights and cache up until the next load; between generations, nothing is lost by it."""
        if self._asleep is None:
            self._asleep = compat.sleep(self._engine)
            self._unfit = "it gave them up to sleep"

    def close(self) -> None:
        """Free what vLLM holds; the engine is of no use afterwards. There is one engine at a time in a process."""
        compat.close(self._engine)

    def generate(
        self, requests: Sequence[Request], settings: Sampling, *, max_rows: int = 256
    ) -> list[Rollout]:
        """One rollout per request, in order; one that cannot be served ends with stop "error" and the reason.

        max_rows is that of the limits: vLLM reads it once.
        """
        if self._unfit is not None:
            raise RuntimeError(f"the engine has no weights to serve: {self._unfit}; load them again")
        self._start_records(settings)
        self._sampler.settings = settings
        tasks = {r.task.id: r.task for r in requests}
        prompts = {id: chat.encode_prompt(self.tokenizer, task) for id, task in tasks.items()}
        done: dict[int, Rollout] = {}
        running: dict[int, _Row] = {}
        for order, request in enumerate(requests):
            row = _Row(request, prompts[request.task.id], order=order, draws=Draws(request.seed))
            row.extend(row.prompt, sampled=False)
            obstacle = self._obstacle(row)
            if obstacle is None:
                self._submit(row, settings, running)
            else:
                done[order] = self._rollout(row, Failed("error", obstacle), settings)
        while running:
            done |= self._step(running, settings)
        return [done[i] for i in range(len(requests))]

    def _obstacle(self, row: _Row) -> str | None:
        """Why vLLM could not serve a request."""
        num, new, most = len(row.prompt), row.request.max_new_tokens, self._model.max_length
        if not num:
            return "the prompt is empty"
        if num + new > most:
            return f"a prompt of {num} tokens with {new} new ones is longer than the model's {most} positions"
        return row.request.obstacle(self._model.config.vocab_size)

    def _stops(self, row: _Row) -> list[int]:
        return [self.eos_token_id, *row.request.stop_ids]

    def _submit(self, row: _Row, settings: Sampling, running: dict[int, _Row]) -> None:
        number = next(self._numbers)
        tokens = row.tokens[:-1] if row.full else list(row.tokens)
        params = SamplingParams(
            max_tokens=1 if row.full else row.room,
            ignore_eos=True,  # our stop token is named, vLLM's idea of it may come from a config
            stop_token_ids=[] if settings.ignore_eos else self._stops(row),
            detokenize=False,
            extra_args={compat.PARAMS: number},
        )
        row.draws.computed = 0
        self._sampler.draws[number] = row.draws
        running[number] = row
        self._engine.add_request(str(number), {"prompt_token_ids": tokens}, params)

    def _step(self, running: dict[int, _Row], settings: Sampling) -> dict[int, Rollout]:
        """One pass of vLLM; of what it has ended, the rollouts that are over, by their order."""
        over: list[tuple[_Row, Stop | Failed, bool]] = []
        turns: list[_Row] = []
        for output in self._engine.step():
            number = int(output.request_id)
            row = running[number]
            if row.draws.broken:
                over.append(
                    (row, Failed("error", "the logits are not finite: the weights are broken"), False)
                )
                if not output.finished:
                    self._engine.abort_request([output.request_id])
            elif output.finished and row.full:
                row.draws.forget(len(row.tokens) - 1)
                over.append((row, "length", False))
            elif output.finished:
                row.extend(output.outputs[0].token_ids, sampled=True)
                self.num_prefix_hits += output.num_cached_tokens or 0
                if settings.ignore_eos or row.tokens[-1] not in self._stops(row):
                    over.append((row, "length", True))
                else:
                    turns.append(row)
            else:
                continue
            del running[number], self._sampler.draws[number]
        answers = end_turns(self.tokenizer, [(row, row.tokens) for row in turns])
        for row, answer in zip(turns, answers, strict=True):
            if not isinstance(answer, list):
                over.append((row, answer, False))
                continue
            forced = answer[: row.room]
            row.extend(forced, sampled=False)
            row.full = not row.room
            if not row.full or (forced and self._model.records is not None):
                self._submit(row, settings, running)
            else:
                over.append((row, "length", False))
        return {row.order: self._rollout(row, why, settings, cut=cut) for row, why, cut in over}

    def _rollout(self, row: _Row, why: Stop | Failed, settings: Sampling, *, cut: bool = False) -> Rollout:
        stop, outcome, text = row.end(self.tokenizer, row.tokens, why, cut=cut)
        kept, experts = self._read_records(row)
        logprobs = np.zeros(len(row.tokens), np.float32)
        for position, logp in row.draws.logprobs.items():
            if position < len(logprobs):
                logprobs[position] = logp
        return Rollout(
            task_id=row.request.task.id,
            index=row.request.index,
            tokens=np.array(row.tokens, np.int32),
            sampled=np.array(row.sampled, np.bool_),
            logprobs=logprobs,
            text=text,
            messages=tuple(row.messages),
            stop=stop,
            outcome=outcome,
            policy_version=self.version,
            kept=kept,
            experts=experts,
            sampling_mask=row.draws.mask(len(row.tokens)) if settings.record_mask else None,
        )

    def _start_records(self, settings: Sampling) -> None:
        """Give the model a place for what is to be recorded; forget cache entries computed without it."""
        if isinstance(self._model, stock.Stock):
            if settings.record_kept or settings.record_experts:
                raise ValueError('rollouts.attention = "stock" records neither kept keys nor experts')
            return
        shape = self._model.shape(kept=settings.record_kept, experts=settings.record_experts)
        if not shape.topk and not shape.experts[0]:
            self._model.records = None
            return
        if self._model.records is None or self._model.records.shape != shape:
            pool = compat.pool(self._model.caches[0].cache)
            self._model.records = records.Records(shape, pool, max_length=self._model.max_length)
            self._engine.reset_prefix_cache()

    def _read_records(self, row: _Row) -> tuple[Any, Any]:
        if self._model.records is None or row.draws.id is None:
            return None, None
        # vLLM forgets an ended request, and gives its blocks to others, in the next pass.
        blocks = self._runner.requests[row.draws.id].block_ids[0]
        return self._model.records.read(blocks, len(row.tokens) - 1)


def _arguments(path: Path, dtype: str, backend: str, limits: Limits, seed: int) -> EngineArgs:
    """vLLM's settings of an engine."""
    if limits.stock:
        model: dict[str, Any] = dict(stock.ARGUMENTS)
    else:
        # The class: a name would be looked at in a process of its own, which takes 8 s.
        ModelRegistry.register_model(plugin.ARCHITECTURE, DsaForVllm)
        model = {
            "hf_overrides": plugin.OVERRIDES,
            "additional_config": {"backend": backend, "deterministic": limits.deterministic},
        }
    return EngineArgs(
        model=str(path),
        skip_tokenizer_init=True,
        dtype=dtype,
        seed=seed,
        max_num_seqs=limits.max_rows,
        max_num_batched_tokens=max(limits.max_batched_tokens, limits.max_rows),
        block_size=stock.BLOCK_SIZE if limits.stock else limits.block_size,
        kv_cache_memory_bytes=limits.cache_bytes,
        enable_prefix_caching=limits.prefix_cache,
        enable_chunked_prefill=not limits.deterministic,
        async_scheduling=False,
        enforce_eager=limits.eager,
        compilation_config={} if limits.eager else GRAPHS,
        disable_log_stats=True,
        enable_sleep_mode=limits.sleep and compat.on_gpu(),
        **model,
    )


def _whole_prompts(path: Path, limits: Limits) -> Limits:
    """Limits under which no prompt is cut and none is found in the cache."""
    longest = int(checkpoint.max_length(path))
    most = max(longest, limits.max_batched_tokens)
    return replace(limits, prefix_cache=False, max_batched_tokens=most)


def _need_memory(path: Path, dtype: str, limits: Limits) -> None:
    """ValueError, with the arithmetic, if the GPU has not the memory; host memory is not ours to count."""
    shape, free = Geometry.read(path), compat.free_bytes()
    if shape is not None and free is not None:
        memory = engine_memory(
            shape,
            dtype=dtype,
            cache_bytes=limits.cache_bytes,
            batched_tokens=limits.max_batched_tokens,
            max_rows=limits.max_rows,
        )
        need_device(memory, free, what=str(path), there="is free on its device")
