"""The training-step part of kernel_layers.py: a whole DSA step beside its peers, and beside dense attention.

A step is what a layer does between its projections: index scores from e4m3 (quantised anew) with exact top-k, sparse
attention, its backward with the target p, the indexer's KL with its gradients. The kept keys of the attention are a
given set ("loc") and not those selected, so that all sides gather the same rows; the selection is timed all the same.

Shape letters: T queries, S keys, H heads, E entry, R latent, K kept, J indexer heads, I indexer head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import kernel_peers as peers
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, Case, Gate, Geometry, Table, kept_keys, length_name, normal, square_keys
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.kernels import dsa, fp8_triton, index_topk_triton, indexer_kl_triton
from posttrain.kernels import sparse_mla_backward_triton as mla_backward
from posttrain.kernels import sparse_mla_triton as mla

Run = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """The inputs of one step; bf16, the head weights fp32."""

    size: Geometry
    q_THE: Tensor
    entries_SE: Tensor
    slots_TK: Tensor
    do_THR: Tensor
    index: dsa.Index
    ranges: index_topk_triton.Ranges

    @property
    def pairs(self) -> int:
        """Keys that the queries may see."""
        return int((self.ranges.end_N - self.ranges.begin_N).long().sum())

    def select(self) -> Tensor:
        """Kept keys by scores from e4m3."""
        q8, q_scale = fp8_triton.quantize_e4m3(self.index.q_TJI)
        k8, k_scale = fp8_triton.quantize_e4m3(self.index.k_SI)
        w = self.index.w_TJ * q_scale
        return index_topk_triton.topk(q8, k8, w, self.ranges, self.size.kept, k_scale_S=k_scale)

    def run(self) -> tuple[Tensor, ...]:
        """The step as autograd runs it: selection, forward, backward; the gradients, and the KL last."""
        self.select()
        q, kv, *index = (
            x.detach().requires_grad_()
            for x in (self.q_THE, self.entries_SE, self.index.q_TJI, self.index.k_SI, self.index.w_TJ)
        )
        o_THR, kl = dsa.attend(
            q, kv, self.slots_TK, scale=self.size.scale, value_size=self.size.latent, deterministic=False,
            index=dsa.Index(*index),
        )  # fmt: skip
        assert kl is not None, "the index trains"
        share = torch.full_like(kl.loss, 1 / len(q))
        grads = torch.autograd.grad((o_THR, kl.loss), (q, kv, *index), (self.do_THR, share))
        return *grads, kl.value


def make(size: Geometry, heads: int, keys: int, *, square: bool = False) -> Step:
    """The last queries of `keys` keys, or with `square` all of them."""
    queries = keys if square else size.queries
    slots = (
        square_keys(heads, keys, size.kept)
        if square
        else kept_keys(Case(heads, keys, "loc"), queries, size.kept)[:queries]
    )
    ends = torch.arange(keys - queries + 1, keys + 1)
    index = dsa.Index(
        normal(queries, size.index_heads, size.index_size, seed=3),
        normal(keys, size.index_size, seed=4),
        normal(queries, size.index_heads, seed=5, dtype=torch.float32)
        * (size.index_heads * size.index_size) ** -0.5,
    )
    return Step(
        size,
        normal(queries, heads, size.entry, seed=0),
        normal(keys, size.entry, seed=1),
        slots,
        normal(queries, heads, size.latent, seed=2),
        index,
        index_topk_triton.key_ranges(torch.zeros_like(ends), ends, DEVICE),
    )


def gate(size: Geometry, heads: int) -> dict[str, Any]:
    """Gradients of a small step: their errors against fp64 over those of the definition in bf16, 2 at most."""
    on_gpu = DEVICE == "cuda"
    small = replace(size, queries=48 if on_gpu else 4)
    step = make(small, heads, size.kept + 1000 if on_gpu else 2 * size.kept)
    exact, rough = (_definition(step, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = Gate(f"gate H={heads}, error / that of bf16")
    names = ("dq", "dkv", "index dq", "index dk", "index dw", "KL")
    for name, *values in zip(names, step.run(), rough, exact, strict=True):
        ours, bf16, true = (x.double() for x in values)
        error, allowed = (float((x - true).norm() / true.norm()) for x in (ours, bf16))
        allowed = max(allowed, 1e-3) if name == "KL" else allowed  # one number may be right by luck
        found.at_most(name, error / allowed, 2.0 if on_gpu else 4.0)  # as may few numbers
    return found.report()


def _definition(step: Step, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What Step.run() returns, with products in that dtype."""
    size, high = step.size, torch.promote_types(dtype, torch.float32)
    q, kv, iq, ik = (
        x.detach().to(dtype).requires_grad_()
        for x in (step.q_THE, step.entries_SE, step.index.q_TJI, step.index.k_SI)
    )
    w = step.index.w_TJ.detach().to(high).requires_grad_()
    slots = step.slots_TK.long()
    entries = kv[slots]
    probs = ((q @ entries.transpose(1, 2)).to(high) * size.scale).softmax(-1)
    o = probs.to(dtype) @ entries[..., : size.latent]
    scores = ((iq @ ik[slots].transpose(1, 2)).to(high).relu() * w[..., None]).sum(1)
    p = probs.detach().mean(1)
    kl = (torch.xlogy(p, p) - p * F.log_softmax(scores, -1)).sum()
    share = torch.full_like(kl, 1 / len(q))
    return *torch.autograd.grad((o, kl), (q, kv, iq, ik, w), (step.do_THR.to(dtype), share)), kl.detach()


