"""Layers of a recipe: merge files, apply `a.b=c`, and say in one line what is wrong where. Next: config.py."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read(files: Sequence[str | Path], settings: Sequence[str]) -> dict[str, Any]:
    """The merged files with the `a.b=c` applied; ValueError names the file that cannot be read."""
    data: dict[str, Any] = {}
    for file in files:
        try:
            layer = tomllib.loads(Path(file).read_text())
        except OSError as error:
            raise ValueError(f"cannot read config {str(file)!r}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid TOML: {error}") from None
        data = merge(data, layer)
    for setting in settings:
        apply(data, setting)
    return data


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; stages and domains are addressed by name: stages.warmup.steps=10."""
    path, found, text = override.partition("=")
    if not found or not path:
        raise ValueError(f"--set {override}: write it as key.subkey=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = path.split(".")
    node: Any = data
    for i, key in enumerate(parents):
        if isinstance(node, list):
            match = [item for item in node if isinstance(item, dict) and item.get("name") == key]
            if not match:
                raise ValueError(f"--set {override}: no {'.'.join(parents[:i])} named {key!r}")
            node = match[0]
        else:
            node = node.setdefault(key, {})
    if not isinstance(node, dict):
        raise ValueError(f"--set {override}: {'.'.join(parents)} is not a table")
    node[last] = value


def line(data: Mapping[str, Any], error: Any) -> str:
    """One pydantic error as one line, with list items called by their name."""
    node: Any = data
    parts: list[str] = []
    for key in error["loc"]:
        if isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
            parts.append(str(node.get("name", key)) if isinstance(node, dict) else str(key))
        elif isinstance(node, dict) and key in node:
            node = node[key]
            parts.append(str(key))
        elif not (isinstance(node, dict) and node.get("kind") == key):  # the union's tag is no key
            parts.append(str(key))
    where = ".".join(parts) or "config"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    got = f" (got {json.dumps(error['input'], default=str)})" if not isinstance(error["input"], dict) else ""
    return f"{where}: {message}{got}"
