"""What one learner and several ranks must do alike: the same cases by either, each giving tensors to compare.

    python tests/group_worker.py RANK SIZE PORT CHECKPOINT OUT CONTEXT DEVICE [CASE ...]

Rank 0 leaves the results in OUT/results.pt. SIZE 0 is a learner alone, without a group.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from posttrain import config, packing
from posttrain.group import Group, Place
from posttrain.learner import Learner, Setup
from posttrain.muon import Muon
from posttrain.schema import Batch, SamplingMask
from posttrain.shards import whole

Found = dict[str, torch.Tensor]
BOTH = frozenset({"model", "indexer"})


def _device() -> str:
    """Of learners in this process; ranks.launch says so to those that it starts."""
    return os.environ.get("GROUP_DEVICE", "cpu")


def learner(path: Path, group: Group | None, **changes: Any) -> Learner:
    """A learner of the case; sharding options apply to several ranks only."""
    fields: dict[str, Any] = {
        "checkpoint": path,
        "attention": "sparse",
        "optimizer": config.Optimizer(lr=1e-2, max_grad_norm=0.7),
        "total_steps": 10,
        "train": frozenset({"model"}),
        "device": _device(),
    }
    sharding = {"ranks": 1 if group is None else group.size} | changes.pop("sharding", {})
    if group is None:
        sharding = {"ranks": 1, "recompute": sharding.get("recompute", False)}
    if group is not None and group.sharing is not None:
        sharding["context"] = group.sharing.size
    return Learner(Setup(**(fields | changes), sharding=config.Sharding(**sharding)), group)


def _recorded(length: int, rng: np.random.Generator) -> dict[str, Any]:
    """What an engine could have recorded: the last seven entries, random experts, random sets of half the tokens."""
    query_L1, back_7 = np.arange(length - 1)[:, None], np.arange(7)
    kept_LK = np.where(back_7 <= query_L1, np.maximum(query_L1 - 6, 0) + back_7, -1)
    experts = np.argsort(rng.random((2, length - 1, 4)), axis=-1)[..., :2]
    return {"kept": np.tile(kept_LK, (3, 1, 1)).astype(np.int16), "experts": experts.astype(np.int16)}


def _cut(tokens: np.ndarray[Any, Any], rng: np.random.Generator) -> SamplingMask:
    sets = [np.union1d(rng.choice(214, 5), [token]) if rng.random() < 0.5 else [] for token in tokens]
    return SamplingMask(
        counts=np.array([len(ids) for ids in sets], np.int32), ids=np.concatenate(sets).astype(np.int32)
    )


def batches(
    limit: int, *, order: int = 1, seed: int = 0, keep: bool = False, num_teachers: int = 0
) -> list[Batch]:
    """Nine samples of many lengths, packed; with engine log-probs far enough off to be clipped."""
    rng = np.random.default_rng(seed)
    samples = [
        tiny.sample(
            str(i),
            10 + 3 * i,
            seed=seed + i,
            advantage=(-1) ** i * 0.5,
            group_size=3,
            kl_coef=0.1,
            logprobs=rng.normal(-5.0, 1.0, 10 + 3 * i).astype(np.float32),
            teacher=i % num_teachers if num_teachers else None,
        )
        for i in range(9)
    ][::order]
    if keep:
        samples = [
            replace(s, sampling_mask=_cut(s.tokens, rng), **_recorded(len(s.tokens), rng)) for s in samples
        ]
    return packing.pack(samples, packing.token_weights(samples, "sequence", 3), tokens_per_batch=limit)


def watch(made: Learner) -> Found:
    """The gradients of the last step, whole, before they are clipped."""
    seen: Found = {}
    step = made.optimizers.step

    def watched(**given: Any) -> Any:
        for name, parameter in made.model.named_parameters():
            if parameter.grad is not None:
                seen[name] = whole(parameter.grad).cpu().clone()
        return step(**given)

    made.optimizers.step = watched  # type: ignore[method-assign]
    return seen


def weights(made: Learner) -> Found:
    """All weights; empty on other ranks than the first."""
    return {name: tensor.clone() for name, tensor in made.weights().items()}


def use_sgd(made: Learner) -> None:
    """Updates as large as the gradients: those of AdamW hide their size."""
    parameters = [p for part in made.optimizers.parts.values() for p in part]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    optimizer.param_groups[0]["peak_lr"] = 0.5
    made.optimizers.optimizers = [optimizer]


def _figures(figures: dict[str, float]) -> Found:
    return {f"figure/{name}": torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def gradients(
    path: Path,
    group: Group | None,
    limit: int = 100_000,
    order: int = 1,
    keep: bool = False,
    policy: Any = "grpo",
    **changes: Any,
) -> Found:
    """A GRPO step with a KL, an entropy bonus and the off-policy mask, then its update by SGD."""
    made = learner(
        path, group, reference=True, train=BOTH, indexer_loss="sparse", balance_speed=0.01, **changes
    )
    seen = watch(made)
    use_sgd(made)
    settings = config.Loss(policy=policy, entropy_coef=0.01, offpolicy_delta=0.3)
    given = batches(limit, order=order, keep=keep, num_teachers=len(changes.get("teachers", ())))
    figures, logprobs = made.grpo_step(given, settings, 0.8)
    by_id = {}
    for batch, logp_M in zip(given, logprobs, strict=True):
        counts = [int(m.sum()) for m in np.split(batch.mask_T, batch.cu_seqlens_S[1:-1])]
        by_id |= dict(zip(batch.ids, np.split(logp_M, np.cumsum(counts)[:-1]), strict=True))
    found = {f"grad/{name}": gradient for name, gradient in seen.items()} | _figures(figures)
    found |= {f"logprobs/{id}": torch.from_numpy(by_id[id]) for id in sorted(by_id)}
    return found | {f"weight/{name}": tensor for name, tensor in weights(made).items()}


def taught(path: Path, group: Group | None, form: Any) -> Found:
    """The same with two teachers, so that ranks ask different ones at the same time."""
    teachers = tuple(tiny.sparse_checkpoint(path.parent / f"teacher-{seed}", seed=seed) for seed in (1, 2))
    if group is not None:
        group.collect(0)  # transformers lets the first rank alone write
    return gradients(
        path, group, limit=60, keep=True, mopd=config.Mopd(form=form, coef=0.5), teachers=teachers
    )


def warmup(path: Path, group: Group | None, **changes: Any) -> Found:
    """Only the indexers train: no gradient enters a layer or leaves it."""
    made = learner(
        path, group, attention="dense", indexer_loss="dense", train=frozenset({"indexer"}), **changes
    )
    seen = watch(made)
    figures = made.lm_step(batches(150))
    made.lm_step(batches(150, seed=5))
    return {f"grad/{name}": gradient for name, gradient in seen.items()} | _figures(figures)


def training(path: Path, group: Group | None, sgd: bool = False, **changes: Any) -> Found:
    """Three LM steps of everything, evaluations between them."""
    made = learner(path, group, train=BOTH, indexer_loss="sparse", balance_speed=0.01, **changes)
    if sgd:
        use_sgd(made)
    for seed in range(3):
        figures = made.lm_step(batches(150, seed=seed))
        logprobs = made.logprobs(batches(60, seed=9))
    found = _figures(figures) | {f"logprobs/{i}": torch.from_numpy(x) for i, x in enumerate(logprobs)}
    diagnosed = made.diagnose(batches(150, seed=7))
    found["lm_loss"] = torch.tensor([diagnosed["lm_loss_dense"], diagnosed["lm_loss_sparse"]])
    return found | {f"weight/{name}": tensor for name, tensor in weights(made).items()}


def adapters(path: Path, group: Group | None, **changes: Any) -> Found:
    """Three GRPO steps of adapters, with the KL to the model without them."""
    made = learner(path, group, lora=config.Lora(rank=3, alpha=7.0), reference=True, **changes)
    for seed in range(3):
        figures, logprobs = made.grpo_step(batches(60, seed=seed), config.Loss(), 0.8)
    found = _figures(figures) | {f"logprobs/{i}": torch.from_numpy(x) for i, x in enumerate(logprobs)}
    return found | {f"weight/{name}": tensor for name, tensor in weights(made).items()}


def matrices(_: Path, group: Group | None) -> Found:
    """Muon on matrices of which no number of rows is even, given the same gradients."""
    rng = torch.Generator().manual_seed(0)
    found: Found = {}
    for shape in ((41, 28), (3, 64), (1, 5), (33, 33)):
        start, *given = (torch.randn(shape, generator=rng).to(_device()) for _ in range(4))
        parameter = torch.nn.Parameter(
            start if group is None else distribute_tensor(start, group._mesh, [Shard(0)])
        )
        optimizer = Muon([parameter], lr=0.02, weight_decay=0.1)
        for gradient in given:
            parameter.grad = (
                gradient if group is None else distribute_tensor(gradient, group._mesh, [Shard(0)])
            )
            optimizer.step()
        found[str(shape)] = whole(parameter.detach()).cpu()
    return found


def triton(path: Path, group: Group | None, backend: str = "triton", **changes: Any) -> Found:
    """One small LM step of everything on Triton's interpreter, which is slow."""
    made = learner(path, group, train=BOTH, indexer_loss="sparse", backend=backend, **changes)
    seen = watch(made)
    samples = [tiny.sample(str(i), 10 + i, seed=i) for i in range(2)]
    given = packing.pack(samples, packing.token_weights(samples, "token", 1), tokens_per_batch=99)
    figures = made.lm_step(given)
    return {f"grad/{name}": gradient for name, gradient in seen.items()} | _figures(figures)


