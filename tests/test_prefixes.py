"""Prompts that completions share are run once: by hand, and the same gradients and figures as without."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from posttrain import config, packing, prefixes
from posttrain.kernels.backend import Backend
from posttrain.learner import Learner, Setup
from posttrain.model.context import PackedContext
from posttrain.model.shared import SharedContext
from posttrain.schema import Batch, Sample

PROMPTS = (9, 14)
"""Tokens of two prompts; top-k is 7, so that rows of the first choose, too."""
COMPLETIONS = ((6, 3, 11), (2, 8))


def _samples(*, keep: bool) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for group, (prompt, lengths) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        beginning = rng.integers(6, 200, prompt)
        for i, new in enumerate(lengths):
            length = prompt + new
            sample = tiny.sample(f"{group}#{i}", length, seed=10 * group + i)
            samples.append(
                dataclasses.replace(
                    sample,
                    tokens=np.concatenate([beginning, rng.integers(6, 200, new)]).astype(np.int32),
                    mask=np.arange(length) >= prompt,
                    logprobs=rng.normal(-5.0, 1.0, length).astype(np.float32),
                    advantage=float((-1) ** i),
                    group_size=len(lengths),
                    kl_coef=0.1,
                    experts=_experts(prompt, length, group, i) if keep else None,
                )
            )
    return samples


def _experts(prompt: int, length: int, group: int, i: int) -> Any:
    """The same for the prompt's tokens, different for the completions'."""
    common, own = np.random.default_rng(group), np.random.default_rng(100 + i)
    draws = np.concatenate([common.random((2, prompt, 4)), own.random((2, length - 1 - prompt, 4))], axis=1)
    return np.argsort(draws, axis=-1)[..., :2].astype(np.int16)


def _pack(samples: list[Sample], limit: int = 100_000) -> list[Batch]:
    return packing.pack(samples, packing.token_weights(samples, "sequence", 2), tokens_per_batch=limit)


def test_by_hand() -> None:
    """Documents ab|c, ab|de, f|g, ab|h and x|y without targets before its second token."""
    batch = dataclasses.replace(
        _pack(_samples(keep=False))[0],
        tokens_T=np.array([1, 2, 3, 1, 2, 4, 5, 6, 7, 1, 2, 8]),
        cu_seqlens_S=np.array([0, 3, 7, 9, 12]),
        mask_T=np.array([0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1], bool),
    )
    found = prefixes.common(batch)
    assert found is not None
    assert found.token_F.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 0, 1, 7]
    assert found.place_T.tolist() == [0, 1, 2, 5, 6, 7, 8, 11]


def test_what_differs_in_a_replayed_choice_is_not_common() -> None:
    samples = _samples(keep=True)
    (batch,) = _pack(samples)
    assert batch.experts_NTE is not None
    found = prefixes.common(batch)
    assert found is not None and len(batch.tokens_T) - len(found.place_T) == 2 * PROMPTS[0] + PROMPTS[1]
    other = batch.experts_NTE.copy()
    second = int(batch.cu_seqlens_S[1])  # a document with the shorter prompt
    other[0, second] = other[0, second, ::-1]
    changed = prefixes.common(dataclasses.replace(batch, experts_NTE=other))
    assert changed is not None and len(changed.place_T) == len(found.place_T) + PROMPTS[0]


def test_no_two_samples_alike() -> None:
    samples = [tiny.sample(str(i), 12, seed=i) for i in range(3)]
    assert prefixes.common(_pack(samples)[0]) is None


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


def _step(
    path: Path, *, share: bool, keep: bool, limit: int = 100_000, backend: Backend | None = None
) -> Any:
    learner = Learner(
        Setup(
            checkpoint=path,
            attention="sparse",
            optimizer=config.Optimizer(lr=1e-9, max_grad_norm=1e9),
            total_steps=10,
            train=frozenset({"model", "indexer"}),
            indexer_loss="sparse",
            reference=True,
            share_prompts=share,
        )
    )
    grads: dict[str, torch.Tensor] = {}
    step = learner.optimizers.step

    def watched(*, finite: bool) -> dict[str, float]:
        grads.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})
        return step(finite=finite)

    learner.optimizers.step = watched  # type: ignore[method-assign]
    batches = _pack(_samples(keep=keep), limit)
    settings = config.Loss(entropy_coef=0.1)
    before = np.concatenate(learner.logprobs(batches))
    figures, seen = learner.grpo_step(batches, settings, 1.0)
    np.testing.assert_allclose(before, np.concatenate(seen), atol=1e-6)
    return grads, figures, before


def _assert_same(shared: Any, plain: Any) -> None:
    (grads, figures, logp), (wanted, wanted_figures, wanted_logp) = shared, plain
    np.testing.assert_allclose(logp, wanted_logp, atol=1e-6)
    for found in (figures, wanted_figures):
        del found["ties"]  # a common query is looked at once
    assert figures == pytest.approx(wanted_figures, rel=1e-5, abs=1e-7)
    assert grads.keys() == wanted.keys()
    ours, theirs = (torch.cat([g[n].flatten() for n in wanted]).double() for g in (grads, wanted))
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_is_the_same(sparse: Path, keep: bool) -> None:
    """Gradients of model and indexer, log-probs, and all figures: KL, entropy, the load of the experts."""
    shared, plain = (_step(sparse, share=share, keep=keep) for share in (True, False))
    _assert_same(shared, plain)


def test_a_step_is_the_same_in_any_micro_batches(sparse: Path) -> None:
    """Groups are torn apart there; the common tokens of a batch are run once all the same."""
    _assert_same(
        _step(sparse, share=True, keep=False, limit=50), _step(sparse, share=False, keep=False, limit=100_000)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dense_rows", [False, True])
def test_by_triton(dense_rows: bool) -> None:
    """Documents of 7 + 4 and 7 + 2 tokens, of which the first 7 are common, with 5 kept: early and late rows are shared."""
    model = tiny.model(topk=5, num_hidden_layers=1)
    token_F = torch.tensor([*range(11), *range(7), 11, 12])
    place_T = torch.tensor([*range(11), 18, 19])
    common: dict[str, Any] = {
        "attention": "sparse", "indexer_loss": "sparse", "cu_seqlens_S": torch.tensor([0, 11, 20])
    }  # fmt: skip
    tokens_T = tiny.tokens(13)
    chosen = Backend(name="triton", reason="test", dense_rows=dense_rows)
    shared = SharedContext(**common, backend=chosen, token_F=token_F, place_T=place_T)
    ours = _model_pass(model, tokens_T, shared, at=token_F)
    wanted = _model_pass(model, tokens_T[token_F], PackedContext(**common), at=torch.arange(20))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def _model_pass(
    model: Any, tokens: torch.Tensor, context: PackedContext, *, at: torch.Tensor
) -> dict[str, Any]:
    """Logits of all places, the KL's value, and the gradients of both."""
    model.zero_grad(set_to_none=True)
    logits = model(tokens, context, at)
    kl = context.records[0].kl
    assert kl is not None
    (logits.square().mean() + 0.7 * kl).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"logits": logits.detach(), "kl": context.records[0].kl_value}
