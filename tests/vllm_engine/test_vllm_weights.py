"""The learner's weights in a running vLLM engine."""

import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny

from posttrain.model import checkpoint
from posttrain.model.weights import Weights, pack
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.rollouts.vllm.engine import Limits, VllmEngine
from posttrain.toy import sorting, tokenizer

TOKENIZER = tokenizer.build()
OpenEngine = Callable[[Path, Limits], VllmEngine]
REQUESTS = [
    Request(task=task, index=0, seed=i, max_new_tokens=30)
    for i, task in enumerate(sorting.tasks(seed=5, n=4))
]


def test_new_weights_are_served_at_once_and_half_of_them_never(folder: Path, open_engine: OpenEngine) -> None:
    engine = open_engine(folder, Limits(max_rows=8, cache_bytes=4 << 20, block_size=8))
    old = engine.generate(REQUESTS, Sampling())
    model = tiny.model(topk=7, seed=9)
    new = pack(model.state_dict())
    with pytest.raises(ValueError, match="names differ"):
        engine.load(1, Weights(dict(list(new.tensors.items())[:9]), new.checksum))
    assert engine.version == 0
    assert [r.tokens.tolist() for r in engine.generate(REQUESTS, Sampling())] == [
        r.tokens.tolist() for r in old
    ]
    engine.load(1, new)
    found, wanted = (
        engine.generate(REQUESTS, Sampling()),
        TorchEngine(model, TOKENIZER).generate(REQUESTS, Sampling()),
    )
    assert [r.tokens.tolist() for r in found] == [r.tokens.tolist() for r in wanted]
    assert {r.policy_version for r in found} == {1}


def test_a_hundred_loads_leave_no_memory_behind(folder: Path, open_engine: OpenEngine) -> None:
    engine = open_engine(folder, Limits(max_rows=8, cache_bytes=4 << 20))
    weights, process = pack(checkpoint.load(folder).state_dict()), psutil.Process()
    size = []
    for version in range(1, 121):
        engine.load(version, weights)
        engine.generate(REQUESTS[:1], Sampling())
        if version in (20, 120):
            gc.collect()
            size.append(process.memory_info().rss)
    assert size[1] - size[0] < 8 << 20, size


def test_an_engine_sleeps_without_weights_and_cache_and_a_load_wakes_it(
    folder: Path, open_engine: OpenEngine
) -> None:
    engine = open_engine(folder, Limits(max_rows=8, cache_bytes=64 << 20, block_size=8))
    settings = Sampling(record_kept=True, record_experts=True)
    engine.generate(REQUESTS, settings)
    before = psutil.Process().memory_info().rss
    engine.sleep()
    engine.sleep()
    assert before - psutil.Process().memory_info().rss > 48 << 20
    with pytest.raises(RuntimeError, match="no weights to serve: it gave them up to sleep"):
        engine.generate(REQUESTS, settings)
    model = tiny.model(topk=7, seed=9)
    new = pack(model.state_dict())
    with pytest.raises(ValueError, match="names differ"):
        engine.load(1, Weights(dict(list(new.tensors.items())[:9]), new.checksum))
    with pytest.raises(RuntimeError, match="no weights to serve"):
        engine.generate(REQUESTS, settings)
    wanted = TorchEngine(model, TOKENIZER).generate(REQUESTS, settings)
    for version in (2, 3):
        engine.load(version, new)
        for a, b in zip(engine.generate(REQUESTS, settings), wanted, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.policy_version == version
            assert a.kept is not None and b.kept is not None and (a.kept == b.kept).all()
        engine.sleep()
