"""The agreement of an engine with the learner: numbers worked out by hand, and the torch engine's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from posttrain import agree, cli
from posttrain.gaps import gap_figures
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.toy import sorting, tokenizer


def test_a_changed_logprob_key_and_expert_are_seen() -> None:
    engine = TorchEngine(tiny.model(topk=7, seed=2), tokenizer.build())
    request = Request(task=next(iter(sorting.tasks(seed=5, n=1))), index=0, seed=3, max_new_tokens=30)
    (rollout,) = engine.generate([request], Sampling(ignore_eos=True, record_kept=True, record_experts=True))
    same = agree.measure(engine.model, [rollout])
    assert same.num_tokens == 30 and same.gap_max < 1e-5 and same.experts == 1 and same.jaccard == (1, 1, 1)
    assert rollout.kept is not None and rollout.experts is not None
    logprobs, kept, experts = rollout.logprobs.copy(), rollout.kept.copy(), rollout.experts.copy()
    logprobs[-1] -= np.log(2)
    kept[1, 20, 0] = kept[1, 20, -1] + 1  # six of seven in common, of eight
    experts[0, 4] = (experts[0, 4] + 1) % 4
    off = agree.measure(engine.model, [replace(rollout, logprobs=logprobs, kept=kept, experts=experts)])
    assert off.gap_max == pytest.approx(np.log(2), abs=1e-5) and off.ratio_max == pytest.approx(2, abs=1e-4)
    assert off.gap_mean == pytest.approx(np.log(2) / 30, abs=1e-5)
    assert off.kl_engine == pytest.approx(-np.log(2) / 30, abs=1e-5)
    assert off.kl_learner == pytest.approx(2 * np.log(2) / 30, abs=1e-5)
    num = len(rollout.tokens) - 1
    assert off.jaccard[1] == pytest.approx(1 - 0.25 / (num - 7)) and off.jaccard[0] == 1
    assert off.experts == pytest.approx(1 - 1 / (2 * num))


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.sparse_checkpoint(tmp_path / "c", topk=7, seed=2)
    command = ["agree", str(folder), "--tasks", "py://posttrain.toy.sorting:tasks?n=3", "--engine", "torch"]
    assert cli.main([*command, "--new-tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert "3 rollouts, float32" in out and out.count("100.0000%") == 4
    assert cli.main([*command, "--limit", "0"]) == 2


def test_gap_figures_by_hand() -> None:
    found = gap_figures(np.array([0.0, -np.log(2)], np.float32))
    assert found["kl_engine"] == pytest.approx(-np.log(2) / 2) and found["kl_learner"] == pytest.approx(
        np.log(2)
    )
    assert found["gap_mean"] == pytest.approx(np.log(2) / 2) and found["gap_max"] == pytest.approx(np.log(2))
    assert (found["ratio_min"], found["ratio_max"]) == (1, pytest.approx(2))
