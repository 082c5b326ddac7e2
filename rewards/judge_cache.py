"""Replies of a judge on disk: a SQLite file that several processes may use at once."""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.schema import Message

_BUSY_S = 30.0


class Cache:
    """Replies by everything that they depend on; an empty path keeps nothing."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    @staticmethod
    def key(
        identity: str, messages: Sequence[Message], schema: dict[str, Any], temperature: float, seed: int
    ) -> str:
        """sha256 over the judge, what it is asked and how."""
        asked = [identity, list(messages), schema, temperature, seed]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The reply, if there is one."""
        if not self._path:
            return None
        row = self._open().execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; one that is there already stays."""
        if self._path:
            self._open().execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, reply))

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
        return self._db
