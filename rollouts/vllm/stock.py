"""vLLM's own DeepSeek-V3.2 and its sparse attention, behind the same engine: rollouts.attention = "stock".

Its indexer scores in FP8 and breaks ties as it likes, so that it selects other keys than the learner does
(posttrain agree shows how many); it records nothing. Weights are handed over by name and brought into vLLM's layout
by vLLM, which leaves nothing to compare afterwards: they are verified before. Next: engine.py, ../geometry.py.

Shape letters: X experts, F expert width, D hidden.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.model.checkpoint import ROUTER
from posttrain.model.weights import Weights, verify
from posttrain.rollouts.geometry import Geometry, need_stock, stock_obstacles
from posttrain.rollouts.vllm import compat

BLOCK_SIZE = 64
"""Tokens of a cache block: the one size that FlashMLA's sparse kernel takes."""
ARGUMENTS: dict[str, Any] = {"tokenizer_mode": "hf", "hf_overrides": ROUTER}
"""Of EngineArgs. The architecture's own tokenizer mode wants files that a checkpoint of ours need not have; checkpoints
that transformers wrote do not say how they route."""


def need(folder: Path, dtype: str) -> None:
    """Raise ValueError, with every reason, if a checkpoint cannot be served here."""
    shape = Geometry.read(folder)
    obstacles = ["it is no checkpoint"] if shape is None else stock_obstacles(shape, dtype)
    if not torch.cuda.is_available():
        obstacles.append("there is no GPU")
    else:
        obstacles += compat.stock_obstacles()
    need_stock(obstacles, what=str(folder))


class Stock:
    """What the engine asks of a model, for one of vLLM's own."""

    records = None
    attention = "sparse"

    def __init__(self, runner: Any, folder: Path) -> None:
        self._runner = runner
        self.config = runner.model_config.hf_config
        self.max_length: int = runner.model_config.max_model_len
        self.backend = f"vLLM's own ({compat.stock_backend(runner)}, {torch.cuda.get_device_name()})"
        self._shapes = _shapes(folder)

    def record(self, num_rows: int) -> None:
        """Nothing to take after a pass."""

    def take(self, weights: Weights) -> None:
        """Copy the learner's weights; ValueError, and nothing changes, if they are not whole."""
        tensors = dict(split_experts(weights.tensors))
        # The checksum is that of the learner's names: one per matrix of all experts.
        verify(weights, {name: tensor.shape for name, tensor in weights.tensors.items()})
        wrong = sorted(
            self._shapes.keys() ^ tensors.keys()
            or {name for name, tensor in tensors.items() if tensor.shape != self._shapes[name]}
        )
        if wrong:
            raise ValueError(f"weights refused: {len(wrong)} differ from the checkpoint's, {wrong[0]} first")
        self._runner.reload_weights(weights_iterator=iter(tensors.items()))


def split_experts(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a checkpoint has them: experts one by one, in memory [X, 2F, D] and [X, D, F]."""
    for name, tensor in tensors.items():
        stem, dot, last = name.rpartition(".")
        if not (dot and stem.endswith(".mlp.experts")):
            yield name, tensor
            continue
        for i, matrix in enumerate(tensor):
            if last == "gate_up_proj":
                gate, up = matrix.chunk(2)
                yield f"{stem}.{i}.gate_proj.weight", gate
                yield f"{stem}.{i}.up_proj.weight", up
            else:
                yield f"{stem}.{i}.{last}.weight", matrix


def _shapes(folder: Path) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # no dict
    return found
