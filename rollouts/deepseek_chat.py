"""DeepSeek-V3.2's chat format: how messages, tools, calls and thinking are written, and how a turn is read back.

V3.2 has no Jinja template (V3.2 report 3.2.1; notes of its model card). The grammar here, every mark,
blank and newline, is that of the `encoding_dsv32.py` that is published with the checkpoint, as vLLM carries it
(vllm/tokenizers/deepseek_v32_encoding.py). Two things differ. The words that introduce the list of tools
(_TOOLS below) are ours. And an assistant's message may be its raw text, "<think>...</think>answer" with
calls as it wrote them, which is what rollouts hold; `reasoning_content` and `tool_calls` in
the OpenAI form are understood as well. Left out: the roles developer and latest_reminder, response formats.

The rule of thinking: kept while tool results follow, dropped once a new user message has come; the calls and their
results stay. Next: chat.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.schema import Message

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "\uff5cDSML\uff5c"
MARKS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
"""The strings that are single tokens of V3.2's vocabulary."""

_OPEN, _CLOSE = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
_INVOKE = re.compile(rf'\s*<{DSML}invoke name="([^"\n]*)">')
_PARAMETER = re.compile(rf'\s*<{DSML}parameter name="([^"\n]*)" string="(true|false)">')
_END_PARAMETER = f"</{DSML}parameter>"
_END_INVOKE = re.compile(rf"\s*</{DSML}invoke>")
_END_CALLS = re.compile(rf"\s*{_CLOSE}\s*\Z")

_TOOLS = f"""\
## Tools
Functions can be called before you answer. To call some, end your turn with one block of this form, an invoke \
for each call:
{_OPEN}
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
{_CLOSE}
Write a text value as it is, without quotes or escapes, with string="true"; write any other value as JSON, with \
string="false". The results come back inside <function_results>; think about them before you go on.
These are the functions, in JSON Schema:
<functions>
{{schemas}}
</functions>
"""


@dataclass(frozen=True, slots=True)
class Call:
    """One function call. Example: Call("search", {"query": "moon", "limit": 3})."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn taken apart."""

    reasoning: str
    content: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation; the marks at its ends are tokens, so pieces can be tokenised alone."""

    text: str
    sampled: bool
    """Whether the assistant wrote it, end mark included."""


def render(messages: Sequence[Message], *, thinking: bool) -> list[Piece]:
    """The conversation from the beginning mark on.

    A user message and a run of tool results open the next assistant turn by themselves.
    Raises ValueError for a role that is unknown or out of place.
    """
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    pieces = [Piece(BOS, False)]
    for i, message in enumerate(messages):
        role, content = message["role"], str(message.get("content") or "")
        opens = THINK if thinking and i >= last_user else END_THINK
        if role == "system":
            tools = message.get("tools")
            pieces.append(Piece(content + ("\n\n" + render_tools(tools) if tools else ""), False))
        elif role == "user":
            pieces.append(Piece(f"{USER}{content}{ASSISTANT}{opens}", False))
        elif role == "tool":
            before, after = (messages[i - 1]["role"] if i else ""), messages[i + 1 : i + 2]
            if before not in ("assistant", "tool"):
                raise ValueError(
                    f"message {i}: a tool result stands after {before or 'nothing'}, not after a call"
                )
            text = "" if before == "tool" else "\n\n<function_results>"
            text += f"\n<result>{content}</result>"
            if not after or after[0]["role"] != "tool":
                text += f"\n</function_results>\n\n{opens}"
            pieces.append(Piece(text, False))
        elif role == "assistant":
            keep = thinking and i > last_user
            pieces.append(Piece(_assistant(message, keep_thinking=keep), True))
        else:
            raise ValueError(f"message {i}: unknown role {role!r}; known: system, user, assistant, tool")
    return pieces


def render_tool_results(results: Sequence[str], *, thinking: bool) -> str:
    """What stands between the end mark of a turn with calls and the next turn of the same assistant."""
    inside = "".join(f"\n<result>{result}</result>" for result in results)
    return f"\n\n<function_results>{inside}\n</function_results>\n\n{THINK if thinking else END_THINK}"


def render_calls(calls: Sequence[Call]) -> str:
    """The block of calls that ends a turn, the blank line before it included."""
    invokes = []
    for call in calls:
        parameters = []
        for key, value in call.arguments.items():
            is_text = isinstance(value, str)
            written = value if is_text else json.dumps(value, ensure_ascii=False)
            kind = "true" if is_text else "false"
            parameters.append(f'<{DSML}parameter name="{key}" string="{kind}">{written}{_END_PARAMETER}')
        # A call without parameters has an empty line there.
        invokes.append(f'<{DSML}invoke name="{call.name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>")
    return "\n\n" + "\n".join([_OPEN, *invokes, _CLOSE])


def render_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The section on tools in the system message; tools are in the OpenAI form, {"type", "function"}."""
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return _TOOLS.format(schemas=schemas)


def parse_turn(text: str) -> Turn:
    """Take an assistant's text apart: thinking, answer, calls. Calls inside the thinking are thoughts.

    Raises ValueError saying what is wrong with a block of calls. Takes time linear in the text.
    """
    reasoning, closed, rest = text.rpartition(END_THINK)
    if not closed and THINK in text:
        return Turn(text.partition(THINK)[2], "")
    content, opened, block = rest.partition(_OPEN)
    calls: list[Call] = []
    at = 0
    while opened and not (calls and _END_CALLS.match(block, at)):
        call, at = _parse_call(block, at)
        calls.append(call)
    return Turn(reasoning.partition(THINK)[2] or reasoning, content.removesuffix("\n\n"), tuple(calls))


def _assistant(message: Message, *, keep_thinking: bool) -> str:
    text = str(message.get("content") or "")
    before, closed, answer = text.rpartition(END_THINK)
    reasoning = message.get("reasoning_content") or (before.partition(THINK)[2] if closed else "")
    given = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [Call(call["name"], _arguments(call["arguments"])) for call in given]
    head = f"{reasoning}{END_THINK}" if keep_thinking else ""
    content, opened, block = answer.partition(_OPEN)
    if opened:  # calls as a policy wrote them: the blank line before them is part of the format
        answer = f"{content.rstrip()}\n\n{_OPEN}{block.rstrip()}"
    return f"{head}{answer}{render_calls(calls) if calls else ''}{EOS}"


def _arguments(given: str | Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(given) if isinstance(given, str) else given)


def _parse_call(block: str, at: int) -> tuple[Call, int]:
    """The call that starts at `at`, and where it ends."""
    found = _INVOKE.match(block, at)
    if found is None:
        raise ValueError(f"expected an invoke with a name at: {block[at : at + 40]!r}")
    name, at = found[1], found.end()
    arguments: dict[str, Any] = {}
    while parameter := _PARAMETER.match(block, at):
        key, kind = parameter[1], parameter[2]
        end = block.find(_END_PARAMETER, parameter.end())
        if end < 0:
            raise ValueError(f"parameter {key!r} of {name!r} is not closed")
        if key in arguments:
            raise ValueError(f"parameter {key!r} of {name!r} is given twice")
        arguments[key] = _value(block[parameter.end() : end], kind, key)
        at = end + len(_END_PARAMETER)
    closed = _END_INVOKE.match(block, at)
    if closed is None:
        raise ValueError(f"expected a parameter or the end of {name!r} at: {block[at : at + 40]!r}")
    return Call(name, arguments), closed.end()


def _value(text: str, kind: str, key: str) -> Any:
    if kind == "true":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f'parameter {key!r} is no JSON; a text needs string="true"') from None