def whole_step(size: Geometry, heads: Sequence[int], keys: Sequence[int]) -> dict[str, Any]:
    """The step as a sum of our kernels, as one autograd pass, and as the sum of the peers' kernels."""
    report: dict[str, Any] = {}
    for num_heads in heads:
        report[f"gate H={num_heads}"] = gate(size, num_heads)
        for num in keys:
            step = make(size, num_heads, num)
            table = Table(f"step H={num_heads} {length_name(num)}")
            _time_ours(table, step)
            _time_peers(table, step)
            for side in ("ours", "peer"):
                parts = {name: row["ms"] for name, row in table.rows.items() if name.startswith(f"{side}: ")}
                total, name = sum(parts.values()), f"{side}, sum of {len(parts)} parts"
                print(f"{table.name:16s} {name:44s} {total:8.3f} ms", flush=True)
                table.rows[f"sum, {side}"] = {"ms": total, "parts": len(parts)}
            report[table.name] = {"rows": table.rows, "failed": table.failed}
            del step
            _free()
    return report


def _time_ours(table: Table, step: Step) -> None:
    size, slots, index = step.size, step.slots_TK, step.index
    per_entry = 2.0 * step.q_THE.shape[1] * size.kept * len(step.q_THE)
    per_index = 2.0 * size.index_heads * size.index_size
    o, lse = mla.forward(step.q_THE, step.entries_SE, slots, size.scale, size.latent)
    attention = (step.q_THE, step.entries_SE, slots, o, lse, step.do_THR, size.scale)

    def backward() -> Any:
        return mla_backward.backward(*attention, deterministic=False, with_target=True)

    target = backward()[2]
    weight = torch.full((len(slots),), 1 / len(slots), device=DEVICE)
    kl = (index.q_TJI, index.k_SI, index.w_TJ, slots, target, weight)
    sizes = 2 * size.latent + size.rotary, 2 * size.latent + 3 * size.entry
    table.add("ours: e4m3, scores, top-k", step.select, per_index * step.pairs)
    table.add(
        "ours: forward", lambda: mla.forward(*attention[:3], size.scale, size.latent), per_entry * sizes[0]
    )
    table.add("ours: backward + target", backward, per_entry * sizes[1])
    table.add(
        "ours: KL and gradients",
        lambda: indexer_kl_triton.indexer_kl(*kl, deterministic=False),
        3 * per_index * size.kept * len(slots),
    )
    flop = per_index * (step.pairs + 3 * size.kept * len(slots)) + per_entry * sum(sizes)
    table.add("one autograd pass", step.run, flop)


