"""A decoding step of the demo's model on a paged cache, all sequences at once against one after another, on CPU.

OMP_NUM_THREADS=1 python benchmarks/paged_decode.py
"""

import argparse
import time
from dataclasses import replace

import torch

from posttrain.kernels.backend import TORCH
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.model.context import Part
from posttrain.model.entry import Entry
from posttrain.model.paged import NewTokens, PagedCache, PagedContext, paged

BLOCK = 16


def main() -> None:
    """Print milliseconds per step and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=1, topk_group=1, kv_lora_rank=32, q_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=8,
        v_head_dim=24, first_k_dense_replace=1, index_topk=16, index_n_heads=4, index_head_dim=16,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = DeepseekV32ForCausalLM(config).eval()
    blocks = -(-args.length // BLOCK)
    pools = [torch.randn(1 + args.requests * blocks, BLOCK, 56) for _ in range(config.num_hidden_layers)]
    table = torch.arange(1, 1 + args.requests * blocks, dtype=torch.int32).view(args.requests, blocks)
    last = args.length - 1
    new = NewTokens(
        counts_B=[1] * args.requests,
        ends_B=[args.length] * args.requests,
        positions_T=torch.full((args.requests,), last),
        table_BM=table,
        lengths_B=torch.full((args.requests,), args.length, dtype=torch.int32),
        slots_T=table[:, -1].long() * BLOCK + last % BLOCK,
    )
    tokens = torch.randint(0, 256, (args.requests,))

    def together() -> PagedContext:
        cache = PagedCache(pools_PSX=pools, entry=Entry.of(model.config))
        return paged(new, cache, attention="sparse", backend=TORCH, max_length=blocks * BLOCK)

    def apart() -> PagedContext:
        whole = together()
        parts = []
        for i in range(args.requests):
            one = replace(
                new, counts_B=[1], ends_B=[args.length], positions_T=new.positions_T[i : i + 1],
                table_BM=table[i : i + 1], lengths_B=new.lengths_B[i : i + 1], slots_T=new.slots_T[i : i + 1],
            )  # fmt: skip
            single = paged(one, whole.cache, attention="sparse", backend=TORCH, max_length=blocks * BLOCK)
            parts.append(Part(slice(i, i + 1), single.parts[0].context))
        whole.parts = parts
        return whole

    took, hidden = {}, {}
    with torch.inference_mode():
        for name, make in (("together", together), ("one by one", apart)):
            hidden[name] = model.model(tokens, make())
            began = time.perf_counter()
            for _ in range(args.steps):
                model.model(tokens, make())
            took[name] = (time.perf_counter() - began) / args.steps * 1e3
    torch.testing.assert_close(hidden["together"], hidden["one by one"], rtol=0, atol=1e-4)
    ratio = took["one by one"] / took["together"]
    print(
        f"{args.requests} requests of {args.length} tokens: {took['together']:.1f} ms a step, one by one ",
        end="",
    )
    print(f"{took['one by one']:.1f} ms: {ratio:.1f}x")


if __name__ == "__main__":
    main()
