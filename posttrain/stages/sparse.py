"""Top-k on, everything trains: the model on its LM loss, the indexers on their KL over the selected set.

The two never mix: the indexer's inputs are detached and its parameters have their own optimizer
(V3.2-Exp Eq. 4). With attention = "dense" the same steps run without top-k, as the control.
Next: rl.py.
"""

from posttrain import config
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.model.checkpoint import index_topk, load_tokenizer
from posttrain.stages import lm


def run(stage: config.Sparse, job: Job) -> Result:
    """Continued training; the control writes a dense checkpoint."""
    source = job.source(stage.source)
    dense = stage.attention == "dense"
    setup = Setup(
        checkpoint=source,
        attention=stage.attention,
        indexer_loss="none" if dense else "sparse",
        optimizer=stage.optimizer,
        total_steps=stage.steps,
        train=frozenset({"model"} if dense else {"model", "indexer"}),
        balance_speed=stage.balance_speed,
        seed=job.seed,
    )
    heldout = None if dense else lm.Heldout(stage, job, index_topk(source))
    with job.cluster.learner(setup) as learner:
        batches = lm.steps(stage.data, job, load_tokenizer(source))
        tokens, means = lm.train(job, learner, batches, steps=stage.steps)
        figures = {} if heldout is None else heldout.measure(learner)
        figures |= learner.call("finish", job.out, dense=dense)
    figures |= {"loss": means["loss"], **lm.expert_figures(means)}
    return Result(steps=stage.steps, tokens=tokens, figures=figures)
