"""The Triton backend computes what the torch backend does: values, gradients, KL, selection; and is never a surprise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from posttrain import config, packing
from posttrain.kernels import backend, e4m3, index_topk_triton, reference
from posttrain.kernels.backend import TORCH, Backend
from posttrain.kernels.sparse_mla import sparse_mla
from posttrain.learner import Learner, Setup
from posttrain.model.arch import DeepseekV32ForCausalLM, target_logprobs
from posttrain.model.context import PackedContext, StaticCache, StaticContext
from posttrain.model.entry import Entry
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.toy import sorting, tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Backend(name="triton", reason="test", dense_rows=False)
LENGTHS = [11, 1, 14, 3]
"""Longer and shorter than top-k."""


def _model(**changes: Any) -> DeepseekV32ForCausalLM:
    model: Any = tiny.model(**({"topk": 5, "num_hidden_layers": 2} | changes))
    return model.to(DEVICE)  # type: ignore[no-any-return]


def _context(chosen: Backend, lengths: list[int] = LENGTHS, **options: Any) -> PackedContext:
    starts = tiny.packed(lengths).cu_seqlens_S.to(DEVICE)
    fields = {"attention": "sparse", "record_kept": True} | options
    return PackedContext(**fields, backend=chosen, cu_seqlens_S=starts)


def _run(model: DeepseekV32ForCausalLM, context: PackedContext, *, with_lm: bool = True) -> dict[str, Any]:
    """Log-probs, KL values and all gradients of one pass over both losses."""
    tokens = tiny.tokens(len(context.positions_T)).to(DEVICE)
    model.zero_grad(set_to_none=True)
    logp = target_logprobs(model(tokens, context)[:-1], tokens[1:])
    total = -(logp if with_lm else logp.detach()).mean()
    for record in context.records.values():
        if record.kl is not None:
            total = total + 0.7 * record.kl
    total.backward()
    out = {"logp": logp.detach()}
    out |= {f"kl/{n}": r.kl_value for n, r in context.records.items() if r.kl_value is not None}
    return out | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def _assert_same_keys(ours: PackedContext, wanted: PackedContext) -> None:
    mask = wanted.query_mask()
    for layer in range(2):
        a, b = ours.records[layer].kept_BQK, wanted.records[layer].kept_BQK
        assert a is not None and b is not None
        assert torch.equal(a[mask].long(), b[mask]), f"layer {layer} keeps other keys"


@pytest.mark.slow
@pytest.mark.parametrize("dense_rows", [False, True])
def test_replayed_keys_are_those_of_the_first_pass(dense_rows: bool) -> None:
    """After the indexers have changed: the same log-probs as before, by both backends."""
    model = _model()
    first = _context(TORCH)
    before = _run(model, first)["logp"]
    kept: dict[int, torch.Tensor] = {}
    for layer, record in first.records.items():
        assert record.kept_BQK is not None
        kept[layer] = first.flat(record.kept_BQK).to(torch.int16)
    with torch.no_grad():
        for parameter in model.indexer_parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert (_run(model, _context(TORCH))["logp"] - before).abs().max() > 1e-3
    wanted = _run(model, _context(TORCH, replay_kept=kept))
    torch.testing.assert_close(wanted["logp"], before, atol=1e-6, rtol=0)
    chosen = dataclasses.replace(TRITON, dense_rows=dense_rows)
    _assert_close(_run(model, _context(chosen, replay_kept=kept, record_kept=not dense_rows)), wanted)
    losses = [_run(model, _context(b, replay_kept=kept, indexer_loss="sparse")) for b in (chosen, TORCH)]
    _assert_close(*losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deterministic", "index_dtype"),
    [(False, "model"), (True, "model"), (False, "e4m3")],
    ids=["fast", "deterministic", "e4m3"],
)
def test_model_and_indexer_train_as_with_torch(deterministic: bool, index_dtype: str) -> None:
    model = _model(index_dtype=index_dtype)
    by_torch = _context(TORCH, indexer_loss="sparse")
    by_triton = _context(dataclasses.replace(TRITON, deterministic=deterministic), indexer_loss="sparse")
    wanted, ours = _run(model, by_torch), _run(model, by_triton)
    assert sum(name.startswith("kl/") for name in wanted) == 2
    assert any(".indexer.wk" in name for name in wanted) and any(".kv_b_proj" in name for name in wanted)
    _assert_close(ours, wanted)
    _assert_same_keys(by_triton, by_torch)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 1, 4]], ids=["some rows choose", "no row chooses"])
def test_the_indexer_learns_from_dense_rows_what_the_kernels_would_teach(lengths: list[int]) -> None:
    """Eq. 4 over all keys is Eq. 3: another kernel for the rows that keep everything, the same loss."""
    model, fast = _model(), dataclasses.replace(TRITON, dense_rows=True)
    wanted = _run(model, _context(TORCH, lengths, indexer_loss="sparse"))
    ours = _run(model, _context(fast, lengths, record_kept=False, indexer_loss="sparse"))
    assert sum(name.startswith("kl/") for name in wanted) == 2
    _assert_close(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dense_rows", [False, True], ids=["kernels alone", "dense rows"])
def test_only_the_indexer_trains(dense_rows: bool) -> None:
    model, by_triton = _model(), dataclasses.replace(TRITON, dense_rows=dense_rows)
    indexer = set(model.indexer_parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in indexer)
    wanted, ours = (
        _run(model, _context(chosen, indexer_loss="sparse", record_kept=False), with_lm=False)
        for chosen in (TORCH, by_triton)
    )
    assert any(".indexer." in name for name in wanted) and not any(".o_proj" in name for name in wanted)
    _assert_close(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dense_rows", [False, True], ids=["kernels alone", "dense rows"])
def test_only_the_model_trains(dense_rows: bool) -> None:
    """A frozen indexer, as in RL; early rows through dense attention or not: the same function."""
    model = _model()
    by_triton = dataclasses.replace(TRITON, dense_rows=dense_rows)
    wanted = _run(model, _context(TORCH))
    ours = _run(model, _context(by_triton, record_kept=False))
    assert not any("kl/" in name or ".indexer." in name for name in wanted)
    _assert_close(ours, wanted)


@pytest.mark.slow
def test_dense_rows_take_the_kernels_rows(selected_rows: list[int]) -> None:
    """With documents of 11, 1, 14 and 3 tokens and top-k 5, 6 and 9 rows are left to the kernels."""
    fast = dataclasses.replace(TRITON, dense_rows=True)
    model, tokens = _model(num_hidden_layers=1), tiny.tokens(sum(LENGTHS)).to(DEVICE)
    exact = dataclasses.replace(fast, deterministic=True)
    cases: list[tuple[PackedContext, list[int]]] = [
        (_context(fast, record_kept=False), [15]),
        (_context(fast, [5, 1, 3], record_kept=False), []),
        (_context(TRITON, record_kept=False), [29]),
        (_context(fast), [29]),
        (_context(exact, record_kept=False), [29]),
        (_context(fast, record_kept=False, indexer_loss="sparse"), [15]),
        (_context(fast, [5, 1, 3], record_kept=False, indexer_loss="sparse"), []),
    ]
    for context, expected in cases:
        selected_rows.clear()
        model(tokens[: len(context.positions_T)], context)
        assert selected_rows == expected


@pytest.mark.slow
def test_dsa_is_dense_attention_while_everything_fits() -> None:
    model = _model(topk=14)
    _assert_close(_run(model, _context(TRITON)), _run(model, _context(TORCH, attention="dense")))


@pytest.mark.slow
def test_the_indexer_warms_up_as_with_torch() -> None:
    model = _model()
    wanted, ours = (
        _run(model, _context(chosen, [9, 1, 12], attention="dense", indexer_loss="dense"))
        for chosen in (TORCH, TRITON)
    )
    assert sum(name.startswith("kl/") for name in wanted) == 2 and any(".indexer.wk" in n for n in wanted)
    _assert_close(ours, wanted)


def test_without_gradients_there_is_no_kl() -> None:
    model, tokens = _model(num_hidden_layers=1), tiny.tokens(12).to(DEVICE)
    by_triton = _context(TRITON, [9, 3], indexer_loss="sparse")
    with torch.no_grad():
        ours, wanted = model(tokens, by_triton), model(tokens, _context(TORCH, [9, 3]))
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert all(record.kl is None for record in by_triton.records.values())


@pytest.mark.slow
def test_the_kl_is_not_a_number_before_the_backward_pass() -> None:
    model, tokens = _model(), tiny.tokens(sum(LENGTHS)).to(DEVICE)
    context = _context(TRITON, indexer_loss="sparse")
    model(tokens, context)
    record = context.records[0]
    assert record.kl is not None and record.kl_value is not None
    assert record.kl.isnan() and record.kl_value.isnan()
    record.kl.backward()
    assert record.kl_value > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dense_rows", "index_dtype"),
    [(False, "model"), (True, "model"), (True, "e4m3")],
    ids=["kernels alone", "dense rows", "e4m3"],
)
def test_prefill_into_a_cache_and_a_second_pass_after_it(dense_rows: bool, index_dtype: str) -> None:
    """Two rows of 8 tokens, then 3 more each: keys of the first pass come from the cache."""
    model = _model(index_dtype=index_dtype)
    tokens = tiny.tokens(22).view(2, 11).to(DEVICE)
    results = []
    for chosen in (TORCH, dataclasses.replace(TRITON, dense_rows=dense_rows)):
        cache = StaticCache(
            num_layers=2, num_rows=2, length=12, entry=Entry.of(model.config), like=model.lm_head.weight.detach()
        )  # fmt: skip
        logits = []
        for part in (slice(0, 8), slice(8, 11)):
            positions = torch.arange(11, device=DEVICE)[part].expand(2, -1)
            context = StaticContext(
                attention="sparse", backend=chosen, cache=cache, query_positions_BQ=positions
            )
            with torch.no_grad():
                logits.append(model(tokens[:, part].reshape(-1), context))
        results.append((torch.cat(logits), cache.layers))
    (wanted, cache_wanted), (ours, cache_ours) = results
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=0)
    for a, b in zip(cache_ours, cache_wanted, strict=True):
        torch.testing.assert_close(a[..., :28], b[..., :28], atol=2e-5, rtol=0)
        if index_dtype == "model":
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
        else:  # both round, and few keys are so near the middle of two e4m3 numbers that they differ
            (k, _), (k_wanted, _) = (e4m3.unpack(x[..., 28:], 16) for x in (a, b))
            assert (k.float() == k_wanted.float()).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("index_dtype", ["model", "e4m3"])
def test_an_engine_generates_the_same(monkeypatch: pytest.MonkeyPatch, index_dtype: str) -> None:
    """Prefill by the packed kernels, steps by those for a cache; they keep what the packed kernels keep."""
    made: list[StaticContext] = []
    init = StaticContext.__post_init__
    monkeypatch.setattr(StaticContext, "__post_init__", lambda self: (init(self), made.append(self))[0])
    tasks = list(sorting.tasks(seed=5, n=2))
    requests = [Request(task=t, index=0, seed=i, max_new_tokens=4) for i, t in enumerate(tasks)]
    settings = Sampling(record_kept=True, record_experts=True, ignore_eos=True)
    rollouts = []
    for choice in ("torch", "triton"):
        model = _model(index_dtype=index_dtype)
        engine = TorchEngine(model, tokenizer.build(), backend=choice)  # type: ignore[arg-type]
        rollouts.append(engine.generate(requests, settings))
    assert sum(context.pages(0) is not None for context in made) == 3, (
        "not every step used the cache's kernels"
    )
    for wanted, ours in zip(*rollouts, strict=True):
        assert (ours.tokens == wanted.tokens).all() and (ours.experts == wanted.experts).all()
        assert ours.kept is not None and (ours.kept == wanted.kept).all()
        torch.testing.assert_close(ours.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
        packed = _context(TRITON, [len(ours.tokens)])
        with torch.no_grad():
            engine.model(torch.from_numpy(ours.tokens.astype("int64")).to(DEVICE), packed)
        for layer in range(2):
            kept = packed.records[layer].kept_BQK
            assert kept is not None and (kept[0, :-1].cpu().numpy() == ours.kept[layer]).all()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sparse_checkpoint(tmp_path_factory.mktemp("sparse"))


@pytest.mark.slow
def test_a_learners_step_has_the_same_figures(sparse: Path) -> None:
    samples = [tiny.sample(str(i), 12 + 5 * i, seed=i) for i in range(2)]
    batches = packing.pack(samples, packing.token_weights(samples, "token", 1), tokens_per_batch=30)
    figures = []
    for choice in ("torch", "triton"):
        setup = Setup(
            checkpoint=sparse,
            attention="sparse",
            indexer_loss="sparse",
            optimizer=config.Optimizer(lr=1e-3),
            total_steps=10,
            train=frozenset({"model", "indexer"}),
            device=DEVICE,
            backend=choice,  # type: ignore[arg-type]
        )
        learner = Learner(setup)
        assert learner.backend.name == choice
        figures.append(learner.lm_step(batches))
    wanted, ours = figures
    assert wanted["indexer_kl"] > 0
    assert ours == pytest.approx(wanted, rel=1e-4)


def test_the_torch_path_is_its_definition_to_the_last_digit() -> None:
    """One layer's attention against the functions it is made of, called by hand: no bit may differ."""
    layer = tiny.model(topk=7).model.layers[0].self_attn
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(3))
    context = tiny.packed([30], indexer_loss="sparse")
    turns = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    rope = torch.polar(torch.ones_like(turns), turns)
    runs = []
    for attend in (layer, _by_hand):
        layer.zero_grad(set_to_none=True)
        if attend is layer:
            out = layer(x, rope, context)
            kl = context.records[0].kl
            assert kl is not None
        else:
            out, kl = _by_hand(layer, x, rope)
        (out.square().sum() + 0.3 * kl).backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        runs.append({"out": out, "kl": kl} | grads)
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) > 10
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def _by_hand(a: Any, x: torch.Tensor, rope: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from posttrain.model.rope import rotate

    latent = a.q_a_layernorm(a.q_a_proj(x))
    q_nope, q_rot = a.q_b_proj(latent).view(30, -1, 20).split([12, 8], -1)
    kv, k_rot = a.kv_a_proj_with_mqa(x).split([20, 8], -1)
    entries = torch.cat((a.kv_a_layernorm(kv), rotate(k_rot, rope)), -1)
    q_index, k_index, w = a.indexer(x, latent, rope)
    scores = reference.index_scores(q_index[None], k_index[None], w[None])
    mask = reference.causal_mask(torch.arange(30)[None], 30)
    kept = reference.select_topk(scores, mask, 7)
    absorb, values = a.up_projections()
    q = torch.cat((torch.bmm(q_nope.transpose(0, 1), absorb).transpose(0, 1), rotate(q_rot, rope)), -1)
    o, p = sparse_mla(q, entries, kept[0], a.scaling, 20)
    kl = reference.indexer_kl(p, scores.gather(-1, kept.clamp(min=0))[0], kept[0] >= 0).sum()
    out = torch.bmm(o.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)
    return a.o_proj(out.flatten(1)), kl


@pytest.mark.slow
def test_no_grid_of_queries_and_keys_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length is a prime that no other size has: a tensor with the factor twice is queries times keys."""
    monkeypatch.setattr(index_topk_triton, "CHUNK_BYTES", 4096)
    length, squares = 61, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal squares
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    squares += tensor.numel() % length**2 == 0
            return out

    model = _model(num_hidden_layers=1)
    for chosen in (TRITON, TORCH):
        squares = 0
        with Watch():
            _run(model, _context(chosen, [length], indexer_loss="sparse", record_kept=False))
        assert (squares == 0) == (chosen is TRITON)


@pytest.mark.skipif(DEVICE == "cuda", reason="what happens without a GPU")
def test_triton_without_a_gpu_is_refused_and_auto_says_why_it_is_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    found = backend.resolve("triton", cpu, torch.float32, num_heads=8, entry_size=28)
    assert str(found) == "triton (Triton's interpreter)"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ValueError, match=r'backend "triton" cannot run: the model is on cpu; write backend ='
    ):
        tiny.model().backend("triton")
    assert str(tiny.model().backend("auto")) == "torch (the model is on cpu)"
    assert str(tiny.model().backend("torch", deterministic=True)) == "torch (asked for, deterministic)"


@pytest.mark.parametrize(
    ("entry_size", "dtype", "reason"),
    [
        (576, torch.bfloat16, ""),
        (1152, torch.bfloat16, "entries of 2304 bytes need"),
        (64, torch.float32, "float32"),
    ],
    ids=["fits", "too large", "fp32"],
)
def test_auto_looks_at_shared_memory_and_type(
    monkeypatch: pytest.MonkeyPatch, entry_size: int, dtype: torch.dtype, reason: str
) -> None:
    class H200:
        name = "NVIDIA H200"
        shared_memory_per_block_optin = 232_448

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H200.name)
    size, cuda = {"num_heads": 8, "entry_size": entry_size}, torch.device("cuda")
    found = backend.resolve("auto", cuda, dtype, **size)
    assert found.name == ("torch" if reason else "triton") and (reason or "NVIDIA H200") in found.reason
    if entry_size == 1152:
        with pytest.raises(ValueError, match="shared memory"):
            backend.resolve("triton", cuda, dtype, **size)
    else:
        assert backend.resolve("triton", cuda, dtype, **size).name == "triton"
