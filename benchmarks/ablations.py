"""What V3.2's stabilisers do in RL: each one off, all off, and an engine that selects other cache entries, on several seeds.

`python benchmarks/ablations.py --base runs/demo/sparse`, with the sparse checkpoint of the demo (`posttrain run
configs/demo.toml --until sparse`). Learner and engine live in one process per run, so that the engine can be made to
disagree: in bf16 beside a learner in fp32, or with noise in its indexers. Everything else is the product's `rl` stage.
Results go to OUT/ablations.jsonl, one line per run; runs that are there are not repeated. Figures: ablations.md.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from posttrain import config, generation, packing
from posttrain.domains import Domain, open_domains
from posttrain.learner import Learner, Setup
from posttrain.ledger import Ledger
from posttrain.model import checkpoint
from posttrain.model.weights import Weights, pack
from posttrain.rewards.scorer import score_all
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Rollout, Sample
from posttrain.stages import rl

DOMAINS = {
    "math": {
        "tasks": "rg://chain_sum?size=20000&min_terms=6&max_terms=8&min_digits=1&max_digits=1",
        "where": "posttrain.toy.arithmetic:small_totals",
        "rewards": [{"fn": "posttrain.rewards.gym:score"}],
        "max_new_tokens": 60,
    },
    "logic": {
        "tasks": "py://posttrain.toy.sorting:tasks?n=10000",
        "rewards": [{"fn": "posttrain.rewards.answer:exact"}],
        "max_new_tokens": 12,
    },
}
ALL: dict[str, Any] = {
    "loss": {"kl": "unbiased", "offpolicy_delta": 0.1},
    "keep": {"routing": True, "sampling_mask": True, "topk": True},
}
ARMS: dict[str, dict[str, Any]] = {
    "all five": {},
    "k3 for the unbiased KL": {"loss": {"kl": "k3"}},
    "no off-policy mask": {"loss": {"offpolicy_delta": None}},
    "no Keep Routing": {"keep": {"routing": False}},
    "no Keep Sampling Mask": {"keep": {"sampling_mask": False}},
    "no Keep Top-k": {"keep": {"topk": False}},
    "none": {
        "loss": {"kl": "k3", "offpolicy_delta": None},
        "keep": {"routing": False, "sampling_mask": False, "topk": False},
    },
}
"""Changes to ALL; the engine computes in bf16."""
BARE: dict[str, Any] = {
    "loss": {"kl": "none", "offpolicy_delta": None, "old_policy": "recomputed"},
    "keep": {"routing": False, "topk": False},
}
INCONSISTENT: dict[str, dict[str, Any]] = {
    "same selection": BARE,
    "other selection": BARE,
    "other selection, ratio to the engine": BARE | {"loss": BARE["loss"] | {"old_policy": "engine"}},
    "other selection, Keep Top-k": BARE | {"keep": {"routing": False, "topk": True}},
    "unsteady selection": BARE,
    "unsteady selection, ratio to the engine": BARE | {"loss": BARE["loss"] | {"old_policy": "engine"}},
    "unsteady selection, Keep Top-k": BARE | {"keep": {"routing": False, "topk": True}},
}
"""The collapse demo, with an fp32 engine. "same selection" is the product's path: both sides choose the same entries.

"other": the engine's indexers get noise of the relative size --noise in their query weights with every new weights.
"unsteady": the learner's get it in their queries at every pass, as a top-k that is not deterministic breaks ties anew (GLM-5
3.2), while the engine selects as it should. The arms differ in what the learner makes of it.
"""


class Engine(TorchEngine):
    """Takes the learner's weights in its own precision, and may spoil its indexers."""

    noise = 0.0

    def load(self, version: int, weights: Weights) -> None:
        """As TorchEngine."""
        held = self.model.state_dict()
        super().load(version, pack({n: t.to(held[n].dtype) for n, t in weights.tensors.items()}))
        rng = torch.Generator().manual_seed(version)
        for layer in self.model.model.layers:
            weight = layer.self_attn.indexer.wq_b.weight.data
            noise = torch.randn(weight.shape, generator=rng) * float(weight.float().std())
            weight += (self.noise * noise).to(weight.dtype)


