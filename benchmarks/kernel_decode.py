"""The decoding part of kernel_layers.py: index scores, top-k and sparse attention of one new token per sequence.

The cache is that of the product: blocks of 64 tokens scattered over one pool, a token's numbers [entry | index key] in
bf16, and again with index keys in e4m3. A step is timed as a CUDA graph. The bound is the sum, over scores and attention, of the larger of bytes / 4.3 TB/s and
FLOP / 805 TFLOP/s (an H200's), in bf16; an H100 has less memory bandwidth, so what this card copies is printed as well. The
peers keep e4m3 caches, entries included: half the bytes.

Shape letters: B sequences, P blocks, S tokens of a block, M blocks of a sequence, H heads, J indexer heads, K kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import kernel_peers as peers
import torch
from kernel_cases import DEVICE, Gate, Geometry, Table, length_name, normal
from torch import Tensor

from posttrain.kernels import dsa, e4m3, fp8_triton, paged_index_topk_triton, paged_mla_triton, reference
from posttrain.kernels.pages import Pages
from posttrain.model.entry import Entry

Run = Callable[[], Any]
BATCH, BLOCK = 64, 64
TINY_BATCH, TINY_BLOCK = 2, 16
BANDWIDTH, RATE = 4.3e12, 805e12


@dataclass(frozen=True)
class Problem:
    """One new token of every sequence; everything bf16 but the head weights."""

    size: Geometry
    pages: Pages
    q_B1HE: Tensor
    q_index_B1JI: Tensor
    w_B1J: Tensor

    def step(self) -> tuple[Tensor, Tensor]:
        """What the engine runs per layer."""
        return dsa.decode(
            self.q_B1HE, self.q_index_B1JI, self.w_B1J, self.pages,
            num_kept=self.size.kept, scale=self.size.scale, value_size=self.size.latent, max_rows=len(self.q_B1HE),
        )  # fmt: skip


def decode(size: Geometry, heads: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """A step against its roofline and against the peers' chain."""
    report: dict[str, Any] = {}
    if DEVICE == "cuda":
        report["card"] = ceilings()
    for num_heads in heads:
        for length in lengths:
            problem = _problem(size, num_heads, length)
            report[f"gate H={num_heads}"] = _check(problem)
            table = Table(f"decode H={num_heads} {length_name(length)}")
            bounds = _bounds(problem)
            _, kept = problem.step()
            table.add("scores + top-k", graphed(lambda problem=problem: _select(problem)), 0.0)
            attend = graphed(lambda problem=problem, kept=kept: _attend(problem, kept))
            table.add("attention", attend, 0.0)
            table.add("step", graphed(problem.step), 0.0)
            from_e4m3 = replace(problem, pages=_with_e4m3(problem.pages))
            report[f"gate H={num_heads}, e4m3"] = _check(from_e4m3)
            table.add("scores + top-k, e4m3", graphed(lambda problem=from_e4m3: _select(problem)), 0.0)
            table.add("step, e4m3", graphed(from_e4m3.step), 0.0)
            del from_e4m3
            _time_peers(table, problem, kept)
            report[table.name] = {"rows": table.rows, "bounds_ms": bounds, "failed": table.failed}
            _compare(table, bounds)
            del problem, kept, attend
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return report


def graphed(run: Run) -> Run:
    """The run as a CUDA graph; on a CPU the run itself."""
    if DEVICE == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills what libraries keep
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(out: Any = out) -> Any:  # holds what the graph writes to
        graph.replay()
        return out

    return replay


def ceilings() -> dict[str, float]:
    """What this card copies (read + written) and multiplies, to judge the bounds by."""
    table = Table("card")
    x = torch.empty(2 << 30, dtype=torch.int8, device=DEVICE)
    a, b = (normal(8192, 8192, seed=n) for n in (1, 2))
    table.add("copy of 2 GiB", x.clone, 0.0)
    table.add("bf16 product 8192^3", lambda: a @ b, 2.0 * 8192**3)
    copy, product = table.rows["copy of 2 GiB"], table.rows["bf16 product 8192^3"]
    found = {"tb_per_s": 2 * x.numel() / copy["ms"] / 1e9, "tflops": product["tflops"]}
    print(found, flush=True)
    return found


def _problem(size: Geometry, heads: int, length: int) -> Problem:
    batch, block = (BATCH, BLOCK) if DEVICE == "cuda" else (TINY_BATCH, TINY_BLOCK)
    blocks = -(-length // block)
    pool_PSX = normal(batch * blocks, block, size.entry + size.index_size, seed=1)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0))
    pages = Pages(
        entries_PSE=pool_PSX[..., : size.entry],
        index_PSI=pool_PSX[..., size.entry :],
        table_BM=order.view(batch, blocks).int().to(DEVICE),
        lengths_B=torch.full((batch,), length, dtype=torch.int32, device=DEVICE),
        max_length=length,
    )
    w = normal(batch, 1, size.index_heads, seed=4, dtype=torch.float32)
    return Problem(
        size,
        pages,
        normal(batch, 1, heads, size.entry, seed=2),
        normal(batch, 1, size.index_heads, size.index_size, seed=3),
        w * (size.index_heads * size.index_size) ** -0.5,
    )


