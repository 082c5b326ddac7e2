"""Whole layers, training steps and decoding steps on a GPU, beside those of others: `python benchmarks/kernel_layers.py`.

| part | what | beside |
|---|---|---|
| hf | one attention layer with its projections, forward + backward without KL, and peak memory | transformers' DeepseekV32Attention (sdpa), whose indexer runs without gradients |
| step | what training does between the projections, 4096 queries | the sum of the peers' kernels (kernel_peers.py) |
| dense | the same on whole documents: from which length on it is faster | dense multi-head attention 192/128 by cuDNN |
| decode | scores + top-k + attention of a step, batch 64, CUDA graph | the roofline, the peers' chain |

Method: that of kernels.py, a check of the results before the times. What fails is printed and the rest goes on; then the
exit code is 1. --tiny tries every line without a GPU, in Triton's interpreter: TRITON_INTERPRET=1. Results: kernels.md.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kernel_decode as decoding
import kernel_peers as peers
import kernel_steps as steps
import torch
import triton
from kernel_cases import DEVICE, FULL, TINY, Gate, Geometry, Table, length_name, normal
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from posttrain.kernels.backend import Backend
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.model.context import PackedContext
from posttrain.model.rope import unit_circle

LENGTHS = {
    "hf": [8192, 16384, 131072],
    "step": [32768, 131072],
    "dense": [16384, 20480, 24576, 26624, 32768, 65536],
    "decode": [32768],
}
TINY_LENGTHS = {"hf": [48, 64], "step": [64], "dense": [20, 24], "decode": [96]}
HF_LONGEST = 16384
"""Its memory grows with the square: 132 GiB here."""


def main() -> None:
    """Measure, print, write; exit code 1 if something failed."""
    parts: dict[str, Callable[[Geometry, Sequence[int], Sequence[int]], dict[str, Any]]] = {
        "hf": layers, "step": steps.whole_step, "dense": steps.crossover, "decode": decoding.decode
    }  # fmt: skip
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    options.add_argument("--heads", type=int, nargs="+", default=[128, 64])
    options.add_argument("--lengths", type=int, nargs="+", help="instead of those of the part")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    chosen = args.parts or [*parts]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "missing": peers.missing(),
    }
    print(report, flush=True)
    heads, lengths = ([4], TINY_LENGTHS) if args.tiny else (args.heads, LENGTHS)
    for part in chosen:
        try:
            report[part] = parts[part](TINY if args.tiny else FULL, heads, args.lengths or lengths[part])
        except Exception as error:  # a check that failed, or no memory: the other parts still tell something
            traceback.print_exc()
            report[part] = {"failed": [f"{type(error).__name__}: {error}"[:300]]}
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    if failed := [f"{part}: {case}" for part in chosen for case in _failures(report[part])]:
        raise SystemExit("failed: " + "; ".join(failed))


def _failures(report: dict[str, Any]) -> list[str]:
    own = [str(name) for name in report.get("failed", [])]
    inner = {name: case for name, case in report.items() if isinstance(case, dict)}
    return own + [f"{name} {each}" for name, case in inner.items() for each in _failures(case)]


def layers(size: Geometry, heads: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Our layer and transformers' with the same weights; ours alone where the other needs too much memory."""
    report: dict[str, Any] = {}
    for num_heads in heads:
        ours, rope, stock = _layers(size, num_heads, max(lengths))
        report[f"gate H={num_heads}"] = _same(ours, stock, rope, size)
        for length in lengths:
            table = Table(f"layer H={num_heads} {length_name(length)}")
            peaks = {}
            for name, layer in (("transformers", stock), ("ours", ours)):
                if name == "transformers" and length > HF_LONGEST:
                    continue
                run = _run(layer, rope, length, size)
                repeats = 3 if length > 8192 else 5
                table.add(name, run, 0.0, repeats=repeats)
                if name in table.rows:
                    peaks[name] = table.rows[name]["peak_gib"] = _peak_gib(run)
                del run
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
            report[table.name] = {"rows": table.rows, "failed": table.failed}
            if len(peaks) == 2:
                ratio = table.rows["transformers"]["ms"] / table.rows["ours"]["ms"]
                print(f"{table.name:16s} transformers / ours: time {ratio:.2f}", flush=True)
            print(f"{table.name:16s} peak GiB beside the weights: {peaks}", flush=True)
    return report


