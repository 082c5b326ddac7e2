"""An agent world: change one entry of a table, found by following other entries, with SQL, one statement a turn.

Every task has a table of its own, so the row can only be found by reading; the episode's database is a real SQLite
database, and success is its final state. A name is always written as SQL's text literal, so that it is one token
everywhere. Flaws: some demonstrations change a row without looking anything up, stop after a part of the
chain, or follow the wrong column.
"""

import random
import sqlite3
from collections.abc import Iterator
from typing import Any

from posttrain.envs import database
from posttrain.rollouts.toolbox import ToolError
from posttrain.schema import Message, Task

RELATIONS = ("boss", "friend", "rival", "guide", "neighbor", "tutor", "cousin", "partner")
NAMES = (
    "ann bob cat dan eve fay gus hal ida jon kim leo mia ned ola pat quin roy sue tom una vic wes zoe"
).split()
WORDS = (
    *"use sql : set the of to select from people where name = update done error".split(),
    *RELATIONS,
    *(f"'{name}'" for name in NAMES),
)
"""What a tokenizer needs for it."""
DONE = "answer done"
NO_LOOKUP = 0.35
STOP_EARLY = 0.2
WRONG_COLUMN = 0.04
_SCHEMA = f"CREATE TABLE people (name TEXT PRIMARY KEY, {', '.join(f'{r} TEXT' for r in RELATIONS)})"


class Records:
    """One episode: a table that its statements alone change."""

    def __init__(self, table: dict[str, list[str]]) -> None:
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
        return [f"'{rows[0][0]}'"] if len(rows) == len(names) == 1 else ["error"]

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
    """n tasks: two entries to follow, one to change."""
    rng = random.Random(seed)
    for _ in range(n):
        *chain, column = rng.sample(RELATIONS, 3)
        table = {name: rng.choices(NAMES, k=len(RELATIONS)) for name in NAMES}
        person = row = rng.choice(NAMES)
        for relation in chain:
            row = table[row][RELATIONS.index(relation)]
        old = table[row][RELATIONS.index(column)]
        value = rng.choice([name for name in NAMES if name != old])
        path = " of the ".join([column, *reversed(chain)])
        question = f"use sql : set the {path} of '{person}' to '{value}'"
        db = _open(table)
        db.execute(f"UPDATE people SET {column} = ? WHERE name = ?", (value, row))
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
        chain, row = [], rng.choice(NAMES)
    elif rng.random() < STOP_EARLY:
        chain = chain[: rng.randint(1, len(chain) - 1)]
    messages: list[Message] = []
    for relation in chain:
        if rng.random() < WRONG_COLUMN:
            relation = rng.choice(RELATIONS)
        messages.append({"role": "assistant", "content": look(relation, row)})
        row = meta["table"][row][RELATIONS.index(relation)]
        messages.append({"role": "tool", "content": f"'{row}'"})
    messages.append({"role": "assistant", "content": change(meta["column"], meta["value"], row)})
    messages.append({"role": "tool", "content": "done"})
    return [*messages, {"role": "assistant", "content": DONE}]


def solution(task: Task) -> list[str]:
    """The turns that bring the table into the wanted state."""
    turns, row = [], task.meta["person"]
    for relation in task.meta["chain"]:
        turns.append(look(relation, row))
        row = task.meta["table"][row][RELATIONS.index(relation)]
    return [*turns, change(task.meta["column"], task.meta["value"], row), DONE]


def look(relation: str, row: str) -> str:
    """The call that reads an entry."""
    return f"<call> select {relation} from people where name = '{row}' </call>"


def change(column: str, value: str, row: str) -> str:
    """The call that sets an entry."""
    return f"<call> update people set {column} = '{value}' where name = '{row}' </call>"


def _open(table: dict[str, list[str]]) -> sqlite3.Connection:
    return database.build(_SCHEMA, {"people": [(name, *row) for name, row in table.items()]})
