"""The torch engine: cached decoding is the full forward, samples depend on their seed alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from posttrain.model.weights import Weights, pack
from posttrain.rollouts import chat, sampling
from posttrain.rollouts.environment import Stateless
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Rollout, Task
from posttrain.toy import records, sorting, tokenizer

TOKENIZER = tokenizer.build()
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(tiny.model(topk=7, seed=2), TOKENIZER)


def _requests(num: int, *, new: int = 40, **fields: Any) -> list[Request]:
    tasks = list(sorting.tasks(seed=5, n=(num + 1) // 2))
    return [
        Request(task=tasks[i // 2], index=i % 2, seed=1000 + i, max_new_tokens=new, **fields)
        for i in range(num)
    ]


def _full_logits(engine: TorchEngine, rollout: Rollout) -> torch.Tensor:
    context = tiny.packed([len(rollout.tokens)])
    with torch.no_grad():
        logits: torch.Tensor = engine.model(torch.from_numpy(rollout.tokens.astype(np.int64)), context)
    return logits


def _check_logprobs(engine: TorchEngine, rollouts: list[Rollout], settings: Sampling) -> None:
    gaps = []
    for rollout in rollouts:
        logits = _full_logits(engine, rollout)[:-1]
        logp = sampling.processed_logprobs(logits, settings.temperature, settings.top_p)
        tokens = torch.from_numpy(rollout.tokens[1:].astype(np.int64))
        wanted = logp.gather(1, tokens[:, None])[:, 0].numpy()
        mask = rollout.sampled[1:]
        gaps.append(np.abs(wanted - rollout.logprobs[1:])[mask])
        assert (rollout.logprobs[~rollout.sampled] == 0).all()
    assert np.concatenate(gaps).mean() < TOLERANCE
    assert np.concatenate(gaps).max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [Sampling(), Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=0.0)],
    ids=["plain", "processed", "greedy"],
)
def test_cached_decoding_is_the_full_forward(engine: TorchEngine, settings: Sampling) -> None:
    rollouts = engine.generate(_requests(9), settings)
    assert max(len(r.tokens) for r in rollouts) > 40, "too short to need the top-k"
    _check_logprobs(engine, rollouts, settings)
    if settings.temperature == 0:
        for rollout in rollouts:
            best = _full_logits(engine, rollout)[:-1].argmax(-1).numpy()
            assert (best == rollout.tokens[1:])[rollout.sampled[1:]].all()


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "hadamard": {"index_hadamard": True},
    "e4m3": {"index_dtype": "e4m3"},
    "e4m3, hadamard": {"index_dtype": "e4m3", "index_hadamard": True, "index_dim": 32},
    "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "no shared width": {"v_head_dim": 22, "qk_nope_head_dim": 9, "kv_lora_rank": 17, "n_shared_experts": 2},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "index_heads": 1},
}


@pytest.mark.parametrize("changes", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_cached_decoding_of_other_models(changes: dict[str, Any]) -> None:
    other = TorchEngine(tiny.model(topk=7, seed=4, **changes), TOKENIZER)
    _check_logprobs(other, other.generate(_requests(7), Sampling()), Sampling())


def test_cached_decoding_with_dense_attention() -> None:
    dense = TorchEngine(tiny.model(topk=7, seed=2), TOKENIZER, "dense")
    for rollout in dense.generate(_requests(7), Sampling()):
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        with torch.no_grad():
            logits = dense.model(tokens, tiny.packed([len(tokens)], "dense"))
        logp = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.logprobs[1:], logp * rollout.sampled[1:], atol=1e-4)


def test_new_weights_are_used_however_they_came() -> None:
    engine = TorchEngine(tiny.model(topk=7, seed=2), TOKENIZER)
    before = engine.generate(_requests(3), Sampling())
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=0.01, fused=True)
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = engine.generate(_requests(3), Sampling())
    _check_logprobs(engine, after, Sampling())
    engine.load(1, pack(tiny.model(topk=7, seed=2).state_dict()))
    again = engine.generate(_requests(3), Sampling())
    assert [r.tokens.tolist() for r in again] == [r.tokens.tolist() for r in before]
    assert [r.tokens.tolist() for r in after] != [r.tokens.tolist() for r in before]


@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
def test_recorded_keys_and_experts_are_those_of_the_full_forward(index_dtype: str) -> None:
    engine = TorchEngine(tiny.model(topk=7, seed=2, index_dtype=index_dtype), TOKENIZER)
    settings = Sampling(record_kept=True, record_experts=True)
    for rollout in engine.generate(_requests(5), settings):
        context = tiny.packed([len(rollout.tokens)])
        with torch.no_grad():
            engine.model(torch.from_numpy(rollout.tokens.astype(np.int64)), context)
        assert rollout.kept is not None and rollout.experts is not None
        num = len(rollout.tokens) - 1
        assert rollout.kept.shape == (3, num, 7) and rollout.experts.shape == (2, num, 2)
        for layer in range(3):
            kept = context.records[layer].kept_BQK
            assert kept is not None
            assert (kept[0, :num].numpy() == rollout.kept[layer]).all()
        for i, layer in enumerate((1, 2)):
            experts = context.records[layer].experts_TE
            assert experts is not None
            assert (experts[:num].sort(-1).values.numpy() == np.sort(rollout.experts[i], -1)).all()


def test_a_sample_depends_on_its_seed_alone(engine: TorchEngine) -> None:
    requests = _requests(12)
    together = engine.generate(requests, Sampling())
    apart = engine.generate(list(reversed(requests)), Sampling(), max_rows=3)
    for a, b in zip(together, reversed(apart), strict=True):
        assert (a.tokens == b.tokens).all()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len({r.tokens.tobytes() for r in together}) == 12


def test_ignore_eos_gives_exactly_the_tokens_asked_for(engine: TorchEngine) -> None:
    rollouts = engine.generate(_requests(8, new=33), Sampling(ignore_eos=True))
    assert {r.num_sampled for r in rollouts} == {33}
    assert {r.stop for r in rollouts} == {"length"}


class _Scripted:
    """A model, and its decoder, that says what it is told: one-hot logits for the next token of a script."""

    def __init__(self, engine: TorchEngine, script: dict[int, int]) -> None:
        self.config, self.lm_head = engine.model.config, engine.model.lm_head
        self._script = script

    def __call__(self, tokens_T: torch.Tensor, context: Any, at: torch.Tensor) -> torch.Tensor:
        return self._logits(context.positions_T[at])

    def refresh(self) -> None:
        """As a decoder."""

    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *_: Any, **__: Any) -> Any:
        return self._logits(positions_B), {}

    def _logits(self, positions_B: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(positions_B), len(TOKENIZER)), -30.0)
        for row, position in enumerate(positions_B.tolist()):
            logits[row, self._script[position]] = 30.0
        return logits


def test_turns_with_a_tool_by_hand(engine: TorchEngine) -> None:
    """Two calls and an answer: the tool's tokens are forced, masked out, and never sampled."""
    task = next(iter(records.tasks(seed=1, n=1)))
    relation, name = task.meta["chain"][0], task.meta["person"]
    found = task.meta["table"][name][records.RELATIONS.index(relation)]
    first, second = records.look(relation, name), records.change("boss", "bob", found)
    messages = [*task.messages]
    for text, result in ((first, f"'{found}'"), (second, "done")):
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "tool", "content": result})
    messages.append({"role": "assistant", "content": "answer done"})
    tokens, mask = chat.encode_with_mask(TOKENIZER, messages)
    scripted = TorchEngine.__new__(TorchEngine)
    scripted.__dict__.update(engine.__dict__)
    script = _Scripted(engine, {i - 1: t for i, t in enumerate(tokens) if i})
    scripted.model = scripted.decoder = script  # type: ignore[assignment]
    request = Request(task=task, index=0, seed=1, max_new_tokens=64, max_turns=4, environment=records.start)
    (rollout,) = scripted.generate([request], Sampling())
    assert rollout.tokens.tolist() == tokens
    assert rollout.sampled.tolist() == mask
    assert rollout.stop == "eos"
    assert [m["role"] for m in rollout.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert rollout.messages[-1]["content"] == "answer done"
    assert rollout.text == f"{first}\n{second}\nanswer done"

    (cut,) = scripted.generate([Request(**(_fields(request) | {"max_turns": 2}))], Sampling())
    assert cut.stop == "turns"
    assert [m["role"] for m in cut.messages] == ["assistant", "tool", "assistant"]
    (short,) = scripted.generate([Request(**(_fields(request) | {"max_new_tokens": 9}))], Sampling())
    assert short.stop == "length"
    assert len(short.tokens) == len(chat.encode_prompt(TOKENIZER, task)) + 9


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__slots__}


