"""Our model in vLLM: the learner's log-probs and selections, however vLLM cuts, shares and preempts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.weights import pack
from posttrain.rollouts.environment import Stateless
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.rollouts.vllm.engine import Limits, VllmEngine
from posttrain.schema import Rollout, Task
from posttrain.toy import sorting, tokenizer

TOKENIZER = tokenizer.build()
OpenEngine = Callable[[Path, Limits], VllmEngine]
MEAN, LARGEST = 2e-6, 2e-5
"""What |log-prob of engine - of learner| may be in fp32."""
WHOLE = Limits(max_rows=16, cache_bytes=8 << 20, prefix_cache=False)
BYTES_PER_TOKEN = 3 * (20 + 8 + 16) * 4
VARIANTS = {
    "whole prompts": WHOLE,
    "chunks": Limits(max_rows=16, cache_bytes=8 << 20, max_batched_tokens=16, prefix_cache=False),
    "shared prefixes": Limits(max_rows=16, cache_bytes=8 << 20, block_size=8),
    "shared prefixes, chunks": Limits(max_rows=16, cache_bytes=8 << 20, max_batched_tokens=16, block_size=8),
    "preempted": Limits(max_rows=16, cache_bytes=BYTES_PER_TOKEN * 400, prefix_cache=False),
    "preempted, shared, chunks": Limits(
        max_rows=16, cache_bytes=BYTES_PER_TOKEN * 400, max_batched_tokens=16, block_size=8
    ),
}


def _requests(num: int, *, new: int = 60, each: int = 2) -> list[Request]:
    tasks = list(sorting.tasks(seed=5, n=-(-num // each)))
    return [
        Request(task=tasks[i // each], index=i % each, seed=1000 + i, max_new_tokens=new) for i in range(num)
    ]


@pytest.fixture(scope="module")
def learner(folder: Path) -> DeepseekV32ForCausalLM:
    return checkpoint.load(folder)


def _gaps(model: DeepseekV32ForCausalLM, rollouts: list[Rollout], temperature: float = 1.0) -> Any:
    """|log-prob of the engine - of one packed pass of the model| of every sampled token."""
    context = tiny.packed([len(r.tokens) for r in rollouts])
    tokens = torch.from_numpy(np.concatenate([r.tokens for r in rollouts]).astype(np.int64))
    with torch.no_grad():
        logits = model(tokens, context)
    logp = F.log_softmax(logits[:-1] / temperature, -1).gather(1, tokens[1:, None])[:, 0].numpy()
    engine = np.concatenate([r.logprobs for r in rollouts])[1:]
    sampled = np.concatenate([r.sampled for r in rollouts])[1:]
    return np.abs(logp - engine)[sampled]


def _check_records(model: DeepseekV32ForCausalLM, rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        num = len(rollout.tokens) - 1
        context = tiny.packed([num])
        with torch.no_grad():
            model(torch.from_numpy(rollout.tokens[:-1].astype(np.int64)), context)
        assert rollout.kept is not None and rollout.experts is not None
        for layer in range(3):
            kept = context.records[layer].kept_BQK
            assert kept is not None
            assert np.array_equal(kept[0].numpy(), rollout.kept[layer])
        for i, layer in enumerate((1, 2)):
            experts = context.records[layer].experts_TE
            assert experts is not None
            assert np.array_equal(np.sort(experts.numpy()), np.sort(rollout.experts[i]))


@pytest.mark.parametrize("limits", VARIANTS.values(), ids=VARIANTS.keys())
def test_logprobs_and_selections_are_the_learners(
    folder: Path, learner: DeepseekV32ForCausalLM, open_engine: OpenEngine, limits: Limits
) -> None:
    engine = open_engine(folder, limits)
    settings = Sampling(ignore_eos=True, record_kept=True, record_experts=True)
    rollouts = engine.generate(_requests(16), settings)
    assert min(len(r.tokens) for r in rollouts) > 60 > 7
    assert (engine.num_preempted > 0) == (limits.cache_bytes < 1 << 20)
    assert (engine.num_prefix_hits > 0) == limits.prefix_cache
    gaps = _gaps(learner, rollouts)
    print(
        f"mean {gaps.mean():.1e}, max {gaps.max():.1e}, {len(gaps)} tokens, {engine.num_preempted} preempted"
    )
    assert gaps.mean() <= MEAN and gaps.max() <= LARGEST
    _check_records(learner, rollouts)


@pytest.mark.parametrize("name", ["whole prompts", "shared prefixes, chunks", "preempted, shared, chunks"])
def test_e4m3_scores_select_as_the_learners_do(
    e4m3_folder: Path, folder: Path, open_engine: OpenEngine, name: str
) -> None:
    """The same bounds; and a model that did not round would have given other log-probs."""
    limits, learner = VARIANTS[name], checkpoint.load(e4m3_folder)
    engine = open_engine(e4m3_folder, limits)
    rollouts = engine.generate(
        _requests(16), Sampling(ignore_eos=True, record_kept=True, record_experts=True)
    )
    assert (engine.num_preempted > 0) == (limits.cache_bytes < 1 << 20)
    assert (engine.num_prefix_hits > 0) == limits.prefix_cache
    gaps = _gaps(learner, rollouts)
    print(f"mean {gaps.mean():.1e}, max {gaps.max():.1e}, {len(gaps)} tokens")
    assert gaps.mean() <= MEAN and gaps.max() <= LARGEST
    _check_records(learner, rollouts)
    assert _gaps(checkpoint.load(folder), rollouts).mean() > 1e-3


def test_the_same_seeds_give_the_torch_engines_samples(
    folder: Path, learner: DeepseekV32ForCausalLM, open_engine: OpenEngine
) -> None:
    engine = open_engine(folder, WHOLE)
    for settings in (
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9, record_mask=True),
        Sampling(top_k=5, record_mask=True),
        Sampling(temperature=0.0),
    ):
        found = engine.generate(_requests(9), settings)
        wanted = TorchEngine(learner, TOKENIZER).generate(_requests(9), settings)
        for a, b in zip(found, wanted, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.sampled.tolist() == b.sampled.tolist()
            assert (a.text, a.messages, a.stop, a.outcome) == (b.text, b.messages, b.stop, b.outcome)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
            if settings.record_mask:
                assert a.sampling_mask is not None and b.sampling_mask is not None
                assert a.sampling_mask.counts.tolist() == b.sampling_mask.counts.tolist()
                assert a.sampling_mask.ids.tolist() == b.sampling_mask.ids.tolist()


def test_a_request_stops_at_its_own_tokens_as_in_the_torch_engine(
    folder: Path, learner: DeepseekV32ForCausalLM, open_engine: OpenEngine
) -> None:
    requests = _requests(4)
    whole = TorchEngine(learner, TOKENIZER).generate(requests, Sampling())
    stops = [int(r.tokens[int(r.sampled.argmax()) + 5]) for r in whole]
    requests = [replace(r, stop_ids=(stop,)) for r, stop in zip(requests, stops, strict=True)]
    requests.append(replace(requests[0], stop_ids=(-1,)))
    found = open_engine(folder, WHOLE).generate(requests, Sampling())
    for a, b, cut in zip(
        found,
        TorchEngine(learner, TOKENIZER).generate(requests, Sampling()),
        [True] * 4 + [False],
        strict=True,
    ):
        assert a.tokens.tolist() == b.tokens.tolist() and (a.stop, a.outcome) == (b.stop, b.outcome)
        assert (a.stop == "eos" and 0 < a.num_sampled <= 6) if cut else "stop token -1" in a.outcome["error"]


def test_turns_with_tools_are_the_torch_engines(folder: Path, open_engine: OpenEngine) -> None:
    def tool(task: Task, text: str) -> str | None:
        return "boss of ann is bob"

    requests = [
        Request(task=t, index=0, seed=i, max_new_tokens=90, max_turns=3, environment=Stateless(tool))
        for i, t in enumerate(sorting.tasks(seed=3, n=12))
    ]
    model = checkpoint.load(folder)
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] += 0.5  # end turns early
    engine = open_engine(folder, VARIANTS["shared prefixes"])
    engine.load(1, pack(model.state_dict()))
    settings = Sampling(record_kept=True, record_experts=True)
    found = engine.generate(requests, settings)
    wanted = TorchEngine(model, TOKENIZER).generate(requests, settings)
    assert any(len(r.messages) >= 3 for r in found), "no rollout took a tool result"
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.sampled.tolist() == b.sampled.tolist()
        assert (a.text, a.messages, a.stop, a.outcome) == (b.text, b.messages, b.stop, b.outcome)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
    _check_records(model, found)
    assert _gaps(model, found).max() <= LARGEST


def test_a_dense_checkpoint_is_served_densely(tmp_path: Path, open_engine: OpenEngine) -> None:
    model = tiny.model(topk=1, seed=4, index_heads=1, index_dim=8)
    checkpoint.save_dense(model, tmp_path, TOKENIZER)
    engine = open_engine(tmp_path, VARIANTS["chunks"])
    wanted = TorchEngine(model, TOKENIZER, "dense").generate(_requests(6), Sampling())
    for a, b in zip(engine.generate(_requests(6), Sampling()), wanted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def test_a_deterministic_request_has_the_same_bits_in_every_batch(
    folder: Path, learner: DeepseekV32ForCausalLM, open_engine: OpenEngine
) -> None:
    """The same prompt 1, 8, 64 and 65 times, and once among others of other lengths."""
    engine = open_engine(folder, Limits(max_rows=128, cache_bytes=32 << 20, deterministic=True))
    task = next(iter(sorting.tasks(seed=5, n=1)))
    settings = Sampling(ignore_eos=True, record_kept=True)
    (alone,) = engine.generate([Request(task=task, index=0, seed=7, max_new_tokens=20)], settings)
    for num in (8, 64, 65):
        same = [Request(task=task, index=i, seed=7, max_new_tokens=20) for i in range(num)]
        for found in engine.generate(same, settings):
            assert found.tokens.tolist() == alone.tokens.tolist()
            assert found.logprobs.tobytes() == alone.logprobs.tobytes()
    mixed = [*_requests(9, new=31), Request(task=task, index=0, seed=7, max_new_tokens=20), *_requests(5)]
    found = engine.generate(mixed, settings)[9]
    assert found.tokens.tolist() == alone.tokens.tolist()
    assert found.logprobs.tobytes() == alone.logprobs.tobytes()
    assert engine.num_prefix_hits == engine.num_preempted == 0
    assert _gaps(learner, [alone]).max() <= LARGEST
