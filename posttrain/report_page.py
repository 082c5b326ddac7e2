"""report.html: one self-contained page of a run. Next: report.py for where the figures come from."""

from typing import Any


def page(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page."""
    return f"<!doctype html><title>{len(rows)}</title>{report['run']!r}"
