"""Our model in vLLM against vLLM's own DeepSeek-V3.2, on one GPU: the same random weights, requests and version of vLLM.

    python benchmarks/vllm_rollouts.py --out results.json --sizes 64x4096 16x32768
    python benchmarks/vllm_rollouts.py --out gaps.json --sizes 4x4096 2x32768 --new 64 --gaps
    python benchmarks/vllm_rollouts.py --out bits.json --sizes 8x4096 --deterministic --sides ours

Each side runs in a process of its own, with CUDA graphs and without the prefix cache. Speed: greedy; of each size
all is generated twice and the first time thrown away, because a library takes milliseconds to load a kernel for a shape that
it has not met; beside it, how long passes with prompts and passes that only decode took. --gaps: tokens are sampled and their log-probs, as decoding gave them, compared with those of the
learner, which is our model in bf16 in one packed pass. --profile: also which kernels a prompt pass and a decoding step spend
their time in. Index scores are in e4m3 on both sides, as vLLM's own always are;
--index-dtype model: ours in bf16. --deterministic: one more side, where products and kernels do not see the
batch, with its speed; one prompt is then generated 1, 8, 64 and 65 times, on this side and on ours without it; with
--gaps the learner that it is compared with is deterministic, too. Sizes: the
attention of DeepSeek-V3.2 (64 heads, 512 + 64, index 128, top-k 2048) with few, narrow layers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

SHAPE = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
    "num_hidden_layers": 8, "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 512, "q_lora_rank": 1024, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 40_960,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
SIZES = ("64x4096", "64x8192", "16x32768", "8x4096")
"""Requests and prompt tokens."""
REPEATS = (1, 8, 64, 65)
KERNELS = 16
"""That --profile prints."""


def main() -> None:
    """Run the sides and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="REQUESTSxPROMPT")
    parser.add_argument("--new", type=int, default=256, help="tokens generated of each request")
    parser.add_argument("--sides", nargs="*", choices=("ours", "stock"), default=("ours", "stock"))
    parser.add_argument("--gaps", action="store_true", help="against the learner, instead of speed")
    parser.add_argument("--profile", action="store_true", help="also the kernels of prompts and of a step")
    parser.add_argument("--deterministic", action="store_true", help="one more side, and repeated prompts")
    parser.add_argument(
        "--init-range", type=float, default=0.05, help="of the weights; larger has more opinions"
    )
    parser.add_argument(
        "--index-dtype", choices=("e4m3", "model"), default="e4m3", help="what our index scores are made from"
    )
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's that an engine takes")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds of one side")
    parser.add_argument("--side", help="what one process runs")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        run = _learner if args.side == "learner" else _side
        args.out.write_text(json.dumps(run(args)))
        return
    sides = [*args.sides, *(["deterministic"] if args.deterministic else [])]
    results: dict[str, Any] = {"argv": sys.argv[1:]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(folder / "model", args.init_range, args.index_dtype)
        for side in [*sides, *(["learner"] if args.gaps else [])]:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
            command += ["--out", str(folder / f"{side}.json")]
            done = subprocess.run(command, check=False, timeout=args.timeout)
            if done.returncode:
                print(f"{side}: failed with {done.returncode}", flush=True)
                continue
            results[side] = json.loads((folder / f"{side}.json").read_text())
            args.out.write_text(json.dumps(results, indent=2))  # a later side may fail
    _print(results, [side for side in sides if side in results])


def _print(results: dict[str, Any], sides: list[str]) -> None:
    if "learner" in results:
        for row in results["learner"]:
            print(row)
        return
    for i, size in enumerate(row["size"] for row in results[sides[0]]["speed"]):
        speeds = {side: results[side]["speed"][i]["tokens_per_s"] for side in sides}
        text = ", ".join(f"{side} {speed:.0f} tok/s" for side, speed in speeds.items())
        if {"ours", "stock"} <= speeds.keys():
            text += f"; ours is {speeds['ours'] / speeds['stock']:.2f}x of stock"
        if {"ours", "deterministic"} <= speeds.keys():
            text += f"; deterministic is {speeds['deterministic'] / speeds['ours']:.2f}x of ours"
        print(f"{size}: {text}")
    for side in sides:
        for row in results[side].get("repeated", []):
            print(side, row)


def _write(folder: Path, init_range: float, index_dtype: str) -> None:
    import torch

    from posttrain.model import checkpoint
    from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV32Config(**SHAPE, initializer_range=init_range, index_dtype=index_dtype)
    checkpoint.save(DeepseekV32ForCausalLM(config).bfloat16(), folder)


def _side(args: argparse.Namespace) -> dict[str, Any]:
    llm = _engine(args)
    found: dict[str, Any] = {}
    if args.gaps:
        found["sampled"] = _sampled(llm, args)
    else:
        found["speed"] = [_speed(llm, args, *size) for size in _sizes(args.sizes)]
    if args.deterministic and not args.gaps:
        found["repeated"] = _repeated(llm, args)
    if args.profile:
        found["profile"] = [_profile(llm, args, *size) for size in _sizes(args.sizes)]
    return found


def _engine(args: argparse.Namespace) -> Any:
    from posttrain.rollouts.vllm import plugin

    deterministic = args.side == "deterministic"
    # Not launch.environment: it also turns off what the stock model may compile.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_USE_FLASHINFER_SAMPLER="0",
    )
    from vllm import LLM

    plugin.register()  # the folder need not be installed
    settings: dict[str, Any] = {"tokenizer_mode": "hf"}
    if args.side != "stock":
        settings = {
            "hf_overrides": plugin.OVERRIDES,
            "additional_config": {"backend": "auto", "deterministic": deterministic},
        }
    longest = max(length for _, length in _sizes(args.sizes)) + args.new + 16
    if deterministic:  # whole prompts, as VllmEngine has it
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, longest)}
    return LLM(
        str(args.folder / "model"), skip_tokenizer_init=True, dtype="bfloat16", block_size=64, max_num_seqs=72,
        max_model_len=longest, gpu_memory_utilization=args.memory, enable_prefix_caching=False, async_scheduling=False,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        **({"max_num_batched_tokens": 8192} | settings),
    )  # fmt: skip


