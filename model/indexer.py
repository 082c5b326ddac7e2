"""The lightning indexer, trainable: projections, half-split rotary embedding, optional Hadamard rotation.

Scores, top-k and the KL losses are functions in kernels/reference.py. Inputs are detached: the indexer
learns from its own KL alone, and the model never learns through it (V3.2-Exp 2.1). Where a checkpoint scores in e4m3, the
scores that select are made from what queries and keys are in e4m3, and the KL's from the numbers themselves: rounding has no
gradient, and what is learned is what is rounded. Next: entry.py, attention.py.

Shape letters: T tokens, D hidden, C query latent, J indexer heads, I indexer head size, X numbers that a cache holds of a key.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

from posttrain.kernels import e4m3, reference
from posttrain.kernels.backend import Backend
from posttrain.kernels.pointwise import linear_fp32
from posttrain.model.entry import Entry
from posttrain.model.rope import Rope, rotate


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard rotation of the last dimension, whose size is a power of two."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"index_head_dim={size}: the Hadamard rotation needs a power of two")
    shape = x.shape
    step = 1
    while step < size:
        a, b = x.reshape(-1, size // (2 * step), 2, step).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).reshape(shape)
        step *= 2
    return x / math.sqrt(size)


class LightningIndexer(hf.DeepseekV32Indexer):
    """transformers' indexer weights with a differentiable forward on packed tokens."""

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.use_hadamard = bool(getattr(config, "index_hadamard", False))
        self.entry = Entry.of(config)

    def forward(  # type: ignore[override]  # packed, and it returns what the scores are made of
        self, x_TD: Tensor, latent_TC: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, J, I], keys [T, I] and fp32 head weights [T, J] (times J^-1/2).

        x is the attention input after the layer norm, latent the *normalised* query latent; both are
        detached here. Order inside a head: [rotary | rest].
        """
        x_TD, latent_TC = x_TD.detach(), latent_TC.detach()
        q_TJI = self.wq_b(latent_TC).view(-1, self.n_heads, self.head_dim)
        k_TI = self._normed(self.wk(x_TD))
        q_TJI, k_TI = (rotate(x, rope, halves=True, overwrite=True) for x in (q_TJI, k_TI))
        if self.use_hadamard:  # both sides or none: rotating one side destroys the scores
            q_TJI, k_TI = hadamard(q_TJI), hadamard(k_TI)
        w_TJ = linear_fp32(x_TD, self.weights_proj.weight) * self.n_heads**-0.5
        return q_TJI, k_TI, w_TJ

    def _normed(self, k_TI: Tensor) -> Tensor:
        """Layer norm in fp32, in k's dtype."""
        norm: nn.LayerNorm = self.k_norm
        size, dtype = (self.head_dim,), k_TI.dtype
        if k_TI.is_cuda and norm.weight.dtype == dtype:  # one kernel, in fp32 inside
            return F.layer_norm(k_TI, size, norm.weight, norm.bias, norm.eps)
        return F.layer_norm(k_TI.float(), size, norm.weight.float(), norm.bias.float(), norm.eps).to(dtype)

    def stored(self, k_TI: Tensor, backend: Backend) -> Tensor:
        """Keys [T, X] as caches hold them and the scores that select read them, in k's dtype; without a gradient if e4m3."""
        if not self.entry.e4m3:
            return k_TI
        return e4m3.pack(k_TI, self.entry.stored(k_TI.element_size()), by_triton=backend.name == "triton")

    def scored(self, q: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [..., I], and keys [..., I] from stored [..., X], as the numbers whose products select."""
        if not self.entry.e4m3:
            return q, stored
        return reference.round_e4m3(q), e4m3.values(stored, self.entry.index)
