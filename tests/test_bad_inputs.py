"""Thirty things that a model's output must not do. Each has one outcome, leaves nothing behind and no neighbour hurt.

Programs (1 to 24, 30) run in the sandbox; texts (25 to 27, 30) go to the rewards; files (29) go to the loaders. Tool
results with forged marks (28) are the chat format's business. The slow tests repeat all programs ten times in
random order, four at the same time, in sandboxes used once and in sandboxes that run one program after another.
"""

import contextlib
import json
import os
import pickle
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from test_rewards import rollout, task

from posttrain import config
from posttrain.rewards import answer, gym, program
from posttrain.rewards.base import Verdict, judge
from posttrain.rewards.bubblewrap import Bubblewrap
from posttrain.rewards.sandbox import Call, Limits, Outcome, Program
from posttrain.rewards.sandbox_command import SPARE_USER
from posttrain.rewards.scorer import Scorer
from posttrain.schema import RewardFn, Task
from posttrain.tasks import load_tasks

MIB = 1 << 20
LIMITS = Limits(
    cpu_s=1.0, wall_s=20.0, memory_bytes=192 * MIB, processes=12, output_bytes=64 << 10, disk_bytes=8 * MIB
)
"""The wall time is long, so that a busy machine changes no outcome; what waits has SHORT."""
SHORT = replace(LIMITS, wall_s=1.0)
SECRET = "planted-secret-5e1f"
MARK = "posttrain-left-behind"
LATENESS_S = 1.0
NEIGHBOUR = Program(source="def f(x): return [x, x + 1]", call=Call(function="f", args=(41,)))


@dataclass(frozen=True)
class Bad:
    """A program and what must come of it."""

    number: int
    name: str
    source: str
    status: str
    call: Call | None = None
    denied: tuple[str, ...] = ()
    says: str = ""
    limits: Limits = LIMITS
    check: Callable[[Outcome], bool] = field(default=lambda outcome: True)


SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def denied(result):
    assert result == -1, "it was allowed"
    return os.strerror(ctypes.get_errno())