def _sizes(texts: list[str]) -> list[tuple[int, int]]:
    return [(int(requests), int(length)) for requests, _, length in (text.partition("x") for text in texts)]


def _prompts(requests: int, length: int) -> list[Any]:
    import numpy as np

    rng = np.random.default_rng(length)
    return [
        {"prompt_token_ids": rng.integers(6, SHAPE["vocab_size"], length).tolist()} for _ in range(requests)
    ]


def _speed(llm: Any, args: argparse.Namespace, requests: int, length: int) -> dict[str, Any]:
    import torch
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = _prompts(requests, length)
    walls_s: list[float] = []
    for _ in range(2):
        with _Passes(llm.llm_engine) as passes:
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            torch.cuda.synchronize()
            walls_s.append(time.perf_counter() - began)
    wall_s = walls_s[-1]
    row = {"size": f"{requests}x{length}", "wall_s": wall_s, "tokens_per_s": requests * args.new / wall_s}
    row |= {"first_s": walls_s[0], "passes": passes.figures(), "device": torch.cuda.get_device_name()}
    print(args.side, row, flush=True)
    return row


class _Passes:
    """How long an engine's passes take, and how long the host is in the model of them."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._runner = engine, engine.model_executor.driver_worker.worker.model_runner
        self._seconds: dict[str, list[tuple[float, float]]] = {"with prompts": [], "decoding": []}
        self._found: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._step, self._execute = self._engine.step, self._runner.execute_model
        self._engine.step, self._runner.execute_model = self._timed_step, self._timed_execute
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.step, self._runner.execute_model = self._step, self._execute

    def _timed_step(self) -> Any:
        began, self._found = time.perf_counter(), None
        outputs = self._step()
        if self._found is not None:
            kind, in_model_s = self._found
            self._seconds[kind].append((time.perf_counter() - began, in_model_s))
        return outputs

    def _timed_execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = self._execute(scheduled, *args, **kwargs)
        num, rows = scheduled.total_num_scheduled_tokens, len(scheduled.num_scheduled_tokens)
        if rows:
            self._found = ("decoding" if num == rows else "with prompts"), time.perf_counter() - began
        return output

    def figures(self) -> dict[str, dict[str, float]]:
        """Milliseconds by kind of pass."""
        return {
            kind: {
                "count": len(found),
                "ms_median": 1e3 * statistics.median(step for step, _ in found),
                "ms_mean": 1e3 * statistics.mean(step for step, _ in found),
                "ms_in_model": 1e3 * statistics.median(host for _, host in found),
            }
            for kind, found in self._seconds.items()
            if found
        }


def _profile(
    llm: Any, args: argparse.Namespace, requests: int, length: int, steps: int = 32
) -> dict[str, Any]:
    """Milliseconds by kernel: of all prompts, and of one decoding step."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    prompts = _prompts(requests, length)
    found: list[dict[str, float]] = []
    for new in (1, 1 + steps):
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        with profile(activities=[ProfilerActivity.CUDA]) as run:
            llm.generate(prompts, params, use_tqdm=False)
            torch.cuda.synchronize()
        on_gpu = (e for e in run.key_averages() if "CUDA" in str(e.device_type))
        found.append({e.key: e.self_device_time_total / 1e3 for e in on_gpu})
    once, more = found
    a_step = {key: (ms - once.get(key, 0.0)) / steps for key, ms in more.items()}
    for what, rows in (("prompts", once), ("a step", a_step)):
        print(f"{args.side} {requests}x{length}, {what}: kernels {sum(rows.values()):.2f} ms", flush=True)
        for key, ms in sorted(rows.items(), key=lambda row: -row[1])[:KERNELS]:
            print(f"  {ms:10.3f} ms  {key[:90]}", flush=True)
    return {"size": f"{requests}x{length}", "prompts_ms": once, "step_ms": a_step}


