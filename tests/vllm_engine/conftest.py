"""These tests need vLLM, which has an environment of its own: make test-vllm."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    return _opinionated(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="session")
def e4m3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with index scores in e4m3."""
    return _opinionated(tmp_path_factory.mktemp("e4m3"), index_dtype="e4m3")


def _opinionated(path: Path, **changes: Any) -> Path:
    model = tiny.model(topk=7, seed=2, **changes)
    with torch.no_grad():
        model.lm_head.weight *= 4
    checkpoint.save(model, path, tokenizer.build())
    return path


@pytest.fixture
def open_engine() -> Iterator[Callable[[Path, Any], Any]]:
    """Makes engines, and closes them whatever happens: a second one beside them would break."""
    from posttrain.rollouts.vllm.engine import VllmEngine  # vLLM is there: tests are collected

    made: list[Any] = []

    def make(path: Path, limits: Any) -> Any:
        for engine in made:
            engine.close()
        made[:] = [VllmEngine(path, tokenizer.build(), limits=limits)]
        return made[0]

    yield make
    for engine in made:
        engine.close()
