"""What the ways to hold a model on one or two GPUs cost: seconds of a learner's phase, memory of device and host.

    python benchmarks/sharding_gpu.py --out results.json                  # all ways that this machine has GPUs for
    python benchmarks/sharding_gpu.py --out results.json --ways "one" "one, offload"
    python benchmarks/sharding_gpu.py --out results.json --tiny           # two processes on a CPU, over gloo

The model of learner_gpu.py with 32 experts (0.9 B parameters), bf16; GRPO updates on 8 prompts x 8 completions of 128 + 512
tokens for each GPU, indexers frozen. Every way runs in processes of its own, one for each GPU. Next: learner_gpu.py.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from learner_gpu import CASES, SHAPE, TINY, _batches

from posttrain import config
from posttrain.group import Group, Place
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.toy import tokenizer

WAYS: dict[str, Mapping[str, Any]] = {
    "one": {},
    "one, recompute": {"recompute": True},
    "one, offload": {"offload": True},
    "one, offload, recompute": {"offload": True, "recompute": True},
    "two": {"ranks": 2},
    "two, whole layers": {"ranks": 2, "reshard": False},
    "two, mixed precision": {"ranks": 2, "mixed_precision": True},
    "two, spread experts": {"ranks": 2, "spread_experts": True},
    "two, share batches": {"ranks": 2, "context": 2},
    "two, offload": {"ranks": 2, "offload": True},
}
PROMPTS = 8
"""For each GPU."""


def main() -> None:
    """Measure the ways one after another and print a line for each."""
    args = _parser().parse_args()
    if args.folder:
        _rank(args)
        return
    have = 2 if args.tiny else torch.cuda.device_count()
    ways = [way for way in args.ways or WAYS if WAYS[way].get("ranks", 1) <= have]
    if args.tiny:
        ways = [way for way in ways if "offload" not in way]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(folder, _shape(args))
        for way in ways:
            rows.append(row := _measure(args, folder, way))
            print(_line(row), flush=True)
            args.out.write_text(json.dumps(rows, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--ways", nargs="+", choices=WAYS)
    options.add_argument("--experts", type=int, default=32)
    options.add_argument("--microbatch", type=int, default=20_480, help="tokens")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--timeout", type=int, default=150, help="seconds of one way")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--folder", type=Path, help="of the checkpoint: one process of one way")
    options.add_argument("--rank", type=int)
    options.add_argument("--port", type=int)
    return options


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    return TINY if args.tiny else SHAPE | {"n_routed_experts": args.experts}


def _write(folder: Path, shape: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    words = tokenizer.build()
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**shape, eos_token_id=words.eos_token_id))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters", flush=True)
    checkpoint.save(model.bfloat16(), folder, words)


def _measure(args: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    """Start the processes of a way; what the first has found, or why it failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--port", str(port)]
    command += ["--ways", way]
    ranks = []
    for rank in range(WAYS[way].get("ranks", 1)):
        env = os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)}
        more = ["--rank", str(rank), "--out", str(folder / f"rank-{rank}.json")]
        ranks.append(
            subprocess.Popen(
                [*command, *more], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        texts = [rank.communicate(timeout=args.timeout)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
        return {"way": way, "failed": f"not done in {args.timeout} s"}
    if any(rank.returncode for rank in ranks):
        return {"way": way, "failed": "\n".join(texts)[-3000:]}
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(ranks))]
    return found[0] | {"peak_gib": [row["peak_gib"] for row in found]}


def _rank(args: argparse.Namespace) -> None:
    """One process of a way."""
    (way,) = args.ways
    sharding = config.Sharding(**WAYS[way])
    device = "cpu" if args.tiny else "cuda"
    group = None
    if sharding.wrapped:
        place = Place(rank=args.rank, size=sharding.ranks, address=f"tcp://127.0.0.1:{args.port}")
        group = Group(place, device=device, timeout_s=args.timeout, context=sharding.context)
    learner = Learner(
        Setup(
            checkpoint=args.folder,
            attention="sparse",
            optimizer=config.Optimizer(lr=1e-6),
            total_steps=100,
            train=frozenset({"model"}),
            sharding=sharding,
            device=device,
            dtype="bfloat16",
        ),
        group,
    )
    case = replace(CASES["short, indexer frozen"], num_prompts=PROMPTS * sharding.ranks)
    if args.tiny:
        case = replace(case, num_prompts=2 * sharding.ranks, prompt=(20, 30), completion=10)
    batches = _batches(_shape(args), case, 200 if args.tiny else args.microbatch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        figures, _ = learner.grpo_step(batches, config.Loss(), 1.0)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    assert "skipped" not in figures, figures
    found = {
        "way": way,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tokens": sum(len(b.tokens_T) for b in batches),
        "micro_batches": len(batches),
        "s": statistics.median(times[1:]),
        "s_steps": times,
        "loss": figures["loss"],
        "grad_norm": figures["grad_norm/model"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
        "host_gib": psutil.Process().memory_info().rss / 2**30,
    }
    args.out.write_text(json.dumps(found))
    if group is not None:
        group.close()


def _line(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{row['way']:26s}FAILED: {row['failed'].splitlines()[-1][:200]}"
    peaks = " ".join(f"{peak:6.2f}" for peak in row["peak_gib"])
    return (
        f"{row['way']:26s}{row['tokens'] / row['s']:9.0f} tokens/s  {row['s']:7.3f} s  device GiB {peaks:14s}"
        f"host GiB {row['host_gib']:6.2f}  grad norm {row['grad_norm']:.6g}"
    )


if __name__ == "__main__":
    main()
