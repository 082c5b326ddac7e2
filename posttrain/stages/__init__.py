"""Every kind of stage and the function that runs it: `run(stage, job) -> Result`.

Import paths and not functions, because the stages import torch and `posttrain check` must not.
Next: job.py for what a stage gets and returns.
"""

STAGES: dict[str, str] = {
    "pretrain": "posttrain.stages.pretrain:run",
    "convert": "posttrain.stages.convert:run",
    "warmup": "posttrain.stages.warmup:run",
    "sparse": "posttrain.stages.sparse:run",
    "rl": "posttrain.stages.rl:run",
    "distill": "posttrain.stages.distill:run",
    "sft": "posttrain.stages.sft:run",
    "export": "posttrain.stages.export:run",
    "evaluate": "posttrain.stages.evaluate:run",
}
"""Kind -> import path `package.module:function`."""


class StageFailed(RuntimeError):
    """A stage failed for a reason outside our code; the message is one line."""
