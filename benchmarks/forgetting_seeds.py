"""Domains trained one after another against all together, at equal rollouts, on three seeds.

`python benchmarks/forgetting_seeds.py` runs configs/forgetting.toml. The conflict between the domains is
designed (align punishes the thinking that math needs): this shows the mechanism, not its size elsewhere.
"""

import statistics
from typing import Any

import seeds

from posttrain import config
from posttrain.intervals import Z95

SEEDS = (101, 102, 103)


def figures(report: dict[str, Any]) -> seeds.Row:
    """The figures of one seed."""
    both, sampled = report["forgetting"], report["eval"]
    assert both["rollouts_sequence"] == both["rollouts_together"], "unequal rollouts"
    first, last = both["sequence"][0], both["sequence"][-1]
    row = {"sparse base, mean pass@1 (%)": seeds.mean(sampled, "sparse")}
    for name in (*both["sequence"], both["together"]):
        row[f"{name}, mean (%)"] = seeds.mean(sampled, name)
        row |= {f"{name}, {d} (%)": 100 * r["pass@1"] for d, r in sampled[name].items()}
    row["half width of the interval of a mean (points)"] = 100 * (
        both["sequence_pass"]["ci95"][1] - both["sequence_pass"]["mean"]
    )
    forgotten = sampled[first]["math"]["pass@1"] - sampled[last]["math"]["pass@1"]
    row["math forgotten in the sequence (points)"] = 100 * forgotten
    row["together - sequence (points)"] = 100 * (
        both["together_pass"]["mean"] - both["sequence_pass"]["mean"]
    )
    return row


def main() -> None:
    """Run and print."""
    args = seeds.parser(str(__doc__), SEEDS).parse_args()
    cfg = config.load(["configs/forgetting.toml"])
    rows = {seed: figures(report) for seed, report in seeds.reports(cfg, args).items()}
    seeds.write(args.out / "forgetting-seeds.json", rows)
    print(seeds.table(rows, {}))
    gaps = [row["together - sequence (points)"] for row in rows.values()]
    if len(gaps) > 1:
        half = Z95 * statistics.stdev(gaps) / len(gaps) ** 0.5
        mean = statistics.fmean(gaps)
        print(
            f"\ntogether - sequence over {len(gaps)} seeds: {mean:+.1f} points, 95 % interval of the mean +- {half:.1f}"
        )


if __name__ == "__main__":
    main()