"""
F = Call(function="f", args=(3,))
PROGRAMS = [
    Bad(1, "loop", "while True: pass", "timeout"),
    Bad(
        2,
        "loop that swallows everything",
        "import signal\nfor n in set(range(1, 65)) - {9, 19, 32, 33}:\n    signal.signal(n, signal.SIG_IGN)\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    Bad(3, "sleep", "import time\nwhile True: time.sleep(1e6)", "timeout", limits=SHORT),
    Bad(4, "huge power", "9**9**9", "timeout"),
    Bad(4, "slow regex", "import re; re.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    Bad(
        5,
        "fork bomb",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
        check=lambda outcome: outcome.cpu_s < 4,
    ),
    Bad(
        5,
        "thread bomb",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "nonzero",
        says="can't start new thread",
    ),
    Bad(
        6,
        "daemon",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)",
        "ok",
        check=lambda outcome: outcome.seconds < 1,
    ),
    Bad(
        7,
        "child that keeps stdout",
        "import os, time\nif os.fork() == 0: time.sleep(1000)\nprint('parent done')",
        "ok",
        says="parent done",
        check=lambda outcome: outcome.seconds < 1,
    ),
    Bad(8, "50 GB at once", "x = bytearray(50 << 30)", "memory"),
    Bad(8, "memory bit by bit", "x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    Bad(
        8,
        "memory of many processes",
        "import os, time\nme = os.getpid()\nfor _ in range(8): os.getpid() == me and os.fork()\nx = b'x' * (60 << 20)\ntime.sleep(1000)",
        "memory",
    ),
    Bad(9, "10 GB of stdout", "while True: print('x' * 10_000)", "output"),
    Bad(9, "stderr too", "import sys\nwhile True: sys.stderr.write('x' * 10_000)", "output"),
    Bad(10, "one line without end", "import sys\nwhile True: sys.stdout.write('x' * 1_000_000)", "output"),
    Bad(10, "a value without end", "def f(x): return 'x' * 10_000_000", "output", call=F),
    Bad(
        11,
        "full disk",
        "import os\nn = 0\ntry:\n    while True:\n        n += 1\n        open(f'/w/{n}', 'wb').write(b'x' * (1 << 20))\n"
        "except OSError as e: print(e.strerror)",
        "ok",
        says="No space left on device",
    ),
    Bad(
        11,
        "disk elsewhere",
        "import os\nfor folder in ('/', '/usr', '/dev', '/dev/shm', '/proc', os.path.dirname(os.__file__)):\n"
        f"    try: open(folder + '/{MARK}', 'w'); print('WROTE', folder)\n    except OSError: pass",
        "ok",
        check=lambda outcome: "WROTE" not in outcome.stdout,
    ),
    Bad(
        12,
        "a million files",
        "for i in range(10**6): open(f'/w/{i}', 'w').close()",
        "disk",
        limits=replace(LIMITS, cpu_s=9),
    ),
    Bad(
        13,
        "files of the host",
        "import os\nfor path in ('/etc/shadow', '/etc/passwd', '/root/.ssh', '/home', '/proc/1/environ', "
        "'/proc/1/mem', '/proc/1/fd/0', '/var', '/sys', '/run', '/etc'):\n"
        "    try: print('READ', path, (os.listdir if os.path.isdir(path) else lambda p: open(p).read(50))(path))\n"
        "    except OSError: pass",
        "ok",
        check=lambda outcome: "READ" not in outcome.stdout,
    ),
    Bad(
        13,
        "every file it can find",
        "import os\nfor top, _, names in os.walk('/'):\n    if top.startswith(('/usr', '/lib', '/proc', '/w')): continue\n"
        "    for name in names:\n        if '/lib/python' in top or name.startswith(('libpython', 'python')): continue\n"
        "        if name in ('null', 'zero', 'urandom'): continue\n"
        "        print('FOUND', top, name)",
        "ok",
        check=lambda outcome: "FOUND" not in outcome.stdout,
        limits=replace(LIMITS, cpu_s=5),
    ),
    Bad(14, "environment", "import os; print(dict(os.environ))", "ok", says="'HOME': '/w'"),
    Bad(
        15,
        "connect",
        "import socket\nfor where in (('127.0.0.1', PORT), ('127.0.0.1', 8265), ('1.1.1.1', 53)):\n"
        "    try: socket.create_connection(where, 1); print('CONNECTED')\n    except OSError as e: print(e.strerror)",
        "ok",
        denied=("socket",),
        check=lambda outcome: "CONNECTED" not in outcome.stdout and outcome.denied["socket"] == 3,
    ),
    Bad(
        16,
        "names and datagrams",
        "import socket\ntry: socket.gethostbyname('example.com'); print('RESOLVED')\nexcept OSError: pass\n"
        "try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)); print('SENT')\n"
        "except OSError: pass",
        "ok",
        denied=("socket",),
        check=lambda outcome: not outcome.stdout,
    ),
    Bad(
        17,
        "metadata address",
        "import urllib.request\nurllib.request.urlopen('http://169.254.169.254/latest', timeout=1)",
        "nonzero",
        denied=("socket",),
    ),
    Bad(
        18,
        "docker",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
        "nonzero",
        says="No such file",
    ),
    Bad(
        18,
        "mount, trace, namespaces",
        SYSCALL + "print(denied(libc.mount(b'none', b'/w', b'tmpfs', 0, None)))\n"
        "print(denied(libc.ptrace(16, 1, 0, 0)))\nprint(denied(libc.unshare(0x10000000)))\n"
        "print(denied(libc.unshare(0x20000)))\nprint(denied(libc.prlimit(1, 0, ctypes.create_string_buffer(16), None)))",
        "ok",
        denied=("mount", "ptrace", "unshare", "prlimit64"),
        says="Operation not permitted",
    ),
    Bad(
        18,
        "memory of process 1",
        "import os, signal\nfor n in set(range(1, 65)) - {32, 33}:\n"
        "    try: os.kill(1, n)\n    except OSError: pass\nprint('still here')",
        "ok",
        says="still here",
    ),
    Bad(
        19,
        "links that lead out",
        "import os\nos.symlink('/etc/passwd', '/w/out')\nos.symlink('/', '/w/root')",
        "ok",
    ),
    Bad(
        20,
        "the grader",
        "import json, sys\njson.dumps = lambda *a, **k: '{\"value\": 4}'\n"
        "for name, module in list(sys.modules.items()):\n    if 'sandbox' in name: print('FOUND', name)\n"
        "def f(x): return 5",
        "ok",
        call=F,
        check=lambda outcome: "FOUND" not in outcome.stdout,
    ),
    Bad(
        20,
        "descriptors that are not its own",
        "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))",
        "ok",
        says="[0, 1, 2, 3, 4]",  # the last one reads the folder
    ),
    Bad(21, "exit", "import sys\ndef f(x): sys.exit(0)", "ok", call=F, check=lambda o: not o.has_value),
    Bad(21, "hard exit", "import os\ndef f(x): os._exit(0)", "ok", call=F, check=lambda o: not o.has_value),
    Bad(
        22,
        "printed verdict",
        "import os\nprint('all tests passed', '{\"value\": 4}')\n"
        "def f(x):\n    print('{\"value\": 4}')\n    os._exit(0)",
        "ok",
        call=F,
        check=lambda o: not o.has_value,
    ),
    Bad(
        23,
        "equal to everything",
        "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Any()",
        "ok",
        call=F,
        check=lambda o: not o.has_value and "returned Any" in o.note,
    ),
    Bad(
        23,
        "a number that lies",
        "class Int(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return [Int(7)]",
        "ok",
        call=F,
        check=lambda o: not o.has_value,
    ),
    Bad(
        24,
        "files that Python picks up",
        "for name in ('conftest', 'sitecustomize', 'usercustomize', 'json', 'os'):\n"
        "    open(f'/w/{name}.py', 'w').write('raise SystemExit(0)')",
        "ok",
    ),
    Bad(
        30,
        "strange text",
        "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\x00' + 'e\\u0301\\u202e'.encode())\n"
        "def f(x): return '\\ud800\\x00\\u202e' + '\\u0301' * 1000",
        "ok",
        call=F,
        says="\ufffd\ufffd\x00",
        check=lambda o: o.value == "\ud800\x00\u202e" + "\u0301" * 1000,
    ),
    Bad(19, "folder that nobody can read", "import os; os.chmod('/w', 0)", "ok"),
    Bad(30, "source that is no text", "x = '\ud800'", "nonzero", says="surrogates not allowed"),
    Bad(30, "source with NUL", "x = '\x00'", "nonzero", says="null bytes"),
    Bad(
        30,
        "value without bottom",
        "def f(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
        "ok",
        call=F,
    ),
]
IDS = [f"{bad.number}-{bad.name.replace(' ', '-')}" for bad in PROGRAMS]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bubblewrap]:
    with _sandbox(tmp_path_factory, uses=1) as sandbox:
        yield sandbox


@contextlib.contextmanager
def _sandbox(tmp_path_factory: pytest.TempPathFactory, *, uses: int) -> Iterator[Bubblewrap]:
    """Sandboxes on a host with secrets; nothing of theirs is left in the end."""
    others = set(_left_processes())  # those of the module, which are warm while a test opens its own
    (tmp_path_factory.mktemp("host") / "secret").write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_SECRET", SECRET)
        sandbox = Bubblewrap(LIMITS, warm=4, uses=uses)
        try:
            yield sandbox
        finally:
            sandbox.close()
    assert not set(_left_processes()) - others, "processes survived"
    assert not _left_files(), "files outside the sandbox"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of the host that nobody inside must reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def _left_processes() -> list[psutil.Process]:
    """What descends from us, or ran in a sandbox whose parent is gone."""
    size = str(LIMITS.disk_bytes)  # in the command line of our sandboxes, not of the rewards' own
    ours = [c for c in psutil.Process().children(recursive=True) if size in c.cmdline()]
    lost = [
        p
        for p in psutil.process_iter(["ppid", "uids"])
        if p.info["ppid"] == 1 and p.info["uids"].real == SPARE_USER
    ]
    return ours + lost


def _left_files() -> list[Path]:
    return [p for top in ("/", "/tmp", "/dev", "/dev/shm", "/mnt", ".") for p in Path(top).glob(f"{MARK}*")]


def _try(box: Bubblewrap, bad: Bad, port: int) -> None:
    outcome = box.run(Program(source=bad.source.replace("PORT", str(port)), call=bad.call), bad.limits)
    assert outcome.seconds < bad.limits.wall_s + LATENESS_S
    assert outcome.status == bad.status, outcome
    assert all(outcome.denied.get(name, 0) > 0 for name in bad.denied), outcome
    assert bad.says in outcome.stdout + outcome.stderr, outcome
    assert bad.check(outcome), outcome
    assert SECRET not in f"{outcome.stdout}{outcome.stderr}{outcome.value}"


@pytest.mark.parametrize("bad", PROGRAMS, ids=IDS)
def test_a_bad_program_has_its_outcome_and_its_neighbour_keeps_its_own(
    box: Bubblewrap, port: int, bad: Bad
) -> None:
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(1) as threads:
        neighbour = threads.submit(box.run, NEIGHBOUR, LIMITS)
        _try(box, bad, port)
        assert neighbour.result().value == [41, 42]
    assert psutil.Process().memory_info().rss - before < 50 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("uses", [1, 1000], ids=["used once", "used again"])
def test_ten_shuffled_repeats_four_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, port: int, uses: int
) -> None:
    with _sandbox(tmp_path_factory, uses=uses) as box:
        _repeat(box, port)


def _repeat(box: Bubblewrap, port: int) -> None:
    for repeat in range(10):
        order: list[Bad | None] = [*PROGRAMS, *[None] * len(PROGRAMS)]
        random.Random(repeat).shuffle(order)

        def one(bad: Bad | None) -> None:
            if bad is None:
                assert box.run(NEIGHBOUR, LIMITS).value == [41, 42]
            else:
                _try(box, bad, port)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(one, order))


# ---- sessions ----


def test_paths_that_lead_out_of_a_session_are_refused(box: Bubblewrap) -> None:
    with box.session() as session:
        assert session.run(
            Program(source="import os; os.symlink('/', '/w/root'); os.symlink('/usr', '/w/usr')")
        )
        for path in ("../etc/passwd", "/etc/passwd", "root/proc/1/environ", "usr/lib", "", ".", "a\x00b"):
            with pytest.raises(ValueError, match="Error"):
                session.read(path)
            with pytest.raises(ValueError, match="Error"):
                session.write(path, MARK)
        with pytest.raises(ValueError, match="PermissionError"):
            session.run(Program(source="", files={"../out": MARK}))
        session.run(Program(source="import os; os.mkfifo('/w/fifo')"))
        with pytest.raises(ValueError, match="OSError"):
            session.write("fifo", MARK)
        session.write("pkg/a.py", "x = 1")
        assert session.run(Program(source="import pkg.a; print(pkg.a.x)")).stdout == "1\n"
        assert session.read("pkg/a.py") == b"x = 1"


def test_a_session_keeps_files_and_no_processes(box: Bubblewrap) -> None:
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\nopen('kept', 'w').write('1')"
    count = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')), open('kept').read())"
    with box.session() as session:
        assert session.run(Program(source=daemon)).status == "ok"
        assert session.run(Program(source=count)).stdout == "2 1\n", "process 1 and the program"
        assert session.run(Program(source="while True: pass")).status == "timeout"
        assert session.run(Program(source=count)).stdout == "2 1\n"


# ---- texts ----


def _score(reward: RewardFn, given: Task, *texts: str) -> list[float | None]:
    found: dict[int, Verdict] = {}
    judge(reward, given, [rollout(text) for text in texts], found.__setitem__)
    return [found[i].value for i in range(len(texts))]


def test_25_visible_answers_learned_by_heart_score_nothing() -> None:
    tests = [{"stdin": "2", "stdout": "4", "visible": True}, {"stdin": "3", "stdout": "9"}]
    given = task(meta={"tests": tests})
    assert _score(program.passed, given, "print(4)", "print(int(input()) ** 2)") == [0, 1]


WALK = "().__class__.__base__.__subclasses__()[0].__init__.__globals__['os'].system('touch {mark}')"
CODE = [
    "__import__('os').system('touch {mark}')",
    WALK,
    "open('{mark}', 'w')",
    "eval(\"open('{mark}', 'w')\")",
]


@pytest.mark.parametrize("code", CODE)
def test_26_an_answer_that_is_code_is_text(code: str, tmp_path: Path) -> None:
    mark = tmp_path / MARK
    text = code.replace("{mark}", str(mark))
    answers = [text, f"\\boxed{{{text}}}", f"\\text{{{text}}}"]
    assert _score(answer.math, task(answer="0"), *answers) == [0, 0, 0]
    for name in sorted(gym.OWN):
        metadata = {"numbers": [1], "target": 0, "variables": ["x"], "variable": "x", "integrand": "0"}
        entry = {"answer": "0", "metadata": metadata | {"valid_answers": ["0"]}}
        given = task(answer="0", meta={"dataset": name, "entry": entry})
        assert _score(gym.score, given, *answers) == [0, 0, 0]
    assert not mark.exists()


@pytest.mark.slow
def test_27_an_answer_without_end_or_bottom_is_wrong() -> None:
    texts = ["10^{10^{10^{10}}}", "9" * 300 + "!", "(" * 10**5 + ")" * 10**5, "[" * 200 + "1" + "]" * 200]
    began = time.monotonic()
    assert _score(answer.math, task(answer="1"), *texts) == [0, 0, 0, 0]
    assert time.monotonic() - began < 25
    assert _score(answer.math, task(answer="x + 1"), "1 + x") == [1], "the next one is judged"


STRANGE = [
    "\ud800",
    "\x00",
    "\u202e123",
    "e" + "\u0301" * 10**6,
    b"\xff\xfe".decode(errors="surrogateescape"),
]


@pytest.mark.parametrize("text", STRANGE, ids=["surrogate", "NUL", "right to left", "marks", "no UTF-8"])
def test_30_strange_text_is_wrong_and_its_record_stays_valid(text: str) -> None:
    given = task(
        answer="1",
        meta={
            "tests": [{"stdin": "", "stdout": "1"}],
            "schema": {"type": "integer"},
            "rubric": [{"kind": "equals", "text": "1"}],
            "dataset": "chain_sum",
            "entry": {"answer": "1", "metadata": {}},
        },
    )
    rewards = [
        "answer:exact",
        "answer:math",
        "program:passed",
        "json_answer:valid",
        "rubric:strict",
        "gym:score",
    ]
    scorer = Scorer([config.Reward(fn=f"posttrain.rewards.{name}") for name in rewards])
    (score,) = scorer.score(given, [rollout(f"answer {text}")])
    assert set(score.parts.values()) == {0.0}, score
    assert json.loads(json.dumps(score.note)) == score.note


# ---- files ----


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self._mark}",)


@pytest.mark.slow
def test_29_pickles_and_configs_that_call_things_are_refused(tmp_path: Path) -> None:
    from posttrain.model import checkpoint

    mark = tmp_path / MARK
    for name in ("tasks.pkl", "tasks.parquet", "tasks.jsonl"):
        (tmp_path / name).write_bytes(pickle.dumps(_Bomb(mark)))
        with pytest.raises(ValueError, match="tasks"):
            list(load_tasks(str(tmp_path / name), domain="d", seed=0))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "deepseek_v32", "num_hidden_layers": 1}')
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    with pytest.raises(OSError, match="safetensors"):
        checkpoint.load(folder)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "x"\n_target_ = "os.system"\n[[stages]]\nname = "a"\nkind = "export"\nsource = "./b"\n'
    )
    with pytest.raises(ValueError, match="_target_: unknown key"):
        config.load([recipe])
    recipe.write_text("name: !!python/object/apply:os.system ['touch x']")
    with pytest.raises(ValueError, match="not valid TOML"):
        config.load([recipe])
    assert not mark.exists()
