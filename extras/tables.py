"""Make the tables of README.md from results/**/results.json.

python -m extras.tables            # rewrite what stands between the markers
python -m extras.tables --check    # exit status 1 if that would change anything
"""

import argparse
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = {  # heading: key in results.json
    "final": "final_accuracy",
    "average incremental": "average_incremental_accuracy",
    "forgetting": "forgetting",
    "learning": "learning_accuracy",
    "task known": "task_known_accuracy",
    "by the head": "head_accuracy",
    "oracle means": "class_mean_oracle",
}
# name of a table: its rows, each a label and the run's folder without its seed
TABLES = {
    "cifar100": {m: f"cifar100-T20-{m}-i50" for m in ("ham", "sequential", "average", "frozen")},
    "cub200": {m: f"cub200-T10-{m}" for m in ("ham", "sequential", "average", "frozen")},
}


def load(run, results=ROOT / "results"):
    """All seeds of a run, in order of the seed. A run that was never measured raises."""
    files = sorted(Path(results).glob(f"{run}-s[0-9]*/results.json"))
    if not files:
        raise FileNotFoundError(f"{results}/{run}-s*/results.json: measure it, extras/run_all.py")
    return [json.loads(file.read_text()) for file in files]


def cell(values):
    """Mean, and ± standard deviation of two seeds or more; a dash where it does not apply."""
    if None in values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(rows, results=ROOT / "results"):
    """Markdown table of accuracies (per cent), parameters stored and seconds. rows: label -> run"""
    lines = ["| | " + " | ".join([*COLUMNS, "stored", "train s", "seeds"]) + " |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    for label, run in rows.items():
        runs = load(run, results)
        cells = [cell([r[key] for r in runs]) for key in COLUMNS.values()]
        cells.append(f"{runs[0]['parameters_stored'] / 1e3:,.0f} k")
        cells.append(f"{statistics.mean(r['seconds']['train'] for r in runs):.0f}")
        cells.append(", ".join(str(r["config"]["seed"]) for r in runs))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(text, results=ROOT / "results"):
    """Replace what stands between <!-- table NAME --> and <!-- end -->."""

    def made(match):
        return f"{match[1]}\n{table(TABLES[match[2]], results)}\n{match[3]}"

    return re.sub(r"(<!-- table (\S+) -->).*?(<!-- end -->)", made, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    file = ROOT / "README.md"
    old = file.read_text(encoding="utf-8")
    new = fill(old)
    if check and new != old:
        raise SystemExit("README.md is not what results/ says: python -m extras.tables")
    if not check:
        file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
