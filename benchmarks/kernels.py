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
    options.add_argument("part", choices=("mla",))
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
    report["mla"] = _mla(args.keys, tune=args.tune)
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
    slots = torch.rand(num, keys, generator=make, device="cuda").topk(KEPT, dim=-1).indices.sort(-1).values.int()
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
            assert error <= 2 * allowed, f"H={heads} {name}: error {error:.2e}, the bf16 definition has {allowed:.2e}"
        for run in runs[1:]:
            same = [torch.equal(a, b) for a, b in zip(runs[0], run, strict=True) if a is not None and b is not None]
            assert same[0] and same[2] and (same[1] or not deterministic), f"not repeatable: {same}"
    return figures


def _mla(keys: list[int], *, tune: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"gate": {f"H={h}": _gate(h) for h in (16, 64, 128)}}
    for name, figures in report["gate"].items():
        print(name, {k: f"{a:.2e} (bf16 definition {b:.2e})" for k, (a, b) in figures.items()}, flush=True)
    for heads, num, kind in itertools.product((64, 128), keys, ("loc", "rand")):
        case = Case(heads, num, kind)
        q, kv, slots, do = _inputs(case)
        o, lse = mla.forward(q, kv, slots, SCALE, LATENT)
        flop = 2 * heads * KEPT * QUERIES
        rows: dict[str, tuple[float, float]] = {}

        def add(name: str, run: Callable[[], Any], dims: int) -> None:
            try:
                ms = median_ms(run)
            except Exception as error:  # a launch shape that does not fit is a result, not an end
                print(f"{case.name} {name}: {type(error).__name__} {str(error)[:90]}", flush=True)
                return
            rows[name] = (ms, flop * dims / ms / 1e9)
            print(f"{case.name:16s} {name:34s} {ms:8.3f} ms {rows[name][1]:6.0f} TFLOP/s", flush=True)

        add("forward", lambda: mla.forward(q, kv, slots, SCALE, LATENT), 1088)
        for deterministic in (False, True):
            add(
                f"backward + target{', deterministic' if deterministic else ''}",
                lambda: mla.backward(
                    q, kv, slots, o, lse, do, SCALE, deterministic=deterministic, with_target=True
                ),
                2752,
            )
        if tune and kind == "loc":
            _tune(add, q, kv, slots, do, o, lse)
        report[case.name] = rows
    return report


def _tune(add: Callable[..., None], q: Tensor, kv: Tensor, slots: Tensor, do: Tensor, o: Tensor, lse: Tensor) -> None:
    for warps, stages, keys in ((8, 2, 64), (8, 3, 64), (4, 2, 64), (8, 2, 32), (8, 3, 32)):
        tiles = mla.Tiles(keys=keys, warps=warps, stages=stages)
        add(f"forward {keys} w{warps} s{stages}", lambda: mla.forward(q, kv, slots, SCALE, LATENT, tiles), 1088)

    def back(tiles_q: mla.Tiles, tiles_kv: mla.Tiles, det: bool = False) -> Callable[[], Any]:
        return lambda: mla.backward(
            q, kv, slots, o, lse, do, SCALE,
            deterministic=det, with_target=True, tiles_q=tiles_q, tiles_kv=tiles_kv,
        )  # fmt: skip

    for keys, warps, stages in ((32, 8, 2), (64, 8, 1), (32, 8, 1), (32, 8, 3)):
        shape = mla.Tiles(keys=keys, warps=warps, stages=stages)
        add(f"backward, q {keys} w{warps} s{stages}", back(shape, mla.BACKWARD_KV), 2752)
    for keys, warps, stages in ((128, 4, 2), (64, 4, 2), (64, 8, 2), (128, 8, 1), (64, 4, 1), (64, 4, 3)):
        shape = mla.Tiles(keys=keys, warps=warps, stages=stages)
        for det in (False, True):
            add(f"backward, kv {keys} w{warps} s{stages}{' det' * det}", back(mla.BACKWARD_Q, shape, det), 2752)
    before = mla.WORKSPACE_BYTES
    for shift in (26, 27, 28, 29):
        mla.WORKSPACE_BYTES = 1 << shift
        add(f"backward, workspace {1 << (shift - 20)} MiB", back(mla.BACKWARD_Q, mla.BACKWARD_KV), 2752)
    mla.WORKSPACE_BYTES = before


if __name__ == "__main__":
    main()
