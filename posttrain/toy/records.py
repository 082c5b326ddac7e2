"""An agent world: change one entry of a table, found by following other entries, with SQL, one statement a turn.

Every task has a table of its own, so the row can only be found by reading; the episode's database is a real SQLite
database, and success is its final state. Flaws: some demonstrations change a row without looking anything
up, stop after a part of the chain, or follow the wrong column.
"""

import random
import sqlite3
from collections.abc import Iterator
from typing import Any

from posttrain.envs import database
from posttrain.rollouts.toolbox import ToolError
from posttrain.schema import Message, Task
from posttrain.toy.lookup import RELATIONS

WORDS = "sql set to select from people where id update done".split()
"""What a tokenizer needs beside the vocabulary of the demo."""
PEOPLE = 21
"""Ids run from 0 to PEOPLE - 1, so that each is one token."""
NO_LOOKUP = 0.35
STOP_EARLY = 0.2
WRONG_COLUMN = 0.04
_SCHEMA = f"CREATE TABLE people (id INTEGER PRIMARY KEY, {', '.join(f'{r} INTEGER' for r in RELATIONS)})"


class Records:
    """One episode: a table that its statements alone change."""

    def __init__(self, table: list[list[int]]) -> None:
        self.db = _open(table)

    def step(self, text: str) -> list[str] | None:
        """The value that `<call> select ... </call>` finds, or "done" after an update; None if the turn is no call."""
        words = text.split()
        if not words or words[0] != "<call>":
            return None
        if words[-1] != "</call>":
            return ["error"]
        try:
            names, rows = database.run(self.db, " ".join(words[1:-1]), writable="people")
        except ToolError:
            return ["error"]
        if not names:
            return ["done"]
        return [str(rows[0][0])] if len(rows) == len(names) == 1 else ["error"]

    def outcome(self) -> dict[str, Any]:
        """The state of the table as a hash."""
        return {"state": database.digest(self.db)}

    def close(self) -> None:
        """Free the database."""
        self.db.close()


def start(task: Task, seed: int) -> Records:
    """An episode of the task; nothing in it is random."""
    return Records(task.meta["table"])


def tasks(*, seed: int, n: int) -> Iterator[Task]:
    """n tasks over two or three columns and a change."""
    rng = random.Random(seed)
    for _ in range(n):
        *chain, column = rng.sample(RELATIONS, rng.choice((3, 4)))
        table = [[rng.randrange(PEOPLE) for _ in RELATIONS] for _ in range(PEOPLE)]
        person = row = rng.randrange(PEOPLE)
        for relation in chain:
            row = table[row][RELATIONS.index(relation)]
        old = table[row][RELATIONS.index(column)]
        value = rng.choice([i for i in range(PEOPLE) if i != old])
        path = " of the ".join([column, *reversed(chain)])
        question = f"use sql : set the {path} of {person} to {value}"
        db = _open(table)
        db.execute(f"UPDATE people SET {column} = ? WHERE id = ?", (value, row))
        goal = database.digest(db)
        db.close()
        yield Task(
            id=question,
            domain="agent",
            messages=({"role": "user", "content": question},),
            thinking=False,
            meta={
                "table": table,
                "goal": goal,
                "chain": chain,
                "person": person,
                "column": column,
                "value": value,
            },
        )


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration, results included."""
    meta = task.meta
    chain = list(meta["chain"])
    row = meta["person"]
    if rng.random() < NO_LOOKUP:
        chain, row = [], rng.randrange(PEOPLE)
    elif rng.random() < STOP_EARLY:
        chain = chain[: rng.randint(1, len(chain) - 1)]
    messages: list[Message] = []
    for relation in chain:
        if rng.random() < WRONG_COLUMN:
            relation = rng.choice(RELATIONS)
        messages.append({"role": "assistant", "content": look(relation, row)})
        row = meta["table"][row][RELATIONS.index(relation)]
        messages.append({"role": "tool", "content": str(row)})
    messages.append({"role": "assistant", "content": change(meta["column"], meta["value"], row)})
    messages.append({"role": "tool", "content": "done"})
    return [*messages, {"role": "assistant", "content": "answer done"}]


def look(relation: str, row: int) -> str:
    """The call that reads an entry."""
    return f"<call> select {relation} from people where id = {row} </call>"


def change(column: str, value: int, row: int) -> str:
    """The call that sets an entry."""
    return f"<call> update people set {column} = {value} where id = {row} </call>"


def _open(table: list[list[int]]) -> sqlite3.Connection:
    return database.build(_SCHEMA, {"people": [(i, *row) for i, row in enumerate(table)]})
