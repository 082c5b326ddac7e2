"""What engines need, counted by hand and against a model; recipes that ask for what cannot be are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from posttrain import config
from posttrain.check import check
from posttrain.fit import check_engines
from posttrain.rollouts.geometry import Geometry, engine_memory

V32 = {
    "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
}  # fmt: skip
"""DeepSeek-V3.2."""


def _recipe(tmp_path: Path, shape: dict[str, Any], *settings: str, keep: str = "") -> config.Run:
    model, recipe = tmp_path / "model", tmp_path / "recipe.toml"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(shape))
    recipe.write_text(f"""
name = "r"
[cluster]
dtype = "bfloat16"
[rollouts]
engine = "vllm"
device_gib = 80
[[domains]]
name = "sums"
tasks = "py://posttrain.toy.sorting:tasks"
rewards = [{{ fn = "posttrain.toy.sorting:reward" }}]
[[stages]]
name = "rl"
kind = "rl"
source = "{model}"
steps = 1
mix.sums = {{}}
optimizer.lr = 1e-3
{keep}
""")
    return config.load([recipe], settings)


@pytest.mark.parametrize(
    "changes", [{}, {"n_shared_experts": 3, "n_routed_experts": 7, "num_hidden_layers": 5}]
)
def test_parameters_are_those_of_the_model(changes: dict[str, Any]) -> None:
    model = tiny.model(**changes)
    counted = Geometry.of(model.config.to_dict()).num_parameters
    assert counted == sum(tensor.numel() for tensor in model.state_dict().values())


def test_memory_of_an_engine_is_weights_and_cache_and_work() -> None:
    shape = Geometry.of(V32)
    memory = engine_memory(shape, dtype="bfloat16", cache_bytes=10 << 30, batched_tokens=2048, max_rows=8)
    assert memory.weights == 2 * shape.num_parameters and 671e9 < shape.num_parameters < 673e9
    # Queries against latents are the widest: 2048 x 128 x 576, twice a byte, six times.
    assert memory.work == 2048 * 128 * 576 * 2 * 6
    assert memory.total == memory.weights + (10 << 30) + memory.work
    # 61 layers of 512 + 64 + 128 numbers
    assert f"{(10 << 30) // 85_888} tokens of 85888 bytes" in memory.arithmetic


def test_a_model_that_does_not_fit_one_device_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs more than its device has, 80\.0 GiB") as refused:
        check(_recipe(tmp_path, V32), config_only=True)
    for part in (
        "stage 'rl' generates with",
        "671.88 billion x 2 bytes (bfloat16)",
        "1251.5 GiB",
        "cache_mib",
    ):
        assert part in str(refused.value)
    small = V32 | {"num_hidden_layers": 4, "n_routed_experts": 8}
    check_engines(_recipe(tmp_path, small))
    check_engines(_recipe(tmp_path, V32, "rollouts.device_gib=1300"))
    check_engines(_recipe(tmp_path, V32, "rollouts.engine=torch"))


def test_more_than_one_device_per_engine_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollouts\.tensor_parallel = 2.*one device") as refused:
        check_engines(_recipe(tmp_path, V32, "rollouts.tensor_parallel=2", "rollouts.device_gib=2000"))
    assert "1251.5 GiB" in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "settings", "keep", "why"),
    [
        ({"index_topk": 1024}, [], "", "index_topk = 1024, not 2048"),
        ({"index_head_dim": 64}, [], "", "index_head_dim = 64, not 128"),
        ({"index_n_heads": 16}, [], "", "index_n_heads = 16, not 32 or 64"),
        ({"kv_lora_rank": 256}, [], "", "kv_lora_rank = 256, not 512"),
        ({"v_head_dim": 96}, [], "", "v_head_dim = 96, not 128"),
        ({"num_attention_heads": 192}, [], "", "num_attention_heads = 192, not at most 128"),
        ({}, ["cluster.dtype=float32"], "", "cluster.dtype = float32, not bfloat16"),
        ({}, ["cluster.device=cpu"], "", "it needs a GPU"),
        ({}, ["cluster.deterministic=true"], "", "its kernels depend on the batch"),
        ({}, ["rollouts.engine=torch"], "", 'rollouts.engine = "torch", not "vllm"'),
        ({}, [], "keep.topk = true", "stage 'rl' has keep.topk = true"),
        ({}, [], "keep.routing = true", "stage 'rl' has keep.routing = true"),
    ],
)
def test_stock_attention_where_it_cannot_be_is_refused(
    tmp_path: Path, shape: dict[str, Any], settings: list[str], keep: str, why: str
) -> None:
    settings = ["rollouts.attention=stock", "rollouts.device_gib=4000", *settings]
    check_engines(_recipe(tmp_path, V32, *settings[:2]))
    with pytest.raises(ValueError, match=r'rollouts\.attention = "stock" is impossible') as refused:
        check_engines(_recipe(tmp_path, V32 | shape, *settings, keep=keep))
    assert why in str(refused.value) and 'Write rollouts.attention = "ours"' in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_the_shape_is_known_before_the_stages_have_run() -> None:
    demo = config.load([Path(__file__).parents[1] / "configs" / "demo.toml"], ["rollouts.engine=vllm"])
    check_engines(demo)
    with pytest.raises(ValueError, match=r"billion x 4 bytes \(float32\)"):
        check_engines(
            demo.model_copy(update={"rollouts": demo.rollouts.model_copy(update={"device_gib": 1e-3})})
        )
    with pytest.raises(ValueError, match="index_topk = "):
        settings = ["rollouts.engine=vllm", "rollouts.attention=stock", "cluster.device=cuda"]
        check_engines(config.load([Path(__file__).parents[1] / "configs" / "demo.toml"], settings))
