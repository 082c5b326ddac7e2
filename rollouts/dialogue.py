"""The turns of one rollout: what the policy said, what its environment answered, and how it ended.

Engines bring the tokens; what stands between two assistant turns is decided here, once for all engines. Imports no torch.
Next: environment.py, chat.py, torch_engine.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.rollouts import chat
from posttrain.rollouts.environment import Failed, Live, step_all
from posttrain.rollouts.request import Request
from posttrain.schema import Message, Stop


@dataclass(slots=True)
class Dialogue:
    """One sequence being generated."""

    request: Request
    prompt: list[int]
    live: Live = field(init=False)
    turn_start: int = field(init=False)
    """Where the tokens of the assistant turn begin."""
    messages: list[Message] = field(default_factory=list)
    turns: int = 0

    def __post_init__(self) -> None:
        request = self.request
        self.live = Live(request.environment, request.task, request.seed)
        self.turn_start = len(self.prompt)

    def close_turn(self, tokenizer: chat.Tokenizer, tokens: list[int]) -> str:
        """The text of the assistant turn that ends here; tokens are all so far."""
        text = chat.turn_text(tokenizer, tokens[: self.turn_start], tokens[self.turn_start :])
        self.messages.append({"role": "assistant", "content": text})
        return text

    def end(
        self, tokenizer: chat.Tokenizer, tokens: list[int], why: Stop | Failed, *, cut: bool
    ) -> tuple[Stop, dict[str, Any], str]:
        """Stop, outcome and text of the rollout; cut: a limit of length has cut a turn short."""
        if cut and self.turn_start < len(tokens):
            self.close_turn(tokenizer, tokens)
        stop, outcome = self.live.end(why)
        turns = [str(m["content"]) for m in self.messages if m["role"] == "assistant"]
        return stop, outcome, "\n".join(turns)


def end_turns(
    tokenizer: chat.Tokenizer, ended: Sequence[tuple[Dialogue, list[int]]]
) -> list[Stop | Failed | list[int]]:
    """Close an assistant turn of these dialogues: tokens of the tool results to go on with, or how it is over."""
    turns = [(dialogue.live, dialogue.close_turn(tokenizer, tokens)) for dialogue, tokens in ended]
    answers = step_all(turns)
    return [_go_on(tokenizer, d, len(t), answer) for (d, t), answer in zip(ended, answers, strict=True)]


def _go_on(
    tokenizer: chat.Tokenizer, dialogue: Dialogue, length: int, results: Sequence[str] | Failed | None
) -> Stop | Failed | list[int]:
    dialogue.turns += 1
    if isinstance(results, Failed):
        return results
    if not results:
        return "eos"
    if dialogue.turns >= dialogue.request.max_turns:
        return "turns"
    results = [chat.as_data(tokenizer, result) for result in results]
    dialogue.messages += [{"role": "tool", "content": result} for result in results]
    forced = chat.encode_tool_results(tokenizer, results, thinking=dialogue.request.task.thinking)
    dialogue.turn_start = length + len(forced)
    return forced
