"""Reading training text: streamed documents, chat files, distilled rows.

Text is streamed: no file is read whole, a hub set is not downloaded first. One document in fifty, chosen
by its hash, is held out and never trained on. Left out: near-duplicates. Next: data.py.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow.parquet as pq

from posttrain.config import TextData
from posttrain.rollouts import chat
from posttrain.schema import Sample

_HELDOUT_ONE_IN = 50
_ROWS_AT_ONCE = 1024


def documents(data: TextData, tokenizer: chat.Tokenizer, *, heldout: bool) -> Iterator[Sample]:
    """Samples of at most data.seq_len tokens, cut from documents, again from the start when exhausted.

    A sample never holds two documents. The held-out stream ends with its files.
    """
    for epoch in itertools.count():
        found = False
        for uri in data.text:
            for where, row in rows(uri):
                text = row.get(data.column)
                if not isinstance(text, str):
                    raise ValueError(f"{where}: no text in column {data.column!r}")
                if is_heldout(text) != heldout:
                    continue
                for part, tokens in enumerate(_cut(text, tokenizer, data.seq_len)):
                    found = True
                    mask = np.ones(len(tokens), np.bool_)
                    mask[0] = False
                    yield Sample(id=f"{where}.{part}#{epoch}", tokens=tokens, mask=mask)
        if heldout:
            return
        if not found:
            raise ValueError(f"{', '.join(data.text)}: no document to train on")


def is_heldout(text: str) -> bool:
    """Whether a document is kept out of training."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % _HELDOUT_ONE_IN == 0


def chats(path: Path, tokenizer: chat.Tokenizer) -> list[Sample]:
    """Conversations of a .jsonl or .parquet file with a `messages` column, the assistant's turns as targets."""
    samples = []
    for where, row in rows(str(path)):
        messages = row.get("messages")
        if not _is_chat(messages):
            raise ValueError(
                f"{where}: no messages (a list of role and content with an assistant's turn)"
            )
        assert messages is not None
        tokens, mask = chat.encode_with_mask(tokenizer, messages)
        samples.append(
            Sample(
                id=where,
                tokens=np.array(tokens, np.int32),
                mask=np.array(mask, np.bool_),
                domain=str(row.get("domain", path.stem)),
            )
        )
    return samples


def distilled(path: Path) -> list[Sample]:
    """Rows that a distill stage wrote, with the very tokens that the specialist sampled."""
    table = pq.read_table(path, columns=["id", "domain", "tokens", "sampled"])
    return [
        Sample(
            id=row["id"],
            tokens=np.array(row["tokens"], np.int32),
            mask=np.array(row["sampled"], np.bool_),
            domain=row["domain"],
        )
        for row in table.to_pylist()
    ]


def rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .jsonl or .parquet file or an hf:// set, with where it stands ("file:line").

    hf://name?split=train&config=...&revision=...: a hub name or a local folder, streamed.
    Raises ValueError naming the line for anything that cannot be read.
    """
    if uri.startswith("hf://"):
        yield from _hub_rows(uri)
    elif uri.endswith(".parquet"):
        yield from _parquet_rows(Path(uri))
    elif uri.endswith(".jsonl"):
        yield from _json_rows(Path(uri))
    else:
        raise ValueError(f"{uri!r}: expected a .jsonl or .parquet file or an hf:// set")


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
    for number, row in enumerate(stream, start=1):
        yield f"{uri}:{number}", dict(row)


def _cut(text: str, tokenizer: chat.Tokenizer, seq_len: int) -> Iterator[np.ndarray[Any, Any]]:
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    for start in range(0, len(tokens), seq_len):
        piece = tokens[start : start + seq_len]
        if len(piece) > 1:  # a single token predicts nothing
            yield np.array(piece, np.int32)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
        and any(m["role"] == "assistant" for m in messages)
    )