def _layers(size: Geometry, heads: int, longest: int) -> tuple[Any, Any, Any]:
    """Our attention of a model of one layer, its rotary embedding, and transformers' attention with its weights."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=64, hidden_size=size.hidden, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=size.latent, q_lora_rank=size.query_latent,
        qk_nope_head_dim=size.nope, qk_rope_head_dim=size.rotary, v_head_dim=size.nope,
        max_position_embeddings=longest, index_topk=size.kept, index_n_heads=size.index_heads,
        index_head_dim=size.index_size, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = DeepseekV32ForCausalLM(config)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    ours = model.model.layers[0].self_attn.to(DEVICE, dtype)
    config._attn_implementation = "sdpa"
    stock = hf.DeepseekV32Attention(config, 0).to(DEVICE, dtype)
    stock.load_state_dict(ours.state_dict())
    return ours, model.model.rotary_emb.to(DEVICE), stock


def _run(layer: Any, rotary: Any, length: int, size: Geometry) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the output, the gradients of the input and of every weight but the indexer's."""
    weights = [p for _, p in _weights(layer)]
    dtype = weights[0].dtype
    x_TD, do_TD = (normal(length, size.hidden, seed=seed, dtype=dtype) for seed in (1, 2))
    positions_T = torch.arange(length, device=DEVICE)
    rope = unit_circle(rotary, positions_T)
    backend = Backend(name="triton" if DEVICE == "cuda" else "torch", reason="benchmark")
    starts = torch.tensor([0, length], device=DEVICE)

    def stock() -> tuple[Tensor, ...]:
        x = x_TD.clone().requires_grad_()
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
        embeddings = rotary(x_TD, positions_T[None])
        o_TD = layer(x[None], embeddings, mask, position_ids=positions_T[None])[0][0]
        return o_TD.detach(), *torch.autograd.grad(o_TD, (x, *weights), do_TD)

    def ours() -> tuple[Tensor, ...]:
        x = x_TD.clone().requires_grad_()
        context = PackedContext(attention="sparse", backend=backend, cu_seqlens_S=starts)
        o_TD = layer(x, rope, context)
        return o_TD.detach(), *torch.autograd.grad(o_TD, (x, *weights), do_TD)

    return stock if type(layer) is hf.DeepseekV32Attention else ours


def _weights(layer: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """All but the indexer's, by name."""
    return [(name, p) for name, p in layer.named_parameters() if not name.startswith("indexer.")]


def _same(ours: Any, stock: Any, rotary: Any, size: Geometry) -> dict[str, Any]:
    """Relative distances of output and gradients while all keys are kept, and where two thirds are left out.

    There a key kept more or less in a thousand, where rounding decides, already moves the sum of random values by 4 %.
    """
    gate = Gate("gate, distance to transformers'")
    names = ["o", "dx", *(name.removesuffix(".weight") for name, _ in _weights(stock))]
    for length, at_most in ((size.kept, 0.05), (3 * size.kept, 0.3)):
        found = (_run(layer, rotary, length, size)() for layer in (ours, stock))
        for name, a, b in zip(names, *found, strict=True):
            gate.at_most(
                f"{name}, {length}", float((a.double() - b.double()).norm() / b.double().norm()), at_most
            )
    return gate.report()


def _peak_gib(run: Callable[[], Any]) -> float:
    """Of one run, what was allocated before not counted."""
    if DEVICE == "cpu":
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    main()