class Local:
    """Cluster, learner and pool of one run, in this process."""

    restarts = 0

    def __init__(self, base: Path, *, dtype: torch.dtype, arm: str, noise: float) -> None:
        self._engine = Engine(checkpoint.load(base, dtype=dtype), checkpoint.load_tokenizer(base))
        self._engine.noise = noise if arm.startswith("other") else 0.0
        self._unsteady = noise if arm.startswith("unsteady") else 0.0
        self.hooks: list[RemovableHandle] = []
        """What makes the learner unsteady."""
        self.made: Learner
        self.masked: list[float] = []
        """Share of tokens that the off-policy mask took, of every update."""

    def learner(self, setup: Setup) -> Any:
        """As Cluster."""
        self.made = Learner(setup)
        rng = torch.Generator().manual_seed(setup.seed)
        if self._unsteady:
            for layer in self.made.model.model.layers:
                hook = partial(_shake, size=self._unsteady, rng=rng)
                self.hooks.append(layer.self_attn.indexer.wq_b.register_forward_hook(hook))
        self.load(0, self.publish)  # so that step 0 has the noise too
        return nullcontext(self)

    def pool(self, _: Any) -> Any:
        """As Cluster."""
        return nullcontext(self)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As RemoteLearner."""
        answer = getattr(self.made, method)(*args, **kwargs)
        if method == "grpo_step":  # the stage logs the first update of a step alone, which is on-policy
            self.masked.append(answer[0].get("offpolicy_masked", 0.0))
        return answer

    def publish(self, *_: Any) -> Any:
        """As RemoteLearner."""
        return pack(self.made.weights())

    def load(self, version: int, publish: Any) -> None:
        """As Pool."""
        self._engine.load(version, publish())

    def generate(self, requests: Sequence[Request], settings: Sampling, *_: Any) -> list[Rollout]:
        """As Pool."""
        return self._engine.generate(requests, settings)


def _shake(_: Any, __: Any, out: Tensor, *, size: float, rng: torch.Generator) -> Tensor:
    return out + size * out.std() * torch.randn(out.shape, generator=rng)


def main() -> None:
    """Run what is missing, print the tables."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--base", type=Path, required=True, help="sparse checkpoint")
    options.add_argument("--domain", choices=DOMAINS, default="math")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--tasks", type=int, default=16, help="tasks per step, 8 completions each")
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument(
        "--noise",
        type=float,
        default=0.5,
        help='of "other" and "unsteady" selection, in parts of what it is added to',
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--only", nargs="+", default=[*ARMS, *INCONSISTENT], metavar="ARM")
    options.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    options.add_argument("--out", type=Path, default=Path(".bench"))
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "ablations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {_key(row) for row in rows}
    wanted = [_spec(args, arm, seed) for seed in args.seeds for arm in args.only]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as processes:
        running = [processes.submit(run, spec) for spec in wanted if _key(spec) not in done]
        for future in as_completed(running):
            rows.append(future.result())
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "curve"}), flush=True)
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
    keys = {_key(spec) for spec in wanted}
    print(table([row for row in rows if _key(row) in keys]))


_SPEC = ("arm", "seed", "domain", "steps", "tasks", "lr", "noise")


