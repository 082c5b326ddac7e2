"""The teachers of on-policy distillation: frozen specialists, one of which is asked about each batch.

Each is a whole model beside the learner's, on every rank: ranks ask different teachers at the same time, so that none can
be cut over them. A teacher makes its own choices of experts and cache entries; what batches replay is the policy's.
Left out: teachers that wait in host memory, or in another process. Next: learner.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.model import checkpoint
from posttrain.model.arch import DeepseekV32ForCausalLM

_SAME = ("vocab_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
"""What a teacher shares with the student: its words, and what kernels were chosen by."""


def load(
    paths: Sequence[Path], student: DeepseekV32ForCausalLM, source: Path, *, dtype: torch.dtype, device: str
) -> list[DeepseekV32ForCausalLM]:
    """The models in these folders, frozen. source: folder of the student's checkpoint.

    Raises ValueError for a teacher of another shape or with other tokens.
    """
    models = []
    words = checkpoint.load_tokenizer(source).get_vocab() if paths else {}
    for path in paths:
        model = checkpoint.load(path, dtype=dtype, device=device).requires_grad_(False).eval()
        for field in _SAME:
            theirs, ours = getattr(model.config, field), getattr(student.config, field)
            if theirs != ours:
                raise ValueError(
                    f"teacher {path}: {field}={theirs}, the student's is {ours}; they must be of one family"
                )
        if checkpoint.load_tokenizer(path).get_vocab() != words:
            raise ValueError(f"teacher {path}: its tokenizer has other tokens than the student's, {source}")
        models.append(model)
    return models
