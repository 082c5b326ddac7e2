"""Seconds per step and peak memory against TRL's GRPOTrainer: same checkpoint, prompts and amount of work.

    python benchmarks/vs_trl.py                                                # on a CPU; TRL gets its own environment in .bench/
    python benchmarks/vs_trl.py --size gpu --trl-python python --json out.json    # on one GPU, TRL in the same environment
    python benchmarks/vs_trl.py --size gpu --tiny --steps 1                       # tries the lines of the GPU's size on a CPU

Processes of the sides alternate, so that other load on the machine meets all. On a GPU several of TRL's ways to generate
are tried (--sides); one that fails or takes more than --timeout is told, and the others go on. Next: README.md, trl_sizes.py, worker.py.

Wall time on a CPU means something on a quiet machine only: "others" is the CPU share that other processes took, and
a figure with more than QUIET of it is marked.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from trl_sizes import SIDES, SIZES, TINY_ARCH, Side, Size

# isort: split
import worker  # takes this folder off the path

from posttrain import process
from posttrain.toy import sorting

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
TRL = "trl==1.16.0"
QUIET = 0.1
"""Most CPU that other processes may take, as a share of the machine."""
Result = dict[str, Any]


def main() -> None:
    """Install, run, print."""
    args = _parser().parse_args()
    size = _size(args)
    if args.trl_python is None and any(SIDES[name].is_trl for name in size.sides):
        args.trl_python, args.own_trl = _trl_python(), True
    checkpoint, num_parameters = _checkpoint(size)
    told = [
        f"{num_parameters / 1e6:.2f} M parameters, {size.tasks_per_step} prompts x {size.group_size} completions of up to",
        f"{size.new_tokens} tokens per step, micro-batches of {size.micro_batch} for TRL, {size.device};",
        f"{args.rounds} rounds of {args.steps} steps, {args.threads} threads",
    ]
    report: dict[str, Any] = {"parameters": num_parameters, "rounds": args.rounds, "threads": args.threads}
    report |= {
        "size": asdict(size),
        "trl_dtype": args.trl_dtype,
        "recompute": args.recompute,
        "gpu": _gpu("name") if size.device == "cuda" else None,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "versions": {},
    }
    print(" ".join(told), report["gpu"] or "", flush=True)
    for eos in ("off", "on") if args.eos == "both" else (args.eos,):
        _compare(size, checkpoint, args, report, eos=eos)
        print(f"\nEOS {eos}\n{_table(report[f'eos_{eos}'])}", flush=True)
    print("\n" + "; ".join(f"{side}: {v}" for side, v in report["versions"].items()))


def _compare(
    size: Size, checkpoint: Path, args: argparse.Namespace, report: dict[str, Any], *, eos: str
) -> None:
    """Run all sides by turns; what is known is in the report, and in its file, after every process."""
    results: dict[str, list[Result]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in (name for name in size.sides if name not in failed):
            spec = _spec(size, SIDES[name], checkpoint, args, stop_at_eos=eos == "on")
            found = _run(name, spec, args)
            if isinstance(found, str):
                failed[name] = found
            else:
                results.setdefault(name, []).append(found)
                report["versions"][name] = found["versions"]
            if args.rounds == 1:  # of several, figures need equally many of each side
                report |= {f"eos_{eos}": _figures(results), f"failed_eos_{eos}": failed}
                _save(report, args)
    _check_equal_prompts(results)
    results = {name: runs for name, runs in results.items() if name not in failed}
    report |= {f"eos_{eos}": _figures(results), f"failed_eos_{eos}": failed}
    _save(report, args)


def _save(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", choices=SIZES, default="cpu")
    options.add_argument("--tiny", action="store_true", help="the same sides on a CPU, for seconds")
    options.add_argument("--sides", nargs="+", choices=SIDES, help="which to measure, in this order")
    options.add_argument("--prompts", type=int, help="of a step, instead of the size's")
    options.add_argument("--micro-batch", type=int, help="completions, instead of the size's")
    options.add_argument("--rounds", type=int, help="processes of each side (cpu: 3, gpu: 1)")
    options.add_argument("--steps", type=int, help="measured steps of a process (cpu: 8, gpu: 1)")
    options.add_argument("--threads", type=int, default=2, help="torch threads of each process")
    options.add_argument("--eos", choices=("off", "on", "both"), help="cpu: both, gpu: off")
    options.add_argument("--timeout", type=int, default=3600, help="seconds of one process")
    options.add_argument(
        "--trl-python", help="an interpreter that has TRL; by default an environment is made"
    )
    options.set_defaults(own_trl=False)
    options.add_argument(
        "--trl-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of TRL's weights; float32 is its default, bfloat16 rounds small updates away",
    )
    options.add_argument(
        "--recompute",
        action="store_true",
        help="gradient checkpointing on both sides: TRL's default, which saves memory for time",
    )
    options.add_argument(
        "--huge-pages", action="store_true", help="let TRL have huge pages too, as our actors do"
    )
    options.add_argument("--json", type=Path, help="write all figures here")
    return options


def _size(args: argparse.Namespace) -> Size:
    """What is measured; also fills in what the arguments leave to it."""
    size, on_cpu = SIZES[args.size], args.size == "cpu"
    if args.tiny:
        size = replace(
            size, arch=TINY_ARCH, prompt=min(size.prompt, 14), tasks_per_step=2, group_size=4, new_tokens=8,
            micro_batch=4, device="cpu", dtype="float32",
        )  # fmt: skip
    if args.rounds is None:
        args.rounds = 3 if on_cpu else 1
    if args.steps is None:
        args.steps = 8 if on_cpu else 1
    if args.eos is None:
        args.eos = "both" if on_cpu else "off"
    return replace(
        size,
        sides=tuple(args.sides or size.sides),
        tasks_per_step=args.prompts or size.tasks_per_step,
        micro_batch=args.micro_batch or size.micro_batch,
    )


def _trl_python() -> str:
    """The interpreter of TRL's environment, which is made if it is missing or of another version."""
    venv, constraints = BENCH / "trl", ROOT / "constraints.txt"
    python, mark = venv / "bin" / "python", venv / "installed.txt"
    wanted = f"{TRL}\n{constraints.read_text()}"
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    print(f"installing {TRL} into {venv} (1.5 GB, a few minutes)", flush=True)
    if venv.exists():
        shutil.rmtree(venv)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--upgrade", "pip>=24.1"], check=True)
    torch = next(s for s in constraints.read_text().split() if s.startswith("torch=="))
    # As in .ci/install: the usual index may hold the CUDA build; the metadata tells.
    look = [*pip, "install", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", torch]
    if re.search(r'"(nvidia|cuda)-', subprocess.check_output(look, text=True)):
        index = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
        subprocess.run([*pip, "install", "--no-deps", torch, "--index-url", index], check=True)
    subprocess.run([*pip, "install", "-c", str(constraints), torch, TRL, "transformers"], check=True)
    installed = subprocess.check_output([*pip, "list", "--format=freeze"], text=True)
    if found := re.findall(r"(?m)^(?:nvidia|cuda)-.*$", installed):
        raise ValueError(f"{venv}: CUDA packages were installed ({found[0]}, ...); set TORCH_CPU_INDEX")
    mark.write_text(wanted)
    return str(python)


def _checkpoint(size: Size) -> tuple[Path, int]:
    """A fresh random checkpoint in the size's type with the toy tokenizer, and its number of parameters."""
    import torch  # heavy, and --help needs none of it

    from posttrain.model import checkpoint
    from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
    from posttrain.toy import tokenizer

    path = BENCH / "checkpoint"
    words = tokenizer.build()
    torch.manual_seed(0)
    fields = {"vocab_size": len(words), "bos_token_id": None} | dict(size.arch)
    fields |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**fields))
    checkpoint.save(model.to(getattr(torch, size.dtype)), path, words)
    return path, sum(p.numel() for p in model.parameters())


