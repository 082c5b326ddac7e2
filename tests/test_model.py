"""The model: DSA is dense attention while L <= k, transformers agrees, gradients and documents stay apart."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.kernels import reference
from posttrain.model import checkpoint
from posttrain.model.arch import target_logprobs
from posttrain.model.indexer import hadamard
from posttrain.model.moe import route, run_each, run_padded, update_bias


def test_dsa_equals_dense_attention_while_everything_fits() -> None:
    model, tokens = tiny.model(topk=32), tiny.tokens(50)
    sparse, dense = tiny.packed([32, 1, 17]), tiny.packed([32, 1, 17], "dense")
    difference = (model(tokens, sparse) - model(tokens, dense)).abs().max()
    assert difference < 1e-5
    kept = [sparse.records[n].kept_BQK for n in range(3)]
    assert all(k is not None and k.shape == (3, 32, 32) for k in kept), "the sparse path did not run"
    assert all(r.kept_BQK is None for r in dense.records.values())


def test_dsa_differs_from_dense_attention_beyond_k() -> None:
    model, tokens = tiny.model(topk=7), tiny.tokens(40)
    difference = (model(tokens, tiny.packed([40])) - model(tokens, tiny.packed([40], "dense"))).abs()
    assert difference[:7].max() < 1e-5
    assert difference[20:].max() > 1e-3


@pytest.fixture
def one_tie_rule(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Give transformers' indexer our rule for equal scores; returns what it selects, call by call."""
    selected: list[torch.Tensor] = []

    def topk(x: torch.Tensor, k: int, dim: int = -1, **_: Any) -> Any:
        values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
        if x.dim() == 3 and x.shape[1] > k:  # the indexer's [B, Q, L]; the router's are [T, X]
            selected.append(indices[..., :k])
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    monkeypatch.setattr(torch, "topk", topk)
    return selected


def _stock_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(stock) is hf.DeepseekV32ForCausalLM
    with torch.no_grad():
        logits: torch.Tensor = stock(tokens[None]).logits[0]
    return logits


def test_transformers_computes_the_same_from_our_checkpoint(
    tmp_path: Path, one_tie_rule: list[torch.Tensor]
) -> None:
    ours, tokens = tiny.model(topk=7), tiny.tokens(61)
    checkpoint.save(ours, tmp_path)
    stock = _stock_logits(tmp_path, tokens)
    context = tiny.packed([61])
    with torch.no_grad():
        assert (ours(tokens, context) - stock).abs().max() < 1e-5
    assert len(one_tie_rule) == 3, "expected one selection per layer"
    for layer, selected in enumerate(one_tie_rule):
        kept = context.records[layer].kept_BQK
        assert kept is not None
        for t in range(61):
            theirs = {int(s) for s in selected[0, t] if s <= t}
            assert {int(s) for s in kept[0, t] if s >= 0} == theirs, f"layer {layer}, query {t}"


def test_our_model_computes_the_same_from_their_checkpoint(
    tmp_path: Path, one_tie_rule: list[torch.Tensor]
) -> None:
    tokens = tiny.tokens(45)
    stock = hf.DeepseekV32ForCausalLM(tiny.model(topk=9, seed=5).config)
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = stock(tokens[None]).logits[0]
        ours = checkpoint.load(tmp_path)(tokens, tiny.packed([45]))
    assert (ours - theirs).abs().max() < 1e-5