def _spec(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    common = {"domain": args.domain, "steps": args.steps, "tasks": args.tasks, "lr": args.lr}
    common["noise"] = args.noise if arm.startswith(("other", "unsteady")) else 0.0
    return {"arm": arm, "seed": seed, **common, "base": str(args.base)}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SPEC)


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One run, from the base checkpoint to figures of the final policy."""
    torch.set_num_threads(1)
    base, began = Path(spec["base"]), time.monotonic()
    changes = ARMS.get(spec["arm"]) or INCONSISTENT.get(spec["arm"], {})
    cfg = _recipe(spec, changes)
    (stage,) = cfg.stages
    assert isinstance(stage, config.Rl)
    dtype = torch.bfloat16 if spec["arm"] in ARMS else torch.float32
    local, log = Local(base, dtype=dtype, arm=spec["arm"], noise=spec["noise"]), _Log()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        job: Any = SimpleNamespace(
            cfg=cfg,
            out=out,
            seed=spec["seed"],
            cluster=local,
            metrics=log,
            source=Path,
            ledger=Ledger(out).begin("rl"),
            snapshots=SimpleNamespace(
                restore=lambda _: None, first_step=0, due=lambda _: False, settle=lambda: None
            ),
        )
        rl.run(stage, job)
    for hook in local.hooks:
        hook.remove()
    (domain,) = open_domains(cfg).values()
    figures = log.figures() | measure(local.made, base, domain) | {"masked": statistics.mean(local.masked)}
    return dict(spec) | figures | {"wall_s": time.monotonic() - began}


def _recipe(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> config.Run:
    """Steps of four updates, on completions sampled at top-p 0.9."""
    name = spec["domain"]
    stage = {
        "name": "rl",
        "kind": "rl",
        "source": spec["base"],
        "steps": spec["steps"],
        "mix": {name: {"kl_coef": 0.05}},
        "tasks_per_step": spec["tasks"],
        "updates_per_step": 4,
        "optimizer": {"lr": spec["lr"]},
        **{part: ALL[part] | changes.get(part, {}) for part in ALL},
    }
    return config.Run.model_validate(
        {
            "name": "ablations",
            "rollouts": {"top_p": 0.9},
            "cluster": {"device": "cpu", "reward_workers": 1},
            "domains": [DOMAINS[name] | {"name": name}],
            "stages": [stage],
        }
    )


class _Log:
    """What the stage logs."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def log(self, _: int, values: Mapping[str, Any]) -> None:
        self.rows.append(values)

    def say(self, _: str) -> None:
        """Warnings are in the figures."""

    def figures(self) -> dict[str, Any]:
        """The reward's way, in means of three steps, and how far the engine was from the learner."""
        curve = [
            statistics.mean(r["reward"] for r in self.rows[i : i + 3]) for i in range(len(self.rows) - 2)
        ]
        gaps = [row["engine/gap_mean"] for row in self.rows if "engine/gap_mean" in row]
        return {
            "curve": [round(value, 4) for value in curve],
            "peak": max(curve),
            "last": curve[-1],
            "lost": 1 - curve[-1] / max(curve),
            "collapsed": float(curve[-1] < 0.5 * max(curve)),
            "gap": statistics.mean(gaps) if gaps else math.nan,
        }


def measure(
    learner: Learner, base: Path, domain: Domain, *, num_tasks: int = 75, samples: int = 4
) -> dict[str, float]:
    """The policy itself on held-out tasks: sampled at temperature 1, nothing cut, by an fp32 engine that selects alike."""
    engine = TorchEngine(checkpoint.load(base), checkpoint.load_tokenizer(base))
    engine.load(1, pack(learner.weights()))
    plans = [generation.plan(domain, task, samples, seed=9) for task in domain.evaluation[:num_tasks]]
    rollouts = engine.generate([request for plan in plans for request in plan.requests], Sampling())
    groups = [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]
    scores = score_all(
        [(domain.rewards, plan.task, group) for plan, group in zip(plans, groups, strict=True)]
    )
    values = [score.value for of_group in scores for score in of_group]
    given = [
        Sample(id=str(i), tokens=r.tokens, mask=r.sampled, logprobs=r.logprobs)
        for i, r in enumerate(rollouts)
    ]
    batches = packing.pack(given, [1.0] * len(given), tokens_per_batch=4096)
    policy = np.concatenate(learner.logprobs(batches))
    learner.model.load_state_dict(_state(base))
    reference = np.concatenate(learner.logprobs(batches))
    return {
        "reward": float(np.mean([value for value in values if value is not None])),
        "kl": float((policy - reference).mean()),
        "entropy": float(-policy.mean()),
        "tokens": float(np.mean([r.num_sampled for r in rollouts])),
    }


def _state(base: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = checkpoint.load(base).state_dict()
    return state


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t by number of seeds."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and 95 % interval over seeds of each arm, as Markdown.

    "against" is the reward less that of the first arm of the same kind with the same seed, and thus the same tasks.
    """
    names = ("reward", "peak", "lost", "kl", "entropy", "gap", "masked")
    lines = [
        "| arm | n | collapsed | reward | against | " + " | ".join(names[1:]) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    by_arm = {arm: {r["seed"]: r for r in rows if r["arm"] == arm} for arm in (*ARMS, *INCONSISTENT)}
    for kind in (ARMS, INCONSISTENT):
        first = by_arm[next(iter(kind))]
        for arm in kind:
            mine = by_arm[arm]
            if not mine:
                continue
            reward, *cells = [_interval([row[name] for row in mine.values()]) for name in names]
            shared = [seed for seed in mine if seed in first and mine is not first]
            against = _interval([mine[seed]["reward"] - first[seed]["reward"] for seed in shared])
            collapsed = f"{sum(row['collapsed'] for row in mine.values()):.0f}"
            lines.append("| " + " | ".join([arm, str(len(mine)), collapsed, reward, against, *cells]) + " |")
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.3g}" for value in values)
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3g} +- {half:.2g}"


if __name__ == "__main__":
    main()
