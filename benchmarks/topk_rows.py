"""The selection alone, on a GPU: microseconds of a launch for launch shapes of topk_triton.py, after a check that it is exact.

A case is a number of rows and the range of their lengths, keys of normal scores (or others, --kinds), k = 2048. "4096 x 2k..8k"
are rows of a prompt; 64 rows are a step of decoding. A launch's time is that of twenty in a CUDA graph, so that small cases
find their keys in L2, as in use.

    PYTHONPATH=. python benchmarks/topk_rows.py --out topk_rows.json
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_cases import DEVICE, length_name
from torch import Tensor

from posttrain.kernels.topk_triton import SHAPE, Shape, topk_rows

REPEATS, CHECKED = 20, 48
"""Launches of a graph; rows of a case that are compared with a stable sort."""


@dataclass(frozen=True)
class Case:
    """Rows of shortest to longest keys, evenly spread."""

    rows: int
    shortest: int
    longest: int

    @property
    def name(self) -> str:
        """As it is printed."""
        few, many = length_name(self.shortest), length_name(self.longest)
        return f"{self.rows} x {many}" if few == many else f"{self.rows} x {few}..{many}"


CASES = (
    *(Case(4096, keys, keys) for keys in (4096, 8192, 32768, 131072)),
    Case(6144, 2048, 8192),
    Case(4096, 2048, 32768),
    *(Case(rows, 32768, 32768) for rows in (16, 64)),
    Case(64, 131072, 131072),
)
TINY_CASES = (Case(3, 40, 40), Case(4, 16, 300))


class Problem:
    """Keys of one case, and room for the result."""

    def __init__(self, case: Case, kind: str, kept: int) -> None:
        make = torch.Generator(DEVICE).manual_seed(case.longest + case.rows)
        self.case, self.width = case, (case.longest + 31) // 32 * 32
        self.keys = torch.empty(case.rows, self.width, dtype=torch.int32, device=DEVICE)
        for part in self.keys.split(256):
            x = torch.randn(part.shape, generator=make, device=DEVICE)
            part.copy_(_integers(_scores(x, kind)))
        self.begin = torch.zeros(case.rows, dtype=torch.int32, device=DEVICE)
        self.end = torch.linspace(case.shortest, case.longest, case.rows, device=DEVICE).round().int()
        self.out = torch.empty(case.rows, kept, dtype=torch.int32, device=DEVICE)

    def work(self, shape: Shape) -> Tensor:
        """The workspace, full of rubbish."""
        num = self.case.rows * shape.workspace(self.out.shape[1], self.width)
        return torch.full((num,), -7, dtype=torch.int32, device=DEVICE)

    def run(self, shape: Shape, work: Tensor) -> None:
        """One launch."""
        topk_rows(
            self.keys, self.begin, self.end, work, self.out,
            first_row=0, rows=self.case.rows, first_key=0, width=self.width, shape=shape,
        )  # fmt: skip

    def wrong_rows(self) -> list[int]:
        """Of some rows those whose result is not that of a stable sort."""
        kept, found = self.out.shape[1], []
        for row in torch.linspace(0, self.case.rows - 1, min(CHECKED, self.case.rows)).long().tolist():
            keys = self.keys[row, : int(self.end[row])].long()
            wanted = keys.sort(descending=True, stable=True).indices[:kept].sort().values.int()
            wanted = torch.nn.functional.pad(wanted, (0, kept - len(wanted)), value=-1)
            found += [] if torch.equal(self.out[row], wanted) else [row]
        return found


def _scores(x: Tensor, kind: str) -> Tensor:
    """From normal numbers: those, coarse ones, sums over neighbours, or mostly zeros."""
    if kind == "ties":
        return (x * 20).round() / 20
    if kind == "smooth":
        return sum((x.roll(n, 1) for n in range(16)), torch.zeros_like(x))
    return x.relu() if kind == "zeros" else x


def _integers(scores: Tensor) -> Tensor:
    """What the score kernels store."""
    bits = scores.view(torch.int32)
    return torch.where(scores == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


def main() -> None:
    """Print a line per case and shape, the best last."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kinds", nargs="+", default=["normal"], help="normal, ties, smooth, zeros")
    options.add_argument("--today", action="store_true", help="the shape in use alone")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    wrong: list[str] = []
    for kind, case in itertools.product(args.kinds, TINY_CASES if args.tiny else CASES):
        problem = Problem(case, kind, kept=16 if args.tiny else 2048)
        times: dict[str, float] = {}
        for shape in _shapes(tiny=args.tiny, today=args.today):
            name = ", ".join(f"{field} {value}" for field, value in vars(shape).items())
            work = problem.work(shape)
            problem.out.fill_(-9)
            problem.run(shape, work)
            wrong += [f"{kind} {case.name} row {row}: {name}" for row in problem.wrong_rows()]
            times[name] = _microseconds(problem, shape, work)
            print(f"{kind} {case.name:16s} {name:56s} {times[name]:9.1f} us", flush=True)
        best = min(times, key=lambda name: times[name])
        per_row = times[best] * 1e3 / case.rows
        print(f"{kind} {case.name}: best {best}: {times[best]:.1f} us, {per_row:.1f} ns a row\n", flush=True)
        report[f"{kind} {case.name}"] = times
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    if wrong:
        raise SystemExit("not exact: " + "; ".join(wrong))


def _shapes(*, tiny: bool, today: bool) -> Iterator[Shape]:
    if tiny:
        yield from (Shape(sample=32, narrow=32, wide=wide, warps=1) for wide in (64, 128))
        return
    yield SHAPE
    if today:
        return
    for warps, registers in ((4, 168), (4, 128), (8, None), (8, 64), (16, None), (16, 64)):
        yield replace(SHAPE, warps=warps, registers=registers)
    for sample in (2048, 8192):
        yield replace(SHAPE, sample=sample)


def _microseconds(problem: Problem, shape: Shape, work: Tensor) -> float:
    if DEVICE == "cpu":
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            problem.run(shape, work)
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / REPEATS)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