def _spec(
    size: Size, side: Side, checkpoint: Path, args: argparse.Namespace, *, stop_at_eos: bool
) -> worker.Spec:
    warmup_steps = 1
    prompts = _prompts(size, (warmup_steps + args.steps) * size.tasks_per_step)
    # With the two tokens of the template. A sorting task has 12 at most.
    longest = (size.prompt or 12) + 2 + size.new_tokens
    on_cpu = args.size == "cpu"
    return worker.Spec(
        checkpoint=str(checkpoint),
        prompts=prompts,
        tasks_per_step=size.tasks_per_step,
        group_size=size.group_size,
        new_tokens=size.new_tokens,
        stop_at_eos=stop_at_eos,
        warmup_steps=warmup_steps,
        steps=args.steps,
        threads=args.threads,
        lr=1e-5,
        betas=(0.9, 0.95),
        clip=0.2,
        seed=0,
        device=size.device,
        dtype=args.trl_dtype if side.is_trl else size.dtype,
        rollouts=side.rollouts,
        micro_batch=size.micro_batch,
        tokens_per_batch=4096 if on_cpu else size.micro_batch * longest,  # on a CPU our default
        recompute=args.recompute,
        max_rows=256 if on_cpu else size.tasks_per_step * size.group_size,
        longest=longest,
    )


