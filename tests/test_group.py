"""Two ranks do what one does: gradients, updates, figures, snapshots, checkpoints; and how batches are shared out."""

from pathlib import Path
from typing import Any

import group_worker
import pytest
import tiny
import torch
from group_worker import CASES, Found, batches, learner
from ranks import LIMITS, SHARED, assert_alike, joined, launch

from posttrain import config
from posttrain.group import passes
from posttrain.learner import Setup
from posttrain.model import checkpoint
from posttrain.muon import Muon, orthogonal

FP32 = [name for name in CASES if name not in ("matrices", "bf16", "mixed precision")]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_batch_is_one_ranks_and_all_ranks_make_as_many_passes(size: int) -> None:
    """Five batches of 31 to 53 tokens."""
    given = batches(60)
    assert len(given) == 5
    ranks = [passes(given, rank, size) for rank in range(size)]
    assert sorted(p.index for rank in ranks for p in rank if p.index is not None) == list(range(5))
    assert {len(rank) for rank in ranks} == {{1: 5, 2: 3, 3: 2, 8: 1}[size]}
    for p in (p for rank in ranks for p in rank):
        if p.index is None:  # the cheapest company
            assert len(p.batch.tokens_T) == min(len(b.tokens_T) for b in given)
            assert not p.batch.weight_T.any() and not p.batch.ids
        else:
            assert p.batch is given[p.index]


def test_ranks_have_about_as_many_tokens_each() -> None:
    given = batches(40, seed=3)
    load = [
        sum(len(p.batch.tokens_T) for p in passes(given, rank, 2) if p.index is not None) for rank in (0, 1)
    ]
    assert sum(load) == sum(len(b.tokens_T) for b in given)
    assert max(load) - min(load) <= min(len(b.tokens_T) for b in given)


@pytest.mark.parametrize("shape", [(40, 28), (20, 64), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_that_of_torch_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=rng).to(dtype)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        Muon([ours], **settings),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
    )
    for _ in range(4):
        gradient = torch.randn(shape, generator=rng).to(dtype)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)


def test_an_orthogonal_matrix_has_singular_values_near_one() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(30, 50, generator=rng)).float())
    assert values.min() > 0.6 and values.max() < 1.25


def test_recomputed_layers_run_twice_and_give_the_same_bits(tmp_path: Path) -> None:
    path = tiny.sparse_checkpoint(tmp_path)
    found, calls = {}, {}
    for recompute in (False, True):
        made = learner(
            path, None, train=group_worker.BOTH, indexer_loss="sparse", sharding={"recompute": recompute}
        )
        count: list[int] = []
        made.model.model.layers[1].input_layernorm.register_forward_hook(lambda *_, c=count: c.append(1))
        seen = group_worker.watch(made)
        figures = made.lm_step(batches(10_000))
        found[recompute], calls[recompute] = (seen, figures), len(count)
    assert calls == {False: 1, True: 2}
    assert found[False][1] == found[True][1]
    assert all(torch.equal(gradient, found[True][0][name]) for name, gradient in found[False][0].items())


def test_options_of_several_ranks_are_refused_for_one(tmp_path: Path) -> None:
    for name in ("mixed_precision", "spread_experts"):
        with pytest.raises(ValueError, match=f"{name} = true with ranks = 1"):
            config.Sharding.model_validate({name: True})
    with pytest.raises(ValueError, match="context = 2 does not divide ranks = 3"):
        config.Sharding(ranks=3, context=2)
    with pytest.raises(ValueError, match='offload = true with device = "cpu": parameters are in host memory'):
        config.Cluster(device="cpu", sharding=config.Sharding(offload=True))
    assert config.Sharding(offload=True).wrapped and not config.Sharding(recompute=True).wrapped
    with pytest.raises(ValueError, match="on the CPU: parameters are in host memory as it is"):
        Setup(
            checkpoint=tmp_path,
            attention="sparse",
            optimizer=config.Optimizer(lr=1),
            total_steps=1,
            train=frozenset({"model"}),
            sharding=config.Sharding(ranks=2, offload=True),
        )


