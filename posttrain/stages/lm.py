"""The loop that every language-model stage shares: pretrain, warmup, sparse, sft; and its held-out figures.

While the learner works on one step the driver makes the batches of the next. Next: ../data.py.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
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
    waiting: list[str] = []
    recent: deque[dict[str, float]] = deque(maxlen=_RECENT)
    tokens = 0
    for step in range(steps + 1):
        if step < steps:
            samples = next(stream)
            weights = packing.token_weights(samples, "token", num_groups=1)
            limit = job.cfg.learner.tokens_per_microbatch
            batches = packing.pack(samples, weights, tokens_per_batch=limit)
            ids = [sample.id for sample in samples]
            job.ledger.planned(ids)
            before = learner.lm_step_soon(batches)
        else:
            before, ids = learner.settle(), []
        if before is not None:
            tokens += int(before["tokens"])
            if "skipped" in before:
                job.ledger.failed(waiting, "step skipped")
                job.metrics.say(f"step {step - 1} was skipped: its loss or gradient is not finite, or spikes")
                job.metrics.log(step - 1, before | {"skipped_ids": " ".join(waiting)})
            else:
                recent.append(before)
                job.ledger.trained(waiting)
                job.metrics.log(step - 1, before)
        waiting = ids
    return tokens, _means(recent)


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


def _means(recent: Sequence[dict[str, float]]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for figures in recent:
        for name, value in figures.items():
            values[name].append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}
