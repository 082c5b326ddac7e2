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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the scripts run at tiny sizes, to be tried before they cost anything; such times mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a DSA layer and of a problem."""

    queries: int = QUERIES
    kept: int = KEPT
    latent: int = LATENT
    rotary: int = ROTARY
    nope: int = 128
    """Of a multi-head query and of a value."""
    index_heads: int = 64
    index_size: int = 128
    hidden: int = 7168
    query_latent: int = 1536

    @property
    def entry(self) -> int:
        """Size of a cache entry."""
        return self.latent + self.rotary

    @property
    def scale(self) -> float:
        """Of the softmax over N(0, 1) entries."""
        return self.entry**-0.5


FULL = Geometry()
TINY = Geometry(
    queries=8,
    kept=16,
    latent=32,
    rotary=16,
    nope=16,
    index_heads=4,
    index_size=32,
    hidden=48,
    query_latent=24,
)


@dataclass(frozen=True)
class Case:
    """One problem: number of heads, of keys, and how the kept keys lie."""

    heads: int
    keys: int
    kind: str

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"H={self.heads} {length_name(self.keys)} {self.kind}"


def length_name(keys: int) -> str:
    """32k, or the number itself where it is no such one."""
    return f"{keys // 1024}k" if keys % 1024 == 0 else str(keys)


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of single runs on a cold L2 ("burst": the chip stays cool)."""
    run()
    if DEVICE == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
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
    make = torch.Generator(device=DEVICE).manual_seed(case.keys)
    rows = []
    for start in range(0, queries, 64):
        last = case.keys - queries + start  # the first query of 64 sees the keys 0 .. last
        if case.kind == "rand":
            near = torch.rand(64, last + 1, generator=make, device=DEVICE).topk(kept, dim=-1).indices
        else:
            half, window = kept // 2, min(4096, (last + 1) // 2)
            near = torch.rand(64, window, generator=make, device=DEVICE).topk(half, dim=-1).indices
            far = torch.rand(last + 1 - window, generator=make, device=DEVICE).topk(kept - half).indices
            near = torch.cat((near + last + 1 - window, far.expand(64, -1)), -1)
        rows.append(near.sort(dim=-1).values.int())
    return torch.cat(rows)


def square_keys(heads: int, length: int, kept: int) -> Tensor:
    """Slots int32 [L, k] of a document by itself: all keys while there are no more than k (-1 behind), then "loc"."""
    early = torch.arange(kept, dtype=torch.int32, device=DEVICE).expand(kept, kept)
    early = early.masked_fill(early > torch.arange(kept, device=DEVICE)[:, None], -1)
    late = kept_keys(Case(heads, length, "loc"), length - kept, kept)
    return torch.cat((early, late[: length - kept]))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """N(0, 1) on the GPU."""
    make = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=make, device=DEVICE, dtype=dtype)


class Gate:
    """Checks before the times. One that fails is printed and ends the script in an error, but after the times: a GPU is rare."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: dict[str, float] = {}
        self.failed: list[str] = []

    def at_most(self, what: str, value: float, limit: float) -> None:
        """NaN fails too."""
        self.figures[what] = value
        if not value <= limit:
            self.failed.append(f"{what} {value:.2e}, at most {limit:.2e}")

    def report(self) -> dict[str, Any]:
        """Print and hand over."""
        print(f"{self.name}:", {what: f"{value:.1e}" for what, value in self.figures.items()}, flush=True)
        for text in self.failed:
            print(f"{self.name} FAILED: {text}", flush=True)
        return {"figures": self.figures, "failed": self.failed}


class Table:
    """Times of one case; prints each as it comes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[str, dict[str, float]] = {}
        self.failed: list[str] = []

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
            self._fail(name, error)
            return
        self.rows[name] = row
        more = f"  sustained {row['sustained_ms']:8.3f} ms" if sustained else ""
        print(f"{self.name:16s} {name:44s} {ms:8.3f} ms {row['tflops']:6.0f} TFLOP/s{more}", flush=True)

    def peer(self, name: str, make: Callable[[], Callable[[], Any] | None], flop: float = 0.0) -> None:
        """Time the run that make() gives, if it gives one: what a peer needs beforehand may fail as well."""
        try:
            run = make()
        except Exception as error:
            self._fail(name, error)
            return
        if run is not None:
            self.add(name, run, flop)

    def _fail(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        what = " ".join(str(error).split())[:160]
        print(f"{self.name:16s} {name:44s} {type(error).__name__} {what}", flush=True)
