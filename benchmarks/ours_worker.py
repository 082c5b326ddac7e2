"""One process of our own side: TorchEngine and Learner in this process, or either engine behind Ray as in a run.

The loop is that of posttrain/stages/rl.py without ledger and files; groups without a signal are not
dropped, so that both sides train on the same number of tokens. Next: vs_trl.py.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import worker

from posttrain import config, packing, process
from posttrain.advantage import advantages
from posttrain.generation import sample_seed
from posttrain.learner import Learner, Setup
from posttrain.memory import PeakMemory
from posttrain.model import checkpoint
from posttrain.rollouts.geometry import BYTES, Geometry
from posttrain.rollouts.pool import PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Batch, Rollout, Sample, Task


@dataclass(frozen=True, kw_only=True)
class Side:
    """The two halves of a step, wherever they run."""

    generate: Callable[[Sequence[Request], Sampling], list[Rollout]]
    train: Callable[[Sequence[Batch]], Any]
    publish: Callable[[int], None]
    """Give the engine the learner's weights of that version."""


def main() -> None:
    """Train for the steps of the specification; rollouts "ray" and "vllm" put both halves into actors."""
    spec = worker.read_spec()
    process.prepare()  # as our actors do
    torch.set_num_threads(spec.threads)
    use_ray = spec.rollouts != "torch"
    with PeakMemory() as peak, ExitStack() as stack:
        side = _remote(spec, stack) if use_ray else _local(spec)
        steps = [_step(spec, side, n) for n in range(spec.total_steps)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    allocated = None if use_ray else worker.allocated_bytes(spec)
    peak_bytes = peak.bytes if use_ray else worker.peak_bytes()
    worker.write_result(spec, steps, peak_bytes, versions, allocated_bytes=allocated)


def _local(spec: worker.Spec) -> Side:
    learner = Learner(_setup(spec))
    engine = TorchEngine(learner.model, checkpoint.load_tokenizer(Path(spec.checkpoint)))
    print(f"learner: {learner.backend}; engine: {engine.backend}")

    def train(batches: Sequence[Batch]) -> None:
        learner.grpo_step(batches, config.Loss(clip=spec.clip), 1.0)
        worker.synchronize(spec)

    return Side(
        generate=lambda requests, settings: engine.generate(requests, settings, max_rows=spec.max_rows),
        train=train,
        publish=lambda _: None,  # one process, one copy of the weights
    )


def _remote(spec: worker.Spec, stack: ExitStack) -> Side:
    from posttrain.cluster import Cluster  # imports Ray

    engine = "vllm" if spec.rollouts == "vllm" else "torch"
    cfg = config.Run.model_validate(
        {
            "name": "vs-trl",
            "cluster": {
                "device": spec.device,
                "dtype": spec.dtype,
                "threads": spec.threads,
                "sharding": {"recompute": spec.recompute},
            },
            "rollouts": {"engine": engine},
            "stages": [{"name": "export", "kind": "export", "source": spec.checkpoint}],
        }
    )
    cluster = stack.enter_context(Cluster(cfg))
    learner = stack.enter_context(cluster.learner(_setup(spec)))
    setup = PoolSetup(
        checkpoint=Path(spec.checkpoint),
        attention="sparse",
        engine=engine,  # type: ignore[arg-type]  # one of the two
        max_rows=spec.max_rows,
        cache_bytes=_cache_bytes(spec),
        batched_tokens=max(2048, spec.tokens_per_batch),
    )
    pool = stack.enter_context(cluster.pool(setup))
    return Side(
        generate=pool.generate,
        train=lambda batches: learner.call("grpo_step", batches, config.Loss(clip=spec.clip), 1.0),
        publish=lambda version: pool.load(version, learner.publish),
    )


def _cache_bytes(spec: worker.Spec) -> int:
    """For every sequence of a wave, rounded up to blocks of 16 tokens; vLLM also wants room for one of the longest."""
    shape = Geometry.read(Path(spec.checkpoint))
    assert shape is not None, "we wrote it"
    wave = min(spec.max_rows, spec.completions) * (spec.longest + 16)
    tokens = max(wave, checkpoint.max_length(spec.checkpoint)) + 16
    return tokens * shape.num_hidden_layers * shape.entry_bytes(BYTES[spec.dtype])


def _setup(spec: worker.Spec) -> Setup:
    return Setup(
        checkpoint=Path(spec.checkpoint),
        attention="sparse",
        optimizer=config.Optimizer(lr=spec.lr, betas=spec.betas),
        total_steps=spec.total_steps,
        train=frozenset({"model"}),
        sharding=config.Sharding(recompute=spec.recompute),
        device=spec.device,
        dtype=spec.dtype,
        seed=spec.seed,
    )


def _step(spec: worker.Spec, side: Side, number: int) -> worker.Step:
    questions = spec.prompts[number * spec.tasks_per_step :][: spec.tasks_per_step]
    tasks = [
        Task(id=q, domain="bench", messages=({"role": "user", "content": q},), thinking=False)
        for q in questions
    ]
    requests = [
        Request(
            task=task,
            index=i,
            seed=sample_seed(spec.seed, 0, task.id, i),
            max_new_tokens=spec.new_tokens,
        )
        for task in tasks
        for i in range(spec.group_size)
    ]
    began, cpu = time.perf_counter(), time.process_time()
    rollouts = side.generate(requests, Sampling(ignore_eos=not spec.stop_at_eos))
    generated = time.perf_counter()
    batches = _score(spec, rollouts)
    scored = time.perf_counter()
    side.train(batches)
    side.publish(number + 1)
    ended = time.perf_counter()
    lengths = [r.num_sampled for r in rollouts]
    worker.check(spec, lengths)
    assert sum(int(b.mask_T.sum()) for b in batches) == sum(lengths), "not every token is trained on"
    return worker.Step(
        generate=generated - began,
        score=scored - generated,
        total=ended - began,
        cpu=time.process_time() - cpu,
        lengths=lengths,
        prompts=worker.prompts_hash([r.tokens[~r.sampled].tolist() for r in rollouts]),
    )


def _score(spec: worker.Spec, rollouts: Sequence[Rollout]) -> list[Batch]:
    """Rewards, advantages (0 in a group of equal rewards) and packed batches."""
    samples = []
    for start in range(0, len(rollouts), spec.group_size):
        group = rollouts[start : start + spec.group_size]
        found = advantages([worker.reward(r.text) for r in group]) or [0.0] * len(group)
        samples += [
            Sample(
                id=f"{r.task_id}#{r.index}",
                tokens=r.tokens,
                mask=r.sampled,
                logprobs=r.logprobs,
                advantage=advantage,
                group_size=len(group),
            )
            for r, advantage in zip(group, found, strict=True)
        ]
    weights = packing.token_weights(samples, "sequence", num_groups=spec.tasks_per_step)
    return packing.pack(samples, weights, tokens_per_batch=spec.tokens_per_batch)


if __name__ == "__main__":
    main()
