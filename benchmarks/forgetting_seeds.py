"""Domains trained one after another against all together, at equal rollouts, on three seeds.

`python benchmarks/forgetting_seeds.py` runs configs/forgetting.toml. The conflict between the domains is
designed (align punishes the thinking that math needs): this shows the mechanism, not its size elsewhere.
"""

import math
import statistics
from typing import Any

import seeds

from posttrain import config

SEEDS = (101, 102, 103)
STUDENT_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t for the mean over so many seeds."""


def figures(report: dict[str, Any]) -> seeds.Row:
    """The figures of one seed."""
    both, sampled = report["forgetting"], report["eval"]
    assert both["rollouts_sequence"] == both["rollouts_together"], "unequal rollouts"
    first, last = both["sequence"][0], both["sequence"][-1]
    row = {"sparse base, mean pass@1 (%)": seeds.mean(sampled, "sparse")}
    for name in (*both["sequence"], both["together"]):
        row[f"{name}, mean (%)"] = seeds.mean(sampled, name)
        row |= {f"{name}, {d} (%)": 100 * r["pass@1"] for d, r in sampled[name].items()}
    forgotten = sampled[first]["math"]["pass@1"] - sampled[last]["math"]["pass@1"]
    row["math forgotten in the sequence (points)"] = 100 * forgotten
    arms = [both["together_pass"], both["sequence_pass"]]
    row["together - sequence (points)"] = 100 * (arms[0]["mean"] - arms[1]["mean"])
    halves = [arm["ci95"][1] - arm["mean"] for arm in arms]
    row["  half width of its 95 % interval, tasks (points)"] = 100 * math.hypot(*halves)
    return row


def main() -> None:
    """Run and print."""
    args = seeds.parser(str(__doc__), SEEDS).parse_args()
    cfg = config.load(["configs/forgetting.toml"])
    rows = {seed: figures(report) for seed, report in seeds.reports(cfg, args).items()}
    seeds.write(args.out / "forgetting-seeds.json", rows)
    print(seeds.table(rows, {}))
    gaps = [row["together - sequence (points)"] for row in rows.values()]
    if len(gaps) in STUDENT_95:
        half = STUDENT_95[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
        mean = statistics.fmean(gaps)
        print(
            f"\ntogether - sequence over {len(gaps)} seeds: {mean:+.1f} points, "
            f"95 % interval over seeds +- {half:.1f}"
        )


if __name__ == "__main__":
    main()
