"""Reading training text: streamed documents and chats, chat files, distilled rows.

Text is streamed: no file is read whole, a hub set is not downloaded first. One document or chat in fifty, chosen
by its hash, is held out and never trained on. Left out: near-duplicates. Next: data.py.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from posttrain.config import TextData
from posttrain.rollouts import chat
from posttrain.schema import Message, Sample
from posttrain.table_file import rows

_HELDOUT_ONE_IN = 50


def documents(data: TextData, tokenizer: chat.Tokenizer, *, heldout: bool) -> Iterator[Sample]:
    """Samples of data.text, cut to at most data.seq_len tokens, and of data.chats, which are not cut.

    Again from the start when exhausted. A sample never holds two documents. The held-out stream ends with its files.
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
        for uri in data.chats:
            for where, row in rows(uri):
                messages = _messages(row, where)
                if is_heldout(json.dumps(messages)) == heldout:
                    found = True
                    yield chat_sample(f"{where}#{epoch}", messages, tokenizer)
        if heldout:
            return
        if not found:
            raise ValueError(f"{', '.join(data.files)}: no document to train on")


def is_heldout(text: str) -> bool:
    """Whether a document is kept out of training."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % _HELDOUT_ONE_IN == 0


def chat_sample(id: str, messages: list[Message], tokenizer: chat.Tokenizer, *, domain: str = "") -> Sample:
    """A conversation as a sample; the assistant's tokens are the targets."""
    tokens, mask = chat.encode_with_mask(tokenizer, messages)
    return Sample(id=id, tokens=np.array(tokens, np.int32), mask=np.array(mask, np.bool_), domain=domain)


def chats(path: Path, tokenizer: chat.Tokenizer) -> list[Sample]:
    """Conversations of a .jsonl or .parquet file with a `messages` column, the assistant's turns as targets."""
    return [
        chat_sample(where, _messages(row, where), tokenizer, domain=str(row.get("domain", path.stem)))
        for where, row in rows(str(path))
    ]


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


def _cut(text: str, tokenizer: chat.Tokenizer, seq_len: int) -> Iterator[np.ndarray[Any, Any]]:
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    for start in range(0, len(tokens), seq_len):
        piece = tokens[start : start + seq_len]
        if len(piece) > 1:  # a single token predicts nothing
            yield np.array(piece, np.int32)


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a row; ValueError if it holds none."""
    messages = row.get("messages")
    if not (
        isinstance(messages, list)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
        and any(m["role"] == "assistant" for m in messages)
    ):
        raise ValueError(f"{where}: no messages (a list of role and content with an assistant's turn)")
    return messages
