"""The demo's mixed stage, killed and resumed, against the same stage undisturbed: equal bits, or not.

    python benchmarks/resume_kills.py --out results.json                 # on a GPU
    python benchmarks/resume_kills.py --out results.json --tiny          # on two CPU cores, a few minutes

Everything is the product's own: driver, Ray, learner and rollout actors, judge, snapshots. A base is trained once and copied
for every run. Five drivers are killed (SIGKILL, from outside) at different moments of the stage and started again; the
control is one of those killed runs, resumed with the random numbers of the task order forgotten. With cluster.deterministic
weights, optimizer and rollouts of all but the control must have the sha256 of the run that nobody killed.

Left out: the specialists and their distillation, so that the mixed stage starts from the sparse base; kills inside the
writing of a snapshot, which tests/test_snapshots.py has.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from posttrain import config, mixture, pipeline
from posttrain.store import file_hash

ROOT = Path(__file__).resolve().parents[1]
KILLS = ((1, 0.3), (4, 0.8), (8, 0.5), (11, 0.1), (14, 0.6))
"""Steps of 16 that the driver has logged before it is killed, and for how much of one more it then may go on."""
STEPS, EVERY = 16, 3
"""Of the mixed stage, and how often it takes a snapshot."""
CONTROL = 2
"""The kill that is also resumed without its random numbers."""
LENGTHS = {"judge": 60, "pretrain": 300, "warmup": 20, "sparse": 30, "mixed": STEPS}
"""Steps of the stages that are kept of the recipe."""
WAIT_S = 600
"""Longest wait for one process."""


@dataclass(frozen=True, kw_only=True)
class End:
    """What a run is compared by, and how it came there."""

    name: str
    killed_after: int | None
    """Steps that were logged before the kill."""
    first_step: int
    """Of the process that finished the stage."""
    seconds: float
    state: str
    """sha256 of all that trained and its optimizer."""
    weights: str
    """sha256 of the checkpoint."""
    rollouts: tuple[str, ...]
    """sha256 of each step's rollouts."""
    backends: Any
    """Kernels of learner and engine."""


def main() -> None:
    """Run all, print a line for each, fail if the bits are not as they must be."""
    args = _parser().parse_args()
    if args.child:
        _child(args)
        return
    shutil.rmtree(args.runs, ignore_errors=True)
    args.runs.mkdir(parents=True)
    began = time.monotonic()
    _ended(_start(args, "base", "--until", "sparse"), args, "base")
    base = file_hash(args.runs / "base" / "sparse" / "model.safetensors")
    print(f"base: {time.monotonic() - began:.0f} s, weights {base[:12]}", flush=True)
    with ThreadPoolExecutor(args.parallel) as pool:
        unkilled = pool.submit(_unkilled, args)
        parts = [pool.submit(_killed, args, number) for number in range(len(KILLS))]
        ends = [end for part in parts for end in part.result()]
        first = unkilled.result()
    wrong = _wrong(first, ends, base)
    found = {"seconds": time.monotonic() - began, "device": args.device, "base": base, "wrong": wrong}
    found |= {"unkilled": asdict(first), "others": [asdict(end) for end in ends]}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(wrong) or "5 of 5 killed runs have the bits of the unkilled one, and the control has not")
    print(f"{found['seconds']:.0f} s together; {first.backends}")
    sys.exit(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--runs", type=Path, default=Path("runs/resume-kills"), help="emptied first")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--parallel", type=int, default=4, help="runs at a time")
    options.add_argument("--tiny", action="store_true", help="fewer steps before, smaller ones in the stage")
    options.add_argument("--child", help="the run that one driver runs")
    options.add_argument("--until", default="mixed", help="the last stage of that driver")
    options.add_argument("--forget-rng", action="store_true")
    return options


def _recipe(args: argparse.Namespace) -> config.Run:
    """configs/demo.toml without the specialists; how often snapshots are taken is the one change of the mixed stage's
    settings that is not its length."""
    data = tomllib.loads((ROOT / "configs" / "demo.toml").read_text())
    lengths = LENGTHS | ({"judge": 12, "pretrain": 60, "warmup": 6, "sparse": 8} if args.tiny else {})
    stages = [s for s in data["stages"] if s["name"] in {*LENGTHS, "convert"}]
    for stage in stages:
        stage["evaluate"] = False
        if stage["name"] in lengths:
            stage["steps"] = lengths[stage["name"]]
        if stage["kind"] in ("warmup", "sparse"):
            stage["heldout_tokens"] = 2000
        if stage["name"] == "mixed":
            stage |= {"source": "sparse", "tasks_per_step": 8 if args.tiny else 24}
    data |= {"stages": stages, "name": args.child, "out": str(args.runs)}
    data["snapshots"] = {"every_steps": EVERY}
    data["cluster"] = {"device": args.device, "deterministic": True, "threads": 1, "reward_workers": 2}
    return config.Run.model_validate(data)


