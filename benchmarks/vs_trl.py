"""Seconds per step and peak memory against TRL's GRPOTrainer: same checkpoint, prompts and amount of work.

`python benchmarks/vs_trl.py`; processes of the two sides alternate, so that other load on the machine meets
both. TRL gets its own virtual environment in .bench/ on the first call. Next: README.md, worker.py.

Wall time means something on a quiet machine only: "others" is the CPU share that other processes took, and
a figure with more than QUIET of it is marked.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import worker

from posttrain import process
from posttrain.toy import sorting

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
TRL = "trl==1.16.0"
QUIET = 0.1
"""Most CPU that other processes may take, as a share of the machine."""
ARCH: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 576,
    "moe_intermediate_size": 192,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
}
"""About 4.0 M parameters; experts and top-k as in configs/demo.toml."""

RAY = "ours, Ray"
Result = dict[str, Any]


def main() -> None:
    """Install, run, print."""
    args = _parser().parse_args()
    python = {"trl": _trl_python(), "ours": sys.executable, RAY: sys.executable}
    checkpoint, num_parameters = _checkpoint()
    sides = ["trl", "ours", RAY] if args.ray else ["trl", "ours"]
    print(
        f"{num_parameters / 1e6:.2f} M parameters, 32 completions of up to 64 tokens per step, fp32, "
        f"{args.threads} threads; {args.rounds} rounds of {args.steps} steps"
    )
    report: dict[str, Any] = {"parameters": num_parameters, "rounds": args.rounds, "threads": args.threads}
    report |= {"arch": ARCH, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset")}
    for eos in ("off", "on") if args.eos == "both" else (args.eos,):
        spec = _spec(checkpoint, stop_at_eos=eos == "on", steps=args.steps, threads=args.threads)
        results: dict[str, list[Result]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                results[side].append(_run(side, python[side], spec, huge_pages=args.huge_pages))
        _check_equal_prompts(results)
        report[f"eos_{eos}"] = figures = _figures(results)
        print(f"\nEOS {eos}\n{_table(figures)}", flush=True)
        report["versions"] = {side: runs[0]["versions"] for side, runs in results.items()}
    print("\n" + "; ".join(f"{side}: {v}" for side, v in report["versions"].items()))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3, help="processes of each side")
    options.add_argument("--steps", type=int, default=8, help="measured steps of a process")
    options.add_argument("--threads", type=int, default=2, help="torch threads of each process")
    options.add_argument("--eos", choices=("off", "on", "both"), default="both")
    options.add_argument("--ray", action="store_true", help="also measure our side behind Ray")
    options.add_argument(
        "--huge-pages", action="store_true", help="let TRL have huge pages too, as our actors do"
    )
    options.add_argument("--json", type=Path, help="write all figures here")
    return options


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


def _checkpoint() -> tuple[Path, int]:
    """A fresh random checkpoint with the toy tokenizer, and its number of parameters."""
    import torch  # heavy, and --help needs none of it

    from posttrain.model import checkpoint
    from posttrain.model.arch import DeepseekV32Config, DeepseekV32ForCausalLM
    from posttrain.toy import tokenizer

    path = BENCH / "checkpoint"
    words = tokenizer.build()
    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(
        DeepseekV32Config(
            **ARCH,
            vocab_size=len(words),
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    checkpoint.save(model, path, words)
    return path, sum(p.numel() for p in model.parameters())


def _spec(checkpoint: Path, *, stop_at_eos: bool, steps: int, threads: int) -> worker.Spec:
    warmup_steps, tasks_per_step = 1, 8
    tasks = sorting.tasks(seed=0, n=(warmup_steps + steps) * tasks_per_step)
    return worker.Spec(
        checkpoint=str(checkpoint),
        prompts=[task.question for task in tasks],
        tasks_per_step=tasks_per_step,
        group_size=4,
        new_tokens=64,
        stop_at_eos=stop_at_eos,
        warmup_steps=warmup_steps,
        steps=steps,
        threads=threads,
        lr=1e-5,
        betas=(0.9, 0.95),
        clip=0.2,
        seed=0,
    )


def _run(side: str, python: str, spec: worker.Spec, *, huge_pages: bool) -> Result:
    """One process from its start to its end."""
    given, out = BENCH / "spec.json", BENCH / "result.json"
    given.write_text(json.dumps(asdict(spec)))
    out.unlink(missing_ok=True)
    script = ROOT / "benchmarks" / ("trl_worker.py" if side == "trl" else "ours_worker.py")
    command = [python, str(script), str(given), str(out), *(["ray"] if side == RAY else [])]
    threads = str(spec.threads)
    env = os.environ | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if side == "trl":
        env.pop("PYTHONPATH", None)  # nothing of ours in the other environment
    if huge_pages or side != "trl":
        env = process.ENVIRONMENT | env
    busy, began = _busy_s() - _children_s(), time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    others = (_busy_s() - _children_s() - busy) / (time.monotonic() - began) / (os.cpu_count() or 1)
    if done.returncode:
        raise RuntimeError(f"{side}: {script.name} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: Result = json.loads(out.read_text())
    seconds = statistics.median(step["total"] for step in result["steps"])
    # Ray's processes are not our children: their time cannot be told from that of others.
    result["others"] = None if side == RAY else others
    told = "" if side == RAY else f", others took {others:.0%} of the CPU"
    print(f"  {side}: {seconds:.3f} s/step{told}", flush=True)
    return result


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
    assert len(seen) == 1, "the two sides did not see the same prompt tokens"


def _figures(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Medians over all measured steps of each side; ratios are TRL's figure over ours."""
    figures: dict[str, Any] = {}
    per_round = {
        side: [statistics.median(s["total"] for s in run["steps"]) for run in runs]
        for side, runs in results.items()
    }
    for side, runs in results.items():
        steps = [step for run in runs for step in run["steps"]]
        total = statistics.median(s["total"] for s in steps)
        seconds = sum(s["total"] for s in steps)
        generate, score = (sum(s[part] for s in steps) / seconds for part in ("generate", "score"))
        tokens = sum(sum(s["lengths"]) for s in steps) / len(steps)
        figures[side] = {
            "s_per_step": total,
            "s_per_step_rounds": per_round[side],
            "shares": {"generate": generate, "score": score, "train": 1 - generate - score},
            "tokens_per_step": tokens,
            "cpu_s_per_step": None if side == RAY else statistics.median(s["cpu"] for s in steps),
            "others": None if side == RAY else max(run["others"] for run in runs),
            "ms_per_token": 1000 * seconds / len(steps) / tokens,
            "peak_mib": statistics.median(run["peak_bytes"] for run in runs) / 2**20,
            "steps": steps,
        }
    for side in results:
        ratios = [a / b for a, b in zip(per_round["trl"], per_round[side], strict=True)]
        figures[side]["times_faster"] = figures["trl"]["s_per_step"] / figures[side]["s_per_step"]
        figures[side]["times_faster_rounds"] = ratios
    return figures


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"{'':10s}s/step  times faster (rounds)  CPU s/step  generate  score  train  tokens/step  "
        "ms/token  peak MiB  others"
    ]
    for side, row in figures.items():
        shares = row["shares"]
        rounds = f"({min(row['times_faster_rounds']):.2f} to {max(row['times_faster_rounds']):.2f})"
        cpu = "" if row["cpu_s_per_step"] is None else f"{row['cpu_s_per_step']:.3f}"
        others = "" if row["others"] is None else f"{row['others']:.0%}"
        lines.append(
            f"{side:10s}{row['s_per_step']:6.3f}  {row['times_faster']:5.2f} {rounds:15s}  {cpu:>10s}  "
            f"{shares['generate']:8.0%}  {shares['score']:5.0%}  {shares['train']:5.0%}  "
            f"{row['tokens_per_step']:11.0f}  {row['ms_per_token']:8.3f}  {row['peak_mib']:8.0f}  {others:>6s}"
        )
    if any((row["others"] or 0) > QUIET for row in figures.values()):
        lines.append(f"NOT QUIET: other processes took more than {QUIET:.0%} of the CPU; do not publish")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
