"""Kernels on a GPU: a correctness gate first, then medians and rates. `python benchmarks/kernels.py mla --tune`.

Method: S = 4096 queries at the end of L keys, k = 2048 kept each, entries 576 / 512, bf16, N(0, 1) inputs.
Index sets: "rand" uniform over the causal past, "loc" half in the last 4096 tokens and half shared by 64
neighbouring queries, both ascending. A time is the median of single runs, each after a write of 256 MiB that
empties the L2 ("burst"). FLOP: forward 2 H 1088 k S, backward 2 H 2752 k S. Next: ../kernels/README.md.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_peers as peers
import torch
import triton
from kernel_cases import KEPT, LATENT, QUERIES, ROTARY, SCALE, Case, Table, kept_keys, normal
from torch import Tensor

from posttrain.kernels import index_topk_triton as topk
from posttrain.kernels import indexer_kl_triton as kl
from posttrain.kernels import sparse_mla_backward_triton as mla_backward
from posttrain.kernels import sparse_mla_triton as mla


def main() -> None:
    """Check, measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("part", choices=("mla", "indexer"))
    options.add_argument("--tune", action="store_true", help="also time other launch shapes")
    options.add_argument("--keys", type=int, nargs="+", default=[32768])
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(report, flush=True)
    measure = {"mla": _mla, "indexer": _indexer}[args.part]
    report[args.part] = measure(args.keys, tune=args.tune)
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


def _mla(keys: list[int], *, tune: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"gate": {f"H={h}": _gate(h) for h in (16, 64, 128)}}
    for name, figures in report["gate"].items():
        print(name, {k: f"{a:.2e} (bf16 definition {b:.2e})" for k, (a, b) in figures.items()}, flush=True)
    for heads, num, kind in itertools.product((64, 128), keys, ("loc", "rand")):
        table = Table(Case(heads, num, kind).name)
        _time_mla(table, Case(heads, num, kind), tune=tune and kind == "loc")
        report[table.name] = table.rows
    return report


def _time_mla(table: Table, case: Case, *, tune: bool) -> None:
    q, kv, slots, do = _inputs(case)
    o, lse = mla.forward(q, kv, slots, SCALE, LATENT)
    pairs = 2.0 * case.heads * KEPT * QUERIES

    def forward(tiles: mla.Tiles | None = None) -> Callable[[], Any]:
        return lambda: mla.forward(q, kv, slots, SCALE, LATENT, tiles)

    def backward(
        launch: mla_backward.Launch = mla_backward.LAUNCH, *, exact: bool = False
    ) -> Callable[[], Any]:
        return lambda: mla_backward.backward(
            q, kv, slots, o, lse, do, SCALE, deterministic=exact, with_target=True, launch=launch
        )

    sustained = not tune
    table.add("forward", forward(), pairs * 1088, sustained=sustained)
    table.add("backward + target", backward(), pairs * 2752, sustained=sustained)
    table.add("backward + target, deterministic", backward(exact=True), pairs * 2752)
    for name, run, flop in (
        ("FlashMLA forward", peers.flash_mla(q, kv, slots, SCALE, LATENT), 1088),
        ("cuDNN backward", peers.cudnn_backward(q, kv, o, do, lse, slots, SCALE), 2752),
        ("cuDNN target", peers.cudnn_target(q, kv, lse, slots, SCALE), 576),
    ):
        if run is not None:
            table.add(name, run, pairs * flop, sustained=sustained)
    if tune:
        _tune_mla(table, case, forward, backward)


