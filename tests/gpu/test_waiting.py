"""The passes of a step never wait for the device: torch raises an error where one would."""

from pathlib import Path

import numpy as np
import pytest
import real
import torch

from posttrain import config, packing
from posttrain import learner as learner_module
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.readings import read
from posttrain.schema import Sample
from posttrain.toy import tokenizer


def _samples() -> list[Sample]:
    """Two prompts, one beyond top-k, of two completions each."""
    rng = np.random.default_rng(0)
    found = []
    for group, prompt in enumerate((70, 2100)):
        beginning = rng.integers(6, 512, prompt)
        for i, new in enumerate((40, 33)):
            length = prompt + new
            found.append(
                Sample(
                    id=f"{group}#{i}",
                    tokens=np.concatenate([beginning, rng.integers(6, 512, new)]).astype(np.int32),
                    mask=np.arange(length) >= prompt,
                    logprobs=np.full(length, -6.0, np.float32),
                    advantage=float((-1) ** i),
                    group_size=2,
                )
            )
    return found


@pytest.mark.parametrize("train", [{"model"}, {"model", "indexer"}], ids=["frozen", "both"])
def test_the_passes_of_a_step_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: set[str]
) -> None:
    checkpoint.save(real.model(dense_layers=1), tmp_path, tokenizer.build())
    setup = Setup(
        checkpoint=tmp_path,
        attention="sparse",
        optimizer=config.Optimizer(lr=1e-6),
        total_steps=10,
        train=frozenset(train),
        indexer_loss="sparse" if "indexer" in train else "none",
        device="cuda",
        dtype="bfloat16",
    )
    learner = Learner(setup)
    assert learner.backend.name == "triton"
    samples = _samples()
    batches = packing.pack(samples, packing.token_weights(samples, "sequence", 2), tokens_per_batch=2200)
    assert len(batches) > 1
    learner.grpo_step(batches, config.Loss(), 1.0)  # compiles

    def waits(*args: object, **kwargs: object) -> object:
        torch.cuda.set_sync_debug_mode("default")
        return read(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(learner_module, "read", waits)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures, _ = learner.grpo_step(batches, config.Loss(), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "skipped" not in figures
