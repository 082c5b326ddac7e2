"""A small Python package with something broken in it: read, edit, run the tests; hidden tests decide.

The agent sees the package and a test file per module that misses most of the bugs. What it leaves behind, the files,
is the outcome; posttrain.rewards.repair:hidden_tests calls the functions in the sandbox and compares what
they return outside, so that no edit can forge a verdict. Difficulty: `modules` in the package, `bugs` in it.
Used as tasks = "py://posttrain.envs.repair:tasks?n=500&modules=3&bugs=1", environment =
"posttrain.envs.repair:start", rewards = [{ fn = "posttrain.rewards.repair:hidden_tests" }]. Next: packages.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from random import Random
from typing import Annotated, Any

from pydantic import Field

from posttrain.envs import sandboxed
from posttrain.envs.packages import MODULES, Module
from posttrain.rewards.sandbox import Limits, Program
from posttrain.rollouts import toolbox
from posttrain.rollouts.deepseek_chat import Call
from posttrain.rollouts.environment import Policy, play
from posttrain.rollouts.toolbox import ToolError
from posttrain.schema import Message, Task

MAX_TURNS = 30
MAX_FILES = 20
MAX_FILE_CHARACTERS = 20_000
LIMITS = Limits(cpu_s=5, wall_s=10)
POLICY = (
    "You repair a small Python package with tools. The tests in it do not cover everything. Change no function's "
    "name or arguments. When it is repaired, answer with the word done."
)

Path = Annotated[str, Field(max_length=100, description="path of a file, as list_files gives it")]


class Repository:
    """One episode: the files of the package, in memory; programs run in the sandbox."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)

    def list_files(self) -> str:
        """The paths of all files."""
        return "\n".join(sorted(self.files))

    def read_file(self, path: Path) -> str:
        """The text of a file."""
        return self._file(path)

    def edit_file(
        self,
        path: Path,
        old: Annotated[str, Field(min_length=1, description="text that stands in the file exactly once")],
        new: Annotated[str, Field(description="text to put in its place")],
    ) -> str:
        """Replace a piece of a file."""
        text = self._file(path)
        if text.count(old) != 1:
            raise ToolError(
                f"the old text stands {text.count(old)} times in {path}; it must stand there once"
            )
        return self._put(path, text.replace(old, new))

    def write_file(self, path: Path, text: str) -> str:
        """Write a whole file, new or not."""
        plain = PurePosixPath(path)
        if plain.is_absolute() or ".." in plain.parts or str(plain) != path or not path.endswith(".py"):
            raise ToolError(f"{path!r} is no plain relative path of a .py file")
        if path not in self.files and len(self.files) >= MAX_FILES:
            raise ToolError(f"the package has {MAX_FILES} files; no more")
        return self._put(path, text)

    def run_tests(self) -> str:
        """Run all test files with unittest."""
        program = Program(arguments=("-m", "unittest", "-q"), files=self.files)
        shown = sandboxed.report(sandboxed.run(program, LIMITS))
        return re.sub(
            r"(?m)^(Ran \d+ tests?) in [0-9.]+s$", r"\1", shown
        )  # played again, it takes another time

    def step(self, text: str) -> list[str] | None:
        """As Episode.step."""
        return toolbox.respond(_tools(self), text)

    def outcome(self) -> dict[str, Any]:
        """The files as they are."""
        return {"files": self.files}

    def close(self) -> None:
        """Nothing is held."""

    def _file(self, path: str) -> str:
        if path not in self.files:
            raise ToolError(f"there is no file {path!r}; list_files gives the paths")
        return self.files[path]

    def _put(self, path: str, text: str) -> str:
        if len(text) > MAX_FILE_CHARACTERS:
            raise ToolError(f"a file has at most {MAX_FILE_CHARACTERS} characters")
        self.files[path] = text
        return f"{path} is written"


def start(task: Task, seed: int) -> Repository:
    """An episode of the task; raises Unavailable where code cannot be isolated."""
    sandboxed.sandbox()
    return Repository(task.meta["files"])


def tasks(*, seed: int, n: int, modules: int = 3, bugs: int = 1) -> Iterator[Task]:
    """n broken packages; raises ValueError for settings that cannot be met."""
    if not 1 <= bugs <= modules <= len(MODULES):
        raise ValueError(f"modules={modules}, bugs={bugs}: need 1 <= bugs <= modules <= {len(MODULES)}")
    rng = Random(seed)
    for number in range(n):
        yield _task(rng, number, modules, bugs)


def solver(task: Task) -> Policy:
    """Looks around, puts the right text back in place of the wrong one, runs the tests."""
    calls = [Call("list_files", {})]
    for path, wrong, right in task.meta["solution"]:
        calls += [
            Call("read_file", {"path": path}),
            Call("edit_file", {"path": path, "old": wrong, "new": right}),
        ]
    return toolbox.script([*calls, Call("run_tests", {})], "done")


def demonstrate(task: Task, rng: Random) -> list[Message]:
    """The solver's conversation, for a first supervised training."""
    return list(play(start, task, solver(task), seed=0, max_turns=MAX_TURNS).messages)


def _tools(repository: Repository) -> Sequence[toolbox.Function]:
    return (
        repository.list_files,
        repository.read_file,
        repository.edit_file,
        repository.write_file,
        repository.run_tests,
    )


def _task(rng: Random, number: int, modules: int, bugs: int) -> Task:
    chosen = rng.sample(MODULES, modules)
    files: dict[str, str] = {}
    solution: list[tuple[str, str, str]] = []
    for i, module in enumerate(chosen):
        source = module.source
        if i < bugs:
            right, wrong = rng.choice(module.bugs)
            source = source.replace(right, wrong)
            # The solver's edit must fit in one place: the whole text does.
            solution.append((f"{module.name}.py", source, module.source))
        files[f"{module.name}.py"] = source
        files[f"test_{module.name}.py"] = _test_file(module)
    suspects = rng.sample(chosen, modules)
    report = f"Report {number}: some results of {', '.join(m.name for m in suspects)} are wrong. Please repair the package."
    system = {"role": "system", "content": POLICY, "tools": toolbox.schemas(*_tools(Repository({})))}
    return Task(
        id="",
        domain="",
        messages=(system, {"role": "user", "content": report}),
        meta={
            "files": files,
            "hidden": [
                [f"{m.name}.{name}", arguments, result]
                for m in chosen
                for name, arguments, result in m.hidden
            ],
            "solution": solution,
        },
    )


def _test_file(module: Module) -> str:
    lines = ["import unittest", "", f"import {module.name}", "", "", "class Tests(unittest.TestCase):"]
    for i, (name, arguments, result) in enumerate(module.visible):
        call = f"{module.name}.{name}({', '.join(map(repr, arguments))})"
        lines += [f"    def test_{name}_{i}(self):", f"        self.assertEqual({call}, {result!r})", ""]
    return "\n".join(lines)
