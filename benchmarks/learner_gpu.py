"""The learner's phase of a GRPO step on one GPU: seconds, share of the matmul rate that the card reaches, peak memory.

    python benchmarks/learner_gpu.py --out results.json [--profile] [--cases short,long]

A DSA/MoE model of 0.6 B parameters (the attention of DeepSeek-V3.2 with 16 heads), random weights and tokens. "short":
64 prompts of 128 tokens x 8 completions of 512; "long": 4 prompts of 8k to 16k x 8, where the selection leaves something
out; "apart": without running a prompt once for all its completions. One update, from batches on the host to weights that
have moved. FLOPs are the model's for the tokens that are run, three times those of the forward pass: nothing for what is
computed twice. `--tiny` tries the script on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain import config, packing, prefixes
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.schema import Batch, Sample
from posttrain.toy import tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 512,
    "num_hidden_layers": 16, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 512, "q_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 32_768,
}  # fmt: skip
TINY = SHAPE | {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 48, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The sequences of one step: groups of completions of one length."""

    num_prompts: int
    prompt: tuple[int, int]
    """Shortest and longest."""
    completion: int
    train: frozenset[str]
    share_prompts: bool = True


BOTH, MODEL = frozenset({"model", "indexer"}), frozenset({"model"})
GROUP = 8
CASES = {
    "short": Case(64, (128, 128), 512, BOTH),
    "short, indexer frozen": Case(64, (128, 128), 512, MODEL),
    "short, apart": Case(64, (128, 128), 512, BOTH, share_prompts=False),
    "long": Case(4, (8192, 16_384), 512, BOTH),
    "long, indexer frozen": Case(4, (8192, 16_384), 512, MODEL),
    "long, apart": Case(4, (8192, 16_384), 512, BOTH, share_prompts=False),
}


