"""One process of our own side: TorchEngine and Learner in this process, or behind Ray as in a run.

The loop is that of posttrain/stages/rl.py without ledger and files; groups without a signal are not
dropped, so that both sides train on the same number of tokens. Next: vs_trl.py.
"""

import sys
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
from posttrain.rollouts.pool import PoolSetup
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Batch, Rollout, Sample, Task

TOKENS_PER_BATCH = config.Learner().tokens_per_microbatch
MAX_ROWS = config.Rollouts().max_rows


@dataclass(frozen=True, kw_only=True)
class Side:
    """The two halves of a step, wherever they run."""

    generate: Callable[[Sequence[Request], Sampling], list[Rollout]]
    train: Callable[[Sequence[Batch]], Any]
    publish: Callable[[int], None]
    """Give the engine the learner's weights of that version."""


def main() -> None:
    """Train for the steps of the specification; a third argument "ray" puts both halves into actors."""
    spec = worker.read_spec()
    process.prepare()  # as our actors do
    torch.set_num_threads(spec.threads)
    use_ray = sys.argv[3:] == ["ray"]
    with PeakMemory() as peak, ExitStack() as stack:
        side = _remote(spec, stack) if use_ray else _local(spec)
        steps = [_step(spec, side, n) for n in range(spec.total_steps)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    worker.write_result(spec, steps, peak.bytes if use_ray else worker.peak_bytes(), versions)


def _local(spec: worker.Spec) -> Side:
    learner = Learner(_setup(spec))
    engine = TorchEngine(learner.model, checkpoint.load_tokenizer(Path(spec.checkpoint)))
    return Side(
        generate=lambda requests, settings: engine.generate(requests, settings, max_rows=MAX_ROWS),
        train=lambda batches: learner.grpo_step(batches, config.Loss(clip=spec.clip), 1.0),
        publish=lambda _: None,  # one process, one copy of the weights
    )


def _remote(spec: worker.Spec, stack: ExitStack) -> Side:
    from posttrain.cluster import Cluster  # imports Ray

    cfg = config.Run.model_validate(
        {
            "name": "vs-trl",
            "cluster": {"device": "cpu", "threads": spec.threads},
            "stages": [{"name": "export", "kind": "export", "source": spec.checkpoint}],
        }
    )
    cluster = stack.enter_context(Cluster(cfg))
    learner = stack.enter_context(cluster.learner(_setup(spec)))
    setup = PoolSetup(checkpoint=Path(spec.checkpoint), attention="sparse", max_rows=MAX_ROWS)
    pool = stack.enter_context(cluster.pool(setup))
    return Side(
        generate=pool.generate,
        train=lambda batches: learner.call("grpo_step", batches, config.Loss(clip=spec.clip), 1.0),
        publish=lambda version: pool.load(version, learner.publish),
    )


def _setup(spec: worker.Spec) -> Setup:
    return Setup(
        checkpoint=Path(spec.checkpoint),
        attention="sparse",
        optimizer=config.Optimizer(lr=spec.lr, betas=spec.betas),
        total_steps=spec.total_steps,
        train=frozenset({"model"}),
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
    return packing.pack(samples, weights, tokens_per_batch=TOKENS_PER_BATCH)


if __name__ == "__main__":
    main()
