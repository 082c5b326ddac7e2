"""Every kernel compiles for sm_90 at the sizes of real models, fits its shared memory and hardly spills.

No GPU is needed: launches.py lists the launches, compile_worker.py compiles them. Twice: with the Triton of
constraints.txt and with the one that GPU machines with torch 2.11 have, installed by `make test-full`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OTHER = ROOT / ".triton36"
"""Where the Makefile installs the other Triton."""
SHARED_BYTES = 232_448
"""What a thread block may have on an H100 or H200."""


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, OTHER], ids=["locked", "3.6.0"])
def test_every_launch_fits_the_gpu(path: Path | None) -> None:
    rows = _compile(path)
    assert len({row["row"] for row in rows}) > 8
    assert all(row["triton"] == "3.6.0" for row in rows) == (path is OTHER)
    problems = [
        f"{row['row']}: {row['kernel']}: {row['shared']} bytes shared, {row['spill']} spilled "
        f"({row['allowed']} allowed), {row['registers']} registers"
        for row in rows
        if row["shared"] > SHARED_BYTES or row["spill"] > row["allowed"]
    ]
    problems += [
        f"{row['row']}: {row['kernel']} is compiled anew for other sizes" for row in rows if row["too_often"]
    ]
    assert not problems, "\n".join(problems)


def _compile(path: Path | None) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if path is not None:
        if not (path / "triton").is_dir():
            pytest.fail(f"{path} holds no triton: make {path.name}/.installed")
        paths.insert(0, str(path))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/compile_worker.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
