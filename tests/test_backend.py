"""The Triton backend computes what the torch backend does: values, gradients, KL, selection; and is never a surprise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from posttrain import config, packing
from posttrain.kernels import backend, reference
from posttrain.kernels.backend import Backend
from posttrain.kernels.sparse_mla import sparse_mla
from posttrain.learner import Learner, Setup
from posttrain.model.arch import DeepseekV32ForCausalLM, target_logprobs
from posttrain.model.context import PackedContext, StaticCache, StaticContext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Backend(name="triton", reason="test", dense_rows=False)
LENGTHS = [19, 1, 26, 5]
"""Longer and shorter than top-k."""


def _context(name: str, lengths: list[int] = LENGTHS, **options: Any) -> PackedContext:
    chosen = TRITON if name == "triton" else backend.TORCH
    context = tiny.packed(lengths, **({"backend": chosen, "record_kept": True} | options))
    return PackedContext(
        **{f.name: getattr(context, f.name) for f in dataclasses.fields(context) if f.init}
        | {"cu_seqlens_S": context.cu_seqlens_S.to(DEVICE)}
    )


def _run(
    model: DeepseekV32ForCausalLM, context: PackedContext, *, lm: float = 1.0, kl: float = 0.7
) -> dict[str, torch.Tensor]:
    """Log-probs, KL values and all gradients of one pass."""
    tokens = tiny.tokens(int(context.cu_seqlens_S[-1])).to(DEVICE)
    model.zero_grad(set_to_none=True)
    logp = target_logprobs(model(tokens[:-1].new_tensor(tokens.tolist()), context)[:-1], tokens[1:])
    total = -(logp if lm else logp.detach()).mean() * lm
    for record in context.records.values():
        if record.kl is not None:
            total = total + kl * record.kl
    if total.requires_grad:
        total.backward()
    out = {"logp": logp.detach()}
    out |= {f"kl/{n}": r.kl_value for n, r in context.records.items() if r.kl_value is not None}
    return out | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _compare(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def _model(**changes: Any) -> DeepseekV32ForCausalLM:
    return tiny.model(**({"topk": 7} | changes)).to(DEVICE)  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_triton_trains_model_and_indexer_as_torch_does(deterministic: bool) -> None:
    model = _model()
    contexts = [
        _context(name, indexer_loss="sparse", **options)
        for name, options in (
            ("torch", {}),
            ("triton", {"backend": dataclasses.replace(TRITON, deterministic=deterministic)}),
        )
    ]
    wanted, ours = (_run(model, context) for context in contexts)
    assert len([name for name in wanted if name.startswith("kl/")]) == 3
    assert any(".indexer.wk" in name for name in wanted) and any(".kv_b_proj" in name for name in wanted)
    _compare(ours, wanted)
    for layer in range(3):
        kept, by_triton = (c.records[layer].kept_BQK for c in contexts)
        assert kept is not None and by_triton is not None
        mask = contexts[0].query_mask()
        assert torch.equal(kept[mask], by_triton[mask].long()), f"layer {layer} keeps other keys"
