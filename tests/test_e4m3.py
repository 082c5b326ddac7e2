"""Index scores from e4m3: the definition, how caches hold the keys, and what the indexer learns from."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from posttrain import check
from posttrain.config import load
from posttrain.kernels import e4m3, reference
from posttrain.model import checkpoint
from posttrain.model.convert import convert
from posttrain.model.entry import Entry
from posttrain.rollouts.geometry import Geometry
from posttrain.stages.export import export_checkpoint
from posttrain.ties import Ties

E4M3: dict[str, Any] = {"index_dtype": "e4m3"}
LENGTHS = [31, 3, 44]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_the_rounded_numbers() -> None:
    """Against fp64 of the definition, written out; rounding changes them by far more than fp32 sums do."""
    q, k, w = _random(1, 9, 3, 16, seed=0), _random(1, 33, 16, seed=1), _random(1, 9, 3, seed=2)
    found = reference.index_scores(reference.round_e4m3(q), reference.round_e4m3(k), w)
    rounded = []
    for x in (q, k):
        values, scale = reference.quantize_e4m3(x)
        assert torch.equal(scale, torch.exp2(scale.log2().round())), "powers of two"
        rounded.append(values.double() * scale[..., None].double())
    exact = torch.zeros(1, 9, 33, dtype=torch.float64)
    for head in range(3):
        dots = torch.einsum("bqi,bki->bqk", rounded[0][:, :, head], rounded[1])
        exact += w[:, :, head, None].double() * dots.clamp(min=0) / 4
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)
    assert (reference.index_scores(q, k, w).double() - exact).abs().mean() > 1e-2


def test_the_rounded_choice_by_hand() -> None:
    """q = 1; keys 17 and 16 share their scale with 240, so both become 16: of equals the first is kept."""
    k = torch.tensor([[[16.0, 240.0], [17.0, 240.0]]])
    q, w = torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1, 1)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert reference.round_e4m3(k).tolist() == [[[16, 240], [16, 240]]]
    plain = reference.index_scores(q, k, w)
    rounded = reference.index_scores(reference.round_e4m3(q), reference.round_e4m3(k), w)
    assert reference.select_topk(plain, mask, 1).item() == 1
    assert reference.select_topk(rounded, mask, 1).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 48, 128])
def test_stored_keys_are_the_rounded_ones(dtype: torch.dtype, size: int) -> None:
    k = (_random(5, 7, size, seed=0) * torch.exp2(_random(5, 7, 1, seed=1) * 4)).to(dtype)
    k[0, 0], k[0, 1], k[0, 2, 3] = 0.0, 448.0, -448.0
    entry = Entry(latent=28, index=size, e4m3=True)
    pool = torch.full((5, 7, entry.width(dtype.itemsize)), 3.0, dtype=dtype)
    pool[..., 28:] = e4m3.pack(k, entry.stored(dtype.itemsize))
    stored = pool[..., 28:]
    assert torch.equal(e4m3.values(stored, size), reference.round_e4m3(k))
    values, scale = e4m3.unpack(stored, size)
    for found, wanted in zip((values.float(), scale), reference.quantize_e4m3(k), strict=True):
        assert torch.equal(found, wanted.float())
    by_triton = e4m3.pack(k, entry.stored(dtype.itemsize), by_triton=True)
    assert torch.equal(e4m3.values(by_triton, size), reference.round_e4m3(k))
    assert values.data_ptr() == stored.data_ptr(), "views, which kernels read in place"
    k[1, 1, 4] = float("nan")
    assert e4m3.values(e4m3.pack(k, entry.stored(dtype.itemsize)), size)[1, 1].isnan().all()


def test_entry_sizes_by_hand() -> None:
    entry = Entry(latent=576, index=128, e4m3=True)
    # 1152 bytes of latents, 128 + 4 of the key, 28 of padding; without e4m3 1152 + 256
    assert entry.width(2) * 2 == 1312 and Entry(latent=576, index=128).width(2) * 2 == 1408
    assert entry.width(2) % 16 == 0, "what kernels need"
    assert entry.width(4) * 4 == 2304 + 128 + 4 + 28
    config = tiny.model().config.to_dict()
    shape = {name: config[name] for name in Geometry.__slots__ if name in config}
    assert Geometry.of(shape | E4M3).entry_bytes(2) == 56 + 16 + 4 + 20
    assert Geometry.of(shape).entry_bytes(2) == 2 * (28 + 16)


def _losses(model: Any, kept: dict[int, Tensor] | None, mode: str) -> tuple[dict[str, Tensor], Any]:
    """Gradients of the indexers' loss, and the pass's records; on a selection that is given, if any."""
    context = tiny.packed(LENGTHS, indexer_loss=mode, replay_kept=kept)
    model.zero_grad()
    model(tiny.tokens(sum(LENGTHS)), context)
    sum(record.kl for record in context.records.values()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, context


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_indexer_learns_from_what_is_not_rounded(mode: str) -> None:
    """With the selection given, losses and gradients are those of a model that does not round at all."""
    plain, rounding = tiny.model(seed=3), tiny.model(seed=3, **E4M3)
    _, context = _losses(rounding, None, mode)
    _, other = _losses(plain, None, mode)
    kept = {}
    for layer, record in context.records.items():
        kept[layer] = context.flat(record.kept_BQK)
        assert layer or not torch.equal(record.kept_BQK, other.records[layer].kept_BQK), "nothing is rounded"
    grads, context = _losses(rounding, kept, mode)
    wanted, other = _losses(plain, kept, mode)
    assert grads.keys() == wanted.keys() and any(".indexer.wk" in name for name in grads)
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name]), name
    for layer, record in context.records.items():
        assert record.kl_value == other.records[layer].kl_value


def test_ties_and_recall_are_those_of_the_selection() -> None:
    """Keys that differ by less than a step of e4m3 all tie, so every query keeps the first ones."""
    shares, kept = [], []
    for changes in ({}, E4M3):
        model = tiny.model(topk=7, seed=3, num_hidden_layers=1, **changes)
        indexer = model.model.layers[0].self_attn.indexer
        rotary = indexer.qk_rope_head_dim
        with torch.no_grad():
            indexer.k_norm.weight.fill_(1e-4)
            indexer.k_norm.bias.fill_(4.0)
            indexer.wq_b.weight.unflatten(0, (2, 16))[:, :rotary] = 0.0
        context = tiny.packed([40], diagnose=True)
        with torch.no_grad(), Ties(model, context) as ties:
            model(tiny.tokens(40), context)
        shares.append(ties.share)
        kept.append(context.records[0])
    assert shares[0] < 0.7 and shares[1] == 1.0
    assert (kept[1].kept_BQK[0, 7:] == torch.arange(7)).all()
    assert kept[0].recall[0] != kept[1].recall[0] and torch.equal(kept[0].recall[1], kept[1].recall[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_dtype": "fp8"}, "index_dtype='fp8': write"),
        (E4M3 | {"index_dim": 24}, r"index_head_dim=24: .* a multiple of 16, at most 128"),
        (E4M3 | {"index_dim": 144}, r"index_head_dim=144: .* a multiple of 16, at most 128"),
        (E4M3 | {"kv_lora_rank": 17}, "kv_lora_rank=17: .* needs an even number"),
    ],
)
def test_sizes_that_e4m3_cannot_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.model(**changes)


def test_the_setting_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    dense = tiny.dense_checkpoint(tmp_path / "dense")
    sizes = {"index_topk": 7, "index_n_heads": 2, "index_head_dim": 16, "seed": 0}
    convert(dense, tmp_path / "plain", **sizes)
    convert(dense, tmp_path / "e4m3", **sizes, index_dtype="e4m3")
    with pytest.raises(ValueError, match="index_head_dim=24"):
        convert(dense, tmp_path / "bad", **(sizes | {"index_head_dim": 24}), index_dtype="e4m3")
    assert not (tmp_path / "bad").exists()
    assert "index_dtype" not in (tmp_path / "plain" / "config.json").read_text()
    model = checkpoint.load(tmp_path / "e4m3")
    checkpoint.save(model, tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "exported")
    for name, wanted in (("plain", False), ("e4m3", True), ("again", True), ("exported", True)):
        entry = checkpoint.load(tmp_path / name).model.layers[0].self_attn.indexer.entry
        assert entry == Entry(latent=28, index=16, e4m3=wanted)
        shape = Geometry.read(tmp_path / name)
        assert shape is not None and shape.entry_bytes(4) == entry.width(4) * 4


def test_check_refuses_a_recipe_with_such_sizes() -> None:
    demo = Path(__file__).parents[1] / "configs" / "demo.toml"
    check.check(load([demo], ["stages.convert.index_dtype=e4m3"]), config_only=True)
    settings = ["stages.convert.index_dtype=e4m3", "stages.convert.index_head_dim=40"]
    with pytest.raises(ValueError, match="stage 'convert': index_head_dim=40"):
        check.check(load([demo], settings), config_only=True)
