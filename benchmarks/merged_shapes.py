"""Launch shapes of the merged gradients of entries with few heads, on a GPU: which are faster than today's?

The whole backward of sparse attention with the target, in fast mode, of the last 4096 queries of 16k keys, k = 2048; the first row
of a table is without merging. Before the times stand the share of entries that merging leaves to be added, and the largest
difference to the gradients without it over their largest. What wins goes into sparse_mla_backward_triton.Launch.merged.

    PYTHONPATH=. python benchmarks/merged_shapes.py --heads 16 --out merged_shapes.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from kernel_cases import DEVICE, FULL, TINY, Case, Geometry, Table, kept_keys, normal

from posttrain.kernels import sparse_mla_backward_triton as mla_backward
from posttrain.kernels import sparse_mla_triton as mla
from posttrain.kernels.merge_triton import merge
from posttrain.kernels.sparse_mla_backward_triton import MERGED, Launch, Tiles

SHAPES = tuple(
    Tiles(keys=keys, columns=columns, warps=warps, stages=stages)
    for keys, columns, warps, stages in (
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (64, 256, 4, 3),
        (64, 256, 8, 2),
        (64, 256, 8, 3),
        (64, 512, 8, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    )
)
"""With 16 heads all compile for sm_90 without a spill. Four stages are three: the slots are loaded before what they point to."""


def main() -> None:
    """One table per number of heads and kind of selection."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--heads", type=int, nargs="+", default=[16])
    options.add_argument("--keys", type=int)
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    for heads in args.heads:
        for kind in ("loc", "rand"):
            case = Case(heads, args.keys or (128 if args.tiny else 16384), kind)
            table = _measure(TINY if args.tiny else FULL, case, SHAPES[:2] if args.tiny else SHAPES)
            report[table.name] = {"rows": table.rows, "failed": table.failed}
            if args.out:
                args.out.write_text(json.dumps(report, indent=2) + "\n")


def _measure(size: Geometry, case: Case, shapes: tuple[Tiles, ...]) -> Table:
    slots = kept_keys(case, size.queries, size.kept)[: size.queries]
    q, kv = normal(size.queries, case.heads, size.entry, seed=0), normal(case.keys, size.entry, seed=1)
    do = normal(size.queries, case.heads, size.latent, seed=2)
    o, lse = mla.forward(q, kv, slots, size.scale, size.latent)

    def backward(tiles: Tiles | None) -> torch.Tensor:
        _, dkv, _ = mla_backward.backward(
            q, kv, slots, o, lse, do, size.scale, deterministic=False, with_target=True,
            launch=Launch(merged=tiles),
        )  # fmt: skip
        return dkv

    table = Table(case.name)
    left = int(merge(slots, len(kv)).num_P.sum()) / int((slots >= 0).sum())
    merged, plain = backward(MERGED), backward(None)
    table.add("not merged", lambda: backward(None), 0.0, sustained=DEVICE == "cuda")
    off = float((merged - plain).abs().max() / plain.abs().max())
    print(f"{table.name}: {left:.3f} of the entries left to add, difference {off:.1e}", flush=True)
    for t in shapes:
        name = f"{t.keys} x {t.columns} w{t.warps} s{t.stages}"
        table.add(name, lambda t=t: backward(t), 0.0, sustained=DEVICE == "cuda")  # type: ignore[misc]
    return table


if __name__ == "__main__":
    main()
