"""The command line: run, check, status, export, reward, agree, tasks. Imports no torch, so that it answers at once.

Exit codes: 0 done, 1 a stage or the machine failed, 2 bad input, 130 interrupted. What the user can
mend gets one line on stderr; a traceback is a bug. Next: check.py, pipeline.py.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain import config
from posttrain.stages import StageFailed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    # Rewards and tools may live beside the recipe. At the end of the path, where a folder called
    # like an installed package shadows nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _COMMANDS[args.command](args)
    except ValueError as error:
        return _fail(str(error), 2)
    except (StageFailed, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posttrain", description="Post-training of DeepSeek-Sparse-Attention models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe; run it again to continue it")
    _add_config(run)
    run.add_argument("--only", metavar="STAGE", help="run this stage and its evaluation alone")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument("--dry-run", action="store_true", help="print what would run, and why")

    check = commands.add_parser("check", help="validate a recipe and call its rewards once")
    _add_config(check)
    check.add_argument("--config-only", action="store_true", help="load no functions and no tasks")
    check.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")

    status = commands.add_parser("status", help="show how far a run is")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR")
    export.add_argument("out", type=Path, metavar="OUT_DIR")

    reward = commands.add_parser("reward", help="try rewards on saved rollouts")
    reward.add_argument("fn", nargs="+", metavar="PKG.MOD:FN", help="one reward or several")
    reward.add_argument(
        "--tasks", action="append", required=True, metavar="URI", help="where the rollouts' tasks come from"
    )
    reward.add_argument(
        "--rollouts", type=Path, required=True, metavar="PATH", help="a .parquet file, or a stage's folder"
    )
    reward.add_argument("--args", default="{}", metavar="JSON", help="keywords that make the (first) reward")
    reward.add_argument(
        "--diff",
        metavar="OTHER",
        help="another reward, or 'saved': show the rollouts that it values otherwise",
    )
    reward.add_argument("--seed", type=int, default=0, help="the run's seed")
    reward.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="deadline per rollout")
    reward.add_argument("--show", type=int, default=5, metavar="N", help="changed rollouts to print")
    reward.add_argument("--json", action="store_true", help="print every value as JSON")

    agree = commands.add_parser("agree", help="measure an engine against the learner on a checkpoint")
    agree.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR")
    agree.add_argument("--tasks", required=True, metavar="URI", help="where the prompts come from")
    agree.add_argument("--engine", choices=("torch", "vllm"), default="vllm")
    agree.add_argument("--limit", type=int, default=16, metavar="N", help="prompts to sample from")
    agree.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to sample for each")
    agree.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    agree.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    agree.add_argument("--seed", type=int, default=0)

    tasks = commands.add_parser("tasks", help="look at a task source")
    tasks.add_argument("uri", metavar="URI")
    tasks.add_argument("--where", metavar="PKG.MOD:FN", help="a predicate on Task")
    tasks.add_argument("--seed", type=int, default=0)
    tasks.add_argument("--limit", type=int, default=10_000, metavar="N", help="tasks to read at most")
    tasks.add_argument("--show", type=int, default=3, metavar="N", help="tasks to print")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="TOML files, merged from left to right")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override a setting; stages and domains go by name: stages.warmup.steps=10",
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder becomes DIR/<name>")


def _load(args: argparse.Namespace) -> config.Run:
    out = [] if args.out is None else [f"out={json.dumps(args.out)}"]
    return config.load(args.config, [*args.set, *out])


def _run(args: argparse.Namespace) -> None:
    cfg = _load(args)
    from posttrain import pipeline  # only here: rich and the store are not needed elsewhere

    pipeline.run(cfg, only=args.only, until=args.until, dry_run=args.dry_run)


def _check(args: argparse.Namespace) -> None:
    cfg = _load(args)
    from posttrain import check  # only here: numpy and the rewards are not needed elsewhere

    report = check.check(cfg, config_only=args.config_only)
    print(json.dumps(check.as_json(report), indent=2) if args.json else check.as_text(report))


def _status(args: argparse.Namespace) -> None:
    from posttrain import status  # only here, like the others

    print(status.text(args.run_dir))


def _export(args: argparse.Namespace) -> None:
    if not (args.checkpoint / "config.json").is_file():
        raise ValueError(f"{args.checkpoint}: no checkpoint there (config.json is missing)")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out}: exists and is not an empty folder; name a new one")
    importlib.import_module("posttrain.stages.export").export_checkpoint(args.checkpoint, args.out)


def _reward(args: argparse.Namespace) -> None:
    from posttrain import rollout_file, workbench  # only here, like the others

    try:
        keywords = json.loads(args.args)
    except ValueError as error:
        raise ValueError(f"--args {args.args!r}: not valid JSON ({error})") from None
    if not isinstance(keywords, dict):
        raise ValueError(f"--args {args.args!r}: expected a JSON object")
    first, *more = args.fn
    rewards = [config.Reward(fn=first, args=keywords, timeout_s=args.timeout)]
    rewards += [config.Reward(fn=fn, timeout_s=args.timeout) for fn in more]
    saved = rollout_file.read(args.rollouts)
    pairs = workbench.attach(saved, args.tasks, seed=args.seed)
    judged = [workbench.judge(reward, pairs) for reward in rewards]
    other = None
    if args.diff == workbench.SAVED:
        other = workbench.saved_scores(pairs)
    elif args.diff is not None:
        other = workbench.judge(config.Reward(fn=args.diff, name=args.diff, timeout_s=args.timeout), pairs)
    if args.json:
        print(json.dumps(workbench.as_json(pairs, [*judged, *([other] if other else [])]), indent=2))
    else:
        print(workbench.report(pairs, judged, num_rollouts=len(saved), other=other, show=args.show))


def _agree(args: argparse.Namespace) -> None:
    from posttrain import agree  # only here: it loads models

    figures = agree.agree(
        args.checkpoint,
        args.tasks,
        engine=args.engine,
        num_tasks=args.limit,
        new_tokens=args.new_tokens,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
    )
    print(figures)


def _tasks(args: argparse.Namespace) -> None:
    from posttrain import preview  # only here, like the others

    print(preview.preview(args.uri, seed=args.seed, where=args.where, limit=args.limit, show=args.show))


_COMMANDS = {
    "run": _run,
    "check": _check,
    "status": _status,
    "export": _export,
    "reward": _reward,
    "agree": _agree,
    "tasks": _tasks,
}


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code
