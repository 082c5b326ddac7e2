"""Weights on their way to an engine: what is not whole is refused, and nothing has changed."""

import pytest
import tiny
import torch

from posttrain.model.weights import Weights, checksum, pack, take


def test_the_checksum_sees_every_bit_name_and_place() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int64)}
    changed = [
        {"a": torch.tensor([2.0, 1.0]), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.0 + 2**-22]), "b": base["b"]},
        {"a": torch.tensor([[1.0, 2.0]]), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"], "b": torch.tensor(3, dtype=torch.int32)},
    ]
    assert len({checksum(base), *map(checksum, changed)}) == 6
    assert checksum({"b": base["b"].clone(), "a": base["a"].clone()}) == checksum(base)
    assert checksum({"a": torch.ones(3, dtype=torch.bfloat16)}) != checksum(
        {"a": torch.ones(3, dtype=torch.float16)}
    )


def test_a_model_takes_whole_weights_only() -> None:
    engine, learner = tiny.model(seed=1), tiny.model(seed=2)
    before = checksum(engine.state_dict())
    good = pack(learner.state_dict())
    half = dict(list(good.tensors.items())[:5])
    mixed = good.tensors | {"lm_head.weight": engine.lm_head.weight.detach()}
    broken = good.tensors | {"lm_head.weight": torch.full_like(good.tensors["lm_head.weight"], float("nan"))}
    for bad, message in (
        (Weights(half, good.checksum), "names differ"),
        (Weights(mixed, good.checksum), "checksum is not the learner's"),
        (pack(broken), "lm_head.weight is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            take(engine, bad)
        assert checksum(engine.state_dict()) == before
    take(engine, good)
    assert checksum(engine.state_dict()) == good.checksum == checksum(learner.state_dict())
