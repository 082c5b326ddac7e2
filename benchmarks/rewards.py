"""How fast rewards are on this machine: mathematics, programs in the sandbox, and what a hanging one costs others.

`python benchmarks/rewards.py [--json FILE]`. Targets, on two idle cores: 500 simple answers and 25 sandboxed tests
per second, each in a sandbox of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

from posttrain.config import Reward
from posttrain.rewards.base import reference_rollout
from posttrain.rewards.bubblewrap import Bubblewrap
from posttrain.rewards.sandbox import Call, Limits, Program
from posttrain.rewards.scorer import Scorer, score_all
from posttrain.rewards.workers import Workers
from posttrain.schema import Rollout, Task

GROUP = 8
TEST = Program(source="def add(a, b):\n    return a + b\n", call=Call(function="add", args=(1, 2)))
HARD = [("\\frac{1}{2}", "0.5000"), ("x^2+1", "1+x^2"), ("(1,2)", "1<x<2"), ("\\sqrt{8}", "2\\sqrt{2}")]


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    workers = Workers(cores)
    figures = {
        "simple math answers/s": _math(workers, _simple(300)),
        "other math answers/s, first time": _math(workers, _other(40, distinct=True)),
        "other math answers/s, asked before": _math(workers, _other(40, distinct=False)),
        "Python starts/s, one after another": _rate(100, 1, _bare),
    }
    with _opened(uses=1) as box:
        figures["sandboxed tests/s, fresh, one after another"] = _rate(200, 1, lambda: _test(box))
        figures[f"sandboxed tests/s, fresh, {cores} at a time"] = _rate(400, cores, lambda: _test(box))
    with _opened(uses=1000) as box:
        figures[f"sandboxed tests/s, used again, {cores} at a time"] = _rate(800, cores, lambda: _test(box))
    figures["hanging reward of 2 s: seconds until 400 others are judged"] = _hang(workers)
    workers.close()
    for name, value in figures.items():
        print(f"{name:60} {value:9.1f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _simple(num_tasks: int) -> list[tuple[Task, list[Rollout]]]:
    """Integers, decimals and fractions; half of the answers are wrong."""
    random = Random(0)
    groups = []
    for n in range(num_tasks):
        task = Task(id=f"math/{n}", domain="math", messages=(), answer=str(random.randint(-999, 999)))
        groups.append(
            (task, [_said(task, f"\\boxed{{{int(task.answer or 0) + i % 2}.0}}") for i in range(GROUP)])
        )
    return groups


def _other(num_tasks: int, *, distinct: bool) -> list[tuple[Task, list[Rollout]]]:
    """Expressions, which math-verify has to parse."""
    groups = []
    for n in range(num_tasks):
        reference, answer = HARD[n % len(HARD)]
        extra = f"+{n}" if distinct else ""
        task = Task(id=f"math/{n}", domain="math", messages=(), answer=reference + extra)
        groups.append((task, [_said(task, answer + extra) for _ in range(GROUP)]))
    return groups


def _said(task: Task, text: str) -> Rollout:
    return replace(reference_rollout(task), text=text)


def _math(workers: Workers, groups: list[tuple[Task, list[Rollout]]]) -> float:
    scorer = Scorer([Reward(fn="posttrain.rewards.answer:math")], workers)
    warm = [(scorer, *_simple(1)[0])] * 2 * workers.size
    score_all(warm)
    began = time.monotonic()
    score_all([(scorer, task, rollouts) for task, rollouts in groups])
    return len(groups) * GROUP / (time.monotonic() - began)


def _opened(*, uses: int) -> "contextlib.closing[Bubblewrap]":
    return contextlib.closing(Bubblewrap(Limits(cpu_s=2, wall_s=5), warm=4, uses=uses))


def _test(box: Bubblewrap) -> None:
    assert box.run(TEST).value == 3


def _bare() -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", "print(1 + 2)"], check=True, stdout=subprocess.DEVNULL)


def _rate(count: int, width: int, once: Callable[[], None]) -> float:
    once()
    began = time.monotonic()
    with ThreadPoolExecutor(width) as threads:
        for done in [threads.submit(once) for _ in range(count)]:
            done.result()
    return count / (time.monotonic() - began)


def _hang(workers: Workers) -> float:
    """One rollout hangs; how long the other 400 take, including it."""
    scorer = Scorer([Reward(fn="posttrain.rewards.rubric:strict", timeout_s=2)], workers)
    rubric = {"rubric": [{"kind": "regex", "pattern": "(a+)+$"}]}
    task = Task(id="d/1", domain="d", messages=(), answer="a", meta=rubric)
    quick = [(scorer, task, [_said(task, "a")] * GROUP)] * 50
    score_all(quick[:8])
    began = time.monotonic()
    score_all([(scorer, task, [_said(task, "a" * 60 + "b")]), *quick])
    return time.monotonic() - began


if __name__ == "__main__":
    main()
