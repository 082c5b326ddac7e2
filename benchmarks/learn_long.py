"""Does a model learn at real geometry? Dense pretraining -> convert -> warm-up -> sparse, at 8k to 16k tokens on one GPU.

The task is retrieval. A document is entries "key value key"; a third of them are new, the others come once more at a
distance that is log-uniform up to the length of the document, and there the value is to be predicted: what is measured.
The loss is on these answers and on the second key, which is the token before the last one: copying it teaches the attention
by position that retrieval is built on. Keys and values are paired anew in every document, so that nothing can be known by
heart. Attention is that of DeepSeek-V3.2 (entries 576 / 512, indexer heads of 128, k = 2048) in a small body. Without a
GPU: --size tiny (k = 32, 512 tokens).

It shows accuracy near (distance below k) and far, the LM gap (sparse - dense) and top-k recall, for dense attention, the
untrained indexer, after warm-up and after sparse training; and fails unless the last is as good as the first.

    PYTHONPATH=. python benchmarks/learn_long.py --minutes 8 --out learn_long.json

Shape letters: M answers of a batch, V vocabulary.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain import config, packing
from posttrain.device_batch import on_device
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.model.context import AttentionMode, PackedContext
from posttrain.model.convert import convert
from posttrain.schema import Batch, Sample

ENTRY = 3
"""Tokens of "key value key"."""
NEW = 1 / 3
"""Share of the entries that are new."""
RECENT = 10
"""Steps that decide whether a length is learned."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps at one length; it ends early where the mean loss of the last steps falls below `until`."""

    length: int
    steps: int
    until: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, its data and its schedule."""

    model: dict[str, Any]
    topk: int
    index_heads: int
    index_dim: int
    keys: int
    values: int
    tokens_per_step: int
    pretrain: tuple[Phase, ...]
    warmup: tuple[Phase, ...]
    sparse: tuple[Phase, ...]
    heldout: int
    """Documents of the last length."""
    lr: float = 4e-3
    sparse_lr: float = 1e-3
    indexer_lr: float = 1e-3

    @property
    def length(self) -> int:
        """Of the held-out documents."""
        return self.sparse[-1].length


REAL = Size(
    model={
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
        "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    topk=2048, index_heads=64, index_dim=128, keys=2560, values=512, tokens_per_step=65536,
    pretrain=(
        Phase(length=48, steps=300, until=0.03), Phase(length=192, steps=200, until=0.03),
        Phase(length=768, steps=150, until=0.03), Phase(length=4096, steps=100, until=0.02),
        Phase(length=8192, steps=100, until=0.01), Phase(length=16384, steps=100, until=0.005),
    ),
    warmup=(Phase(length=4096, steps=100), Phase(length=16384, steps=80)),
    sparse=(Phase(length=8192, steps=20), Phase(length=16384, steps=60)),
    heldout=4,
)  # fmt: skip
TINY = Size(
    model={
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
    topk=32, index_heads=4, index_dim=32, keys=192, values=32, tokens_per_step=4096,
    pretrain=(
        Phase(length=24, steps=400, until=0.05), Phase(length=96, steps=200, until=0.05),
        Phase(length=256, steps=100, until=0.03), Phase(length=512, steps=100, until=0.02),
    ),
    warmup=(Phase(length=256, steps=60), Phase(length=512, steps=60)),
    sparse=(Phase(length=512, steps=40),),
    heldout=8,
)  # fmt: skip
SIZES = {"real": REAL, "tiny": TINY}


@dataclass(frozen=True)
class Heldout:
    """A document and how far from each answer its pair stands, in tokens [M]."""

    batch: Batch
    distance_M: NDArray[np.int64]


@dataclass
class Run:
    """What the stages share."""

    size: Size
    device: str
    folder: Path
    deadline: float
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    report: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Run all stages, print the table, write the report; exit code 1 where the model did not learn."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", choices=[*SIZES], default="real" if torch.cuda.is_available() else "tiny")
    options.add_argument(
        "--minutes", type=float, default=8.0, help="stages that have not ended by then are cut"
    )
    options.add_argument("--heads", type=int, help="attention heads")
    options.add_argument("--lr", type=float)
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    size = SIZES[args.size]
    size = replace(size, lr=args.lr or size.lr)
    if args.heads:
        size = replace(size, model=size.model | {"num_attention_heads": args.heads})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run = Run(size, device, Path(folder), began + args.minutes * 60)
        report = run.report
        report |= {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "size": asdict(size),
        }
        try:
            _stages(run, began, args.minutes * 60)
        finally:
            report["wall_s"] = time.perf_counter() - began
            if device == "cuda":
                report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if args.out:
                args.out.write_text(json.dumps(report, indent=2) + "\n")
    _verdict(report)


def _stages(run: Run, began: float, seconds: float) -> None:
    size, report = run.size, run.report
    heldout = _heldout(size)
    fresh, dense, converted = (run.folder / name for name in ("fresh", "dense", "converted"))
    checkpoint.save(_fresh(size), fresh)

    run.deadline = began + 0.55 * seconds
    learner = _learner(run, fresh, "dense", size.pretrain, size.lr)
    _train(run, "pretrain", learner, size.pretrain)
    report["dense"] = {"accuracy": _accuracy(learner, heldout, "dense", size.topk)}
    checkpoint.save_dense(learner.model, dense)
    convert(
        dense, converted, index_topk=size.topk, index_n_heads=size.index_heads,
        index_head_dim=size.index_dim, seed=0,
    )  # fmt: skip

    run.deadline = began + 0.75 * seconds
    learner = _learner(run, converted, "warmup", size.warmup, size.lr)
    _measure(report, "untrained", learner, heldout, size.topk)
    _train(run, "warmup", learner, size.warmup)
    _measure(report, "warmup", learner, heldout, size.topk)
    checkpoint.save(learner.model, run.folder / "warm")

    run.deadline = began + seconds
    learner = _learner(run, run.folder / "warm", "sparse", size.sparse, size.sparse_lr)
    _train(run, "sparse", learner, size.sparse)
    _measure(report, "sparse", learner, heldout, size.topk)


def document(size: Size, length: int, rng: np.random.Generator, id: str) -> tuple[Sample, NDArray[np.int64]]:
    """One document and, at every answer, how many tokens before it the pair stood; 0 elsewhere.

    Vocabulary: [keys | values]. A third of the entries are new; the others repeat the entry that stands a log-uniform
    distance before, which may have come once more in between: the distance that counts is that to the last one.
    """
    slots = length // ENTRY
    value_of = size.keys + rng.integers(0, size.values, size.keys)
    unused = iter(rng.permutation(size.keys).tolist())
    is_new = rng.random(slots) < NEW
    back = np.exp(rng.random(slots) * np.log(np.maximum(np.arange(slots), 1))).astype(np.int64)
    keys: list[int] = []
    last: dict[int, int] = {}
    distance_L = np.zeros(ENTRY * slots, np.int64)
    for slot in range(slots):
        if not keys or is_new[slot]:
            key = next(unused)
        else:
            key = keys[slot - int(back[slot])]
            distance_L[ENTRY * slot + 1] = ENTRY * (slot - last[key])
        keys.append(key)
        last[key] = slot
    tokens = np.stack((keys, value_of[keys], keys), axis=1).reshape(-1).astype(np.int32)
    copied = np.arange(len(tokens)) % ENTRY == 2
    return Sample(id=id, tokens=tokens, mask=copied | (distance_L > 0)), distance_L


def _heldout(size: Size) -> list[Heldout]:
    rng, found = np.random.default_rng(1 << 20), []
    for n in range(size.heldout):
        sample, distance_L = document(size, size.length, rng, f"heldout.{n}")
        sample = replace(sample, mask=distance_L > 0)
        (batch,) = packing.pack([sample], [1.0], tokens_per_batch=size.length)
        found.append(Heldout(batch, distance_L[distance_L > 0]))
    return found


def _fresh(size: Size) -> DeepseekV32ForCausalLM:
    torch.manual_seed(0)
    layers = size.model["num_hidden_layers"]
    return DeepseekV32ForCausalLM(
        DeepseekV32Config(
            **size.model, vocab_size=size.keys + size.values, max_position_embeddings=size.length,
            num_key_value_heads=size.model["num_attention_heads"], first_k_dense_replace=layers,
            moe_intermediate_size=64, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
            index_n_heads=1, index_head_dim=size.model["qk_rope_head_dim"], index_topk=1,
        )
    )  # fmt: skip


def _learner(run: Run, source: Path, stage: str, phases: Sequence[Phase], lr: float) -> Learner:
    parts: dict[str, dict[str, Any]] = {
        "dense": {"attention": "dense", "train": frozenset({"model"})},
        "warmup": {"attention": "dense", "train": frozenset({"indexer"}), "indexer_loss": "dense"},
        "sparse": {"attention": "sparse", "train": frozenset({"model", "indexer"}), "indexer_loss": "sparse"},
    }
    learner = Learner(
        Setup(
            checkpoint=source,
            optimizer=config.Optimizer(kind="muon", lr=lr, indexer_lr=run.size.indexer_lr, warmup_steps=20),
            total_steps=sum(phase.steps for phase in phases),
            device=run.device,
            dtype="bfloat16" if run.device == "cuda" else "float32",
            **parts[stage],
        )
    )
    print(f"{stage}: {learner.backend}", flush=True)
    return learner


def _train(run: Run, stage: str, learner: Learner, phases: Sequence[Phase]) -> None:
    """All phases; past the deadline the stage ends where it is, and says so."""
    log: list[dict[str, float]] = []
    for phase in phases:
        recent: list[float] = []
        began, done = time.perf_counter(), 0
        while done < phase.steps and time.perf_counter() < run.deadline:
            figures = learner.lm_step(_step(run, phase.length))
            done += 1
            recent = [*recent[1 - RECENT :], figures["loss"]]
            if done == 1 or done % 25 == 0:
                _say(stage, phase.length, done, figures, began)
            if len(recent) == RECENT and sum(recent) / RECENT < phase.until:
                break
        seconds = time.perf_counter() - began
        loss = recent[-1] if recent else float("nan")
        log.append({"length": phase.length, "steps": done, "seconds": seconds, "loss": loss})
        if time.perf_counter() >= run.deadline:
            print(f"{stage}: time is up at {phase.length} tokens, step {done} of {phase.steps}", flush=True)
            break
        print(f"{stage}: {phase.length} tokens, {done} steps, {seconds:.0f} s", flush=True)
    run.report.setdefault("training", {})[stage] = log


def _step(run: Run, length: int) -> list[Batch]:
    half = max(length, run.size.tokens_per_step // 2)  # tokens of one of two passes
    num = 2 * (half // length)
    samples = [document(run.size, length, run.rng, str(n))[0] for n in range(num)]
    weights = packing.token_weights(samples, "token", num_groups=1)
    return packing.pack(samples, weights, tokens_per_batch=half)


def _say(stage: str, length: int, step: int, figures: dict[str, float], began: float) -> None:
    more = f" KL {figures['indexer_kl']:.4f}" if "indexer_kl" in figures else ""
    more += " SKIPPED" if "skipped" in figures else ""
    each = (time.perf_counter() - began) / step
    print(
        f"{stage} {length:6d} step {step:4d} loss {figures['loss']:.4f}{more} {each:.2f} s/step", flush=True
    )


def _measure(
    report: dict[str, Any], stage: str, learner: Learner, heldout: Sequence[Heldout], topk: int
) -> None:
    figures = learner.diagnose([each.batch for each in heldout])
    recalls = [layer["recall_ratio"] for layer in figures["layers"]]
    kl = [layer["kl"] for layer in figures["layers"]]
    figures |= {
        "accuracy": _accuracy(learner, heldout, "sparse", topk),
        "lm_gap": figures["lm_loss_sparse"] - figures["lm_loss_dense"],
    }
    report[stage] = figures
    print(
        f"{stage}: recall by layer {[round(r, 3) for r in recalls]} KL {[round(x, 3) for x in kl]} "
        f"accuracy {figures['accuracy']}",
        flush=True,
    )


@torch.no_grad()
def _accuracy(
    learner: Learner, heldout: Sequence[Heldout], attention: AttentionMode, topk: int
) -> dict[str, float]:
    """Share of right answers near (distance < k), far, and of all."""
    right, distance = [], []
    for each in heldout:
        tensors = on_device(each.batch, learner.setup.device)
        context = PackedContext(
            attention=attention, backend=learner.backend, cu_seqlens_S=tensors.cu_seqlens_S
        )
        logits_MV = learner.model(tensors.tokens_T, context, tensors.at_M)
        right.append((logits_MV.argmax(-1) == tensors.targets_M).cpu().numpy())
        distance.append(each.distance_M)
    right_M, far_M = np.concatenate(right), np.concatenate(distance) >= topk
    parts = {"near": right_M[~far_M], "far": right_M[far_M], "all": right_M}
    return {name: float(part.mean()) for name, part in parts.items()} | {"answers": len(right_M)}


def _verdict(report: dict[str, Any]) -> None:
    """Print the table; SystemExit where dense did not learn, or sparse training did not give it back."""
    print(f"\n{report['device']}, {report['wall_s']:.0f} s")
    print(f"{'':10s}   near    far    all  LM dense LM sparse      gap  recall")
    for stage in ("dense", "untrained", "warmup", "sparse"):
        figures = report[stage]
        near, far, every = (figures["accuracy"][name] for name in ("near", "far", "all"))
        row = f"{stage:10s} {near:6.3f} {far:6.3f} {every:6.3f}"
        if "layers" in figures:
            recall = min(layer["recall_ratio"] for layer in figures["layers"])
            row += f" {figures['lm_loss_dense']:9.4f} {figures['lm_loss_sparse']:9.4f} {figures['lm_gap']:8.4f} {recall:7.3f}"
        print(row)
    dense, untrained, final = (report[name]["accuracy"]["far"] for name in ("dense", "untrained", "sparse"))
    if not (dense > 0.8 and untrained < dense - 0.2 and final > dense - 0.05):
        raise SystemExit("NOT SHOWN: far, dense > 0.8, untrained < dense - 0.2, sparse > dense - 0.05")


if __name__ == "__main__":
    main()
