"""Draw seconds and peak memory over the number of models, from merge_speed.jsonl.

python benchmarks/plot_merge.py WORK/merge_speed.jsonl OUTPUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    rows = [line for line in lines if line["part"] == "tasks"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for operator in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == operator]
        counts = [row["tasks"] for row in own]
        left.plot(counts, [row["seconds"] for row in own], marker="o", label=operator)
        right.plot(counts, [1000 * row["peak_gb"] for row in own], marker="o", label=operator)
    left.set(xlabel="models merged", ylabel="seconds, whole command", xticks=counts, ylim=(0, None))
    right.set(xlabel="models merged", ylabel="peak memory, MB", xticks=counts, ylim=(0, None))
    left.legend(frameon=False)
    figure.suptitle("manyshot merge, 107 M parameters, bfloat16, 2 cores")
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
