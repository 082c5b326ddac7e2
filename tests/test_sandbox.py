"""The sandbox as its users meet it: what is missing, what dies with whom, what a program gets."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from posttrain.rewards.bubblewrap import Bubblewrap
from posttrain.rewards.sandbox import Call, Limits, Program, SandboxMissing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def box() -> Iterator[Bubblewrap]:
    sandbox = Bubblewrap(Limits(cpu_s=2, wall_s=5))
    yield sandbox
    sandbox.close()


def test_a_program_gets_its_input_files_and_arguments(box: Bubblewrap) -> None:
    source = "import sys, helper\nprint(helper.twice(input()))\nprint(len(sys.stdin.read()))\nprint('e', file=sys.stderr)"
    files = {"helper.py": "def twice(x): return x + x", "data/raw.bin": b"\xff\x00"}
    outcome = box.run(Program(source=source, stdin="ab\n" + "x" * 200_000, files=files))
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "abab\n200000\n", "e\n")
    tests = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)"
    outcome = box.run(Program(arguments=("-m", "unittest"), files={"test_it.py": tests}))
    assert outcome.status == "ok" and "Ran 1 test" in outcome.stderr


def test_a_call_reaches_into_modules_and_returns_plain_data(box: Bubblewrap) -> None:
    files = {
        "shop/__init__.py": "",
        "shop/cart.py": "def total(items, *, tax=0): return {'sum': (sum(items) + tax,)}",
    }
    call = Call(function="shop.cart.total", args=([1, 2],), kwargs={"tax": 3})
    outcome = box.run(Program(source="", files=files, call=call))
    assert outcome.has_value and outcome.value == {"sum": [6]}
    assert box.run(Program(source="def f(): return None", call=Call(function="f"))).has_value
    outcome = box.run(Program(source="", call=Call(function="nothing")))
    assert outcome.status == "nonzero" and not outcome.has_value and "nothing" in outcome.stderr


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("raise SystemExit(7)", "nonzero", 7),
        ("raise SystemExit('bye')", "nonzero", 1),
        ("raise SystemExit", "ok", 0),
        ("import os; os.kill(os.getpid(), 11)", "killed", None),
        ("import ctypes; ctypes.string_at(0)", "killed", None),
        ("import atexit; atexit.register(print, 'late')", "ok", 0),
        (
            "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
            "ok",
            0,
        ),
    ],
)
def test_a_program_ends_as_python_ends(box: Bubblewrap, source: str, status: str, code: int | None) -> None:
    outcome = box.run(Program(source=source))
    assert (outcome.status, outcome.exit_code) == (status, code), outcome
    assert outcome.stdout == ("late\n" if "late" in source else "")


def test_hashes_are_the_same_every_time(box: Bubblewrap) -> None:
    assert len({box.run(Program(source="print(hash('a'))")).stdout for _ in range(3)}) == 1


def test_many_threads_share_the_pool(box: Bubblewrap) -> None:
    def square(n: int) -> object:
        return box.run(Program(source="def f(x): return x * x", call=Call(function="f", args=(n,)))).value

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(square, range(24))) == [n * n for n in range(24)]


def test_a_sandbox_used_again_starts_clean() -> None:
    sandbox = Bubblewrap(Limits(cpu_s=1, wall_s=2), warm=1, uses=3)
    pids = []
    for then in (
        "",
        "",
        "",
        "open('left', 'w')",
        "",
        "while True: pass",
        "import socket; socket.socket()",
        "",
    ):
        source = f"import os; print(os.listdir(), os.getpid(), flush=True)\n{then}"
        files, _, pid = sandbox.run(Program(source=source)).stdout.rpartition(" ")
        assert files == "[]"
        pids.append(int(pid))
    sandbox.close()
    # The first sandbox has run the start-up test (2 and 3); 2 is the first process of a new one.
    assert pids == [4, 5, 2, 3, 2, 3, 2, 2]


def test_a_program_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="either source or arguments"):
        Program()
    with pytest.raises(ValueError, match="either source or arguments"):
        Program(source="", arguments=("-V",))
    with pytest.raises(ValueError, match="a call needs source"):
        Program(arguments=("-V",), call=Call(function="f"))


def test_more_disk_than_the_sandbox_has_is_refused(box: Bubblewrap) -> None:
    with pytest.raises(ValueError, match="this sandbox has"):
        box.run(Program(source=""), Limits(disk_bytes=1 << 40))


# ---- what is missing ----


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxMissing, match="no sandbox: bwrap is missing; apt install bubblewrap"):
        Bubblewrap()


def test_without_user_namespaces_nothing_runs() -> None:
    code = "import sys\nfrom posttrain.rewards.bubblewrap import Bubblewrap\ntry: Bubblewrap()\n"
    code += "except ValueError as error: print(error)\nelse: print('ran')"
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith("no sandbox: ") and "user namespaces" in done.stdout, done
    assert done.stdout.count("\n") == 1


def test_check_tells_that_the_sandbox_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(
        '{"question": "Print 1.", "answer": "print(1)", "meta": {"tests": [{"stdin": "", "stdout": "1"}]}}\n'
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "r"\n[[domains]]\nname = "code"\ntasks = "tasks.jsonl"\n'
        'rewards = [{ fn = "posttrain.rewards.program:passed" }]\n'
        '[[stages]]\nname = "convert"\nkind = "convert"\nsource = "./model"\n'
    )

    def check(path: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "posttrain", "check", str(recipe)]
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    done = check("/nowhere")
    assert done.returncode == 2 and "no sandbox: bwrap is missing" in done.stderr, done
    assert done.stderr.count("\n") == 1
    assert check(os.environ["PATH"]).returncode == 0, check(os.environ["PATH"])


# ---- who dies with whom ----

KILLED = """
import os, sys, threading, time
from posttrain.config import Reward
from posttrain.rewards.bubblewrap import shared
from posttrain.rewards.sandbox import Program
from posttrain.rewards.workers import Workers
from posttrain.rewards.base import reference_rollout
from posttrain.schema import Task
task = Task(id="d/1", domain="d", messages=(), answer="a" * 60 + "b", meta={"rubric": [{"kind": "regex", "pattern": "(a+)+$"}]})
reward = Reward(fn="posttrain.rewards.rubric:mean", timeout_s=1000)
threading.Thread(target=Workers(1).judge, args=(reward, task, [reference_rollout(task)])).start()
threading.Thread(target=shared().run, args=(Program(source="import time; time.sleep(1000)"),)).start()
time.sleep(4)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_and_no_sandbox() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
