"""Rows of .jsonl and .parquet files, hub sets and generators, streamed, each with the place it comes from.

Next: tasks.py, text.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from posttrain.rewards.base import load_object

_ROWS_AT_ONCE = 1024


def rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .jsonl or .parquet file, an hf:// set or a py:// generator, with where it stands ("file:line").

    hf://name?split=train&config=...&revision=...: a hub name or a local folder, streamed; question=...
    and answer=... name the columns that hold them. py://module:function?option=...: called with the options, gives dicts.
    Raises ValueError naming the line for anything that cannot be read.
    """
    if uri.startswith("hf://"):
        yield from _hub_rows(uri)
    elif uri.startswith("py://"):
        yield from _generated_rows(uri)
    elif uri.endswith(".parquet"):
        yield from _parquet_rows(Path(uri))
    elif uri.endswith(".jsonl"):
        yield from _json_rows(Path(uri))
    else:
        raise ValueError(f"{uri!r}: expected a .jsonl or .parquet file, an hf:// set or a py:// generator")


def call(uri: str, what: str, **given: Any) -> Iterator[Any]:
    """What the function of py://module:function?option=... yields, called with the options and what is given.

    Raises ValueError if it does not load or does not take them.
    """
    path, _, query = uri.removeprefix("py://").partition("?")
    function = load_object(path, what)
    options = given | {key: option(text) for key, text in parse_qsl(query)}
    try:
        return iter(function(**options))
    except TypeError as error:
        raise ValueError(f"{what} {uri!r}: {error}") from error


def option(text: str) -> int | float | bool | str:
    """An option of a URI: a number or true/false where it reads as one."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _generated_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(call(uri, "rows"), start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{uri}:{number}: expected a dict, got {type(row).__name__}")
        yield f"{uri}:{number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq  # half a second: only here

    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None
    number = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


def _hub_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset  # heavy: only here

    parts = urlsplit(uri)
    name = parts.netloc + parts.path
    options = dict(parse_qsl(parts.query))
    try:
        stream = load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri}: cannot be loaded ({str(error).splitlines()[0]})") from None
    renamed = {options[name]: name for name in ("question", "answer") if name in options}
    for number, row in enumerate(stream, start=1):
        yield f"{uri}:{number}", {renamed.get(key, key): value for key, value in row.items()}
