"""The rules of the layout: who may import whom, and what every file looks like."""

import ast
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rollouts", "rewards", "model", "kernels")
LONGER = {"posttrain.config": 600}
"""Every knob of the system, with its meaning and source, is in one module."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    full = parts if parts[0] == "posttrain" else ("posttrain", *parts)
    return ".".join(full).removesuffix(".__init__")


def _sources() -> dict[str, Path]:
    own = [p for p in (ROOT / "posttrain").glob("**/*.py") if p.relative_to(ROOT).parts[1] not in FOLDERS]
    return {_name(p): p for p in [*own, *(p for f in FOLDERS for p in (ROOT / f).glob("**/*.py"))]}


SOURCES = _sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def _imports(name: str, *, top_only: bool) -> set[str]:
    """Modules imported by a module; with top_only those inside functions and TYPE_CHECKING are left out."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                assert node.module
                assert all(alias.name != "*" for alias in node.names), f"{name}: star import"
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                for field in ("body", "orelse", "finalbody"):
                    visit(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(TREES[name].body)
    return found


def _reachable(name: str) -> set[str]:
    """Every module that importing `name` imports, our own followed."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for target in _imports(waiting.pop(), top_only=True):
            if target not in seen:
                seen.add(target)
                if target in TREES:
                    waiting.append(target)
    return seen


def _uses(imports: set[str], package: str) -> bool:
    return any(target == package or target.startswith(f"{package}.") for target in imports)


LIGHT = ["posttrain.cli", "posttrain.check", "posttrain.config", "posttrain.schema", "posttrain.tasks"]
LIGHT += ["posttrain.preview", "posttrain.rollout_file", "posttrain.workbench"]
LIGHT += [name for name in SOURCES if name.startswith(("posttrain.envs.", "posttrain.rewards."))]


@pytest.mark.parametrize("name", LIGHT)
def test_check_config_and_rewards_import_no_torch(name: str) -> None:
    reachable = _reachable(name)
    for heavy in ("torch", "transformers", "ray", "datasets", "reasoning_gym", "math_verify"):
        assert not _uses(reachable, heavy), f"{name} imports {heavy}"


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if n.startswith(("posttrain.model.", "posttrain.kernels."))]
)
def test_model_and_kernels_know_neither_config_nor_ray(name: str) -> None:
    imports = _imports(name, top_only=False)
    for foreign in ("ray", "posttrain.config", "posttrain.stages", "posttrain.rollouts", "posttrain.rewards"):
        assert not _uses(imports, foreign), f"{name} imports {foreign}"
    if name.startswith("posttrain.kernels"):
        assert not _uses(imports, "transformers")
        assert not _uses(imports, "posttrain.model")


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("posttrain.rewards.")])
def test_rewards_know_config_and_schema_only(name: str) -> None:
    ours = {t for t in _imports(name, top_only=False) if t.startswith("posttrain.")}
    allowed = ("posttrain.rewards", "posttrain.config", "posttrain.schema")
    assert all(target.startswith(allowed) for target in ours), ours


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("posttrain.rollouts.")])
def test_rollouts_know_no_environment_in_particular(name: str) -> None:
    assert not _uses(_imports(name, top_only=False), "posttrain.envs")


@pytest.mark.parametrize("name", list(SOURCES))
def test_ray_vllm_and_stages_stay_in_their_places(name: str) -> None:
    imports = _imports(name, top_only=False)
    if name not in ("posttrain.cluster", "posttrain.rollouts.pool"):
        assert not _uses(imports, "ray")
    if not name.startswith("posttrain.rollouts.vllm"):
        assert not _uses(imports, "vllm")
    if name != "posttrain.pipeline" and not name.startswith(("posttrain.stages", "posttrain.cli")):
        assert not _uses(imports, "posttrain.stages"), "stages are the pipeline's"


def test_the_four_folders_are_linked_and_hold_no_init() -> None:
    for folder in FOLDERS:
        link = ROOT / "posttrain" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", list(SOURCES))
def test_files_and_functions_keep_their_size(name: str) -> None:
    text = SOURCES[name].read_text()
    assert len(text.splitlines()) <= LONGER.get(name, 450), "a file holds one noun"
    assert ast.get_docstring(TREES[name]), "say what the module is"
    assert text.isascii()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit a screen"


def test_every_folder_with_code_is_packaged_once() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = table["packages"]
    folders = {name.rpartition(".")[0] for name in SOURCES if SOURCES[name].name != "__init__.py"}
    assert set(packages) == folders | {"posttrain.stages", "posttrain.toy", "posttrain"}
    assert len(packages) == len(set(packages))
    assert table["package-dir"] == {"posttrain": "posttrain", **{f"posttrain.{f}": f for f in FOLDERS}}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_constraints_pin_exact_versions_without_addresses(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), pins
    assert not any(pin.lower().startswith(("nvidia-", "cuda-")) for pin in pins)


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, posttrain.cli, posttrain.config, posttrain.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_check_of_a_config_answers_within_a_second() -> None:
    command = [sys.executable, "-m", "posttrain", "check", "configs/v32.toml", "--config-only"]
    fastest = float("inf")
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1.0
