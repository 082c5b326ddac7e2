"""Weights from a learner to an engine in another process: seconds of a sync by every way, leaks, and one cut half-way.

    python benchmarks/weight_sync.py --out sync.json                     # one GPU, 1 billion weights in bf16
    python benchmarks/weight_sync.py --out sync.json --device cpu --layers 1 --hidden 256 --syncs 20

Two processes with the same model and other weights. A sync is what a training step waits for: the offer (buffer and
checksum), the way, and `take` with its checks before and after the copy. Broadcast needs a second GPU for the engine; with one
GPU it is left out, and said so. Memory is resident host memory of both processes and what the GPUs have in use.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.model.transport import Audience, Receiver, Sender
from posttrain.model.weights import checksum, take

WARM = 5
"""Syncs before the first look at the memory."""


def main() -> None:
    """Run both processes and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument(
        "--syncs", type=int, default=100, help="of the fastest way; a tenth of it of the others"
    )
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine_device = _engine_device(args.device)
    engine = context.Process(target=_engine, args=(theirs, engine_device, args.layers, args.hidden))
    engine.start()
    try:
        rows = _learner(ours, args)
    finally:
        ours.close()
        engine.join(60)
        engine.kill()
    args.out.write_text(json.dumps({"argv": sys.argv[1:], "rows": rows}, indent=2))


def _engine_device(device: str) -> str:
    """The second GPU if there is one: broadcast then works, ipc does not."""
    return "cuda:1" if device == "cuda" and torch.cuda.device_count() > 1 else device


def _model(device: str, layers: int, hidden: int, *, seed: int) -> DeepseekV32ForCausalLM:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 32_768, "hidden_size": hidden, "intermediate_size": 4 * hidden, "moe_intermediate_size": hidden // 2,
        "num_hidden_layers": layers, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 768,
        "index_n_heads": 32,
    }  # fmt: skip
    with torch.device(device):
        model = DeepseekV32ForCausalLM(DeepseekV32Config(**shape))
    return model.to(device=device, dtype=torch.bfloat16)  # type: ignore[no-any-return, call-overload]


def _engine(pipe: Connection, device: str, layers: int, hidden: int) -> None:
    """Take what is offered until the pipe closes; answers each offer with what happened."""
    model = _model(device, layers, hidden, seed=1)
    receiver = Receiver(torch.device(device), index=0, timeout_s=60)
    pipe.send(receiver.gpu)
    while True:
        try:
            offer = pipe.recv()
        except EOFError:
            return
        try:
            take(model, receiver.accept([offer]))
            answer = "taken"
        except ValueError as error:
            answer = str(error)
        pipe.send((answer, checksum(model.state_dict())))


def _learner(pipe: Connection, args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    model = _model(str(device), args.layers, args.hidden, seed=2)
    num = sum(tensor.numel() for tensor in model.state_dict().values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{num / 1e9:.2f} billion weights in bf16, {len(model.state_dict())} tensors, {name}", flush=True)
    gpu = pipe.recv()
    rows = [_checksums(model, device)]
    with tempfile.TemporaryDirectory() as folder:
        for way in ("ipc", "broadcast", "disk", "memory"):
            sender = Sender(device, host="127.0.0.1", folder=Path(folder), timeout_s=60)
            audience = Audience(engines=(gpu,), ranks=(sender.gpu,), choice=way)  # type: ignore[arg-type]
            try:
                audience.routes()
            except ValueError as error:
                rows.append({"way": way, "impossible": str(error)})
                print(rows[-1], flush=True)
                continue
            syncs = args.syncs if way in ("ipc", "broadcast") else max(WARM + 2, args.syncs // 10)
            rows.append(_way(way, sender, audience, model, pipe, syncs))
            print(json.dumps(rows[-1]), flush=True)
            if way == "ipc":
                rows.append(_cut(sender, audience, model, pipe))
                print(json.dumps(rows[-1]), flush=True)
            sender.close()
    return rows


def _checksums(model: DeepseekV32ForCausalLM, device: torch.device) -> dict[str, Any]:
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        checksum(model.state_dict())  # its result is on the host: nothing is left to wait for
        seconds.append(time.perf_counter() - began)
    row = {"checksum_s": statistics.median(seconds[1:]), "device": str(device)}
    print(json.dumps(row), flush=True)
    return row


def _way(
    way: str, sender: Sender, audience: Audience, model: DeepseekV32ForCausalLM, pipe: Connection, syncs: int
) -> dict[str, Any]:
    seconds, memory = [], []
    for i in range(syncs):
        with torch.no_grad():
            model.lm_head.weight[0, 0] = i  # other weights every time
        began = time.perf_counter()
        weights = model.state_dict()
        offer = sender.offer(weights, weights.items(), audience, rank=0)
        pipe.send(offer)
        answer, held = pipe.recv()
        seconds.append(time.perf_counter() - began)
        assert answer == "taken" and held == offer.checksum, answer
        if i in (WARM, syncs - 1):
            memory.append(_memory())
    return {
        "way": way,
        "syncs": syncs,
        "median_s": statistics.median(seconds[1:]),
        "slowest_s": max(seconds[1:]),
        "first_s": seconds[0],
        f"memory_after_{WARM}": memory[0],
        f"memory_after_{syncs}": memory[-1],
    }


def _cut(
    sender: Sender, audience: Audience, model: DeepseekV32ForCausalLM, pipe: Connection
) -> dict[str, Any]:
    """The learner dies, or goes on, in the middle of filling its buffer: the engine must see a mixture and refuse it."""
    weights = model.state_dict()
    pipe.send(sender.offer(weights, weights.items(), audience, rank=0))
    _, before = pipe.recv()
    offer = sender.offer(weights, weights.items(), audience, rank=0)
    assert sender._buffer is not None, "ipc has a buffer"
    sender._buffer[len(sender._buffer) // 2 :] = 0
    torch.cuda.synchronize()
    pipe.send(offer)
    answer, held = pipe.recv()
    assert "checksum is not the learner's" in answer and held == before, (answer, held, before)
    return {"way": "ipc", "cut_half_way": answer, "engine_unchanged": held == before}


def _memory() -> dict[str, float]:
    """GiB of both processes, and of the GPUs in use by whomever."""
    me = psutil.Process()
    found = {"host": sum(p.memory_info().rss for p in [me, *me.children()]) / 2**30}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found[f"gpu{i}"] = (total - free) / 2**30
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