def test_the_dense_form_is_a_stock_deepseek_v3(tmp_path: Path) -> None:
    ours, tokens = tiny.model(), tiny.tokens(30)
    checkpoint.save_dense(ours, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert stock.config.model_type == "deepseek_v3"
    again = checkpoint.load_dense(tmp_path)
    with torch.no_grad():
        logits = ours(tokens, tiny.packed([30], "dense"))
        assert (logits - stock(tokens[None]).logits[0]).abs().max() < 1e-5
        assert torch.equal(logits, again(tokens, tiny.packed([30], "dense")))


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    ours = tiny.model()
    checkpoint.save(ours, tmp_path)
    again = checkpoint.load(tmp_path).state_dict()
    assert ours.state_dict().keys() == again.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert any(name.endswith("e_score_correction_bias") for name in again), "routing bias lost"


@pytest.mark.parametrize(("attention", "loss"), [("dense", "dense"), ("sparse", "sparse")])
def test_the_two_losses_share_no_gradient(attention: str, loss: Any) -> None:
    model, tokens = tiny.model(topk=7), tiny.tokens(40)
    indexer = set(model.indexer_parameters())
    rest = [p for p in model.parameters() if p not in indexer]

    context = tiny.packed([25, 15], attention, indexer_loss=loss)
    logits = model(tokens, context)
    target_logprobs(logits[:-1], tokens[1:]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in indexer), "LM loss reaches the indexer"
    assert any(p.grad is not None and p.grad.any() for p in rest)

    model.zero_grad(set_to_none=True)
    context = tiny.packed([25, 15], attention, indexer_loss=loss)
    model(tokens, context)
    torch.stack([r.kl for r in context.records.values() if r.kl is not None]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in rest), "the KL reaches the model"
    assert all(p.grad is not None and p.grad.any() for p in indexer), "an indexer learns nothing"


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_no_document_sees_another(attention: str) -> None:
    model, lengths = tiny.model(topk=7), [19, 1, 24]
    tokens = tiny.tokens(sum(lengths))
    with torch.no_grad():
        together = model(tokens, tiny.packed(lengths, attention))
        model.model.embed_tokens.weight[5] = float("nan")  # a token that no document holds
        poisoned = tokens.clone()
        poisoned[20:] = 5
        other = model(poisoned, tiny.packed(lengths, attention))
        assert other[20:].isnan().all() and other[:20].isfinite().all()
        torch.testing.assert_close(together[:20], other[:20], atol=1e-5, rtol=0)
        start = 0
        for length in lengths:
            alone = model(tokens[start : start + length], tiny.packed([length], attention))
            torch.testing.assert_close(together[start : start + length], alone, atol=1e-5, rtol=0)
            start += length


def test_no_token_sees_a_later_one() -> None:
    model, tokens = tiny.model(topk=7), tiny.tokens(30)
    changed = tokens.clone()
    changed[20:] = tiny.tokens(10, seed=4)
    with torch.no_grad():
        before, after = model(tokens, tiny.packed([30])), model(changed, tiny.packed([30]))
    torch.testing.assert_close(before[:20], after[:20], atol=1e-6, rtol=0)


def test_hadamard_rotation_leaves_the_scores_alone() -> None:
    x, y = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))
    assert hadamard(torch.tensor([1.0, 0, 0, 0])).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="index_head_dim=12: the Hadamard rotation needs a power of two"):
        hadamard(torch.zeros(12))
    plain, rotated = tiny.model(topk=7), tiny.model(topk=7, index_hadamard=True)
    rotated.load_state_dict(plain.state_dict())
    assert rotated.model.layers[0].self_attn.indexer.use_hadamard
    tokens = tiny.tokens(40)
    with torch.no_grad():
        difference = plain(tokens, tiny.packed([40])) - rotated(tokens, tiny.packed([40]))
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("run", [run_each, run_padded])
def test_experts_are_run_as_transformers_runs_them(run: Any) -> None:
    moe = tiny.model().moe_layers()[1]
    x = torch.randn(13, 40)
    _, weights, experts = moe.gate(x)
    gate_up, down = (w.transpose(1, 2) for w in (moe.experts.gate_up_proj, moe.experts.down_proj))
    ours = run(x, experts, weights, gate_up, down)
    torch.testing.assert_close(ours, moe.experts(x, experts, weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize("run", [run_each, run_padded])
def test_an_expert_without_tokens_is_no_trouble(run: Any) -> None:
    moe = tiny.model().moe_layers()[1]
    gate_up, down = (w.transpose(1, 2) for w in (moe.experts.gate_up_proj, moe.experts.down_proj))
    out = run(torch.randn(1, 40), torch.tensor([[0, 3]]), torch.ones(1, 2), gate_up, down)
    assert out.isfinite().all()
    assert (out != 0).any()


def test_routing_in_groups_is_that_of_transformers() -> None:
    gate = (
        tiny.model(n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=3).moe_layers()[1].gate
    )
    logits, weights, experts = gate(torch.randn(29, 40))
    ours_weights, ours = route(logits, gate)
    assert torch.equal(ours.sort().values, experts.sort().values)
    assert torch.equal(ours_weights.sort().values, weights.sort().values)


def test_bias_falls_for_busy_experts_and_rises_for_idle_ones() -> None:
    moe = tiny.model().moe_layers()[1]
    moe.gate.e_score_correction_bias.zero_()
    update_bias(moe, torch.tensor([10, 2, 6, 6]), 0.01)
    wanted = torch.tensor([-0.01, 0.01, 0.0, 0.0])
    torch.testing.assert_close(moe.gate.e_score_correction_bias, wanted)


def test_replayed_routing_gives_the_same_output() -> None:
    model, tokens = tiny.model(), tiny.tokens(20)
    context = tiny.packed([20])
    logits = model(tokens, context)
    chosen = {n: r.experts_TE for n, r in context.records.items() if r.experts_TE is not None}
    again = tiny.packed([20], replay_experts=chosen)
    torch.testing.assert_close(model(tokens, again), logits)
    other = tiny.packed([20], replay_experts={n: 3 - e for n, e in chosen.items()})
    assert (model(tokens, other) - logits).abs().max() > 1e-3


def test_no_tensor_of_the_sparse_path_has_queries_keys_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(topk=7, index_heads=3)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    length = 200
    with torch.no_grad(), Watch():
        model(tiny.tokens(length), tiny.packed([length]))
    assert length * length <= largest < 2 * length * length, "an L x L x heads tensor was made"
    assert reference  # the functions under watch
