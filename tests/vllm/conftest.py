"""These tests need vLLM, which has an environment of its own: make test-vllm."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

from posttrain.model import checkpoint
from posttrain.toy import tokenizer

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

if importlib.util.find_spec("vllm"):
    from posttrain.rollouts.vllm import launch

    launch.prepare()  # before any test imports vLLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sparse checkpoint that keeps 7 keys; it has opinions: its log-probs are far from uniform."""
    model = tiny.model(topk=7, seed=2)
    with torch.no_grad():
        model.lm_head.weight *= 4
    path = tmp_path_factory.mktemp("sparse")
    checkpoint.save(model, path, tokenizer.build())
    return path
