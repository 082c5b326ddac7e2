"""A small dense MLA model from nothing: it learns the task formats from demonstrations (or text).

Only for demonstrations of the pipeline and for tests; real runs start from a checkpoint at convert.
Next: lm.py, convert.py.
"""

import shutil

import torch

from posttrain import config
from posttrain.job import Job, Result
from posttrain.learner import Setup
from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
from posttrain.rewards.base import load_object
from posttrain.stages import lm


def run(stage: config.Pretrain, job: Job) -> Result:
    """Write a `deepseek_v3` checkpoint with its tokenizer."""
    tokenizer = load_object(stage.tokenizer, f"stage {stage.name!r}: tokenizer")()
    fresh = job.out / "fresh"
    checkpoint.save(_fresh_model(stage.arch, tokenizer, job.seed), fresh, tokenizer)
    setup = Setup(
        checkpoint=fresh,
        attention="dense",
        optimizer=stage.optimizer,
        total_steps=stage.steps,
        train=frozenset({"model"}),
        balance_speed=stage.balance_speed,
        seed=job.seed,
    )
    with job.cluster.learner(setup) as learner:
        batches = lm.steps(stage.data, job, tokenizer)
        tokens, means = lm.train(job, learner, batches, steps=stage.steps)
        saved = learner.call("finish", job.out, dense=True)
    shutil.rmtree(fresh)
    figures = {"loss": means["loss"], **lm.expert_figures(means), **saved}
    return Result(steps=stage.steps, tokens=tokens, figures=figures)


def _fresh_model(arch: config.Arch, tokenizer: object, seed: int) -> DeepseekV32ForCausalLM:
    torch.manual_seed(seed)
    fields = arch.model_dump()
    model_config = DeepseekV32Config(
        **fields,
        vocab_size=len(tokenizer),  # type: ignore[arg-type]  # a transformers tokenizer has a length
        num_key_value_heads=arch.num_attention_heads,
        n_group=1,
        topk_group=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
        # The indexer is a placeholder until convert; its first dimensions are rotary.
        index_n_heads=1,
        index_head_dim=arch.qk_rope_head_dim,
        index_topk=1,
    )
    return DeepseekV32ForCausalLM(model_config)
