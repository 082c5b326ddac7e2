"""Problems, clocks and tables of kernels.py."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of single runs on a cold L2 ("burst": the chip stays cool)."""
    run()
    torch.cuda.synchronize()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)  # the launches are queued while the GPU waits
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def sustained_ms(run: Callable[[], Any], seconds: float = 0.6) -> float:
    """Mean milliseconds back to back: limited by power, as training is."""
    run()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        count += 10
    return (time.perf_counter() - began) / count * 1e3


def kept_keys(case: Case, queries: int = QUERIES, kept: int = KEPT) -> Tensor:
    """Ascending slots int32 [S, k]; the queries are the last ones.

    "rand": uniform over the causal past. "loc": half in the last 4096 tokens, half shared by 64 neighbouring
    queries from the far past.
    """
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


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """N(0, 1) on the GPU."""
    make = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=make, device="cuda", dtype=dtype)


class Table:
    """Times of one case; prints each as it comes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[str, dict[str, float]] = {}

    def add(
        self, name: str, run: Callable[[], Any], flop: float, *, sustained: bool = False, repeats: int = 20
    ) -> None:
        """Time one run; a launch shape that does not fit, or a peer that refuses, is a result, not an end."""
        try:
            ms = median_ms(run, repeats)
            row = {"ms": ms, "tflops": flop / ms / 1e9}
            if sustained:
                row["sustained_ms"] = sustained_ms(run)
        except Exception as error:
            print(
                f"{self.name:16s} {name:44s} {type(error).__name__} {' '.join(str(error).split())[:160]}",
                flush=True,
            )
            return
        self.rows[name] = row
        more = f"  sustained {row['sustained_ms']:8.3f} ms" if sustained else ""
        print(f"{self.name:16s} {name:44s} {ms:8.3f} ms {row['tflops']:6.0f} TFLOP/s{more}", flush=True)
