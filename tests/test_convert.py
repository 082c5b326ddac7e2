"""Conversion of real architectures on tiny random checkpoints, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.model import checkpoint
from posttrain.model.convert import convert, dequantise

OPTIONS: dict[str, Any] = {"index_topk": 7, "index_n_heads": 2, "index_head_dim": 16, "seed": 1}


def _stock_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = stock(tokens[None]).logits[0]
    return logits


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite"])
def test_converted_model_computes_what_the_source_does(tmp_path: Path, kind: str, interleave: bool) -> None:
    source = tiny.dense_checkpoint(tmp_path / "source", kind, rope_interleave=interleave)
    report = convert(source, tmp_path / "out", **OPTIONS, shard_bytes=20_000)
    assert report.model_type == kind and report.num_layers == 3
    assert (report.reordered > 0) == (not interleave)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2, "shards were asked for"
    ours, tokens = checkpoint.load(tmp_path / "out"), tiny.tokens(40)
    theirs = _stock_logits(source, tokens)
    with torch.no_grad():
        dense = ours(tokens, tiny.packed([40], "dense"))
        sparse = ours(tokens, tiny.packed([40]))
    assert (dense - theirs).abs().max() < 1e-5
    assert (sparse - theirs)[:7].abs().max() < 1e-5, "while everything fits, DSA is the same function"
    assert (sparse - theirs)[20:].abs().max() > 1e-3, "the indexer leaves nothing out"
    assert checkpoint.load_tokenizer(tmp_path / "out").eos_token_id == 1


def test_indexers_are_fresh_seeded_and_in_every_layer(tmp_path: Path) -> None:
    source = tiny.dense_checkpoint(tmp_path / "source")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(source, tmp_path / name, **(OPTIONS | {"seed": seed}))
    a, b, c = (checkpoint.load(tmp_path / name) for name in "abc")
    weights = [list(m.indexer_parameters()) for m in (a, b, c)]
    assert len(weights[0]) == 3 * 5
    assert all(torch.equal(x, y) for x, y in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    assert all(p.isfinite().all() for p in weights[0])


def test_block_scaled_fp8_by_hand() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out = dequantise(weight, scale)
    assert out.dtype == torch.bfloat16 and out.shape == (130, 200)
    assert [float(out[i, j]) for i, j in ((0, 0), (127, 127), (0, 128), (129, 0), (129, 199))] == [
        1,
        1,
        2,
        3,
        4,
    ]


def test_fp8_checkpoint_is_dequantised(tmp_path: Path) -> None:
    source = tiny.dense_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    scale = torch.full((1, 1), 0.01)
    tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scale
    wanted = tensors[name].float() * 0.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "out", **OPTIONS)
    assert report.dequantised == 1
    got = dict(checkpoint.load(tmp_path / "out").named_parameters())[name]
    torch.testing.assert_close(got.detach(), wanted, atol=1e-2, rtol=1e-2)


def test_prediction_layers_are_dropped_and_said_so(tmp_path: Path) -> None:
    source = tiny.dense_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "out", **OPTIONS)
    assert report.dropped_layers == (3,)
    assert report.notes == ("multi-token-prediction layers [3] dropped",)
    assert checkpoint.load(tmp_path / "out").config.num_hidden_layers == 3


def _edit(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


def _refused(source: Path, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        convert(source, out, **(OPTIONS | options))
    assert "\n" not in str(error.value)
    assert not out.exists(), "something was written"


def test_refusals_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    source, out = tiny.dense_checkpoint(tmp_path / "source"), tmp_path / "out"
    _refused(tmp_path, out, "not a Hugging Face checkpoint")
    _refused(source, out, "index_head_dim=4: its first 8 dimensions are rotary", index_head_dim=4)
    _refused(source, out, "index_head_dim=12: index_hadamard needs", index_head_dim=12, index_hadamard=True)
    _edit(source, q_lora_rank=None)
    _refused(source, out, "q_lora_rank is null")
    _edit(source, q_lora_rank=28, index_topk=64)
    _refused(source, out, "already has an indexer")
    (source / "config.json").write_text("{broken")
    _refused(source, out, "not valid JSON")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    _refused(tmp_path / "llama", tmp_path / "out", "model_type 'llama' is not MLA")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    source, out = tiny.dense_checkpoint(tmp_path / "source"), tmp_path / "out"
    whole = (source / "model.safetensors").read_bytes()
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.kv_b_proj.weight")
    save_file(tensors, source / "model.safetensors")
    _refused(source, out, r"1 tensors missing, the first is model\.layers\.1\.self_attn\.kv_b_proj\.weight")
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    _refused(source, out, "not a readable safetensors file")
    (source / "model.safetensors").unlink()
    _refused(source, out, "no model.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(source, out, "shard model-00001-of-00002.safetensors is missing")
