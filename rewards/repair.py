"""Hidden tests on the files that a repository-repair episode left behind.

All cases run in one process in the sandbox; what the functions return is compared here, outside. So an edit can
break or slow down its own package, but neither see an expected result nor write a verdict. Next: sandbox.py.
"""

import json
from typing import Any

from posttrain.rewards import bubblewrap
from posttrain.rewards.base import Mark, Unscorable, per_rollout
from posttrain.rewards.sandbox import Call, Limits, Program
from posttrain.schema import Rollout, Task

LIMITS = Limits(cpu_s=10, wall_s=20)
_DRIVER = """
import importlib

def results(cases):
    found = []
    for name, arguments in cases:
        module, _, function = name.partition(".")
        try:
            found.append([getattr(importlib.import_module(module), function)(*arguments)])
        except Exception:
            found.append([])
    return found
"""


@per_rollout
def hidden_tests(task: Task, rollout: Rollout) -> Mark:
    """1 if every case of meta["hidden"] gives its result with the files of the outcome, else 0.

    Raises SandboxMissing or Unscorable if the sandbox is missing or fails; neither is a score.
    """
    cases = task.meta.get("hidden")
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"task {task.id} has no hidden cases (a list in meta)")
    files = rollout.outcome.get("files")
    if rollout.stop != "eos" or not isinstance(files, dict):
        return Mark(0.0, "the episode did not end with files")
    program = Program(
        source=_DRIVER,
        call=Call(function="results", args=([[name, arguments] for name, arguments, _ in cases],)),
        files=files,
    )
    outcome = bubblewrap.shared().run(program, LIMITS)
    if outcome.status == "error":
        raise Unscorable(f"the sandbox failed: {outcome.note}")
    if not outcome.has_value:
        return Mark(0.0, f"no results: {outcome.status} {outcome.note}".rstrip())
    found = outcome.value if isinstance(outcome.value, list) else []
    wanted = [[result] for _, _, result in cases]
    passed = sum(map(_same, found, wanted))
    return Mark(float(len(found) == passed == len(wanted)), f"{passed} of {len(wanted)} hidden cases")


def _same(found: Any, wanted: Any) -> bool:
    """Equal as JSON: True is not 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