def _sampled(llm: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens sampled at temperature 1 and their log-probs."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=args.new, temperature=1.0, ignore_eos=True, detokenize=False, logprobs=0
    )
    rows = []
    for requests, length in _sizes(args.sizes):
        for prompt, output in zip(
            prompts := _prompts(requests, length), llm.generate(prompts, params, use_tqdm=False), strict=True
        ):
            tokens = list(output.outputs[0].token_ids)
            logps = [
                found[token].logprob for token, found in zip(tokens, output.outputs[0].logprobs, strict=True)
            ]
            rows.append(
                {
                    "size": f"{requests}x{length}",
                    "prompt": prompt["prompt_token_ids"],
                    "tokens": tokens,
                    "logps": logps,
                }
            )
    return rows


def _repeated(llm: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whether one prompt has the same tokens and log-probs in every batch, greedy."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=args.new, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0
    )
    (prompt,) = _prompts(1, _sizes(args.sizes)[0][1])
    first: Any = None
    rows = []
    for num in REPEATS:
        answers = []
        for output in llm.generate([prompt] * num, params, use_tqdm=False):
            tokens = tuple(output.outputs[0].token_ids)
            found = output.outputs[0].logprobs
            answers.append(
                (tokens, tuple(at[token].logprob for token, at in zip(tokens, found, strict=True)))
            )
        first = first or answers[0]
        rows.append(
            {
                "batch": num,
                "same_tokens": sum(answer[0] == first[0] for answer in answers),
                "same_logprobs": sum(answer == first for answer in answers),
            }
        )
    return rows


def _learner(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Gaps between each side's log-probs and those of one packed pass of our model over the same tokens."""
    import numpy as np
    import torch

    from posttrain.gaps import gap_figures
    from posttrain.model import checkpoint
    from posttrain.model.context import PackedContext

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoint.load(args.folder / "model", dtype=torch.bfloat16, device=device)
    rows: list[dict[str, Any]] = []
    for side in (
        side for side in ("ours", "stock", "deterministic") if (args.folder / f"{side}.json").exists()
    ):
        gaps: dict[str, list[Any]] = {}
        backend = model.backend("auto", deterministic=side == "deterministic")
        print(f"learner of {side}: {backend}", flush=True)
        for row in json.loads((args.folder / f"{side}.json").read_text())["sampled"]:
            tokens = torch.tensor(row["prompt"] + row["tokens"], device=device)
            ends = torch.tensor([0, len(tokens)], device=device)
            context = PackedContext(attention="sparse", backend=backend, cu_seqlens_S=ends)
            at = torch.arange(len(row["prompt"]) - 1, len(tokens) - 1, device=device)
            with torch.no_grad():
                logp = model(tokens, context, at).log_softmax(-1).gather(1, tokens[at + 1, None])[:, 0]
            gaps.setdefault(row["size"], []).append(np.array(row["logps"], np.float32) - logp.cpu().numpy())
        for size, found in gaps.items():
            figures = gap_figures(np.concatenate(found))
            rows.append({"side": side, "size": size, "tokens": sum(map(len, found))} | figures)
    means = {(row["side"], row["size"]): row["gap_mean"] for row in rows}
    for row in rows:
        stock = means.get(("stock", row["size"]))
        if stock and row["side"] != "stock":
            row["of_stock"] = row["gap_mean"] / stock
    return rows


if __name__ == "__main__":
    main()
