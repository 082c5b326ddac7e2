"""Steps that must not be taken, and runs that must not start."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from posttrain import config, packing, pipeline
from posttrain.learner import Learner, Setup
from posttrain.optimizer import Optimizers
from posttrain.schema import Batch
from posttrain.stages import rl

BOTH = frozenset({"model", "indexer"})


def _learner(path: Path, **changes: Any) -> Learner:
    fields: dict[str, Any] = {
        "checkpoint": tiny.sparse_checkpoint(path),
        "attention": "sparse",
        "optimizer": config.Optimizer(lr=1e-3, warmup_steps=5),
        "total_steps": 10,
        "train": BOTH,
        "indexer_loss": "sparse",
        "balance_speed": 0.01,
    }
    return Learner(Setup(**(fields | changes)))


def _batches(advantage: float = 1.0) -> list[Batch]:
    samples = [tiny.sample(f"s{i}", 12 + i, seed=i, advantage=advantage if i == 3 else 1.0) for i in range(5)]
    return packing.pack(samples, packing.token_weights(samples, "token", 1), tokens_per_batch=40)


def _state(learner: Learner) -> dict[str, Any]:
    """Everything a step may move: parameters, buffers, moments, schedule."""
    tensors = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    for i, optimizer in enumerate(learner.optimizers.optimizers):
        for j, state in enumerate(optimizer.state.values()):
            tensors |= {f"{i}/{j}/{name}": value.clone() for name, value in state.items()}
    return tensors | {"count": torch.tensor([learner.optimizers.step_count, learner.version])}


def _moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    learner = _learner(tmp_path)
    learner.grpo_step(_batches(), config.Loss(clip=10.0), 1.0)
    before = _state(learner)
    figures, _ = learner.grpo_step(_batches(float("nan")), config.Loss(clip=10.0), 1.0)
    assert figures["skipped"] == figures["nonfinite"] == 1 and "spike" not in figures
    assert _moved(before, _state(learner)) == []
    figures, _ = learner.grpo_step(_batches(), config.Loss(clip=10.0), 1.0)
    assert "skipped" not in figures
    moved = _moved(before, _state(learner))
    assert any("correction_bias" in name for name in moved) and "count" in moved and len(moved) > 20


def test_gradients_that_are_not_finite_are_a_reason_too(tmp_path: Path) -> None:
    """The loss is finite, but one parameter's gradient is not."""
    learner = _learner(tmp_path)
    learner.lm_step(_batches())
    before = _state(learner)
    name, parameter = next(iter(learner.model.named_parameters()))
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    figures = learner.lm_step(_batches())
    assert figures["nonfinite"] == 1 and np.isfinite(figures["loss"]), name
    assert _moved(before, _state(learner)) == []
    hook.remove()
    assert "skipped" not in learner.lm_step(_batches())


def test_three_steps_in_a_row_that_are_not_finite_stop_and_name_the_samples(tmp_path: Path) -> None:
    learner = _learner(tmp_path)
    bad, good = _batches(float("nan")), _batches()
    for batches in (bad, bad, good, bad, bad):
        learner.grpo_step(batches, config.Loss(clip=10.0), 1.0)
    guilty = next(batch.ids for batch in bad if "s3" in batch.ids)
    with pytest.raises(FloatingPointError, match=rf"3 steps in a row .* Samples: {', '.join(guilty)}$"):
        learner.grpo_step(bad, config.Loss(clip=10.0), 1.0)


def test_that_it_stopped_is_told_in_one_line(tmp_path: Path) -> None:
    line = pipeline._explain(FloatingPointError("3 steps in a row"), tmp_path)
    assert line == f"3 steps in a row (traceback in {tmp_path / 'traceback.txt'})"


def _step(optimizers: Optimizers, model_gradient: float, indexer_gradient: float) -> dict[str, float]:
    for part, value in (("model", model_gradient), ("indexer", indexer_gradient)):
        for parameter in optimizers.parts[part]:
            parameter.grad = torch.full_like(parameter, value)
    return optimizers.step()


@pytest.mark.parametrize("part", ["model", "indexer"])
def test_a_spike_of_either_part_is_skipped_until_it_is_usual(part: str) -> None:
    """Eight steps of norm n, then 3.9 n passes, 4.1 n does not; after a window of large norms they are usual."""
    cfg = config.Optimizer(lr=1e-6, spike_factor=4.0, spike_window=8)
    optimizers = Optimizers(tiny.model(), cfg, train=set(BOTH), total_steps=99)

    def step(size: float) -> bool:
        large = (size, 1.0) if part == "model" else (1.0, size)
        figures = _step(optimizers, *large)
        assert ("spike" in figures) == ("skipped" in figures) and "nonfinite" not in figures
        return "skipped" in figures

    assert not any(step(size) for size in (1, 9, 1, 1, 1, 1, 1, 1)), "the guard begins after eight steps"
    count = optimizers.step_count
    assert step(4.1) and optimizers.step_count == count
    assert not step(3.9)
    assert [step(100) for _ in range(6)] == [True] * 4 + [False] * 2
    assert not step(1)


def test_without_a_factor_no_step_is_a_spike() -> None:
    optimizers = Optimizers(tiny.model(), config.Optimizer(lr=1e-6), train=set(BOTH), total_steps=99)
    assert not any("skipped" in _step(optimizers, size, 1.0) for size in [1.0] * 9 + [1e6])


def test_parameters_that_no_gradient_reaches_are_an_error() -> None:
    optimizers = Optimizers(tiny.model(), config.Optimizer(lr=1e-6), train=set(BOTH), total_steps=9)
    for parameter in optimizers.parts["model"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="no gradient has reached the indexer parameters"):
        optimizers.step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"indexer_loss": "none"}, "only its KL trains an indexer"),
        ({"train": frozenset({"model"})}, "only its KL trains an indexer"),
        ({"attention": "dense"}, "nothing is selected"),
    ],
)
def test_a_learner_whose_indexer_would_stay_untrained_does_not_start(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _learner(tmp_path, **fields)


def test_rl_of_a_dense_checkpoint_does_not_start(tmp_path: Path) -> None:
    dense, sparse = tiny.dense_checkpoint(tmp_path / "a"), tiny.sparse_checkpoint(tmp_path / "b")
    stage = config.Rl.model_validate(
        {"name": "rl", "kind": "rl", "source": "s", "mix": {"m": {}}, "steps": 1, "optimizer": {"lr": 1}}
    )
    job: Any = SimpleNamespace(source=lambda _: dense, seed=0)
    with pytest.raises(
        ValueError, match=r"rl: 's' is a dense checkpoint without indexers; .* convert it first"
    ):
        rl._setup(stage, job)
    job.source = lambda _: sparse
    assert rl._setup(stage, job).train == {"model"}
    setup = rl._setup(stage.model_copy(update={"indexer": "train"}), job)
    assert setup.train == BOTH and setup.indexer_loss == "sparse" and setup.attention == "sparse"
