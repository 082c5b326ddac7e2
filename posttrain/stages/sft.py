"""Supervised fine-tuning of a fresh copy of a sparse checkpoint on distilled rows or the user's chats.

The loss is on the assistant's tokens; domains take turns. The indexers stay frozen. Next: rl.py.
"""

from collections import Counter

from posttrain import config, data, graph, text
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.model.checkpoint import load_tokenizer
from posttrain.schema import Sample
from posttrain.stages import lm
from posttrain.stages.distill import DATA


def run(stage: config.Sft, job: Job) -> Result:
    """Write the fine-tuned checkpoint."""
    source = job.source(stage.source)
    tokenizer = load_tokenizer(source)
    rows: list[Sample] = []
    for name in stage.data:
        path = job.source(name)
        if graph.is_path(name):
            rows += text.chats(path, tokenizer)
        else:
            rows += text.distilled(path / DATA)
    if not rows:
        raise ValueError(f"stage {stage.name!r}: no rows in {', '.join(stage.data)}")
    setup = Setup(
        checkpoint=source,
        attention="sparse",
        optimizer=stage.optimizer,
        total_steps=stage.steps,
        train=frozenset({"model"}),
        lora=stage.lora,
        seed=job.seed,
    )
    batches = data.steps(data.balanced(rows, seed=job.seed), stage.sequences_per_step)
    with job.cluster.learner(setup) as learner:
        tokens, means = lm.train(job, learner, batches, steps=stage.steps)
        saved = learner.call("finish", job.out)
    per_domain = {f"rows/{name}": n for name, n in sorted(Counter(r.domain for r in rows).items())}
    figures = {"loss": means["loss"], "rows": len(rows), **per_domain, **saved}
    return Result(steps=stage.steps, tokens=tokens, figures=figures)
