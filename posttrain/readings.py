"""What passes leave on the device, read when all of a step have run: nobody waits for the device between them.

Next: learner.py.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.ties import Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Scalars of one pass, without gradients."""

    loss: Tensor
    ids: tuple[str, ...]
    """The pass's samples."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """Each a sum over valid tokens."""
    kl: Mapping[int, Tensor] = field(default_factory=dict)
    """Of each layer's indexer, a sum over queries."""
    ties: Ties | None = None


def read(
    readings: Sequence[Reading], *, counts: bool, valid: int, share: float
) -> tuple[defaultdict[str, float], list[str]]:
    """Figures of the step so far, and the samples of passes whose loss is not finite.

    counts: whether this rank's losses and figures do; figures are divided by valid, KLs multiplied by share.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    nonfinite: list[str] = []
    for reading in readings:
        for name, value in reading.figures.items():
            sums[name] += counts * float(value) / valid
        if reading.ties is not None:
            sums["ties"] = reading.ties.share
        loss = float(reading.loss)
        sums["loss"] += counts * loss
        if not math.isfinite(loss):
            nonfinite.extend(reading.ids)
        for layer, kl in reading.kl.items():
            sums[f"indexer_kl/{layer}"] += float(kl) * share
    return sums, nonfinite
