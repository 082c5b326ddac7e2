"""The nouns of the pipeline: Task, Rollout, Score, Group, Sample, Batch, Checkpoint.

Values only: frozen dataclasses of Python and numpy types, so that they pickle cheaply between Ray
actors and can be read without torch. Next: config.py, then pipeline.py.

Shape letters: L tokens of one sequence, T tokens of a packed batch, S sequences in it, K kept cache entries
per query, N layers, E experts per token, R kept vocabulary entries of all tokens together.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]
"""One chat message: {"role": "system" | "user" | "assistant" | "tool", "content": str}."""

Stop = Literal["eos", "length", "turns", "crash", "error"]
"""Why a rollout ended: by itself, at a limit of tokens or turns, or since its environment failed: broken by the
policy ("crash", worth 0) or unavailable ("error", unscorable)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One prompt with what is needed to judge an answer to it.

    Example: Task(id="math/3f2a90c1", domain="math",
                  messages=({"role": "user", "content": "4 + 1 ="},), answer="5")
    """

    id: str
    """Unique and stable: derived from the domain and the prompt, never from a position in a file."""
    domain: str
    """Name of the domain in the config, for instance "math"."""
    messages: tuple[Message, ...]
    """The conversation up to the point where the policy continues."""
    answer: str | None = None
    """Reference answer, where the reward needs one."""
    thinking: bool = True
    """Whether the chat template opens the answer in thinking mode (where it knows the difference)."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever the reward or the tools of this task need (a rubric, a database, a generator entry)."""

    @property
    def question(self) -> str:
        """All message contents joined: what is hashed for splitting and deduplication."""
        return "\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingMask:
    """Ragged: the vocabulary entries that top-p and top-k left for each token to be drawn from.

    Example: tokens 1 and 2 of four were sampled, from {5, 9} and from everything: counts = [0, 2, 0, 0],
    ids = [5, 9].
    """

    counts: NDArray[np.int32]
    """[L] (packed: [T]) entries left for this token; 0 where it was not sampled, or from everything."""
    ids: NDArray[np.int32]
    """[R] those of all tokens, one after another, ascending within a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled continuation of a task, prompt included.

    Example, two turns with one tool call: tokens = prompt + call + result + answer; sampled is True
    on `call` and `answer` only; messages = assistant call, tool result, assistant answer.
    """

    task_id: str
    index: int
    """Position inside its group, 0 .. group_size - 1."""
    tokens: NDArray[np.int32]
    """[L] prompt and everything after it."""
    sampled: NDArray[np.bool_]
    """[L] True where the policy chose the token, False for prompt and tool results."""
    logprobs: NDArray[np.float32]
    """[L] log-probability under the processed sampling distribution of the engine; 0 where not sampled."""
    text: str
    """Decoded text of the policy's turns, special tokens dropped; what a simple reward reads."""
    messages: tuple[Message, ...] = ()
    """Assistant and tool turns produced during the rollout."""
    stop: Stop = "eos"
    outcome: dict[str, Any] = field(default_factory=dict)
    """What the task's environment says of its final state: plain JSON data for the rewards."""
    policy_version: int = 0
    """Learner step of the weights that generated it."""
    kept: NDArray[np.int16] | NDArray[np.int32] | None = None
    """[N, L - 1, K] selected key positions per layer and query, ascending, -1 = none at the end; if recorded.
    The last token was never a query."""
    experts: NDArray[np.int16] | None = None
    """[N, L - 1, E] experts chosen per MoE layer and token, if recorded."""
    sampling_mask: SamplingMask | None = None
    """What each token was drawn from, if recorded."""

    @property
    def num_sampled(self) -> int:
        """Number of tokens chosen by the policy."""
        return int(self.sampled.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What the rewards say about one rollout."""

    value: float | None
    """Weighted sum; None = unscorable through no fault of the candidate (never read as 0)."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """Each reward function's own number, by name."""
    note: str = ""
    """Why a part is None or 0, where a reward did not simply say so."""
    blamed: bool = False
    """Whether a part is 0 because the candidate's text broke or outlasted its reward."""


RewardFn = Callable[[Task, Sequence[Rollout]], list[Any] | Awaitable[list[Any]]]
"""A reward sees a task and all rollouts of its group and returns one number, None or rewards.base.Mark per rollout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All rollouts of one task: the unit of GRPO, of rejection sampling and of pass@k."""

    task: Task
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training sequence."""

    id: str
    """Ledger id; for text and SFT rows the row id."""
    tokens: NDArray[np.int32]
    """[L]"""
    mask: NDArray[np.bool_]
    """[L] True where the token is a training target."""
    logprobs: NDArray[np.float32] | None = None
    """[L] engine log-probs (RL only)."""
    advantage: float = 0.0
    group_size: int = 1
    """Completions in the sample's group that take part: the 1/G of the paper's objective."""
    weight: float = 1.0
    """Weight of the sample's domain in the mixture."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy for the sample's domain."""
    clip: tuple[float, float] | None = None
    """Its domain's ratio clip, below and above 1; None = that of the loss."""
    length_budget: int = 0
    """Tokens that its completion could have had: the constant normaliser of Dr.GRPO."""
    domain: str = ""
    teacher: int | None = None
    """Which of the stage's teachers it is distilled from; None = none."""
    kept: NDArray[np.int16] | NDArray[np.int32] | None = None
    """As in Rollout: what the learner takes over instead of choosing anew; also the next two."""
    experts: NDArray[np.int16] | None = None
    sampling_mask: SamplingMask | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Packed samples: one forward pass of the learner. No padding anywhere."""

    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Position inside the own document, starting at 0."""
    cu_seqlens_S: NDArray[np.int64]
    """[S + 1] document starts, last entry T."""
    mask_T: NDArray[np.bool_]
    """True where tokens_T[t] is predicted from t - 1 and counts in the loss."""
    weight_T: NDArray[np.float32]
    """Weight of token t in the loss sum, normaliser included: the loss is sum(weight_T * loss_T)."""
    logprobs_T: NDArray[np.float32]
    advantage_T: NDArray[np.float32]
    kl_coef_T: NDArray[np.float32]
    clip_S2: NDArray[np.float32]
    """[S, 2] ratio clip of each sequence, below and above 1; NaN = that of the loss."""
    ids: tuple[str, ...]
    """Ledger ids of the samples, in order."""
    old_logprobs_T: NDArray[np.float32] | None = None
    """The learner's log-probs before the first update of the step; None: this is the first update."""
    teacher: int | None = None
    """Of all its samples."""
    kept_NTK: NDArray[np.int16] | NDArray[np.int32] | None = None
    """Positions inside the own document. The last token of a document, which nothing is predicted from, keeps
    itself."""
    experts_NTE: NDArray[np.int16] | None = None
    """-1 at the last token of a document: routed by the current weights."""
    sampling_mask: SamplingMask | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A directory in Hugging Face format. Never a live object."""

    path: Path
    attention: Literal["dense", "sparse"]
    """How to run it: dense MLA, or DSA with the indexer's top-k."""