def main() -> None:
    """Measure all cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=";".join(CASES), help="separated by ';'")
    parser.add_argument("--microbatch", type=int, default=32_768, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also print where the time of one step goes")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    shape = TINY if args.tiny else SHAPE
    rate = _matmul_rate(256 if args.tiny else 8192)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = tokenizer.build()
        model = DeepseekV32ForCausalLM(DeepseekV32Config(**shape, eos_token_id=words.eos_token_id))
        checkpoint.save(model.bfloat16(), folder, words)
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters; matmul {rate / 1e12:.0f} TFLOP/s"
        )
        del model
        for name in args.cases.split(";"):
            case = CASES[name]
            if args.tiny:
                case = replace(case, num_prompts=2, prompt=(40, 60), completion=20)
            row = {"case": name, "matmul_flops": rate, **_measure(folder, shape, case, rate, args)}
            results.append(row)
            print(json.dumps(row), flush=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


def _measure(folder: Path, shape: dict[str, Any], case: Case, rate: float, args: Any) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    learner = Learner(
        Setup(
            checkpoint=folder,
            attention="sparse",
            optimizer=config.Optimizer(lr=1e-6),
            total_steps=100,
            train=case.train,
            indexer_loss="sparse" if "indexer" in case.train else "none",
            sharding=config.Sharding(recompute=args.recompute),
            device="cuda" if cuda else "cpu",
            dtype="bfloat16",
            share_prompts=case.share_prompts,
        )
    )
    batches = _batches(shape, case, args.microbatch)
    _sync()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        figures, _ = learner.grpo_step(batches, config.Loss(), 1.0)
        _sync()
        times.append(time.perf_counter() - began)
    assert "skipped" not in figures and np.isfinite(figures["loss"]), figures
    seconds = statistics.median(times[1:])
    shared = [prefixes.common(b) if case.share_prompts else None for b in batches]
    flops = _flops(shape, batches, shared, index="indexer" in case.train)
    found = {
        "tokens": sum(len(b.tokens_T) for b in batches),
        "tokens_run": sum(
            len(b.tokens_T if s is None else s.place_T) for b, s in zip(batches, shared, strict=True)
        ),
        "micro_batches": len(batches),
        "s": seconds,
        "s_steps": times,
        "model_tflops": flops / seconds / 1e12,
        "share_of_matmul": flops / seconds / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    if args.profile:
        _profile(lambda: learner.grpo_step(batches[:2], config.Loss(), 1.0))
    return found


def _batches(shape: dict[str, Any], case: Case, microbatch: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    samples = []
    for group in range(case.num_prompts):
        prompt = rng.integers(6, shape["vocab_size"], int(rng.integers(case.prompt[0], case.prompt[1] + 1)))
        for i in range(GROUP):
            length = len(prompt) + case.completion
            completion = rng.integers(6, shape["vocab_size"], case.completion)
            samples.append(
                Sample(
                    id=f"{group}#{i}",
                    tokens=np.concatenate([prompt, completion]).astype(np.int32),
                    mask=np.arange(length) >= len(prompt),
                    logprobs=np.full(length, -10.0, np.float32),
                    advantage=float(rng.normal()),
                    group_size=GROUP,
                )
            )
    weights = packing.token_weights(samples, "sequence", num_groups=case.num_prompts)
    return packing.pack(samples, weights, tokens_per_batch=microbatch)


def _flops(
    shape: dict[str, Any], batches: list[Batch], shared: list[prefixes.Prefixes | None], *, index: bool
) -> float:
    """Of the model: 3 x forward; multi-head attention up to top-k keys, absorbed beyond; scores of the indexer once."""
    s = shape
    heads, latent, rope = s["num_attention_heads"], s["kv_lora_rank"], s["qk_rope_head_dim"]
    nope, value, hidden = s["qk_nope_head_dim"], s["v_head_dim"], s["hidden_size"]
    projections = hidden * (s["q_lora_rank"] + latent + rope) + heads * value * hidden
    projections += heads * (s["q_lora_rank"] * (nope + rope) + latent * (nope + value))
    expert = 3 * hidden * s["moe_intermediate_size"]
    moe = (s["n_shared_experts"] + s["num_experts_per_tok"]) * expert + hidden * s["n_routed_experts"]
    layers, dense = s["num_hidden_layers"], s["first_k_dense_replace"]
    per_token = layers * projections + dense * 3 * hidden * s["intermediate_size"] + (layers - dense) * moe
    indexer = layers * (
        s["q_lora_rank"] * s["index_n_heads"] * s["index_head_dim"]
        + hidden * (s["index_head_dim"] + s["index_n_heads"])
    )
    forward, once, topk = 0.0, 0.0, s["index_topk"]
    for batch, found in zip(batches, shared, strict=True):
        keys = (batch.positions_T if found is None else batch.positions_T[found.place_T]).astype(float) + 1
        pairs = keys[keys <= topk].sum() * (nope + rope + value) + (keys > topk).sum() * topk * (
            2 * latent + rope
        )
        forward += 2 * len(keys) * (per_token + index * indexer) + 2 * layers * heads * pairs
        forward += 2 * int(batch.mask_T.sum()) * hidden * s["vocab_size"]
        once += 2 * layers * keys[keys > topk].sum() * s["index_n_heads"] * s["index_head_dim"]
    return 3 * forward + once


def _matmul_rate(size: int) -> float:
    """FLOP/s of a bf16 product, the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _sync()
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        _sync()
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * size**3 / best


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _profile(step: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        _sync()
    rows = [
        (e.key, e.self_device_time_total / 1e3, e.count)
        for e in found.key_averages()
        if "CUDA" in str(e.device_type)
    ]
    print(f"kernels {sum(ms for _, ms, _ in rows):.0f} ms")
    for key, ms, count in sorted(rows, key=lambda row: -row[1])[:24]:
        print(f"  {ms:8.1f} ms {count:6d}  {key[:100]}", flush=True)


if __name__ == "__main__":
    main()