def _time_peers(table: Table, step: Step) -> None:
    size, slots, index = step.size, step.slots_TK, step.index
    q, kv, scale = step.q_THE, step.entries_SE, size.scale
    o, lse = mla.forward(q, kv, slots, scale, size.latent)
    q8, q_scale = fp8_triton.quantize_e4m3(index.q_TJI)
    k8, k_scale = fp8_triton.quantize_e4m3(index.k_SI)
    w, ranges = index.w_TJ * q_scale, step.ranges
    p = torch.full(slots.shape, 1 / size.kept, device=DEVICE)
    parts = (index.q_TJI, index.k_SI, index.w_TJ)

    def scores() -> Run | None:
        return peers.deep_gemm_scores(q8, k8, k_scale, w, ranges.begin_N, ranges.end_N)

    def select() -> Run | None:
        run = scores()
        return None if run is None else peers.cudnn_topk(run(), ranges.end_N, size.kept)

    table.peer("peer: DeepGEMM scores", scores)
    table.peer("peer: cuDNN deterministic top-k", select)
    table.peer("peer: FlashMLA forward", lambda: peers.flash_mla(q, kv, slots, scale, size.latent))
    table.peer("peer: cuDNN backward", lambda: peers.cudnn_backward(q, kv, o, step.do_THR, lse, slots, scale))
    table.peer("peer: cuDNN target", lambda: peers.cudnn_target(q, kv, lse, slots, scale))
    table.peer("peer: cuDNN predict", lambda: peers.cudnn_predict(*parts, slots))
    table.peer(
        "peer: cuDNN indexer backward", lambda: peers.cudnn_indexer_backward(*parts, p.clone(), p, slots)
    )


def crossover(size: Geometry, heads: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """A DSA step with KL against dense multi-head attention, both forward and backward, on whole documents."""
    report: dict[str, Any] = {}
    for num_heads in heads:
        ratios: list[tuple[int, float]] = []
        for length in lengths:
            table = Table(f"H={num_heads} {length_name(length)}")
            _time_dense(table, size, num_heads, length)
            _free()
            step = make(size, num_heads, length, square=True)
            table.add("DSA with KL", step.run, 0.0, repeats=3)
            del step
            _free()
            report[table.name] = {"rows": table.rows, "failed": table.failed}
            times = [row["ms"] for name, row in table.rows.items() if name.startswith("dense")]
            if times and "DSA with KL" in table.rows:
                ratios.append((length, min(times) / table.rows["DSA with KL"]["ms"]))
                print(f"{table.name:16s} dense / DSA {ratios[-1][1]:.2f}", flush=True)
        report[f"crossover H={num_heads}"] = found = _crossing(ratios)
        print(f"H={num_heads}: DSA with KL is faster from {found} tokens on", flush=True)
    return report


def _time_dense(table: Table, size: Geometry, heads: int, length: int) -> None:
    """Causal multi-head attention, forward and backward."""
    head = size.nope + size.rotary
    q, k, v = (
        normal(1, heads, length, width, seed=seed).requires_grad_()
        for seed, width in ((0, head), (1, head), (2, size.nope))
    )
    do = normal(1, heads, length, size.nope, seed=3)
    name, backend = ("cuDNN", SDPBackend.CUDNN_ATTENTION) if DEVICE == "cuda" else ("torch", SDPBackend.MATH)

    def run() -> Any:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head**-0.5)
        return torch.autograd.grad(o, (q, k, v), do)

    # backward has five products for the forward's two, all of them over the same pairs
    pairs = length * (length + 1) / 2
    flop = 2.0 * heads * pairs * (4 * head + 3 * size.nope)
    table.add(f"dense, {name}", run, flop, repeats=3)


def _crossing(ratios: Sequence[tuple[int, float]]) -> int | None:
    """Where the ratio passes 1, in a straight line between lengths; the first length if it starts above; None if never."""
    before: tuple[int, float] | None = None
    for length, ratio in ratios:
        if ratio >= 1:
            if before is None:
                return length
            share = (1 - before[1]) / (ratio - before[1])
            return round(before[0] + share * (length - before[0]))
        before = (length, ratio)
    return None


def _free() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
