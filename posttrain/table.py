"""Rows of words as aligned columns. Next: check.py, status.py."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """One line per row; every row has the same number of cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
