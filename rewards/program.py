"""Programs judged by tests that they never see: task.meta["tests"], each run in a sandbox of its own.

A test is {"stdin": ..., "stdout": ...}: the program reads and prints; or {"call": "name", "args": [...],
"kwargs": {...}, "expected": ...}: a function of the program is called, and its result, plain JSON data, compared
here, outside. Also: "visible": true for tests that the prompt shows, "tolerance": relative, for floats.
task.meta["limits"] overrides fields of Limits. The task's answer is a program that passes. Next: sandbox.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.rewards.base import Mark, per_rollout
from posttrain.rewards.bubblewrap import shared
from posttrain.rewards.sandbox import Call, Limits, Outcome, Program
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 65536
TOLERANCE = 1e-9
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class TestVerdict:
    """What one test says of one program."""

    number: int
    visible: bool
    passed: bool
    why: str = ""
    """"wrong", "no value", "not run", or the status of the program's Outcome."""
    denied: tuple[str, ...] = ()
    """Forbidden system calls that it tried."""


@per_rollout
def passed(task: Task, rollout: Rollout) -> Mark:
    """1 if the program passes every test; the first failure ends it."""
    verdicts = run_tests(task, rollout.text, stop_early=True)
    return Mark(float(all(v.passed for v in verdicts)), _summary(verdicts))


@per_rollout
def share(task: Task, rollout: Rollout) -> Mark:
    """Share of the tests that the program passes. Partial credit teaches partial programs: prefer `passed`."""
    verdicts = run_tests(task, rollout.text, stop_early=False)
    return Mark(sum(v.passed for v in verdicts) / len(verdicts), _summary(verdicts))


def run_tests(task: Task, text: str, *, stop_early: bool) -> list[TestVerdict]:
    """A verdict per test. After a timeout the rest is not run: one hang is enough.

    Raises SandboxMissing, ChildProcessError if the sandbox breaks, ValueError for tests that are none.
    """
    box = shared()  # first of all: without a sandbox even a wrong answer is not judged
    tests = task.meta.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"task {task.id} has no tests (a list in meta)")
    limits = _limits(task)
    source = program_in(text)
    verdicts: list[TestVerdict] = []
    over = not source
    for number, test in enumerate(tests, start=1):
        visible = bool(test.get("visible"))
        why = "not run"
        denied: tuple[str, ...] = ()
        if not over:
            program, wanted = _program(task, number, test, source)
            outcome = box.run(program, limits)
            if outcome.status == "error":
                raise ChildProcessError(outcome.note)
            why = _why_not(test, outcome, wanted)
            denied = tuple(outcome.denied)
            over = outcome.status == "timeout" or bool(stop_early and why)
        verdicts.append(TestVerdict(number=number, visible=visible, passed=not why, why=why, denied=denied))
    return verdicts


def program_in(text: str) -> str:
    """The last fenced block after the thinking, or all of it where there is none; empty if too long."""
    text = text.rpartition("</think>")[2]
    blocks = _FENCE.findall(text)
    source: str = blocks[-1] if blocks else text
    return source if source.strip() and len(source) <= MAX_CHARACTERS else ""


def same(found: Any, wanted: Any, *, tolerance: float = TOLERANCE) -> bool:
    """Whether two plain values are equal: True is not 1, a list is a tuple, floats are equal within the tolerance."""
    if isinstance(found, bool) or isinstance(wanted, bool) or found is None or wanted is None:
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        if isinstance(found, int) and isinstance(wanted, int):
            return found == wanted
        return _close(found, wanted, tolerance)
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(
            same(a, b, tolerance=tolerance) for a, b in zip(found, wanted, strict=True)
        )
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(
            same(found[key], wanted[key], tolerance=tolerance) for key in wanted
        )
    return isinstance(found, str) and isinstance(wanted, str) and found == wanted


def _close(found: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int that no float can hold
        return False


def _program(task: Task, number: int, test: Mapping[str, Any], source: str) -> tuple[Program, Any]:
    """The program of one test and what it must print or return."""
    if "call" in test and "expected" in test:
        call = Call(function=test["call"], args=test.get("args", ()), kwargs=test.get("kwargs", {}))
        return Program(source=source, call=call), test["expected"]
    if "stdin" in test and "stdout" in test:
        return Program(source=source, stdin=test["stdin"]), test["stdout"]
    raise ValueError(f"task {task.id}: test {number} needs stdin and stdout, or call and expected")


def _why_not(test: Mapping[str, Any], outcome: Outcome, wanted: Any) -> str:
    """Why a test fails, or nothing."""
    if outcome.status != "ok":
        return outcome.status
    if "call" not in test:
        return "" if _lines(outcome.stdout) == _lines(wanted) else "wrong"
    if not outcome.has_value:
        return "no value"
    right = same(outcome.value, wanted, tolerance=float(test.get("tolerance", TOLERANCE)))
    return "" if right else "wrong"


def _lines(text: str) -> list[str]:
    """Lines without blanks at their ends and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _limits(task: Task) -> Limits:
    try:
        return Limits(**task.meta.get("limits", {}))
    except TypeError as error:
        raise ValueError(f"task {task.id}: limits: {error}") from None


def _summary(verdicts: Sequence[TestVerdict]) -> str:
    """Example: "visible 2 of 2, hidden 0 of 3; test 3: timeout; forbidden: socket"."""
    parts = []
    for name, kind in (("visible", True), ("hidden", False)):
        of_kind = [v.passed for v in verdicts if v.visible is kind]
        if of_kind:
            parts.append(f"{name} {sum(of_kind)} of {len(of_kind)}")
    first = next((f"; test {v.number}: {v.why}" for v in verdicts if not v.passed), "")
    denied = sorted({name for v in verdicts for name in v.denied})
    return ", ".join(parts) + first + (f"; forbidden: {', '.join(denied)}" if denied else "")
