"""Messages to tokens and back: with the tokenizer's own chat template, or in V3.2's format where it has none.

Multi-turn rollouts never re-tokenise what the policy wrote: tool results are turned into the tokens that
stand between two assistant turns, and those are appended. Next: deepseek_chat.py, torch_engine.py.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from posttrain.rollouts import deepseek_chat
from posttrain.schema import Message, Task


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the pipeline uses."""

    eos_token_id: int
    chat_template: Any

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any:
        """Render and tokenise messages."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Tokens to text."""
        ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Text to tokens."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens that are cut out of a text before anything else: control marks."""
        ...


def encode(
    tokenizer: Tokenizer, messages: list[Message], *, open_turn: bool, thinking: bool = True
) -> list[int]:
    """Tokens of a conversation; open_turn appends what opens the next assistant turn (V3.2 always does)."""
    if _is_deepseek(tokenizer):
        pieces = deepseek_chat.render(messages, thinking=thinking)
        return tokenizer.encode("".join(piece.text for piece in pieces), add_special_tokens=False)
    tokens = tokenizer.apply_chat_template(
        messages,
        tools=next((m["tools"] for m in messages if m.get("tools")), None),
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


def encode_tool_results(tokenizer: Tokenizer, results: Sequence[str], *, thinking: bool = True) -> list[int]:
    """Tokens from the end of an assistant turn (its stop token excluded) to the start of the next one."""
    if _is_deepseek(tokenizer):
        text = deepseek_chat.render_tool_results(results, thinking=thinking)
        return tokenizer.encode(text, add_special_tokens=False)
    before: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    tools = [{"role": "tool", "content": result} for result in results]
    head = encode(tokenizer, before, open_turn=False, thinking=thinking)
    full = encode(tokenizer, [*before, *tools], open_turn=True, thinking=thinking)
    if full[: len(head)] != head:
        raise ValueError(
            "the chat template rewrites earlier turns when a tool message follows; it cannot be continued"
        )
    return full[len(head) :]


def encode_with_mask(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokens of a finished conversation and, for each, whether the assistant wrote it (stop token included)."""
    if _is_deepseek(tokenizer):
        return _encode_pieces(tokenizer, messages)
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


def turn_text(tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of a turn; where the prompt has opened the thinking, with the mark that opens it."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    head: str = tokenizer.decode(list(before[-3:]), skip_special_tokens=False)
    opened = head.rstrip().endswith(deepseek_chat.THINK)
    return (deepseek_chat.THINK + text if opened else text).strip()


def as_data(tokenizer: Tokenizer, text: str) -> str:
    """Foreign text in which no control mark of the tokenizer is left and which can be tokenised.

    Example: as_data(tokenizer, "done <eos>") == "done &#x3c;eos>"
    """
    text = text.encode("utf-8", "replace").decode()  # lone surrogates
    marks = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not marks:
        return text
    return re.sub("|".join(map(re.escape, marks)), lambda m: f"&#x{ord(m[0][0]):x};{m[0][1:]}", text)


def _encode_pieces(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    thinks = any(
        m.get("reasoning_content") or deepseek_chat.END_THINK in str(m.get("content"))
        for m in messages
        if m["role"] == "assistant"
    )
    tokens: list[int] = []
    mask: list[bool] = []
    for piece in deepseek_chat.render(messages, thinking=thinks):
        new = tokenizer.encode(piece.text, add_special_tokens=False)
        tokens += new
        mask += [piece.sampled] * len(new)
    return tokens, mask


def _is_deepseek(tokenizer: Tokenizer) -> bool:
    """Whether to use V3.2's format: the tokenizer has no template, and every mark is one token of it."""
    if tokenizer.chat_template is not None:
        return False
    missing = [mark for mark in deepseek_chat.MARKS if mark not in tokenizer.get_added_vocab()]
    if missing:
        raise ValueError(
            f"the tokenizer has no chat template, and V3.2's format needs the tokens {', '.join(missing)}"
        )
    return True