def test_logprobs_are_right_after_tool_results(engine: TorchEngine) -> None:
    """A random model never writes a call, so this tool answers any turn."""

    def tool(task: Task, text: str) -> str | None:
        return "'bob'"

    requests = [
        Request(task=t, index=0, seed=i, max_new_tokens=90, max_turns=3, environment=Stateless(tool))
        for i, t in enumerate(records.tasks(seed=3, n=24))
    ]
    eager = TorchEngine(tiny.model(topk=7, seed=2), TOKENIZER)
    with torch.no_grad():
        eager.model.lm_head.weight[TOKENIZER.eos_token_id] += 0.5  # end turns early
    rollouts = eager.generate(requests, Sampling())
    assert any(len(r.messages) >= 3 for r in rollouts), "no rollout took a tool result"
    _check_logprobs(eager, rollouts, Sampling())


def test_processed_distribution_by_hand() -> None:
    logits = torch.tensor([[math_log(0.5), math_log(0.3), math_log(0.15), math_log(0.05)]])
    kept = sampling.processed_logprobs(logits, 1.0, 0.6).exp()[0]
    assert kept.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=1e-6)
    hot = sampling.processed_logprobs(logits, 0.5, 1.0).exp()[0]
    total = 0.25 + 0.09 + 0.0225 + 0.0025
    assert hot.tolist() == pytest.approx([x / total for x in (0.25, 0.09, 0.0225, 0.0025)], abs=1e-6)


