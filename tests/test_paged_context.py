"""The model on a paged cache, in chunks and mixed passes, is the model on the packed documents."""

import random
from typing import Literal

import pytest
import tiny
import torch

from posttrain.kernels.backend import Backend
from posttrain.kernels.experts import run_experts
from posttrain.model import paged as paged_module
from posttrain.model.arch import DeepseekV32ForCausalLM
from posttrain.model.entry import Entry
from posttrain.model.paged import NewTokens, PagedCache, paged

TOPK, BLOCK = 7, 4
LENGTHS = (3, 41, 1, 22)
Attention = Literal["dense", "sparse"]


def _cache(model: DeepseekV32ForCausalLM, num_blocks: int) -> PagedCache:
    config = model.config
    entry = Entry.of(config)
    pools = [torch.full((num_blocks, BLOCK, entry.width(4)), 1e4) for _ in range(config.num_hidden_layers)]
    return PagedCache(pools_PSX=pools, entry=entry)


class _Engine:
    """Sequences in scattered blocks; block 0 belongs to nobody, as in vLLM."""

    def __init__(
        self, attention: Attention, backend: Backend, index_dtype: str = "model", *, num_layers: int = 3
    ) -> None:
        self.model = tiny.model(
            topk=TOPK, seed=2, index_dtype=index_dtype, num_hidden_layers=num_layers
        ).eval()
        self.attention: Attention = attention
        self.backend = backend
        self.documents = [tiny.tokens(n, seed=n) for n in LENGTHS]
        most = -(-max(LENGTHS) // BLOCK) + 1
        places = list(range(1, 1 + most * len(LENGTHS)))
        random.Random(0).shuffle(places)
        self.table = torch.tensor(places, dtype=torch.int32).view(len(LENGTHS), most)
        self.cache = _cache(self.model, 1 + len(places))
        self.done = [0] * len(LENGTHS)

    def step(
        self, counts: dict[int, int], *, record_kept: bool = True
    ) -> tuple[list[int], torch.Tensor, list[torch.Tensor]]:
        """Sequences in the order of the pass, hidden states, and kept positions of each layer."""
        order = sorted(counts, key=lambda b: counts[b] != 1)
        starts = [self.done[b] for b in order]
        ends = [self.done[b] + counts[b] for b in order]
        positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        sequence = torch.tensor([b for b in order for _ in range(counts[b])])
        block = self.table[sequence, positions // BLOCK].long()
        new = NewTokens(
            counts_B=[counts[b] for b in order],
            ends_B=ends,
            positions_T=positions,
            table_BM=self.table[order],
            lengths_B=torch.tensor(ends, dtype=torch.int32),
            slots_T=block * BLOCK + positions % BLOCK,
        )
        context = paged(
            new,
            self.cache,
            attention=self.attention,
            backend=self.backend,
            max_length=self.table.shape[1] * BLOCK,
            record_kept=record_kept,
        )
        tokens = [self.documents[b][s:e] for b, s, e in zip(order, starts, ends, strict=True)]
        with torch.inference_mode():
            hidden = self.model.model(torch.cat(tokens), context)
        for b, end in zip(order, ends, strict=True):
            self.done[b] = end
        recorded = record_kept and self.attention == "sparse"
        layers = range(self.model.config.num_hidden_layers if recorded else 0)
        return order, hidden, [context.kept(layer, TOPK) for layer in layers]


@pytest.mark.parametrize(
    ("attention", "backend", "index_dtype"),
    [
        ("sparse", "torch", "model"),
        ("sparse", "torch", "e4m3"),
        pytest.param("sparse", "triton", "model", marks=pytest.mark.slow),
        pytest.param("sparse", "triton", "e4m3", marks=pytest.mark.slow),
        ("dense", "torch", "model"),
    ],
)
def test_chunks_and_mixed_passes_are_the_packed_pass(
    attention: Attention, backend: str, index_dtype: str
) -> None:
    chosen = Backend(name=backend, reason="test", dense_rows=False)  # type: ignore[arg-type]
    engine = _Engine(attention, chosen, index_dtype)
    rng = random.Random(1)
    hidden: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    kept: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    mixed = 0
    while any(done < n for done, n in zip(engine.done, LENGTHS, strict=True)):
        left = {b: n - engine.done[b] for b, n in enumerate(LENGTHS) if n > engine.done[b]}
        chosen = {
            b: rng.choice([1, 1, rng.randint(1, min(n, 9))]) for b, n in left.items() if rng.random() < 0.8
        }
        if not chosen:
            continue
        mixed += len({count == 1 for count in chosen.values()}) == 2
        order, out, layers = engine.step(chosen)
        for b, part in zip(order, out.split([chosen[b] for b in order]), strict=True):
            hidden[b].append(part)
        for layer in layers:
            for b, rows in zip(order, layer.split([chosen[b] for b in order]), strict=True):
                kept[b].append(rows)
    assert mixed > 2, "no mixed pass"
    context = tiny.packed(list(LENGTHS), attention)
    with torch.inference_mode():
        wanted = engine.model.model(torch.cat(engine.documents), context)
    found = torch.cat([torch.cat(parts) for parts in hidden])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    if attention == "sparse":
        for layer in range(3):
            record = context.records[layer].kept_BQK
            assert record is not None
            for b, n in enumerate(LENGTHS):
                rows = torch.cat(kept[b][layer::3])
                assert torch.equal(rows.long(), record[b, :n]), f"layer {layer}, document {b}"


@pytest.mark.slow
@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
def test_a_deterministic_pass_has_the_bits_of_the_packed_pass(index_dtype: str) -> None:
    """By Triton: what an engine decodes is what the learner finds; on a GPU with gradients, too (tests/gpu)."""
    backend = Backend(name="triton", reason="test", deterministic=True)
    engine = _Engine("sparse", backend, index_dtype, num_layers=2)
    for moe in engine.model.moe_layers().values():
        moe.run = run_experts
    hidden: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    for left in (4, 3, 2, 1, 0):
        counts = {b: max(1, n - left) if left == 4 or n <= 4 else 1 for b, n in enumerate(LENGTHS)}
        counts = {b: count for b, count in counts.items() if engine.done[b] < LENGTHS[b]}
        order, out, _ = engine.step(counts, record_kept=False)
        for b, part in zip(order, out.split([counts[b] for b in order]), strict=True):
            hidden[b].append(part)
    found = torch.cat([torch.cat(parts) for parts in hidden])
    with torch.inference_mode():
        wanted = engine.model.model(torch.cat(engine.documents), tiny.packed(list(LENGTHS), backend=backend))
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_a_deterministic_block_that_is_computed_again_has_the_same_products() -> None:
    backend = Backend(name="triton", reason="test", deterministic=True)
    engine = _Engine("sparse", backend, num_layers=2)
    grads: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        for layer in engine.model.model.layers:
            layer.recompute = recompute
        engine.model.zero_grad()
        hidden = engine.model.model(torch.cat(engine.documents), tiny.packed(list(LENGTHS), backend=backend))
        hidden.square().sum().backward()
        grads.append({name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "model.layers.1.self_attn.q_b_proj.weight" in grads[0]
    assert not [name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])]


@pytest.mark.slow
@pytest.mark.parametrize(("keys_together", "parts"), [(1 << 18, 1), (60, 2)], ids=["all", "some"])
@pytest.mark.parametrize("dense_rows", [False, True], ids=["kernels alone", "dense rows"])
def test_prompts_and_chunks_are_scored_by_one_launch(
    monkeypatch: pytest.MonkeyPatch,
    selected_rows: list[int],
    dense_rows: bool,
    keys_together: int,
    parts: int,
) -> None:
    """41 tokens after 9, 22 and 3 from the start, one that decodes: 66 rows; in the dense way go 7 of the 22, since the
    3 would be padded, and of the 41 none, whose keys are not all in the pass."""
    monkeypatch.setattr(paged_module, "KEYS_TOGETHER", keys_together)
    engine = _Engine(
        "sparse", Backend(name="triton", reason="test", dense_rows=dense_rows), "e4m3", num_layers=1
    )
    engine.documents[1] = tiny.tokens(50, seed=1)
    engine.documents[2] = tiny.tokens(4, seed=2)
    engine.table = torch.randperm(60, generator=torch.Generator().manual_seed(0)).int()[:56].view(4, 14) + 1
    engine.cache = _cache(engine.model, 61)
    engine.step({1: 9, 2: 3}, record_kept=False)
    selected_rows.clear()
    order, out, _ = engine.step({2: 1, 1: 41, 3: 22, 0: 3}, record_kept=False)
    assert order == [2, 1, 3, 0]
    assert len(selected_rows) == parts and sum(selected_rows) == 66 - 7 * dense_rows
    with torch.inference_mode():
        lengths = [len(document) for document in engine.documents]
        wanted = engine.model.model(torch.cat(engine.documents), tiny.packed(lengths)).split(lengths)
    found = out.split([1, 41, 22, 3])
    for b, rows in zip(order, found, strict=True):
        torch.testing.assert_close(rows, wanted[b][-len(rows) :], rtol=0, atol=2e-5)


def test_a_sequence_reads_blocks_that_the_same_pass_fills() -> None:
    """vLLM lets a second sequence share the prompt's blocks while the first one's prompt is in the same pass."""
    backend = Backend(name="torch", reason="test")
    engine = _Engine("sparse", backend)
    engine.documents[3] = engine.documents[1][:22]
    engine.table[3, :5] = engine.table[1, :5]  # 20 tokens shared
    engine.done[3] = 21
    engine.table[3, 5] = engine.table[1, 5]
    order, out, _ = engine.step({1: 41, 3: 1})
    assert order == [3, 1]
    torch.testing.assert_close(out[0], out[1 + 21], rtol=0, atol=2e-5)
