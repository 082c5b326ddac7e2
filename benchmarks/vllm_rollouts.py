"""Our model in vLLM against vLLM's own DeepSeek-V3.2, on one GPU: the same random weights, requests and version of vLLM.

    python benchmarks/vllm_rollouts.py --out results.json

Each side runs in a process of its own, with CUDA graphs, greedy, without the prefix cache. The first pass of each size is thrown
away. Sizes: the attention of DeepSeek-V3.2 (64 heads, 512 + 64, index 128, top-k 2048) with few, narrow layers. Not run yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
    "num_hidden_layers": 8, "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 512, "q_lora_rank": 1024, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 40_960,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
SIZES = ((64, 4096), (64, 8192), (16, 32_768), (8, 4096))
"""Requests and prompt tokens."""
NEW = 256


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", choices=("ours", "stock"), help="what one process runs")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        args.out.write_text(json.dumps(_side(args.side, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _write(folder)
        results = {}
        for side in ("ours", "stock"):
            out = Path(temporary) / f"{side}.json"
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--out", str(out)]
            subprocess.run(command, check=True, timeout=1200)
            results[side] = json.loads(out.read_text())
    args.out.write_text(json.dumps(results, indent=2))
    for ours, stock in zip(results["ours"], results["stock"], strict=True):
        share = ours["tokens_per_s"] / stock["tokens_per_s"]
        print(
            f"{ours['requests']} x {ours['prompt']}: {ours['tokens_per_s']:.0f} tok/s, stock {stock['tokens_per_s']:.0f}, {share:.2f}x"
        )


def _write(folder: Path) -> None:
    import torch

    from posttrain.model import checkpoint
    from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**SHAPE)).bfloat16()
    checkpoint.save(model, folder)


def _side(side: str, folder: Path) -> list[dict[str, Any]]:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_USE_FLASHINFER_SAMPLER="0"
    )
    import numpy as np
    import torch
    from vllm import LLM, SamplingParams

    from posttrain.rollouts.vllm import plugin

    plugin.register()  # the folder need not be installed
    ours: dict[str, Any] = {"hf_overrides": plugin.OVERRIDES} if side == "ours" else {"tokenizer_mode": "hf"}
    graphs: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", block_size=64, max_num_seqs=64, max_model_len=36_000,
        max_num_batched_tokens=8192, gpu_memory_utilization=0.8, enable_prefix_caching=False,
        compilation_config=graphs, **ours,
    )  # fmt: skip
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False)
    rng, rows = np.random.default_rng(0), []
    for requests, length in SIZES:
        prompts: list[Any] = [
            {"prompt_token_ids": rng.integers(6, SHAPE["vocab_size"], length).tolist()}
            for _ in range(requests)
        ]
        llm.generate(prompts[:2], params, use_tqdm=False)
        torch.cuda.synchronize()
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
        row = {
            "requests": requests,
            "prompt": length,
            "wall_s": wall_s,
            "tokens_per_s": requests * NEW / wall_s,
        }
        rows.append(row | {"device": torch.cuda.get_device_name()})
        print(side, row, flush=True)
    return rows


if __name__ == "__main__":
    main()
