"""A plain Hugging Face folder of a checkpoint, reloaded by stock transformers to prove it.

The proof is a forward pass: stock logits against ours on a sequence no longer than top-k, where DSA and
dense attention are the same function and no tie can differ. Next: ../model/checkpoint.py.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from posttrain import config
from posttrain.job import Job, Result
from posttrain.model import checkpoint
from posttrain.model.context import PackedContext

PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
)
"""What a checkpoint consists of; a stage's folder holds more."""
_TOLERANCE = 1e-3
_MAX_TOKENS = 64


def run(stage: config.Export, job: Job) -> Result:
    """Copy and prove the source's checkpoint."""
    difference = export_checkpoint(job.source(stage.source), job.out)
    return Result(figures={"max_logit_difference": difference})


def export_checkpoint(source: Path, out: Path) -> float:
    """Write the Hugging Face folder; returns the largest difference of logits, stock against ours.

    Raises ValueError if the source is no checkpoint or stock transformers computes something else.
    """
    attention = checkpoint.attention_of(source)
    files = sorted({file for pattern in PATTERNS for file in source.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{source}: no safetensors file there")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, out / file.name)
    difference = _difference(out, attention)
    if difference > _TOLERANCE:
        raise ValueError(f"{out}: stock transformers differs by {difference:.2g} in a logit")
    return difference


@torch.no_grad()
def _difference(path: Path, attention: str) -> float:
    ours = checkpoint.load(path) if attention == "sparse" else checkpoint.load_dense(path)
    with checkpoint.quiet():
        stock = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    topk = int(ours.config.index_topk) if attention == "sparse" else _MAX_TOKENS
    num_tokens = min(topk, _MAX_TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(ours.config.vocab_size, (num_tokens,), generator=generator)
    context = PackedContext(
        attention="sparse" if attention == "sparse" else "dense",
        cu_seqlens_S=torch.tensor([0, num_tokens]),
    )
    difference = (ours(tokens_T, context) - stock(tokens_T[None]).logits[0]).abs().max()
    return float(difference)