def _with_e4m3(pages: Pages) -> Pages:
    """The same cache with its index keys in e4m3."""
    entry = Entry(latent=pages.entries_PSE.shape[2], index=pages.index_PSI.shape[2], e4m3=True)
    stored = entry.stored(pages.entries_PSE.element_size())
    keys_PSX = e4m3.pack(pages.index_PSI, stored, by_triton=True)
    pool_PSX = torch.cat((pages.entries_PSE, keys_PSX), -1)
    keys_PSI, scale_PS = e4m3.unpack(pool_PSX[..., entry.latent :], entry.index)
    entries_PSE = pool_PSX[..., : entry.latent]
    return replace(pages, entries_PSE=entries_PSE, index_PSI=keys_PSI, scale_PS=scale_PS)


def _select(problem: Problem) -> Tensor:
    q, w = problem.q_index_B1JI, problem.w_B1J
    if problem.pages.scale_PS is not None:
        q, w = fp8_triton.quantize_e4m3(q, weight=w)
    return paged_index_topk_triton.topk(q, w, problem.pages, problem.size.kept)


def _attend(problem: Problem, kept: Tensor) -> Any:
    size, q = problem.size, problem.q_B1HE
    part = paged_mla_triton.part_size(len(q), q.shape[2], size.kept)
    return paged_mla_triton.attend(q, problem.pages, kept, size.scale, size.latent, part=part)


def _check(problem: Problem) -> dict[str, Any]:
    """Of the first two sequences: the kept keys by fp32 scores, the output by fp64."""
    size, pages, rows = problem.size, problem.pages, slice(0, 2)
    out, kept = problem.step()
    length, q_index = pages.max_length, problem.q_index_B1JI[rows]
    index, entries = (
        reference.paged(pool, pages.table_BM[rows], length) for pool in (pages.index_PSI, pages.entries_PSE)
    )
    if pages.scale_PS is not None:
        scale_B1 = reference.paged(pages.scale_PS[..., None], pages.table_BM[rows], length)
        q_index, index = reference.round_e4m3(q_index), index.float() * scale_B1
    dot = q_index.float() @ index.float()[:, None].transpose(2, 3)  # [B, 1, J, L]
    scores = (dot.relu() * problem.w_B1J[rows][..., None]).sum(2)
    best = scores.topk(size.kept).indices
    hit = torch.zeros_like(scores).scatter_(-1, best, 1.0).gather(-1, kept[rows].long())
    exact, rough = (
        reference.sparse_mla(
            problem.q_B1HE[rows].to(t), entries.to(t), kept[rows].long(), size.scale, size.latent
        )[0].double()
        for t in (torch.float64, torch.bfloat16)
    )
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (out[rows], rough))
    gate = Gate("gate")
    gate.at_most("kept keys that are not the best", 1 - float(hit.mean()), 0.005)
    gate.at_most("error / that of bf16", error / allowed, 2.0)
    return gate.report()


def _bounds(problem: Problem) -> dict[str, float]:
    """Milliseconds of the roofline, for keys and entries in bf16."""
    size = problem.size
    batch, _, heads, _ = problem.q_B1HE.shape
    tokens, kept = batch * problem.pages.max_length, batch * size.kept
    index_flop = 2 * size.index_heads * size.index_size * tokens
    index = max(2 * size.index_size * tokens / BANDWIDTH, index_flop / RATE)
    width = size.entry + size.latent
    attention = max(2 * size.entry * kept / BANDWIDTH, 2 * heads * width * kept / RATE)
    return {"scores": index * 1e3, "attention": attention * 1e3, "sum": (index + attention) * 1e3}


def _time_peers(table: Table, problem: Problem, kept: Tensor) -> None:
    """DeepGEMM's paged scores, cuDNN's deterministic top-k, FlashMLA's decoding kernel: times only."""
    size, pages = problem.size, problem.pages
    k8, scale = fp8_triton.quantize_e4m3(pages.index_PSI.contiguous())
    q8 = problem.q_index_B1JI.to(torch.float8_e4m3fn)

    def scores() -> Run | None:
        return peers.deep_gemm_paged(q8, k8, scale, problem.w_B1J[:, 0], pages)

    def select() -> Run | None:
        run = scores()
        return None if run is None else peers.cudnn_topk(run(), pages.lengths_B, size.kept)

    table.peer("peer: DeepGEMM paged scores", scores)
    table.peer("peer: cuDNN deterministic top-k", select)
    block = pages.table_BM.gather(1, (kept[:, 0] // pages.block_size).long())
    slots = (block * pages.block_size + kept[:, 0] % pages.block_size).int()
    rows = pages.entries_PSE.contiguous().view(-1, size.entry)
    q = problem.q_B1HE
    table.peer(
        "peer: FlashMLA decode, e4m3",
        lambda: peers.flash_mla_decode(q, rows, slots, pages.block_size, size.scale),
    )
    table.peer(
        "FlashMLA sparse_fwd, bf16", lambda: peers.flash_mla(q[:, 0], rows, slots, size.scale, size.latent)
    )


def _compare(table: Table, bounds: dict[str, float]) -> None:
    step = table.rows.get("step", {}).get("ms", float("nan"))
    print(
        f"{table.name:16s} bound {bounds['scores']:.3f} + {bounds['attention']:.3f} = {bounds['sum']:.3f} ms: "
        f"the step takes {step / bounds['sum']:.2f} times as long",
        flush=True,
    )
    parts = [row["ms"] for name, row in table.rows.items() if name.startswith("peer: ")]
    if parts:
        print(f"{table.name:16s} peers, sum of {len(parts)} of 3 parts: {sum(parts):.3f} ms", flush=True)
