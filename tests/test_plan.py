"""Which rows of a pass are dense and which the kernels', by hand; and that a pass in parts is the pass."""

from typing import Any

import pytest
import test_paged_context
import tiny
import torch

from posttrain.kernels import dense
from posttrain.kernels.backend import TORCH, Backend
from posttrain.model import context as context_module
from posttrain.model import paged as paged_module
from posttrain.model.plan import KERNELS

CPU = torch.device("cpu")
SPLIT = Backend(name="triton", reason="test")


@pytest.fixture
def long_from_6(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (context_module, paged_module):
        monkeypatch.setattr(module, "LONG", 6)


@pytest.mark.usefixtures("long_from_6")
def test_long_documents_stand_alone_and_short_ones_together() -> None:
    """With seven dense rows: 3 and 4 are short, 9 and 7 long, of 20 none is dense."""
    found = context_module.plan_documents(
        [0, 3, 12, 16, 36], [3, 9, 4, 20, 7], [3, 7, 4, 0, 7], CPU, begun=[0, 0, 0, 5, 0], apart=True
    )
    split, ranges = found.split, found.ranges
    assert split is not None and ranges is not None
    assert split.sizes == (3, 7, 2, 4, 20, 7) and split.ways == (0, 1, KERNELS, 0, KERNELS, 2)
    assert [part.host_lengths for part in split.dense] == [(3, 4), (7,), (7,)]
    assert ranges.begin_N.tolist() == [3] * 2 + [16] * 20
    assert ranges.end_N.tolist() == [11, 12, *range(22, 42)]
    x = torch.arange(43)
    parts = split.parts(x)
    assert [[run.tolist() for run in part] for part in parts[:2]] == [
        [[0, 1, 2], [12, 13, 14, 15]],
        [list(range(3, 10))],
    ]
    assert [len(run) for run in parts[-1]] == [2, 20]
    assert torch.equal(split.whole([torch.cat(part) for part in parts]), x)


@pytest.mark.usefixtures("long_from_6")
def test_long_documents_of_about_one_length_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of 4: 6 and 8, 9 and 12; of the last nothing is dense."""
    monkeypatch.setattr(dense, "STEP", 4)
    split = context_module.plan_documents(
        [0, 6, 15, 18, 26, 38], [6, 9, 3, 8, 12, 5], [6, 9, 3, 8, 12, 0], CPU
    ).split
    assert split is not None and split.sizes == (6, 9, 3, 8, 12, 5)
    assert split.ways == (0, 1, 2, 0, 1, KERNELS)
    assert [part.host_lengths for part in split.dense] == [(6, 8), (9, 12), (3,)]


def test_long_documents_have_few_lengths() -> None:
    """cuDNN makes a plan for each: seven up to 2048, then eight for every doubling."""
    assert dense.lengths(2048) == [512, 768, 1024, 1280, 1536, 1792, 2048]
    assert [dense.padded(n) for n in (512, 513, 2048, 2049, 5000, 16_385)] == [
        512,
        768,
        2048,
        2304,
        5120,
        18_432,
    ]
    assert {dense.padded(n) for n in range(512, 9000)} == set(dense.lengths(8999))


def test_all_rows_one_way() -> None:
    found = context_module.plan_documents([0, 3], [3, 4], [3, 4], CPU)
    assert found.ranges is None and found.split is not None
    assert found.split.sizes == (7,) and len(found.split.dense) == 1
    assert torch.equal(found.split.whole([torch.arange(7)]), torch.arange(7))
    found = context_module.plan_documents([0, 3], [3, 4], [0, 0], CPU)
    assert found.split is None and found.ranges is not None


def test_one_document_is_a_grid_as_it_is() -> None:
    context = tiny.packed([5])
    x = torch.arange(10.0).view(5, 2)
    assert context.grid(x).data_ptr() == x.data_ptr() and context.grid(x).shape == (1, 5, 2)
    assert torch.equal(context.flat(context.grid(x)), x) and context.positions_T.tolist() == [0, 1, 2, 3, 4]
    assert context.query_mask().tolist() == [[True] * 5] and context.query_positions_BQ.shape == (1, 5)


def _run(lengths: list[int], backend: Backend, **options: Any) -> dict[str, torch.Tensor]:
    model, tokens = tiny.model(topk=7, num_hidden_layers=1, seed=4), tiny.tokens(sum(lengths))
    context = tiny.packed(lengths, backend=backend, **options)
    hidden = model.model(tokens, context)
    losses = [record.kl for record in context.records.values() if record.kl is not None]
    (hidden.square().mean() + sum(losses)).backward()
    with torch.no_grad():
        found = {"no grad": model.model(tokens, tiny.packed(lengths, backend=backend))}
    found["hidden"] = hidden.detach()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.usefixtures("long_from_6")
@pytest.mark.parametrize(
    "lengths", [[3, 9, 4, 12, 7], [9], [7, 6], [2, 3]], ids=["all ways", "two", "alone", "short"]
)
def test_a_pass_in_parts_is_the_pass(lengths: list[int], poisoned_memory: None) -> None:
    ours, wanted = (_run(lengths, backend, indexer_loss="sparse") for backend in (SPLIT, TORCH))
    assert ours.keys() == wanted.keys() and any(".indexer." in name for name in ours)
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
@pytest.mark.usefixtures("long_from_6")
def test_a_mixed_pass_in_parts_is_the_pass(poisoned_memory: None) -> None:
    """One that decodes, a chunk, two prompts with dense rows of their own and two short ones between."""
    engine = test_paged_context._Engine("sparse", SPLIT, "e4m3", num_layers=2)
    engine.documents = [tiny.tokens(n, seed=n) for n in (12, 30, 6, 20)]
    engine.step({0: 11, 1: 9}, record_kept=False)
    order, out, _ = engine.step({0: 1, 1: 21, 2: 6, 3: 20}, record_kept=False)
    with torch.inference_mode():
        wanted = engine.model.model(torch.cat(engine.documents), tiny.packed([12, 30, 6, 20])).split(
            [12, 30, 6, 20]
        )
    assert order == [0, 1, 2, 3]
    for b, rows in zip(order, out.split([1, 21, 6, 20]), strict=True):
        torch.testing.assert_close(rows, wanted[b][-len(rows) :], rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [300, 512, 700], ids=["short", "whole", "padded"])
def test_long_documents_are_padded_and_taken_by_powers_of_two(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """What a GPU does, with the CPU's kernel: the same numbers, of no more than a few lengths."""
    shapes, attend = [], dense._attend

    def watched(q: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(tuple(q.shape[:2]))
        return attend(q, *args)

    monkeypatch.setattr(dense, "_attend", watched)
    make = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(3, length, 2, size, generator=make, requires_grad=True) for size in (6, 6, 4))
    wanted = attend(q, k, v, 0.3)
    found = dense._causal_on_gpu(q, k, v, 0.3)
    padded = -(-length // 128) * 128
    assert shapes == ([(3, 300)] if length == 300 else [(2, padded), (1, padded)])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    dout = torch.randn(wanted.shape, generator=make)
    grads = (torch.autograd.grad(x, (q, k, v), dout) for x in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
