"""The demo on three seeds that nothing was tuned on, with the dense control of equal steps.

`python benchmarks/demo_seeds.py`; every figure that the project promises of the demo, with its limit.
The settings of configs/demo.toml were chosen on seeds 0 and 1.
"""

from typing import Any

import seeds

from posttrain import config

SEEDS = (101, 102, 103)
SPECIALISTS = {"math": "rl-math", "logic": "rl-logic", "agent": "rl-agent", "align": "rl-align"}
LIMITS = {
    "LM loss sparse - dense after sparse": ("<= 0.01", lambda x: x <= 0.01),
    "LM loss sparse - dense, untrained indexer": (">= 0.5", lambda x: x >= 0.5),
    "recall relative to the oracle, worst layer": (">= 0.87", lambda x: x >= 0.87),
    "counted held-out tokens": (">= 50000", lambda x: x >= 50_000),
    "sparse base, mean pass@1 (%)": ("25 to 50", lambda x: 25 <= x <= 50),
    **{f"{d} specialist - base (points)": (">= 8", lambda x: x >= 8) for d in SPECIALISTS},
    "final - sparse base (points)": (">= 30", lambda x: x >= 30),
    "final - sparse base, greedy (points)": (">= 10", lambda x: x >= 10),
    "mean |log-prob engine - learner|, worst stage": ("< 1e-5", lambda x: x < 1e-5),
    "least loaded expert, share of choices": (">= 0.02", lambda x: x >= 0.02),
    "tasks per domain": (">= 200", lambda x: x >= 200),
    "domains with a median of >= 64 tokens": (">= 2", lambda x: x >= 2),
    "lost or duplicated samples": ("= 0", lambda x: x == 0),
}


def with_control(cfg: config.Run) -> config.Run:
    """The recipe plus the same continued training without top-k."""
    stages: list[config.Stage] = []
    for stage in cfg.stages:
        stages.append(stage)
        if isinstance(stage, config.Sparse):
            stages.append(stage.model_copy(update={"name": "control", "attention": "dense"}))
    return cfg.model_copy(update={"stages": stages})


def figures(report: dict[str, Any]) -> seeds.Row:
    """The figures of one seed."""
    stages = {stage["name"]: stage["figures"] for stage in report["stages"]}
    sampled, greedy = report["eval"], report["eval_greedy"]
    sparse, rl = stages["sparse"], [*SPECIALISTS.values(), "mixed"]
    row = {
        "LM loss sparse - dense after sparse": sparse["lm_gap"],
        "LM loss sparse - dense, untrained indexer": stages["warmup"]["untrained_lm_gap"],
        "recall relative to the oracle, worst layer": sparse["recall"],
        "counted held-out tokens": min(sparse["counted_queries"], sparse["counted_targets"]),
        "dense base, mean pass@1 (%)": seeds.mean(sampled, "pretrain"),
        "sparse base, mean pass@1 (%)": seeds.mean(sampled, "sparse"),
        "sparse base, greedy (%)": seeds.mean(greedy, "sparse"),
        "dense control, mean pass@1 (%)": seeds.mean(sampled, "control"),
        "dense control, greedy (%)": seeds.mean(greedy, "control"),
    }
    for domain, name in SPECIALISTS.items():
        gain = sampled[name][domain]["pass@1"] - sampled["sparse"][domain]["pass@1"]
        row[f"{domain} specialist - base (points)"] = 100 * gain
    own = [sampled[name][domain]["pass@1"] for domain, name in SPECIALISTS.items()]
    row |= {
        "specialists in their own domain (%)": 100 * sum(own) / len(own),
        "student, mean pass@1 (%)": seeds.mean(sampled, "sft"),
        "student, greedy (%)": seeds.mean(greedy, "sft"),
        "final, mean pass@1 (%)": seeds.mean(sampled, "mixed"),
        "final, greedy (%)": seeds.mean(greedy, "mixed"),
        "final - sparse base (points)": seeds.mean(sampled, "mixed") - seeds.mean(sampled, "sparse"),
        "final - sparse base, greedy (points)": seeds.mean(greedy, "mixed") - seeds.mean(greedy, "sparse"),
        "mean |log-prob engine - learner|, worst stage": max(stages[s]["engine/gap_mean"] for s in rl),
        "least loaded expert, share of choices": min(stages[s]["expert_min"] for s in ("pretrain", "sparse")),
        "tasks per domain": min(r["n"] for table in sampled.values() for r in table.values()),
        "domains with a median of >= 64 tokens": sum(
            r["median_tokens"] >= 64 for r in sampled["mixed"].values()
        ),
        "lost or duplicated samples": report["ledger"]["lost"] + report["ledger"]["duplicated"],
        "pipeline time (s), control included": report["wall_s"],
    }
    return row


def main() -> None:
    """Run and print."""
    args = seeds.parser(str(__doc__), SEEDS).parse_args()
    cfg = with_control(config.load(["configs/demo.toml"]))
    rows = {seed: figures(report) for seed, report in seeds.reports(cfg, args).items()}
    seeds.write(args.out / "demo-seeds.json", rows)
    print(seeds.table(rows, LIMITS))


if __name__ == "__main__":
    main()
