"""Kernels on a GPU: a correctness gate first, then medians and rates. `python benchmarks/kernels.py`.

Method: S = 4096 queries at the end of L keys, k = 2048 kept each, entries 576 / 512, 64 indexer heads of 128, bf16,
N(0, 1) inputs. Index sets: "rand" uniform over the causal past, "loc" half in the last 4096 tokens and half shared
by 64 neighbouring queries, both ascending. A time is the median of single runs, each after a write of 256 MiB that
empties the L2 ("burst"), beside the mean of runs back to back ("sustained"). Kernels of others run in the same process
where they are importable (kernel_peers.py). FLOP: forward 2 H 1088 k S, backward 2 H 2752 k S, target 2 H 576 k S,
indexer 2 J I pairs and its backward three times that. Results: kernels.md. Next: ../kernels/README.md.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_indexer as indexer
import kernel_peers as peers
import torch
import triton
from kernel_cases import KEPT, LATENT, QUERIES, ROTARY, SCALE, Case, Table, kept_keys, normal
from torch import Tensor

from posttrain.kernels import sparse_mla_backward_triton as mla_backward
from posttrain.kernels import sparse_mla_triton as mla


def main() -> None:
    """Check, measure, print, write."""
    parts = {"mla": _mla, "topk": indexer.topk, "kl": indexer.sparse_kl, "warmup": indexer.warmup}
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    options.add_argument("--keys", type=int, nargs="+", default=[32768])
    options.add_argument("--kinds", nargs="+", default=["loc", "rand"])
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    chosen = args.parts or [*parts]
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(report, flush=True)
    for part in chosen:
        report[part] = parts[part](args.keys, args.kinds)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, kv = normal(QUERIES, case.heads, LATENT + ROTARY, seed=0), normal(case.keys, LATENT + ROTARY, seed=1)
    return q, kv, kept_keys(case), normal(QUERIES, case.heads, LATENT, seed=2)


def _reference(q: Tensor, kv: Tensor, slots: Tensor, do: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """o, dq, dkv, p of the definition with products in that dtype."""
    q, kv = (x.detach().to(dtype).requires_grad_() for x in (q, kv))
    entries = kv[slots.clamp(min=0).long()]
    logits = (q @ entries.transpose(1, 2)).to(torch.promote_types(dtype, torch.float32)) * SCALE
    probs = logits.masked_fill((slots < 0)[:, None], float("-inf")).softmax(-1)
    o = probs.to(dtype) @ entries[..., :LATENT]
    dq, dkv = torch.autograd.grad(o, (q, kv), do.to(dtype))
    return [o.detach(), dq, dkv, probs.mean(1).detach()]


def _gate(heads: int) -> dict[str, Any]:
    """Errors against fp64 over errors of the bf16 definition, and repeated runs; raises if either is wrong."""
    num, keys = 48, 3000
    make = torch.Generator(device="cuda").manual_seed(heads)
    q, kv, do = (
        torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)
        for shape in ((num, heads, 576), (keys, 576), (num, heads, 512))
    )
    slots = (
        torch.rand(num, keys, generator=make, device="cuda").topk(KEPT, dim=-1).indices.sort(-1).values.int()
    )
    slots[3, 100:] = -1
    slots[4, 1:] = -1
    slots[5, ::3] = -1
    exact = _reference(q, kv, slots, do, torch.float64)
    rough = _reference(q, kv, slots, do, torch.bfloat16)
    figures: dict[str, Any] = {}
    for deterministic in (False, True):
        o, lse = mla.forward(q, kv, slots, SCALE, LATENT)
        runs = [
            mla_backward.backward(
                q, kv, slots, o, lse, do, SCALE, deterministic=deterministic, with_target=True
            )
            for _ in range(5)
        ]
        found = [o, *runs[0]]
        for name, ours, true, bf16 in zip(("o", "dq", "dkv", "p"), found, exact, rough, strict=True):
            assert ours is not None
            error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, bf16))
            figures[f"{name}{' det' if deterministic else ''}"] = (float(error), float(allowed))
            assert error <= 2 * allowed, (
                f"H={heads} {name}: error {error:.2e}, the bf16 definition has {allowed:.2e}"
            )
        for run in runs[1:]:
            same = [
                torch.equal(a, b)
                for a, b in zip(runs[0], run, strict=True)
                if a is not None and b is not None
            ]
            assert same[0] and same[2] and (same[1] or not deterministic), f"not repeatable: {same}"
    return figures


def _mla(keys: list[int], kinds: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {"gate": {f"H={h}": _gate(h) for h in (16, 64, 128)}}
    for name, figures in report["gate"].items():
        print(name, {k: f"{a:.2e} (bf16 definition {b:.2e})" for k, (a, b) in figures.items()}, flush=True)
    for heads, num, kind in itertools.product((64, 128), keys, kinds):
        table = Table(Case(heads, num, kind).name)
        _time_mla(table, Case(heads, num, kind))
        report[table.name] = table.rows
    return report


def _time_mla(table: Table, case: Case) -> None:
    q, kv, slots, do = _inputs(case)
    o, lse = mla.forward(q, kv, slots, SCALE, LATENT)
    pairs = 2.0 * case.heads * KEPT * QUERIES

    def backward(*, deterministic: bool) -> Callable[[], Any]:
        return lambda: mla_backward.backward(
            q, kv, slots, o, lse, do, SCALE, deterministic=deterministic, with_target=True
        )

    for name, run, flop in (
        ("forward", lambda: mla.forward(q, kv, slots, SCALE, LATENT), 1088),
        ("FlashMLA forward", peers.flash_mla(q, kv, slots, SCALE, LATENT), 1088),
        ("backward + target", backward(deterministic=False), 2752),
        ("backward + target, deterministic", backward(deterministic=True), 2752),
        ("cuDNN backward", peers.cudnn_backward(q, kv, o, do, lse, slots, SCALE), 2752),
        ("cuDNN target", peers.cudnn_target(q, kv, lse, slots, SCALE), 576),
    ):
        if run is not None:
            table.add(name, run, pairs * flop, sustained=True)


if __name__ == "__main__":
    main()
