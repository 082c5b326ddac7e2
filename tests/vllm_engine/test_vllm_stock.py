"""vLLM's own sparse attention: refused where it cannot run, fed by the names of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from posttrain.model import checkpoint
from posttrain.rollouts.vllm.engine import Limits, VllmEngine
from posttrain.rollouts.vllm.stock import split_experts

OpenEngine = Callable[[Path, Limits], VllmEngine]


def test_the_cpu_and_another_geometry_are_refused_at_once(folder: Path, open_engine: OpenEngine) -> None:
    with pytest.raises(ValueError, match=r'rollouts\.attention = "stock" is impossible') as refused:
        open_engine(folder, Limits(stock=True))
    for part in ("there is no GPU", "index_topk = 7, not 2048", "float32, not bfloat16", "kv_lora_rank = 20"):
        assert part in str(refused.value)


def test_weights_get_the_names_and_values_of_a_checkpoint(tmp_path: Path) -> None:
    model = tiny.model(topk=7, seed=3)
    checkpoint.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")
    wanted = load_file(tmp_path / "model.safetensors")
    found = dict(split_experts(model.state_dict()))
    assert found.keys() == wanted.keys() and len(found) > len(model.state_dict())
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
