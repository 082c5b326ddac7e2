"""The loop that every language-model stage shares: pretrain, warmup, sparse, sft; and its held-out figures.

While the learner works on one step the driver makes the batches of the next. Next: ../data.py.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from posttrain import config, data, packing
from posttrain.cluster import RemoteLearner
from posttrain.domains import open_domains
from posttrain.job import Job
from posttrain.model.checkpoint import load_tokenizer
from posttrain.schema import Sample

_RECENT = 20
"""Steps that the figures of a finished stage are averaged over: one step is noisy."""


def train(
    job: Job, learner: RemoteLearner, stream: Iterator[list[Sample]], *, steps: int
) -> tuple[int, dict[str, float]]:
    """Run `steps` optimizer steps; returns the tokens trained on and the mean figures of the last steps."""
    log = _Log()
    before = job.snapshots.restore(learner)
    first = job.snapshots.first_step
    if before is not None:
        log = _Log(**before)
        # The stream is a function of the seed, so that its frontier is the number of the step.
        next(itertools.islice(stream, first - 1, first))
    waiting: list[str] = []
    for step in range(first, steps):
        if job.snapshots.due(step):
            log.add(job, step - 1, waiting, learner.settle())
            job.snapshots.take(step, learner, asdict(log))
        samples = next(stream)
        weights = packing.token_weights(samples, "token", num_groups=1)
        limit = job.cfg.learner.tokens_per_microbatch
        batches = packing.pack(samples, weights, tokens_per_batch=limit)
        ids = [sample.id for sample in samples]
        job.ledger.planned(ids)
        log.add(job, step - 1, waiting, learner.lm_step_soon(batches))
        waiting = ids
    log.add(job, steps - 1, waiting, learner.settle())
    job.snapshots.settle()
    return log.tokens, log.means()


@dataclass(slots=True)
class _Log:
    """What the stage's own figures are made of."""

    tokens: int = 0
    recent: list[dict[str, float]] = field(default_factory=list)

    def add(self, job: Job, step: int, ids: Sequence[str], figures: dict[str, float] | None) -> None:
        """Account for a step that is done; None: there is none."""
        if figures is None:
            return
        self.tokens += int(figures["tokens"])
        if "skipped" in figures:
            job.ledger.failed(ids, "step skipped")
            job.metrics.say(f"step {step} was skipped: its loss or gradient is not finite, or spikes")
            job.metrics.log(step, figures | {"skipped_ids": " ".join(ids)})
        else:
            self.recent = [*self.recent[1 - _RECENT :], figures]
            job.ledger.trained(ids)
            job.metrics.log(step, figures)

    def means(self) -> dict[str, float]:
        values: defaultdict[str, list[float]] = defaultdict(list)
        for figures in self.recent:
            for name, value in figures.items():
                values[name].append(value)
        return {name: sum(v) / len(v) for name, v in values.items()}


def stream(text: config.TextData, job: Job, tokenizer: Any, *, heldout: bool = False) -> Iterator[Sample]:
    """What the stage's data section names."""
    domains = [] if text.files else list(open_domains(job.cfg).values())
    return data.lm_stream(text, domains, tokenizer, seed=job.seed, heldout=heldout)


def steps(text: config.TextData, job: Job, tokenizer: Any) -> Iterator[list[Sample]]:
    """The training samples of each step."""
    return data.steps(stream(text, job, tokenizer), text.sequences_per_step)


class Heldout:
    """Held-out figures of a conversion: made once, measured before and after training."""

    def __init__(self, stage: config.Warmup | config.Sparse, job: Job, topk: int) -> None:
        tokenizer = load_tokenizer(job.source(stage.source))
        samples = data.counted(
            stream(stage.data, job, tokenizer, heldout=True), topk=topk, at_least=stage.heldout_tokens
        )
        limit = job.cfg.learner.tokens_per_microbatch
        self._batches = packing.pack(samples, [1.0] * len(samples), tokens_per_batch=limit)

    def measure(self, learner: RemoteLearner) -> dict[str, Any]:
        """LM loss dense and sparse (nats per token), KL and top-k recall per layer."""
        figures: dict[str, Any] = learner.call("diagnose", self._batches)
        figures["lm_gap"] = figures["lm_loss_sparse"] - figures["lm_loss_dense"]
        figures["recall"] = min(layer["recall_ratio"] for layer in figures["layers"])
        return figures


def expert_figures(figures: dict[str, float]) -> dict[str, float]:
    """The least and the most loaded expert of any layer, as shares of all choices."""
    least = [v for name, v in figures.items() if name.startswith("expert_min/")]
    most = [v for name, v in figures.items() if name.startswith("expert_max/")]
    return {"expert_min": min(least), "expert_max": max(most)} if least else {}