def _child(args: argparse.Namespace) -> None:
    """One driver."""
    if args.forget_rng:
        restore, fresh = mixture._Epochs.restore, Random(0).getstate()
        mixture._Epochs.restore = lambda self, state: restore(self, {**state, "rng": fresh})  # type: ignore[method-assign]
    pipeline.run(_recipe(args), until=args.until)


def _start(args: argparse.Namespace, name: str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", name, "--out", str(args.out), "--runs", str(args.runs)]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else []), *more]
    with (args.runs / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def _ended(driver: subprocess.Popen[bytes], args: argparse.Namespace, name: str) -> None:
    if driver.wait(WAIT_S):
        log = (args.runs / f"{name}.log").read_text(errors="replace")
        raise RuntimeError(f"{name}: the driver ended with {driver.returncode}\n{log[-3000:]}")


def _unkilled(args: argparse.Namespace) -> End:
    shutil.copytree(args.runs / "base", args.runs / "unkilled")
    return _finish(args, "unkilled")


def _killed(args: argparse.Namespace, number: int) -> list[End]:
    """Kill a run and resume it; the control is resumed from a copy."""
    name, (steps, part) = f"killed-{number + 1}", KILLS[number]
    shutil.copytree(args.runs / "base", args.runs / name)
    driver = _start(args, name)
    until, times = time.monotonic() + WAIT_S, []
    while len(times) < steps and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
        times = _times(args.runs / name)
    time.sleep(part * (times[-1] - times[-2] if len(times) > 1 else 1.0))
    os.kill(driver.pid, signal.SIGKILL)
    if driver.wait() != -signal.SIGKILL:
        _ended(driver, args, name)
        raise RuntimeError(f"{name}: it had ended before it could be killed")
    logged = len(_times(args.runs / name))
    if number == CONTROL:
        shutil.copytree(args.runs / name, args.runs / "control")
    ends = [_finish(args, name, killed_after=logged)]
    if number == CONTROL:
        ends.append(_finish(args, "control", "--forget-rng", killed_after=logged))
    return ends


def _times(run: Path) -> list[float]:
    """When each step of the mixed stage was logged; the last line may be half written."""
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [row["time"] for row in map(json.loads, rows) if row["stage"] == "mixed"]


def _finish(args: argparse.Namespace, name: str, *more: str, killed_after: int | None = None) -> End:
    """Run a stage to its end and read what it left."""
    began = time.monotonic()
    _ended(_start(args, name, *more), args, name)
    stage = args.runs / name / "mixed"
    summary = json.loads((stage / "summary.json").read_text())
    end = End(
        name=name,
        killed_after=killed_after,
        first_step=summary["first_step"],
        seconds=time.monotonic() - began,
        state=summary["figures"]["state_sha256"],
        weights=file_hash(stage / "model.safetensors"),
        rollouts=tuple(file_hash(file) for file in sorted((stage / "rollouts").iterdir())),
        backends=summary["backends"],
    )
    killed = (
        ""
        if killed_after is None
        else f"killed after {killed_after} steps, went on at step {end.first_step}, "
    )
    print(
        f"{name:10s} {killed}state {end.state[:12]} weights {end.weights[:12]}, {end.seconds:.0f} s",
        flush=True,
    )
    return end


def _wrong(first: End, ends: Sequence[End], base: str) -> list[str]:
    """What is not as it must be."""
    found = ["the stage moved nothing"] if first.weights == base else []
    found += ["not every step has its rollouts"] if len(first.rollouts) != STEPS else []
    for end in ends:
        same = [getattr(end, field) == getattr(first, field) for field in ("state", "weights", "rollouts")]
        if end.name == "control" and any(same):
            found.append("the control has bits of the unkilled run: this comparison shows nothing")
        if end.name != "control" and not all(same):
            found.append(f"{end.name} differs from the unkilled run (state, weights, rollouts equal: {same})")
    if len({end.killed_after for end in ends}) < len(KILLS):
        found.append("two runs were killed at the same step")
    return found


if __name__ == "__main__":
    main()
