"""A batch where the learner computes, its valid tokens singled out. Next: learner.py.

Shape letters: T tokens that are run, F places of the batch (as many, unless prompts are shared), S sequences in it, M
valid (predicted) tokens, N layers, K kept entries, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain import prefixes
from posttrain.kernels.lanes import send
from posttrain.logprob import KeptIds
from posttrain.schema import Batch
from posttrain.sharing import Part, Sharing


@dataclass(slots=True)
class DeviceBatch:
    """Tensors on the device."""

    tokens_T: Tensor
    cu_seqlens_S: Tensor
    lengths: tuple[int, ...]
    """Of the sequences, on the host."""
    at_M: Tensor
    """Where each valid token is predicted: one before it."""
    targets_M: Tensor
    weight_M: Tensor
    sequence_M: Tensor
    experts_NTE: Tensor | None
    kept_NTK: Tensor | None
    kept_ids: KeptIds | None
    part: Part | None = None
    """What this rank runs of it, where ranks share each batch."""
    shared: tuple[Tensor, Tensor] | None = None
    """token_F and place_T of prefixes.py, where prompts are shared; cu_seqlens_S cuts places."""
    host_shared: tuple[Tensor, Tensor] | None = None
    """The same in host memory."""

    def own(self) -> "DeviceBatch":
        """The tokens that this rank runs and the valid ones predicted from them; weights and sequences stay whole."""
        part = self.part
        if part is None:
            return self
        own_T, own_M = slice(part.begin, part.end), slice(part.first, part.last)
        return replace(
            self,
            tokens_T=self.tokens_T[own_T],
            at_M=self.at_M[own_M] - part.begin,
            targets_M=self.targets_M[own_M],
            experts_NTE=None if self.experts_NTE is None else self.experts_NTE[:, own_T],
            kept_NTK=None if self.kept_NTK is None else self.kept_NTK[:, own_T],
            kept_ids=None if self.kept_ids is None else self.kept_ids.part(part.first, part.last),
        )


def on_device(
    batch: Batch, device: str, sharing: Sharing | None = None, *, share_prompts: bool = False
) -> DeviceBatch:
    """The batch on a device; sharing: this process among ranks that share it.

    With share_prompts, prompts that samples have in common are there once.
    """
    valid_M = np.flatnonzero(batch.mask_T)
    lengths_S = np.diff(batch.cu_seqlens_S)
    sequence_T = np.repeat(np.arange(len(lengths_S)), lengths_S)

    def tensor(array: NDArray[Any]) -> Tensor:
        return send(torch.from_numpy(array), device)

    kept_ids = None
    if batch.sampling_mask is not None:
        counts_M = batch.sampling_mask.counts[valid_M]
        masked_N = np.flatnonzero(counts_M)
        rows_R = np.repeat(np.arange(len(masked_N)), counts_M[masked_N])
        ids_R = batch.sampling_mask.ids.astype(np.int64)
        kept_ids = KeptIds(tensor(masked_N), tensor(rows_R), tensor(ids_R))
    shared = prefixes.common(batch) if share_prompts else None
    places = None if shared is None else (torch.from_numpy(shared.token_F), torch.from_numpy(shared.place_T))
    run = slice(None) if shared is None else shared.place_T
    at_M = tensor(valid_M - 1 if shared is None else shared.token_F[valid_M - 1])
    return DeviceBatch(
        tokens_T=tensor(batch.tokens_T[run]),
        cu_seqlens_S=tensor(batch.cu_seqlens_S),
        lengths=tuple(lengths_S.tolist()),
        at_M=at_M,
        targets_M=tensor(batch.tokens_T[valid_M]),
        weight_M=tensor(batch.weight_T[valid_M]),
        sequence_M=tensor(sequence_T[valid_M]),
        experts_NTE=None if batch.experts_NTE is None else tensor(batch.experts_NTE[:, run]),
        # Gigabytes: the host waits rather than pin as much memory again.
        kept_NTK=None if batch.kept_NTK is None else torch.from_numpy(batch.kept_NTK[:, run]).to(device),
        kept_ids=kept_ids,
        part=None if sharing is None else sharing.part(len(batch.tokens_T), at_M),
        shared=None if places is None else (send(places[0], device), send(places[1], device)),
        host_shared=places,
    )
