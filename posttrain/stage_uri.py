"""stage://NAME in settings of a reward: the folder of that stage of the same run. Next: config.py, units.py."""

from pathlib import Path
from typing import Any

_SCHEME = "stage://"


def stages(value: Any) -> list[str]:
    """The stages named anywhere in a value of TOML."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [name for part in parts for name in stages(part)]
    named = isinstance(value, str) and value.startswith(_SCHEME)
    return [value.removeprefix(_SCHEME)] if named else []


def resolved(value: Any, run: Path) -> Any:
    """The value with folders below `run` in their place."""
    if isinstance(value, dict):
        return {key: resolved(part, run) for key, part in value.items()}
    if isinstance(value, list):
        return [resolved(part, run) for part in value]
    named = stages(value)
    return str(run / named[0]) if named else value
