"""A SQLite database in memory with a guarded door for SQL that a policy writes.

Guards: only SELECT over the tables (and UPDATE of one, where an environment wants it), functions from a list (none that depends on time or chance, none that
loads code), no ATTACH and no PRAGMA, a budget of virtual-machine steps, limits on rows, values and
statement. Next: shop.py.
"""

import functools
import hashlib
import json
import sqlite3
from collections.abc import Sequence

from posttrain.rollouts.toolbox import ToolError

MAX_ROWS = 50
MAX_STEPS = 2_000_000
"""Steps of SQLite's virtual machine per statement: some 50 ms."""
_STEPS_AT_ONCE = 1000
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4096,
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
}
_FUNCTIONS = frozenset(
    (
        "abs avg coalesce count group_concat ifnull iif instr length like lower ltrim max min nullif replace round "
        "row_number rtrim substr substring sum total trim typeof upper"
    ).split()
)


def build(schema: str, rows: dict[str, Sequence[tuple[object, ...]]]) -> sqlite3.Connection:
    """A database in memory with these tables and rows. Steps of an episode may run in several threads, one at a time."""
    db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    for limit, value in _LIMITS.items():
        db.setlimit(limit, value)
    db.executescript(schema)
    for table, values in rows.items():
        marks = ", ".join("?" for _ in values[0]) if values else ""
        db.executemany(f"INSERT INTO {table} VALUES ({marks})", values)
    return db


def run(
    db: sqlite3.Connection, sql: str, *, writable: str | None = None
) -> tuple[list[str], list[tuple[object, ...]]]:
    """Column names and rows of one statement: a SELECT, or an UPDATE of the writable table. Both empty for an UPDATE.

    At most MAX_ROWS + 1 rows. Raises ToolError for anything that is refused, fails or takes too long.
    """
    budget = iter(range(MAX_STEPS // _STEPS_AT_ONCE))
    db.set_authorizer(functools.partial(_authorize, writable))
    db.set_progress_handler(lambda: next(budget, None) is None, _STEPS_AT_ONCE)
    try:
        cursor = db.execute(sql)
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: NUL and surrogates
        raise ToolError(
            "the statement takes too long" if "interrupted" in str(error) else str(error)
        ) from None
    finally:
        db.set_progress_handler(None, 0)
        db.set_authorizer(None)
    if cursor.description is None and cursor.rowcount < 0:
        raise ToolError("there is no statement")
    return [str(column[0]) for column in cursor.description or ()], rows


def select(db: sqlite3.Connection, sql: str) -> str:
    """The rows of a SELECT as text: a line of column names, then a line of JSON per row; ToolError as run."""
    names, rows = run(db, sql)
    if not names:
        raise ToolError("the statement gives no rows; only SELECT is allowed")
    lines = [json.dumps(row, ensure_ascii=False, default=repr) for row in rows[:MAX_ROWS]]
    more = [f"... (more than {MAX_ROWS} rows)"] if len(rows) > MAX_ROWS else []
    return "\n".join([", ".join(names), *lines, *more])


def digest(db: sqlite3.Connection) -> str:
    """sha256 over all rows of all tables, whatever their order."""
    tables = [
        name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    ]
    state = {table: sorted(map(repr, db.execute(f"SELECT * FROM {table}"))) for table in tables}
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _authorize(writable: str | None, action: int, first: str | None, second: str | None, *_: object) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_READ):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FUNCTIONS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_UPDATE and writable is not None and first == writable:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY
