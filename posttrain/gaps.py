"""The distance of an engine's log-probs from the learner's on the engine's own samples. Next: agree.py, stages/rl.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def gap_figures(log_M: NDArray[Any]) -> dict[str, float]:
    """Figures of log(engine / learner) of sampled tokens [M].

    gap_*: |log-prob of engine - of learner|. kl_engine: KL(engine || learner) per token, the mean over the samples;
    kl_learner: KL(learner || engine), the samples weighted by learner / engine. ratio_*: learner / engine.
    Example: one token of two that the learner finds twice as likely: kl_engine = -log(2) / 2, kl_learner = log(2).
    """
    log_M = log_M.astype(np.float64)
    gap_M, ratio_M = np.abs(log_M), np.exp(-log_M)
    return {
        "gap_mean": float(gap_M.mean()),
        "gap_p99": float(np.quantile(gap_M, 0.99)),
        "gap_max": float(gap_M.max()),
        "kl_engine": float(log_M.mean()),
        "kl_learner": float((ratio_M * -log_M).mean()),
        "ratio_min": float(ratio_M.min()),
        "ratio_max": float(ratio_M.max()),
    }