def snapshot(path: Path, group: Group | None, folder: Path, **changes: Any) -> Found:
    """Two steps, a snapshot, two steps more."""
    optimizer = config.Optimizer(lr=1e-3)
    made = learner(path, group, train=BOTH, indexer_loss="sparse", optimizer=optimizer, **changes)
    for seed in range(2):
        made.lm_step(batches(150, seed=seed))
    if group is None or group.rank == 0:
        folder.mkdir()
    if group is not None:
        group.collect(0)
    made.snapshot(folder)
    made.snapshot_finish()
    return _two_more(made)


def goes_on(path: Path, group: Group | None, folder: Path) -> Found:
    """The two steps more, from a snapshot."""
    made = learner(path, group, train=BOTH, indexer_loss="sparse", optimizer=config.Optimizer(lr=1e-3))
    made.restore(folder)
    return _two_more(made)


def _two_more(made: Learner) -> Found:
    for seed in (2, 3):
        made.lm_step(batches(150, seed=seed))
    return {f"weight/{name}": tensor for name, tensor in weights(made).items()}


def saved(path: Path, group: Group | None, folder: Path) -> Found:
    """A checkpoint, and the step it was saved after."""
    made = learner(path, group)
    made.lm_step(batches(150))
    made.save(folder)
    return weights(made)


