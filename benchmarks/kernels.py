"""Kernels on a GPU: a correctness gate first, then medians and rates. `python benchmarks/kernels.py mla --tune`.

Method: S = 4096 queries at the end of L keys, k = 2048 kept each, entries 576 / 512, bf16, N(0, 1) inputs.
Index sets: "rand" uniform over the causal past, "loc" half in the last 4096 tokens and half shared by 64
neighbouring queries, both ascending. A time is the median of single runs, each after a write of 256 MiB that
empties the L2 ("burst"). FLOP: forward 2 H 1088 k S, backward 2 H 2752 k S. Next: ../kernels/README.md.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from posttrain.kernels import index_topk_triton as topk
from posttrain.kernels import indexer_kl_triton as kl
from posttrain.kernels import sparse_mla_triton as mla

QUERIES, KEPT, LATENT, ROTARY = 4096, 2048, 512, 64
SCALE = (LATENT + ROTARY) ** -0.5


@dataclass(frozen=True)
class Case:
    """One problem: number of heads, of keys, and how the kept keys lie."""

    heads: int
    keys: int
    kind: str

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"H={self.heads} {self.keys // 1024}k {self.kind}"


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


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of single runs on a cold L2."""
    run()
    torch.cuda.synchronize()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the launches are queued while the GPU waits
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def kept_keys(case: Case, queries: int = QUERIES, kept: int = KEPT) -> Tensor:
    """Ascending slots int32 [S, k]; the queries are the last ones."""
    make = torch.Generator(device="cuda").manual_seed(case.keys)
    rows = []
    for start in range(0, queries, 64):
        last = case.keys - queries + start  # the first query of 64 sees the keys 0 .. last
        if case.kind == "rand":
            near = torch.rand(64, last + 1, generator=make, device="cuda").topk(kept, dim=-1).indices
        else:
            half, window = kept // 2, min(4096, (last + 1) // 2)
            near = torch.rand(64, window, generator=make, device="cuda").topk(half, dim=-1).indices
            far = torch.rand(last + 1 - window, generator=make, device="cuda").topk(kept - half).indices
            near = torch.cat((near + last + 1 - window, far.expand(64, -1)), -1)
        rows.append(near.sort(dim=-1).values.int())
    return torch.cat(rows)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)

    q, kv = normal(QUERIES, case.heads, LATENT + ROTARY), normal(case.keys, LATENT + ROTARY)
    return q, kv, kept_keys(case), normal(QUERIES, case.heads, LATENT)


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
            mla.backward(q, kv, slots, o, lse, do, SCALE, deterministic=deterministic, with_target=True)
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


class Table:
    """Times of one case; prints each as it comes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, name: str, run: Callable[[], Any], flop: float) -> None:
        """Time one run; a launch shape that does not fit is a result, not an end."""
        try:
            ms = median_ms(run)
        except Exception as error:
            print(f"{self.case.name} {name}: {type(error).__name__} {str(error)[:90]}", flush=True)
            return
        rate = flop / ms / 1e9
        self.rows[name] = {"ms": ms, "tflops": rate}
        print(f"{self.case.name:16s} {name:40s} {ms:8.3f} ms {rate:6.0f} TFLOP/s", flush=True)


def _mla(keys: list[int], *, tune: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"gate": {f"H={h}": _gate(h) for h in (16, 64, 128)}}
    for name, figures in report["gate"].items():
        print(name, {k: f"{a:.2e} (bf16 definition {b:.2e})" for k, (a, b) in figures.items()}, flush=True)
    for heads, num, kind in itertools.product((64, 128), keys, ("loc", "rand")):
        table = Table(Case(heads, num, kind))
        _time_mla(table, tune=tune and kind == "loc")
        report[table.case.name] = table.rows
    return report


def _time_mla(table: Table, *, tune: bool) -> None:
    q, kv, slots, do = _inputs(table.case)
    o, lse = mla.forward(q, kv, slots, SCALE, LATENT)
    pairs = 2.0 * table.case.heads * KEPT * QUERIES

    def forward(tiles: mla.Tiles = mla.FORWARD) -> Callable[[], Any]:
        return lambda: mla.forward(q, kv, slots, SCALE, LATENT, tiles)

    def backward(
        tiles_q: mla.Tiles = mla.BACKWARD_Q, tiles_kv: mla.Tiles = mla.BACKWARD_KV, *, exact: bool = False
    ) -> Callable[[], Any]:
        return lambda: mla.backward(
            q, kv, slots, o, lse, do, SCALE,
            deterministic=exact, with_target=True, tiles_q=tiles_q, tiles_kv=tiles_kv,
        )  # fmt: skip

    table.add("forward", forward(), pairs * 1088)
    table.add("backward + target", backward(), pairs * 2752)
    table.add("backward + target, deterministic", backward(exact=True), pairs * 2752)
    if not tune:
        return
    for columns, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (1, 2)):
        shape = mla.Tiles(keys=keys, warps=warps, stages=stages, columns=columns)
        table.add(f"backward kv {columns}x{keys} w{warps} s{stages}", backward(tiles_kv=shape), pairs * 2752)


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
        table = Table(Case(64, num, "index"))
        table.add("scores + top-k bf16", lambda: topk.topk(q, k, w, begins, ends, KEPT), 2 * 64 * 128 * pairs)  # noqa: B023
        if tune:
            for block, queries, warps, stages in itertools.product((128, 256), (16, 64), (4, 8), (2, 3, 4)):
                shape = topk.Shape(keys=block, queries=queries, warps=warps, stages=stages)
                table.add(
                    f"scores {block}x{queries} w{warps} s{stages}",
                    lambda: topk.topk(q, k, w, begins, ends, KEPT, shape=shape),
                    2 * 64 * 128 * pairs,
                )  # noqa: B023
        slots = kept_keys(Case(64, num, "loc"))
        p = torch.rand(QUERIES, KEPT, generator=make, device="cuda").softmax(-1)
        weight = torch.full((QUERIES,), 1 / QUERIES, device="cuda")
        for exact in (False, True):
            table.add(
                f"KL and gradients{' exact' * exact}",
                lambda: kl.indexer_kl(q, k, w, slots, p, weight, deterministic=exact),
                6 * 64 * 128 * KEPT * QUERIES,
            )  # noqa: B023
        if tune:
            for block, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3)):
                shape = kl.Shape(keys=block, warps=warps, stages=stages)
                table.add(
                    f"KL {block} w{warps} s{stages}",
                    lambda: kl.indexer_kl(q, k, w, slots, p, weight, deterministic=False, shape=shape),
                    6 * 64 * 128 * KEPT * QUERIES,
                )  # noqa: B023
        report[table.case.name] = table.rows
    return report


if __name__ == "__main__":
    main()
