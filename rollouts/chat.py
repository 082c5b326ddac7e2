"""Messages to tokens and back, with the tokenizer's own chat template.

Multi-turn rollouts never re-tokenise what the policy wrote: a tool result is turned into the tokens that
the template puts between two assistant turns, and those are appended. Next: torch_engine.py.
"""

from typing import Any, Protocol

from posttrain.schema import Message, Task


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the pipeline uses."""

    eos_token_id: int

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any:
        """Render and tokenise messages."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Tokens to text."""
        ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Text to tokens."""
        ...


def encode(
    tokenizer: Tokenizer, messages: list[Message], *, open_turn: bool, thinking: bool = True
) -> list[int]:
    """Tokens of a conversation; open_turn appends what opens the next assistant turn."""
    tokens = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=open_turn,
        thinking=thinking,
        enable_thinking=thinking,
    )
    return list(tokens)


def encode_prompt(tokenizer: Tokenizer, task: Task) -> list[int]:
    """Tokens of a task, the assistant turn opened."""
    return encode(tokenizer, list(task.messages), open_turn=True, thinking=task.thinking)


def encode_tool_result(tokenizer: Tokenizer, result: str) -> list[int]:
    """Tokens from the end of an assistant turn (its stop token excluded) to the start of the next one."""
    before: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    head = encode(tokenizer, before, open_turn=False)
    full = encode(tokenizer, [*before, {"role": "tool", "content": result}], open_turn=True)
    if full[: len(head)] != head:
        raise ValueError(
            "the chat template rewrites earlier turns when a tool message follows; it cannot be continued"
        )
    return full[len(head) :]


def encode_with_mask(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokens of a finished conversation and, for each, whether the assistant wrote it (stop token included)."""
    tokens: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = encode(tokenizer, messages[:i], open_turn=True)
        closed = encode(tokenizer, messages[: i + 1], open_turn=False)
        if closed[: len(opened)] != opened or opened[: len(tokens)] != tokens:
            raise ValueError(
                "the chat template rewrites earlier turns; the assistant's tokens cannot be told apart"
            )
        mask += [False] * (len(opened) - len(tokens)) + [True] * (len(closed) - len(opened))
        tokens = closed
    if messages[-1]["role"] == "assistant":  # nothing follows, and templates are slow
        return tokens, mask
    rest = encode(tokenizer, messages, open_turn=False)
    return rest, mask + [False] * (len(rest) - len(mask))
