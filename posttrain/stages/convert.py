"""Dense MLA checkpoint -> the same weights plus fresh indexers. Next: ../model/convert.py, warmup.py."""

from posttrain import config
from posttrain.job import Job, Result
from posttrain.model.convert import convert


def run(stage: config.Convert, job: Job) -> Result:
    """Write the `deepseek_v32` form of the source."""
    report = convert(
        job.source(stage.source),
        job.out,
        index_topk=stage.index_topk,
        index_n_heads=stage.index_n_heads,
        index_head_dim=stage.index_head_dim,
        index_hadamard=stage.index_hadamard,
        index_dtype=stage.index_dtype,
        seed=job.seed,
    )
    for note in report.notes:
        job.metrics.say(f"{stage.name}: {note}")
    figures = {
        "model_type": report.model_type,
        "num_layers": report.num_layers,
        "dequantised": report.dequantised,
        "reordered": report.reordered,
        "dropped_layers": list(report.dropped_layers),
    }
    return Result(figures=figures)