# ---- two processes, started once for everything below ----


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def two(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """The folder that two ranks wrote in, and what they found."""
    out = tmp_path_factory.mktemp("two")
    group_worker.snapshot(path, None, out / "by-one")
    return out, launch(path, out, size=2, context=1)


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["2 of 2", "2 of 4"])
def shared(
    request: pytest.FixtureRequest, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """What ranks find that share their batches: all of them, or pairs of four."""
    size, context = request.param
    return launch(path, tmp_path_factory.mktemp("shared"), size=size, context=context, names=SHARED)


def _one(path: Path, name: str) -> Found:
    torch.set_num_threads(1)
    return CASES[name](path, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_two_ranks_are_one_learner(path: Path, two: tuple[Path, dict[str, Found]], name: str) -> None:
    assert_alike(two[1][name], _one(path, name), LIMITS.get(name, 1e-6))


@pytest.mark.slow
def test_a_group_of_one_rank_is_a_learner_alone(path: Path, tmp_path: Path) -> None:
    """What offloading on one GPU runs on; there is nothing to offload from here."""
    for name, found in launch(path, tmp_path, size=1, names=["micro-batches", "adamw", "muon"]).items():
        assert_alike(found, _one(path, name), LIMITS.get(name, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_their_batches_are_one_learner(
    path: Path, shared: dict[str, Found], name: str
) -> None:
    """With documents that begin on one rank and end on another, and tokens predicted across the cut.

    Ties of scores are all that they do not tell: a part of a batch lacks keys.
    """
    assert "figure/ties" not in shared[name]
    expected = {key: value for key, value in _one(path, name).items() if key != "figure/ties"}
    assert_alike(shared[name], expected, LIMITS.get(name, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
def test_kernels_of_shared_batches_and_recomputed_layers_are_those_of_torch(
    tmp_path: Path, index_dtype: str
) -> None:
    """The KL of the indexer is known in the backward pass alone there: its figure must be that of the first pass."""
    path = tiny.sparse_checkpoint(tmp_path / "one-layer", num_hidden_layers=1, index_dtype=index_dtype)
    expected = group_worker.triton(path, None, backend="torch")
    found = launch(path, tmp_path, size=2, context=2, names=["triton"])["triton"]
    again = group_worker.triton(path, None, sharding={"recompute": True})
    assert float(expected["figure/indexer_kl"]) > 0
    for ours in (found, again):
        assert_alike(ours, expected, limit=2e-5)


@pytest.mark.slow
def test_muon_on_shards_is_muon_to_the_bit(path: Path, two: tuple[Path, dict[str, Found]]) -> None:
    expected = _one(path, "matrices")
    assert len(expected) == 4
    assert all(torch.equal(matrix, two[1]["matrices"][name]) for name, matrix in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-batches", "another order"])
def test_neither_ranks_nor_packing_nor_order_change_a_step(
    path: Path, two: tuple[Path, dict[str, Found]], name: str
) -> None:
    """One batch on one rank against micro-batches on two: the gradients and the update of SGD."""
    found, expected = two[1][name], _one(path, "one batch")
    for kind in ("grad", "logprobs", "weight"):
        ours, theirs = joined(found, kind), joined(expected, kind)
        assert (ours - theirs).norm() < 1e-6 * theirs.norm(), kind
    moved = joined({f"weight/{n}": t for n, t in checkpoint.load(path).state_dict().items()}, "weight")
    assert (moved - joined(expected, "weight")).norm() > 1e-4 * moved.norm(), "the update is no noise"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "mixed precision"])
def test_bf16_on_two_ranks_is_that_of_one(path: Path, two: tuple[Path, dict[str, Found]], name: str) -> None:
    """Up to the rounding of sums, 2^-9 of each gradient. Under mixed precision weights and sums are fp32."""
    found, expected = two[1][name], _one(path, "bf16")
    ours, theirs = joined(found, "grad"), joined(expected, "grad")
    assert 1e-5 < (ours - theirs).norm() / theirs.norm() < 1e-2
    assert torch.equal(joined(found, "logprobs"), joined(expected, "logprobs"))
    dtypes = {t.dtype for n, t in found.items() if n.startswith("weight/") and "correction_bias" not in n}
    assert dtypes == {torch.float32 if name == "mixed precision" else torch.bfloat16}


@pytest.mark.slow
def test_a_snapshot_of_one_rank_goes_on_on_two_and_back(
    path: Path, two: tuple[Path, dict[str, Found]]
) -> None:
    out, results = two
    back = group_worker.goes_on(path, None, out / "by-two")
    for found in (results["goes on"], back):
        ours, theirs = joined(found, "weight"), joined(results["snapshot"], "weight")
        assert len(ours) > 10_000 and (ours - theirs).norm() < 1e-6 * theirs.norm()
    spread = group_worker.goes_on(path, None, out / "by-two-spread")
    assert (joined(spread, "weight") - joined(results["spread"], "weight")).norm() < 1e-6 * theirs.norm()
    again = group_worker.goes_on(path, None, out / "by-one")
    assert (joined(again, "weight") - joined(back, "weight")).norm() < 1e-6 * theirs.norm()


@pytest.mark.slow
def test_two_ranks_save_a_plain_checkpoint(path: Path, two: tuple[Path, dict[str, Found]]) -> None:
    out, results = two
    loaded = checkpoint.load(out / "checkpoint").state_dict()
    assert loaded.keys() == results["saved"].keys()
    assert all(torch.equal(tensor, results["saved"][name]) for name, tensor in loaded.items())
    names = [sorted(p.name for p in folder.iterdir()) for folder in (out / "checkpoint", path)]
    assert names[0] == names[1]
    assert (out / "checkpoint" / "config.json").read_text() == (path / "config.json").read_text()
