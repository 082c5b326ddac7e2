"""LoRA: adapters alone train, every part of them has an effect, merged they are the same model."""

from pathlib import Path
from typing import Any

import group_worker
import numpy as np
import pytest
import tiny
import torch
from group_worker import batches
from torch.distributed.checkpoint.filesystem import FileSystemReader

from posttrain import config
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint, lora
from posttrain.model.arch import DeepseekV32ForCausalLM

MAPS = 5 * 3 + 3 * 3
"""Linear maps with adapters in tiny.model(): five of attention, three of an MLP (shared experts count), three layers."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


def _learner(path: Path, **changes: Any) -> Learner:
    return group_worker.learner(path, None, **({"lora": config.Lora(rank=3, alpha=7.0)} | changes))


def _adapted(path: Path, dtype: torch.dtype = torch.float32) -> DeepseekV32ForCausalLM:
    """A model whose adapters all do something."""
    model = checkpoint.load(path, dtype=dtype)
    lora.inject(model, rank=3, alpha=7.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def _logits(model: Any, attention: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tiny.tokens(60), tiny.packed([25, 35], attention))
    return logits


def _merged(model: Any) -> DeepseekV32ForCausalLM:
    weights = lora.merged(model.state_dict(), rank=3, alpha=7.0)
    plain = tiny.model()
    plain.load_state_dict(weights, strict=True)
    return plain.to(model.lm_head.weight.dtype)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_merged_weights_are_the_same_model(path: Path, attention: str) -> None:
    model = _adapted(path)
    plain, before = _logits(_merged(model), attention), _logits(checkpoint.load(path), attention)
    found = _logits(model, attention)
    assert (found - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-4)


def test_adapters_begin_as_nothing_and_can_be_off(path: Path) -> None:
    fresh, adapted, before = checkpoint.load(path), _adapted(path), _logits(checkpoint.load(path), "sparse")
    lora.inject(fresh, rank=3, alpha=7.0)
    assert torch.equal(_logits(fresh, "sparse"), before)
    with torch.no_grad(), lora.without(adapted):
        assert torch.equal(_logits(adapted, "sparse"), before)
    assert not torch.equal(_logits(adapted, "sparse"), before)
    trains = [
        parameter.requires_grad for name, parameter in adapted.named_parameters() if lora.is_adapter(name)
    ]
    assert len(trains) == 2 * MAPS and all(trains), "off was only for the block"


def test_merging_is_in_fp32_and_rounds_once(path: Path) -> None:
    model = _adapted(path, torch.bfloat16)
    name = "model.layers.1.self_attn.kv_b_proj"
    state = model.state_dict()
    base, a, b = (state[f"{name}.{n}.weight"] for n in ("base_layer", "lora_A.default", "lora_B.default"))
    assert base.dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32
    exact = (base.double() + 7.0 / 3 * (b.double() @ a.double())).to(torch.bfloat16)
    found = lora.merged(state, rank=3, alpha=7.0)
    assert torch.equal(found[f"{name}.weight"], exact)
    assert found.keys() == checkpoint.load(path).state_dict().keys()
    assert torch.equal(found["lm_head.weight"], state["lm_head.weight"])


@pytest.mark.parametrize("step", ["lm", "grpo"])
def test_every_adapter_trains_and_nothing_else(path: Path, step: str) -> None:
    learner = _learner(path)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    for seed in range(2):  # B is zero at first, so that A has no gradient in the first step
        if step == "lm":
            learner.lm_step(batches(150, seed=seed))
        else:
            learner.grpo_step(batches(150, seed=seed), config.Loss(clip=100.0), 1.0)
    after = learner.model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if lora.is_adapter(name)} and len(moved) == 2 * MAPS


def test_the_reference_is_the_model_with_its_adapters_off(path: Path) -> None:
    """The KL is 0 before the first step, and afterwards that to the checkpoint; no second model is held."""
    learner = _learner(path, reference=True)
    assert learner.reference is None
    settings = config.Loss(kl="k3", clip=100.0)
    figures, before = learner.grpo_step(batches(150), settings, 1.0)
    assert figures["kl"] == 0
    learner.grpo_step(batches(150, seed=1), settings, 1.0)
    figures, after = learner.grpo_step(batches(150), settings, 1.0)
    gaps = np.concatenate(before).astype(np.float64) - np.concatenate(after)
    assert (
        figures["kl"] == pytest.approx(float((np.exp(gaps) - gaps - 1).mean()), rel=1e-3)
        and figures["kl"] > 1e-5
    )


def test_engines_and_checkpoints_get_merged_weights(path: Path, tmp_path: Path) -> None:
    learner = _learner(path)
    for seed in range(2):
        learner.lm_step(batches(150, seed=seed))
    weights = learner.weights()
    learner.save(tmp_path / "out")
    saved = checkpoint.load(tmp_path / "out")
    assert weights.keys() == saved.state_dict().keys() == checkpoint.load(path).state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.state_dict().items())
    plain = group_worker.learner(tmp_path / "out", None)
    for a, b in zip(learner.logprobs(batches(150)), plain.logprobs(batches(150)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_snapshot_holds_adapters_and_no_frozen_weights(path: Path, tmp_path: Path) -> None:
    learner, other = _learner(path), _learner(path, seed=9)
    learner.lm_step(batches(150))
    learner.snapshot(tmp_path)
    learner.snapshot_finish()
    other.restore(tmp_path)
    names = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    weights = {name.removeprefix("model/") for name in names if name.startswith("model/")}
    rest = {name for name in weights if not lora.is_adapter(name)}
    assert rest == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}, (
        "what a step may move"
    )
    assert sum(map(lora.is_adapter, weights)) == 2 * MAPS
    for made in (learner, other):
        made.lm_step(batches(150, seed=1))
    assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in learner.weights().items())


def test_adapters_with_indexers_that_train_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match='set indexer = "freeze" or leave lora out'):
        Setup(
            checkpoint=path,
            attention="sparse",
            optimizer=config.Optimizer(lr=1),
            total_steps=1,
            train=group_worker.BOTH,
            indexer_loss="sparse",
            lora=config.Lora(),
        )