def _prompts(size: Size, num: int) -> list[str]:
    if not size.prompt:
        return [task.question for task in sorting.tasks(seed=0, n=num)]
    rng = random.Random(0)
    return [" ".join(rng.choices(sorting.LETTERS, k=size.prompt)) for _ in range(num)]


def _run(name: str, spec: worker.Spec, args: argparse.Namespace) -> Result | str:
    """One process from its start to its end; the reason if it failed on a GPU."""
    given, out = BENCH / "spec.json", BENCH / "result.json"
    given.write_text(json.dumps(asdict(spec)))
    out.unlink(missing_ok=True)
    side = SIDES[name]
    python = args.trl_python if side.is_trl else sys.executable
    script = ROOT / "benchmarks" / side.script
    threads = str(spec.threads)
    env = os.environ | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if side.is_trl and args.own_trl:
        env.pop("PYTHONPATH", None)  # nothing of ours in the other environment
    if args.huge_pages or not side.is_trl:
        env = process.ENVIRONMENT | env
    busy, began = _busy_s() - _children_s(), time.monotonic()
    with GpuMemory(on=spec.device == "cuda") as gpu:
        try:
            done = subprocess.run(
                [python, str(script), str(given), str(out)],
                env=env,
                capture_output=True,
                text=True,
                timeout=args.timeout,
            )
        except subprocess.TimeoutExpired:
            return _failed(name, f"not done in {args.timeout} s")
    others = (_busy_s() - _children_s() - busy) / (time.monotonic() - began) / (os.cpu_count() or 1)
    if done.returncode:
        text = f"{script.name} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if args.size == "cpu":
            raise RuntimeError(f"{name}: {text}")
        return _failed(name, text)
    result: Result = json.loads(out.read_text())
    seconds = statistics.median(step["total"] for step in result["steps"])
    # Ray's processes are not our children: their time cannot be told from that of others.
    behind_ray = name in ("ours-ray", "ours-vllm")
    result["others"] = None if behind_ray else others
    result["gpu_bytes"] = gpu.bytes
    told = "" if behind_ray else f", others took {others:.0%} of the CPU"
    print(f"  {name}: {seconds:.3f} s/step{told}", flush=True)
    return result


def _failed(name: str, why: str) -> str:
    print(f"  {name}: FAILED: {' '.join(why.splitlines()[-1:])[:300]}", flush=True)
    return why


class GpuMemory:
    """Most memory in use on the first GPU, all processes, above what was in use before; 0 without one.

    Asked for five times a second: what a caching allocator has taken it keeps.
    """

    def __init__(self, *, on: bool) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(_gpu("memory.used"),)) if on else None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, before: str) -> None:
        while not self._ended.wait(0.2):
            self.bytes = max(self.bytes, (int(_gpu("memory.used")) - int(before)) << 20)


