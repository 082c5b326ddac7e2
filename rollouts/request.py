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
    environment: Environment = single_turn


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