def math_log(x: float) -> float:
    return float(np.log(x))


def test_choice_is_the_inverse_of_the_cumulative_distribution() -> None:
    logp = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]])).expand(5, 4)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 0.799, 0.9999999])
    assert sampling.choose(logp, uniforms, greedy=False).tolist() == [0, 0, 2, 2, 3]
    assert sampling.choose(logp, uniforms, greedy=True).tolist() == [0] * 5


def test_uniform_numbers_are_uniform_and_differ_between_neighbours() -> None:
    seeds = np.arange(200, dtype=np.uint64)
    numbers = np.concatenate([sampling.uniforms(seeds, np.full(200, p)) for p in range(50)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert numbers.std() == pytest.approx(12**-0.5, abs=0.01)
    assert len(np.unique(numbers)) > 9_990
    grid = numbers.reshape(50, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03


def test_a_request_stops_at_its_own_tokens_and_unknown_ones_are_an_error() -> None:
    engine = TorchEngine(tiny.model(topk=7, seed=1), TOKENIZER)
    task = next(iter(sorting.tasks(seed=0, n=1)))
    plain = Request(task=task, index=0, seed=4, max_new_tokens=30)
    (whole,) = engine.generate([plain], Sampling())
    start = int(whole.sampled.argmax())
    stop = int(whole.tokens[start + 5])
    first = start + whole.tokens[start:].tolist().index(stop)
    requests = [replace(plain, stop_ids=(3, stop)), replace(plain, stop_ids=(9999,)), plain]
    cut, unknown, other = engine.generate(requests, Sampling())
    assert cut.tokens.tolist() == whole.tokens[: first + 1].tolist() and cut.stop == "eos"
    assert unknown.stop == "error" and unknown.num_sampled == 0
    assert unknown.outcome == {"error": f"stop token 9999 is not among the model's {221} tokens"}
    assert other.tokens.tolist() == whole.tokens.tolist()
    (alone,) = engine.generate([requests[1]], Sampling())
    assert alone.stop == "error"
    (ignored,) = engine.generate([requests[0]], Sampling(ignore_eos=True))
    assert ignored.num_sampled == 30


def test_an_engine_that_sleeps_has_no_weights_until_they_are_loaded() -> None:
    model = tiny.model(topk=7, seed=1)
    engine = TorchEngine(model, TOKENIZER)
    requests = [
        Request(task=t, index=0, seed=i, max_new_tokens=8) for i, t in enumerate(sorting.tasks(seed=0, n=3))
    ]
    engine.generate(requests, Sampling())
    engine.sleep()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 0
    with pytest.raises(RuntimeError, match="gave them up to sleep"):
        engine.generate(requests, Sampling())
    other = tiny.model(topk=7, seed=2)
    whole = pack(other.state_dict())
    with pytest.raises(ValueError, match="names differ"):
        engine.load(1, Weights(dict(list(whole.tensors.items())[1:]), whole.checksum))
    with pytest.raises(RuntimeError, match="no weights to serve"):
        engine.generate(requests, Sampling())
    engine.load(2, whole)
    wanted = TorchEngine(other, TOKENIZER).generate(requests, Sampling())
    for a, b in zip(engine.generate(requests, Sampling()), wanted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
