"""Launch shapes of the bf16 index scores + top-k, on a GPU: which are faster than today's, and the same selection?

4096 queries at the end of L keys, k = 2048, 64 heads of 128. One row of the table is a shape of the scores, one of the
selection, the number of lanes and the scores of a chunk in MiB. Behind the time stand the share of rows whose selection is
that of today's shape (the order of the sum over heads may change, and with it ties) and whether the kernel for a paged cache,
with the same shape, selects the same: that must hold. What wins goes into index_topk_triton.SHAPE and CHUNK_BYTES, and
tests/gpu then run again.

The selection alone: topk_rows.py. Why chunks about as large as the L2: at 128k, 24 MiB are 48 rows, and a program selects for one row, so that 84 of 132
multiprocessors wait; writing and reading all scores in memory costs about 1 ms.

    PYTHONPATH=. python benchmarks/topk_shapes.py --out topk_shapes.json
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_cases import DEVICE, FULL, TINY, Geometry, Table, length_name, normal
from torch import Tensor

from posttrain.kernels import index_topk_triton, paged_index_topk_triton, topk_triton
from posttrain.kernels.index_topk_triton import Ranges, Shape
from posttrain.kernels.pages import Pages

BLOCK = 64
ALL_SCORES = tuple(
    Shape(keys=keys, queries=queries, columns=columns, warps=warps, stages=stages)
    for keys, queries, columns, warps, stages in (
        (128, 32, 64, 4, 2),
        (128, 64, 64, 4, 1),
        (128, 64, 64, 4, 2),
        (128, 64, 64, 4, 3),
        (128, 64, 128, 4, 2),
        (128, 32, 128, 8, 2),
        (128, 64, 128, 8, 1),
        (128, 64, 128, 8, 2),
        (128, 64, 128, 8, 3),
        (128, 128, 128, 8, 2),
        (128, 64, 256, 8, 1),
        (256, 64, 64, 8, 2),
        (256, 64, 128, 8, 2),
        (64, 64, 128, 4, 1),
        (64, 64, 128, 4, 2),
    )
)
"""All compile for sm_90 under Triton 3.6.0 without a spill: 107 to 214 registers, 49 to 134 KB of shared memory. Products with 64
columns read as many bytes of shared memory as a multiprocessor gives in the time they take; wider ones fewer per product,
shapes without a second stage leave room for a fourth program."""
ALL_SELECTIONS = (
    topk_triton.Shape(),
    topk_triton.Shape(warps=4, registers=128),
    topk_triton.Shape(warps=16, registers=64),
)
CHUNKS_MIB = (24, 44, 68, 88)
"""Two lanes of the largest are 185 MB."""


@dataclass(frozen=True)
class Choice:
    """One row of the table."""

    scores: Shape
    selection: topk_triton.Shape
    mib: float

    @property
    def name(self) -> str:
        """As it stands in the table."""
        s, t = self.scores, self.selection
        shape = f"{s.keys}x{s.queries} c{s.columns} w{s.warps} s{s.stages} l{s.lanes}"
        return f"{shape} | w{t.warps} | {self.mib:g} MiB"


@dataclass(frozen=True)
class Problem:
    """Queries at the end of the keys."""

    size: Geometry
    q_NJI: Tensor
    k_SI: Tensor
    w_NJ: Tensor
    ranges: Ranges

    def chunks(self, mib: float) -> Ranges:
        """The ranges cut into chunks whose scores have that size."""
        end_N = self.ranges.end_N.cpu()
        chunks = index_topk_triton._chunks(torch.zeros_like(end_N), end_N, int(mib * 2**20), step=1)
        return replace(self.ranges, chunks=chunks)

    def run(self, choice: Choice, ranges: Ranges) -> Tensor:
        """The packed kernel's selection."""
        return index_topk_triton.topk(
            self.q_NJI, self.k_SI, self.w_NJ, ranges, self.size.kept,
            shape=choice.scores, select=choice.selection,
        )  # fmt: skip

    def paged(self, choice: Choice, rows: Tensor) -> Tensor:
        """The selection of some rows as new tokens of sequences that share one cache."""
        pool_PSI = self.k_SI.view(-1, BLOCK, self.size.index_size)
        table_M = torch.arange(len(pool_PSI), dtype=torch.int32, device=DEVICE)
        pages = Pages(
            pool_PSI,
            pool_PSI,
            table_M.repeat(len(rows), 1),
            self.ranges.end_N[rows].contiguous(),
            len(self.k_SI),
        )
        kept_N1K = paged_index_topk_triton.topk(
            self.q_NJI[rows][:, None], self.w_NJ[rows][:, None], pages, self.size.kept,
            shape=choice.scores, select=choice.selection,
        )  # fmt: skip
        return kept_N1K[:, 0]


