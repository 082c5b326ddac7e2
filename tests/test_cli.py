"""The command line: exit codes, one line per mistake, nothing half-written, answers at once."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import LlamaConfig

ROOT = Path(__file__).parents[1]


def _posttrain(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def _mistake(done: subprocess.CompletedProcess[str], message: str, code: int = 2) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert message in errors[0]


def _recipe(tmp_path: Path, stages: str, *, tasks: str = "tasks.jsonl", fn: str = "answer:exact") -> Path:
    rows = [{"question": f"question {i}", "answer": str(i)} for i in range(60)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fn = fn if "." in fn else f"posttrain.rewards.{fn}"
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "r"\n[[domains]]\nname = "d"\ntasks = "{tmp_path / tasks}"\nnum_eval = 1\n'
        f'rewards = [{{ fn = "{fn}" }}]\n{stages}'
    )
    return path


def _convert(source: Path, more: str = "") -> str:
    return f'[[stages]]\nname = "convert"\nkind = "convert"\nsource = "{source}"\nindex_topk = 4\n{more}'


RL = """[[stages]]
name = "rl"
kind = "rl"
source = "convert"
steps = 1
mix = { d = {} }
optimizer = { lr = 1e-4 }
"""


def test_check_shows_the_stages_and_calls_the_rewards() -> None:
    done = _posttrain("check", "configs/demo.toml")
    assert done.returncode == 0, done.stderr
    assert "the recipe is valid" in done.stdout and "posttrain.rewards.gym:score" in done.stdout
    report = json.loads(_posttrain("check", "configs/demo.toml", "--json").stdout)
    assert report["config"]["name"] == "demo"
    (judge,) = [line for line in report["rewards"] if line["asks"]]
    assert judge["fn"] == "posttrain.rewards.judge:rubric" and judge["asks"] == ["judge"]
    assert {r["domain"] for r in report["rewards"]} == {"math", "logic", "agent", "align"}
    assert all(r["empty"] == 0 for r in report["rewards"] if r is not judge)


def test_check_answers_at_once() -> None:
    """Measured on two idle cores: 0.35 s and 1.4 s."""
    for words, limit in ((["--config-only"], 1.0), ([], 4.0)):
        times = []
        for _ in range(3):
            began = time.monotonic()
            assert _posttrain("check", "configs/demo.toml", *words).returncode == 0
            times.append(time.monotonic() - began)
        assert min(times) < limit, (words, times)


def test_unknown_key(tmp_path: Path) -> None:
    done = _posttrain("run", "configs/demo.toml", "--out", tmp_path / "runs", "--set", "stages.sft.stepps=3")
    _mistake(done, "stages.sft.stepps: unknown key")
    assert not (tmp_path / "runs").exists()


def test_bounds(tmp_path: Path) -> None:
    for setting, message in (
        ("stages.convert.index_topk=0", "index_topk"),
        ("stages.mixed.group_size=1", "group_size"),
    ):
        done = _posttrain("run", "configs/demo.toml", "--out", tmp_path / "runs", "--set", setting)
        _mistake(done, message)
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_does_not_load(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense"), fn="no_such_package.rewards:f")
    tiny.dense_checkpoint(tmp_path / "dense")
    _mistake(_posttrain("check", recipe), "reward 'no_such_package.rewards:f' does not load")
    _mistake(_posttrain("check", _recipe(tmp_path, _convert(tmp_path / "dense"), fn="answer:nope")), "'nope'")


def test_rewards_beside_the_recipe_load(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from posttrain.rewards.base import per_rollout\n"
        "@per_rollout\ndef short(task, rollout):\n    return 1.0 - len(rollout.text) / 100\n"
    )
    tiny.dense_checkpoint(tmp_path / "dense")
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense"), fn="mine.short")
    recipe.write_text(recipe.read_text().replace("mine.short", "mine:short"))
    done = _posttrain("check", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_reward_that_raises(tmp_path: Path) -> None:
    tiny.dense_checkpoint(tmp_path / "dense")
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense"), fn="rubric:strict")
    _mistake(_posttrain("check", recipe), "has no rubric")


def test_a_broken_line_of_a_task_file(tmp_path: Path) -> None:
    tiny.dense_checkpoint(tmp_path / "dense")
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense") + RL)
    with (tmp_path / "tasks.jsonl").open("a") as file:
        file.write("{broken\n")
    done = _posttrain("run", recipe, "--out", tmp_path / "runs")
    assert done.returncode in (1, 2)
    assert "tasks.jsonl:61: not valid JSON" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "r" / "rl").exists()


def test_an_empty_domain(tmp_path: Path) -> None:
    tiny.dense_checkpoint(tmp_path / "dense")
    (tmp_path / "empty.jsonl").write_text("")
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense"), tasks="empty.jsonl")
    _mistake(_posttrain("check", recipe), "has no task")


@pytest.mark.parametrize("source", ["llama", "missing"])
def test_a_source_that_is_no_mla_checkpoint(tmp_path: Path, source: str) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    recipe = _recipe(tmp_path, _convert(tmp_path / source))
    done = _posttrain("run", recipe, "--out", tmp_path / "runs")
    message = "is not MLA" if source == "llama" else "no such file or folder"
    _mistake(done, message, code=1 if source == "llama" else 2)
    assert not (tmp_path / "runs" / "r" / "convert").exists()
    assert not list((tmp_path / "runs").glob("r/.partial*"))


def test_no_disk_space(tmp_path: Path) -> None:
    """A full disk by a limit on file sizes: every write beyond 64 KiB fails."""
    tiny.dense_checkpoint(tmp_path / "dense")
    recipe = _recipe(tmp_path, _convert(tmp_path / "dense"))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        f"from posttrain.cli import main; sys.exit(main(['run', {str(recipe)!r}, '--out', {str(tmp_path / 'runs')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    _mistake(done, "no disk space", code=1)
    assert not (tmp_path / "runs" / "r" / "convert").exists()
    assert not list((tmp_path / "runs").glob("r/.partial*"))


def test_conversion_alone_needs_no_cluster(tmp_path: Path) -> None:
    tiny.dense_checkpoint(tmp_path / "dense")
    done = _posttrain("run", _recipe(tmp_path, _convert(tmp_path / "dense")), "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/r/convert/model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "runs/r/report.json").read_text())["complete"]


def test_other_mistakes(tmp_path: Path) -> None:
    cases: list[tuple[list[Any], str]] = [
        (["run", "no.toml"], "cannot read config 'no.toml'"),
        (["run", "configs/demo.toml", "--only", "nope"], "--only nope: no such stage"),
        (
            ["run", "configs/demo.toml", "--only", "sft", "--out", tmp_path],
            "its source 'sparse' is not complete",
        ),
        (["status", tmp_path], "no run there"),
        (["export", tmp_path / "x", tmp_path / "y"], "no checkpoint there"),
        (["export", tiny.sparse_checkpoint(tmp_path / "ckpt"), tmp_path / "ckpt"], "not an empty folder"),
    ]
    for words, message in cases:
        _mistake(_posttrain(*words), message)