def _tune_mla(table: Table, case: Case, forward: Any, backward: Any) -> None:
    """Other launch shapes."""
    pairs, base = 2.0 * case.heads * KEPT * QUERIES, mla_backward.LAUNCH
    for keys, stages in ((64, 3), (32, 2), (32, 3)):
        tiles = mla.Tiles(keys=keys, stages=stages)
        table.add(f"forward {keys} keys s{stages}", forward(tiles), pairs * 1088, repeats=8)
    shapes = {
        "pairs": [(128, 64, 4, 3, 64), (128, 64, 4, 4, 64), (128, 64, 8, 3, 64), (256, 64, 8, 3, 64),
                  (64, 64, 4, 4, 64), (128, 64, 8, 3, 128), (64, 64, 4, 3, 128)],
        "dq": [(64, 128, 8, 3, 128), (64, 128, 4, 3, 128), (64, 256, 8, 3, 128), (64, 64, 4, 4, 128), (128, 128, 8, 2, 128)],
        "dkv": [(64, 128, 4, 2, 128), (64, 128, 8, 2, 128), (64, 64, 4, 2, 128), (128, 64, 8, 2, 128), (64, 128, 4, 3, 128), (128, 128, 4, 2, 128)],
    }  # fmt: skip
    for part, tried in shapes.items():
        for keys, columns, warps, stages, heads in tried:
            shape = mla_backward.Tiles(keys, columns, warps, stages, heads)
            name = f"{part} {keys}x{columns} w{warps} s{stages} h{heads}"
            table.add(name, backward(replace(base, **{part: shape})), pairs * 2752, repeats=8)


def _indexer(keys: list[int], *, tune: bool) -> dict[str, Any]:
    """Scores + top-k, and the KL with its gradients."""
    report: dict[str, Any] = {}
    make = torch.Generator(device="cuda").manual_seed(0)
    for num in keys:
        q = torch.randn(QUERIES, 64, 128, generator=make, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(num, 128, generator=make, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(QUERIES, 64, generator=make, device="cuda") * 128**-0.5 / 8
        ends = torch.arange(num - QUERIES + 1, num + 1, device="cuda", dtype=torch.int32)
        begins = torch.zeros_like(ends)
        part = slice(0, 64)
        scores = torch.einsum("nji,si->nsj", q[part].float(), k.float()).relu() @ w[part, :, None]
        unseen = torch.arange(num, device="cuda") >= ends[part, None]
        wanted = scores[..., 0].masked_fill(unseen, float("-inf")).topk(KEPT).indices.sort(-1).values.int()
        found = topk.topk(q, k, w, begins, ends, KEPT)
        overlap = [
            len(set(a.tolist()) & set(b.tolist())) / KEPT for a, b in zip(found[part], wanted, strict=True)
        ]
        print(f"{num // 1024}k: overlap with fp32 (TF32 off) top-k: least {min(overlap):.4f}", flush=True)
        assert min(overlap) > 0.995, "the selection is wrong"
        assert (found[:, 1:] > found[:, :-1]).all() and found.max() < num
        assert torch.equal(found, topk.topk(q, k, w, begins, ends, KEPT)), "not repeatable"
        moved = topk.topk(
            *(x[1000:2003].contiguous() for x in (q,)),
            k,
            w[1000:2003],
            begins[1000:2003],
            ends[1000:2003],
            KEPT,
        )
        assert torch.equal(found[1000:2003], moved), "depends on the chunking"
        pairs = float(ends.sum())
        table = Table(Case(64, num, "index").name)
        table.add("scores + top-k bf16", lambda: topk.topk(q, k, w, begins, ends, KEPT), 2 * 64 * 128 * pairs)  # noqa: B023
        if tune:
            for block, queries, warps, stages in itertools.product((128, 256), (16, 64), (4, 8), (2, 3, 4)):
                shape = topk.Shape(keys=block, queries=queries, warps=warps, stages=stages)
                table.add(
                    f"scores {block}x{queries} w{warps} s{stages}",
                    lambda: topk.topk(q, k, w, begins, ends, KEPT, shape=shape),
                    2 * 64 * 128 * pairs,
                )
        slots = kept_keys(Case(64, num, "loc"))
        p = torch.rand(QUERIES, KEPT, generator=make, device="cuda").softmax(-1)
        weight = torch.full((QUERIES,), 1 / QUERIES, device="cuda")
        for exact in (False, True):
            table.add(
                f"KL and gradients{' exact' * exact}",
                lambda: kl.indexer_kl(q, k, w, slots, p, weight, deterministic=exact),
                6 * 64 * 128 * KEPT * QUERIES,
            )
        if tune:
            for block, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3)):
                shape = kl.Shape(keys=block, warps=warps, stages=stages)
                table.add(
                    f"KL {block} w{warps} s{stages}",
                    lambda: kl.indexer_kl(q, k, w, slots, p, weight, deterministic=False, shape=shape),
                    6 * 64 * 128 * KEPT * QUERIES,
                )
        report[table.name] = table.rows
    return report


if __name__ == "__main__":
    main()