def _gpu(what: str) -> str:
    """A property of the first GPU; memory in MiB."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.check_output(command, text=True).strip()


def _busy_s() -> float:
    """CPU seconds that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    """CPU seconds of the processes that we have started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _check_equal_prompts(results: dict[str, list[Result]]) -> None:
    seen = {
        tuple(tuple(step["prompts"] for step in run["steps"]) for run in runs) for runs in results.values()
    }
    assert len(seen) <= 1, "the sides did not see the same prompt tokens"


def _figures(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Medians over all measured steps of each side; ratios are the fastest TRL's figure over the side's."""
    figures = {side: _side_figures(runs) for side, runs in results.items()}
    trl = [side for side in results if SIDES[side].is_trl]
    if not trl:
        return figures
    best = min(trl, key=lambda side: figures[side]["s_per_step"])
    for row in figures.values():
        rounds = zip(figures[best]["s_per_step_rounds"], row["s_per_step_rounds"], strict=True)
        row["times_faster"] = figures[best]["s_per_step"] / row["s_per_step"]
        row["times_faster_rounds"] = [theirs / ours for theirs, ours in rounds]
        row["memory_of_trl"] = row["peak_mib"] / min(figures[side]["peak_mib"] for side in trl)
    return figures


def _side_figures(runs: Sequence[Result]) -> dict[str, Any]:
    steps = [step for run in runs for step in run["steps"]]
    seconds = sum(s["total"] for s in steps)
    generate, score = (sum(s[part] for s in steps) / seconds for part in ("generate", "score"))
    tokens = sum(sum(s["lengths"]) for s in steps) / len(steps)
    peak = statistics.median(run["gpu_bytes"] or run["peak_bytes"] for run in runs)
    allocated = [run["allocated_bytes"] for run in runs if run["allocated_bytes"]]
    alone = all(run["others"] is not None for run in runs)
    return {
        "s_per_step": statistics.median(s["total"] for s in steps),
        "s_per_step_rounds": [statistics.median(s["total"] for s in run["steps"]) for run in runs],
        "shares": {"generate": generate, "score": score, "train": 1 - generate - score},
        "tokens_per_step": tokens,
        "cpu_s_per_step": statistics.median(s["cpu"] for s in steps) if alone else None,
        "others": max(run["others"] for run in runs) if alone else None,
        "ms_per_token": 1000 * seconds / len(steps) / tokens,
        "peak_mib": peak / 2**20,
        "allocated_mib": statistics.median(allocated) / 2**20 if allocated else None,
        "warmup_s": [run["warmup"] for run in runs],
        "steps": steps,
    }


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"{'':17s}s/step  times faster (rounds)  CPU s/step  generate  score  train  tokens/step  "
        "ms/token  peak MiB  allocated  others"
    ]
    for side, row in figures.items():
        shares = row["shares"]
        faster = ""
        if "times_faster" in row:
            rounds = row["times_faster_rounds"]
            faster = f"{row['times_faster']:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"
        cpu = "" if row["cpu_s_per_step"] is None else f"{row['cpu_s_per_step']:.3f}"
        others = "" if row["others"] is None else f"{row['others']:.0%}"
        allocated = "" if row["allocated_mib"] is None else f"{row['allocated_mib']:.0f}"
        lines.append(
            f"{side:16s}{row['s_per_step']:7.3f}  {faster:>21s}  {cpu:>10s}  "
            f"{shares['generate']:8.0%}  {shares['score']:5.0%}  {shares['train']:5.0%}  "
            f"{row['tokens_per_step']:11.0f}  {row['ms_per_token']:8.3f}  {row['peak_mib']:8.0f}  "
            f"{allocated:>9s}  {others:>6s}"
        )
    if any((row["others"] or 0) > QUIET for row in figures.values()):
        lines.append(f"NOT QUIET: other processes took more than {QUIET:.0%} of the CPU; do not publish")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