def main() -> None:
    """Sweep in two rounds per length: shapes of the scores, then lanes, chunks and selections of the best three."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--keys", type=int, nargs="+")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    size = TINY if args.tiny else FULL
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    wrong: list[str] = []
    for keys in args.keys or ([128] if args.tiny else [32768, 131072]):
        table = Table(f"top-k {length_name(keys)}")
        problem = _problem(size, keys)
        today = Choice(index_topk_triton.SHAPE, topk_triton.SHAPE, index_topk_triton.CHUNK_BYTES / 2**20)
        wanted = problem.run(today, problem.ranges)
        scores = ALL_SCORES[:2] if args.tiny else ALL_SCORES
        for choice in itertools.islice(_rounds(table, today, scores), 5 if args.tiny else None):
            wrong += _measure(table, problem, choice, wanted)
        report[table.name] = {"rows": table.rows, "failed": table.failed}
        best = sorted(table.rows.items(), key=lambda row: row[1]["ms"])[:8]
        print(f"\n{table.name}: today {table.rows[today.name]['ms']:.3f} ms; the best")
        for name, row in best:
            print(f"  {name:44s} {row['ms']:8.3f} ms, rows as today {row['as_today']:.4f}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(report | {"today": asdict(today)}, indent=2) + "\n")
    if wrong:
        raise SystemExit(f"packed and paged selections differ: {wrong}")


def _problem(size: Geometry, keys: int) -> Problem:
    ends = torch.arange(keys - size.queries + 1, keys + 1)
    w = normal(size.queries, size.index_heads, seed=5, dtype=torch.float32)
    return Problem(
        size,
        normal(size.queries, size.index_heads, size.index_size, seed=3),
        normal(keys, size.index_size, seed=4),
        w * (size.index_heads * size.index_size) ** -0.5,
        index_topk_triton.key_ranges(torch.zeros_like(ends), ends, DEVICE),
    )


def _rounds(table: Table, today: Choice, shapes: Sequence[Shape]) -> Iterator[Choice]:
    """What fails to compile is in the table as such; the second round takes the fastest of the first."""
    yield today
    first = [replace(today, scores=replace(shape, lanes=1)) for shape in shapes]
    yield from first
    known = [choice for choice in first if choice.name in table.rows]
    best = sorted(known, key=lambda choice: table.rows[choice.name]["ms"])[:3]
    for choice, lanes, selection, mib in itertools.product(best, (1, 2), ALL_SELECTIONS, CHUNKS_MIB):
        after = Choice(replace(choice.scores, lanes=lanes), selection, mib)
        if after.name not in table.rows:
            yield after


def _measure(table: Table, problem: Problem, choice: Choice, wanted: Tensor) -> list[str]:
    """Time one choice and look at its selection; its name if the paged kernel selects something else."""
    ranges = problem.chunks(choice.mib)
    table.add(choice.name, lambda: problem.run(choice, ranges), 0.0, repeats=7)
    if choice.name not in table.rows:
        return []
    found = problem.run(choice, ranges)
    rows = torch.linspace(0, len(found) - 1, 4).long().to(DEVICE)
    table.rows[choice.name]["as_today"] = float((found == wanted).all(1).float().mean())
    return [] if torch.equal(problem.paged(choice, rows), found[rows]) else [f"{table.name} {choice.name}"]


if __name__ == "__main__":
    main()
