"""The learner: what trains and what does not, micro-batching, schedules, figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from posttrain import config, packing
from posttrain.learner import Learner, Setup
from posttrain.muon import Muon
from posttrain.optimizer import Optimizers


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


def _learner(path: Path, **changes: Any) -> Learner:
    fields: dict[str, Any] = {
        "checkpoint": path,
        "attention": "sparse",
        "optimizer": config.Optimizer(lr=1e-3),
        "total_steps": 10,
        "train": frozenset({"model"}),
    }
    return Learner(Setup(**(fields | changes)))


def _changed(learner: Learner, before: dict[str, torch.Tensor]) -> set[str]:
    after = learner.model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def _copy(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def _batches(limit: int = 4096, **fields: Any) -> list[Any]:
    samples = [tiny.sample(str(i), 12 + 5 * i, seed=i, **fields) for i in range(6)]
    return packing.pack(samples, packing.token_weights(samples, "token", 1), tokens_per_batch=limit)


def test_warmup_changes_the_indexers_alone(sparse: Path) -> None:
    learner = _learner(sparse, attention="dense", indexer_loss="dense", train=frozenset({"indexer"}))
    before = _copy(learner)
    figures = learner.lm_step(_batches())
    changed = _changed(learner, before)
    assert changed and all(".indexer." in name for name in changed)
    assert {name for name in before if ".indexer." in name} == changed
    assert figures["indexer_kl"] > 0


def test_sparse_training_changes_both(sparse: Path) -> None:
    learner = _learner(
        sparse, indexer_loss="sparse", train=frozenset({"model", "indexer"}), balance_speed=0.01
    )
    before = _copy(learner)
    learner.lm_step(_batches())
    changed = _changed(learner, before)
    assert any(".indexer." in name for name in changed)
    assert any(".kv_b_proj." in name for name in changed)
    assert any("e_score_correction_bias" in name for name in changed)


def test_rl_leaves_frozen_indexers_and_routing_bias_alone(sparse: Path) -> None:
    learner = _learner(sparse)
    before = _copy(learner)
    batches = _batches(logprobs=None, advantage=1.0)
    learner.grpo_step(batches, config.Loss(clip=10.0), 1.0)
    changed = _changed(learner, before)
    assert changed
    assert not any(".indexer." in name or "correction_bias" in name for name in changed)


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_micro_batches_do_not_change_the_update(sparse: Path, norm: Any) -> None:
    samples = [
        tiny.sample(
            str(i),
            10 + 3 * i,
            seed=i,
            advantage=(-1) ** i * 0.5,
            group_size=3,
            kl_coef=0.1,
            logprobs=np.full(10 + 3 * i, -5.0, np.float32),
        )
        for i in range(9)
    ]
    weights = packing.token_weights(samples, norm, num_groups=3)
    results = []
    for limit in (60, 100_000):
        # SGD-like: with AdamW a tiny gradient difference can flip a whole step.
        learner = _learner(sparse, reference=True, optimizer=config.Optimizer(lr=1e-9, max_grad_norm=1e9))
        seen = _watch_gradients(learner)
        batches = packing.pack(samples, weights, tokens_per_batch=limit)
        figures, _ = learner.grpo_step(batches, config.Loss(), 1.0)
        results.append((len(batches), figures["loss"], seen[0]))
    (many, loss_many, grads_many), (one, loss_one, grads_one) = results
    assert many > 3 and one == 1
    assert loss_many == pytest.approx(loss_one, rel=1e-5)
    assert grads_one.norm() > 1e-3
    torch.testing.assert_close(grads_many, grads_one, atol=1e-6, rtol=1e-4)


def _watch_gradients(learner: Learner) -> list[torch.Tensor]:
    """A list that each optimizer step adds the gradients to that it starts from."""
    seen: list[torch.Tensor] = []
    step = learner.optimizers.step

    def watched(*, finite: bool) -> dict[str, float]:
        seen.append(_gradients(learner))
        return step(finite=finite)

    learner.optimizers.step = watched  # type: ignore[method-assign]
    return seen


def _gradients(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def test_logprobs_of_a_grpo_step_are_those_before_the_update(sparse: Path) -> None:
    learner = _learner(sparse)
    batches = _batches(limit=60, advantage=1.0)
    before = learner.logprobs(batches)
    _, seen = learner.grpo_step(batches, config.Loss(clip=10.0), 1.0)
    for a, b in zip(before, seen, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(np.abs(a - b).max() for a, b in zip(before, learner.logprobs(batches), strict=True)) > 1e-5


def test_heldout_figures_count_only_queries_with_something_to_leave_out(sparse: Path) -> None:
    learner = _learner(sparse)  # top-k 7
    samples = [tiny.sample("a", 5), tiny.sample("b", 20)]
    figures = learner.diagnose(packing.pack(samples, [1, 1], tokens_per_batch=4096))
    assert figures["heldout_tokens"] == 25
    assert figures["counted_queries"] == 13  # positions 7 .. 19 of b
    assert figures["counted_targets"] == 10  # its second half, predicted from positions 9 .. 18
    for layer in figures["layers"]:
        assert 0 < layer["recall"] <= layer["recall_oracle"] <= 1
        assert layer["recall_ratio"] == pytest.approx(layer["recall"] / layer["recall_oracle"], rel=1e-5)
    assert set(figures["expert_load"]) == {1, 2}
    assert sum(figures["expert_load"][1]) == pytest.approx(1)


def test_heldout_gap_vanishes_when_everything_is_kept(tmp_path: Path) -> None:
    learner = _learner(tiny.sparse_checkpoint(tmp_path, topk=7))
    for layer in learner.model.model.layers:
        layer.self_attn.index_topk = 64
    figures = learner.diagnose(_batches())
    assert figures["lm_loss_sparse"] == pytest.approx(figures["lm_loss_dense"], abs=1e-5)


def test_schedule_by_hand() -> None:
    model = tiny.model()
    optimizer = config.Optimizer(lr=1.0, warmup_steps=1, decay_from=0.5)
    optimizers = Optimizers(model, optimizer, train={"model"}, total_steps=4)
    factors = []
    for _ in range(4):
        factors.append(optimizers.factor())
        optimizers.step_count += 1
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_muon_takes_hidden_matrices_only() -> None:
    model = tiny.model()
    muon = config.Optimizer(kind="muon", lr=1e-3)
    optimizers = Optimizers(model, muon, train={"model", "indexer"}, total_steps=1)
    first, rest, indexer = optimizers.optimizers
    assert isinstance(first, Muon)
    names = {p: n for n, p in model.named_parameters()}
    by_muon = {names[p] for p in first.param_groups[0]["params"]}
    assert "model.layers.0.self_attn.q_b_proj.weight" in by_muon
    assert not any(
        word in n for n in by_muon for word in ("embed", "lm_head", "norm", "gate.weight", "indexer")
    )
    assert all(".indexer." in names[p] for p in indexer.param_groups[0]["params"])
    sizes = [len(o.param_groups[0]["params"]) for o in (first, rest, indexer)]
    assert sum(sizes) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_small_steps_of_bf16_weights_add_up(kind: str) -> None:
    """They move as fp32 ones with the same gradients do, to the bit, and are rounded once."""
    settings, train = config.Optimizer(kind=kind, lr=1e-6, max_grad_norm=1e9), {"model", "indexer"}
    rough, exact = tiny.model().bfloat16(), tiny.model()
    exact.load_state_dict(rough.state_dict())
    first = [p.detach().clone() for p in rough.parameters()]
    pair = [Optimizers(model, settings, train=train, total_steps=99) for model in (rough, exact)]
    make = torch.Generator().manual_seed(0)
    for _ in range(40):
        for p, q in zip(rough.parameters(), exact.parameters(), strict=True):
            p.grad = torch.rand(p.shape, generator=make).bfloat16()  # one sign: every step goes the same way
            q.grad = p.grad.float()
        for optimizers in pair:
            optimizers.step()
    assert len(pair[0].masters) == len(first) and not pair[1].masters
    for p, q in zip(rough.parameters(), exact.parameters(), strict=True):
        assert torch.equal(pair[0].masters[p], q) and torch.equal(p, q.bfloat16())
    moved = [(p != before).float().mean() for p, before in zip(rough.parameters(), first, strict=True)]
    # A step of 1e-6 alone is less than half of the last bit of any bf16 weight above 5e-4.
    assert torch.stack(moved).max() > 0.1


def test_a_huge_indexer_gradient_does_not_scale_the_models_step() -> None:
    model = tiny.model()
    optimizer = config.Optimizer(lr=1e-3, max_grad_norm=1.0)
    optimizers = Optimizers(model, optimizer, train={"model", "indexer"}, total_steps=1)
    indexer = set(model.indexer_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6 if parameter in indexer else 1e-6)
    figures = optimizers.step()
    assert figures["grad_norm/indexer"] > 1e6
    assert figures["grad_norm/model"] < 1.0
