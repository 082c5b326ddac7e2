"""Python functions as tools: their JSON Schemas for the prompt, and the calls of a turn carried out.

A tool is a function with annotated keywords, a docstring and a text as its result. What the policy gets wrong
(no such tool, a bad argument, a refused action) comes back to it as a result that starts with "error:".
Next: ../posttrain/envs/shop.py for a whole environment.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from posttrain.rollouts import deepseek_chat
from posttrain.rollouts.deepseek_chat import Call
from posttrain.rollouts.environment import Policy

MAX_CALLS = 8
"""Calls carried out per turn; a turn with more is refused as a whole."""
MAX_CHARACTERS = 4000
"""Longer results are cut, which the result says."""

Function = Callable[..., str]


class ToolError(Exception):
    """What a tool tells the policy instead of a result. Example: ToolError("there is no order 7")."""


def schemas(*functions: Function) -> list[dict[str, Any]]:
    """The tools for a system message, in the OpenAI form."""
    return [{"type": "function", "function": _schema(inspect.unwrap(f))} for f in functions]


def respond(functions: Sequence[Function], text: str) -> list[str] | None:
    """One result per call in an assistant's turn; None if there is none. A block that cannot be read is one error.

    Whatever a function raises, ToolError apart, goes through.
    """
    try:
        calls = deepseek_chat.parse_turn(text).calls
    except ValueError as error:
        return [f"error: {error}"]
    if len(calls) > MAX_CALLS:
        return [f"error: {len(calls)} calls in one turn; at most {MAX_CALLS}"] * len(calls)
    by_name = {function.__name__: function for function in functions}
    return [clip(_run(by_name, call)) for call in calls] or None


def clip(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, cut at the limit with a note of what is missing."""
    return text if len(text) <= limit else f"{text[:limit]}\n... ({len(text) - limit} characters more)"


def script(calls: Sequence[Call], answer: str) -> Policy:
    """A policy that makes one call a turn and then answers."""
    turns = iter([*(deepseek_chat.render_calls([call]).strip() for call in calls), answer])
    return lambda messages: next(turns)


def _run(by_name: dict[str, Function], call: Call) -> str:
    function = by_name.get(call.name)
    if function is None:
        return f"error: no tool {call.name!r}; there are {', '.join(by_name)}"
    parameters = _parameters(getattr(function, "__func__", function))
    try:
        given = parameters.model_validate(call.arguments)
        return function(**{name: getattr(given, name) for name in parameters.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        return f"error: {call.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ToolError as error:
        return f"error: {error}"


def _schema(function: Function) -> dict[str, Any]:
    parameters = _parameters(getattr(function, "__func__", function)).model_json_schema()
    properties = {
        name: {key: value for key, value in field.items() if key != "title"}
        for name, field in parameters.get("properties", {}).items()
    }
    return {
        "name": function.__name__,
        "description": inspect.getdoc(function) or "",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": parameters.get("required", []),
        },
    }


@functools.cache
def _parameters(function: Function) -> type[BaseModel]:
    """The arguments of a function or method as a model."""
    signature = inspect.signature(function, eval_str=True)
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in signature.parameters.items()
        if name != "self"
    }
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)