SPREAD = {"spread_experts": True}
OFFLOAD = {"offload": True}
MUON = {"optimizer": config.Optimizer(kind="muon", lr=1e-2)}
BF16 = {"dtype": "bfloat16"}
CASES: dict[str, Callable[..., Found]] = {
    "one batch": gradients,
    "micro-batches": lambda *a: gradients(*a, limit=60),
    "another order": lambda *a: gradients(*a, limit=60, order=-1),
    "whole layers": lambda *a: gradients(*a, limit=60, sharding={"reshard": False}),
    "spread experts": lambda *a: gradients(*a, limit=60, sharding=SPREAD),
    "spread and recomputed": lambda *a: gradients(*a, limit=60, sharding=SPREAD | {"recompute": True}),
    "spread, three steps": lambda *a: training(*a, sgd=True, sharding=SPREAD),
    "recomputed": lambda *a: gradients(*a, limit=60, sharding={"recompute": True}),
    "kept": lambda *a: gradients(*a, limit=60, keep=True, max_logits=9 * 214),
    "taught": lambda *a: taught(*a, "full"),
    "taught by samples": lambda *a: taught(*a, "sampled"),
    "gspo": lambda *a: gradients(*a, limit=60, policy="gspo"),
    "warm-up": warmup,
    "warm-up, recomputed": lambda *a: warmup(*a, sharding={"recompute": True}),
    "adamw": training,
    "muon": lambda *a: training(*a, **MUON),
    "adapters": adapters,
    "matrices": matrices,
    "bf16": lambda *a: gradients(*a, limit=60, **BF16),
    "mixed precision": lambda *a: gradients(*a, limit=60, **BF16, sharding={"mixed_precision": True}),
}
"""By path and group."""
OFFLOADED: dict[str, Callable[..., Found]] = {
    "offloaded": lambda *a: gradients(*a, limit=60, sharding=OFFLOAD),
    "offloaded, adamw": lambda *a: training(*a, sharding=OFFLOAD),
    "offloaded, muon": lambda *a: training(*a, sharding=OFFLOAD, **MUON),
    "offloaded, spread": lambda *a: gradients(*a, limit=60, sharding=OFFLOAD | SPREAD),
    "offloaded, bf16": lambda *a: gradients(*a, limit=60, sharding=OFFLOAD, **BF16),
}
"""Where there is a GPU to offload from."""


def main(
    rank: str, size: str, port: str, path: str, out: str, context: str, device: str, *names: str
) -> None:
    """Run the cases as one rank, or (size 0) as a learner alone; with context > 1 the ranks share their batches."""
    torch.set_num_threads(1)
    group, own, other = None, "by-one", "by-two"
    if int(size):
        place = Place(rank=int(rank), size=int(size), address=f"tcp://127.0.0.1:{port}")
        group = Group(place, device=device, timeout_s=60, context=int(context))
        own, other = other, own
    folders: dict[str, Callable[..., Found]] = {
        "snapshot": lambda *a: snapshot(*a, Path(out, own)),
        "spread": lambda *a: snapshot(*a, Path(out, f"{own}-spread"), sharding=SPREAD),
        "goes on": lambda *a: goes_on(*a, Path(out, other)),
        "saved": lambda *a: saved(*a, Path(out, "checkpoint")),
    }
    cases = CASES | OFFLOADED | {"triton": triton} | folders
    results = {name: cases[name](Path(path), group) for name in names or (*CASES, *folders)}
    if group is None or group.rank == 0:
        torch.save(results, Path(out, "results.pt"))
    if group is not None:
        group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
