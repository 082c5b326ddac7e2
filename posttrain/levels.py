"""Levels of difficulty that a function of the recipe gives to tasks. Next: mixture.py, which lets tasks through by level."""

from collections.abc import Callable

from posttrain.rewards.base import load_object
from posttrain.schema import Task


def load(domain: str, path: str | None) -> Callable[[Task], str]:
    """The level of each task of a domain, "" for all without a path.

    Raises ValueError for what does not load; so does the function, naming the task, where the recipe's raises.
    """
    if path is None:
        return lambda task: ""
    where = f"mix.{domain}.level"
    function = load_object(path, where)

    def level(task: Task) -> str:
        try:
            return str(function(task))
        except Exception as error:  # a user's code
            raise ValueError(
                f"{where}: {path} fails on task {task.id!r}: {type(error).__name__}: {error}; "
                "it takes a Task and returns its level"
            ) from error

    return level
