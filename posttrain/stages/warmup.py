"""Dense attention, only the indexers train: KL over all causal keys (V3.2-Exp Eq. 3).

Nothing else receives a gradient, so the language model is bit for bit the one that came in.
Next: sparse.py.
"""

from posttrain import config
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.model.checkpoint import index_topk, load_tokenizer
from posttrain.stages import lm


def run(stage: config.Warmup, job: Job) -> Result:
    """Train the indexers; measure what the untrained ones cost first."""
    source = job.source(stage.source)
    setup = Setup(
        checkpoint=source,
        attention="dense",
        indexer_loss="dense",
        optimizer=stage.optimizer,
        total_steps=stage.steps,
        train=frozenset({"indexer"}),
        seed=job.seed,
    )
    heldout = lm.Heldout(stage, job, index_topk(source))
    with job.cluster.learner(setup) as learner:
        untrained = heldout.measure(learner)
        batches = lm.steps(stage.data, job, load_tokenizer(source))
        tokens, means = lm.train(job, learner, batches, steps=stage.steps)
        figures = heldout.measure(learner)
        figures |= learner.call("finish", job.out)
    figures |= {
        "indexer_kl": means["indexer_kl"],
        "untrained_lm_gap": untrained["lm_gap"],
        "untrained_recall": untrained["recall"],
    }
    return Result(steps=stage.steps, tokens=tokens, figures=figures)
