"""What an engine is asked for: one completion, and how tokens are chosen. Imports no torch.

Next: torch_engine.py.
"""

from dataclasses import dataclass

from posttrain.rollouts.environment import Environment, single_turn
from posttrain.schema import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to generate."""

    task: Task
    index: int
    seed: int
    max_new_tokens: int
    max_turns: int = 1
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a turn, beside the tokenizer's stop token; they stay in its text."""
    environment: Environment = single_turn

    def obstacle(self, vocabulary: int) -> str | None:
        """Why a model of so many tokens cannot serve it."""
        unknown = [id for id in self.stop_ids if not 0 <= id < vocabulary]
        return f"stop token {unknown[0]} is not among the model's {vocabulary} tokens" if unknown else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = no limit."""
    ignore_eos: bool = False
    """Generate exactly max_new_tokens (for benchmarks)."""
    record_kept: bool = False
    record_experts: bool = False
    record_mask: bool = False
