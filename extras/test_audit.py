"""The tables once more, from results/*/results.json by other code: this shares none with tables.py."""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "results"
T975 = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764}  # of Student's t, by number of seeds
FOLDERS = {"random classes": "cifar100-T20-ham-i50", "superclasses": "cifar100-T20-ham-i50-super"}
FOLDERS |= {"random classes, GPU": "cifar100-T20-ham-i50-gpu"}
CHANGED = {"ham": "", "one group": "-one-group", "one group (gain 5)": "-one-group-gain5"}
CHANGED |= {"random group": "-random", "one group per task": "-each-its-own", "no pruning": "-rho1"}
CHANGED |= {"sum (literal)": "-sum", "mean of what was added": "-mean", "ρ = 0.5": "-rho0.5"}
CHANGED |= {"ρ = 0.3": "-rho0.3", "α fixed at 1": "-no-alpha", "G_max = 2": "-gmax2"}
CHANGED |= {"G_max = 10": "-gmax10"}
CHANGED |= {f"no groups, {c} of each adapter": f"-share{c}" for c in (0.3, 0.5, 0.7)}


WORDS = {"random group": "random", "by features": "features", "least similar": "least"}
WORDS |= {"random leaf": "random", "gradients": "before"}
WORDS |= dict.fromkeys(("1e-4", "3e-3", "3e-4", "1e-3"), "before")


def table(page, name):
    """-> list of rows, each a dict of column: text; an empty first cell is the one above"""
    text = (RESULTS / page).read_text("utf-8")
    lines = re.search(rf"<!-- table {name} -->\n(.*?)\n<!-- end", text, re.DOTALL)[1].split("\n")
    head, _, *rows = [[x.strip() for x in line[1:-1].split("|")] for line in lines]
    for above, row in itertools.pairwise(rows):
        row[0] = row[0] or above[0]
    return [dict(zip(head, row, strict=True)) for row in rows]


def runs(setting, row):
    """The runs of a row. -> dict seed: results"""
    if setting in FOLDERS:
        folder = FOLDERS[setting] + CHANGED[row]
    else:
        data, *part, tasks = setting.split(", ")
        name = {"50 per class": "-i50", "250 per class": "-i250", "all images": "-all"}
        gpu = "-gpu" if "GPU" in part else ""
        part = "-224px" if "224 px" in part else name[part[0]] + gpu if part else ""
        if row.startswith("ham, R = "):  # groups of a fixed rank
            row, rank, *how = re.split(", R = |, ", row)
            part += f"-R{rank}" + "".join("-" + WORDS[x] for x in how)
        elif row.split(", ")[-1] in WORDS:
            row, how = row.split(", ")
            part += "-" + WORDS[how]
        tasks = "T1" if row == "joint" else tasks.replace(" = ", "")
        row, *law = row.split(", by the ")  # sequential, by the law
        part += "-law" if law else ""
        folder = f"{data.lower().replace('-', '')}-{tasks}-{row}{part}"
    files = RESULTS.glob(f"{folder}-s[0-9]*/results.json")
    return {(r := json.loads(f.read_text("utf-8")))["config"]["seed"]: r for f in files}


def measured(run):
    """Final accuracy, its mean over tasks, forgetting, learning accuracy: from the matrix alone."""
    a, n = run["accuracy_matrix"], run["test_images_per_task"]
    final = [math.fsum(x * m for x, m in zip(row, n)) / sum(n[: len(row)]) for row in a]
    lost = [max(a[t][j] for t in range(j, len(a) - 1)) - a[-1][j] for j in range(len(a) - 1)]
    learning = statistics.fmean(row[-1] for row in a)
    return final[-1], statistics.fmean(final), sum(lost) / max(1, len(lost)), learning


def cell(values, text):
    """Is "mean ± standard deviation", or one value, what these are, to its last digit?"""
    numbers = [float(x.replace(",", "")) for x in re.findall(r"-?[\d.,]+", text)]
    want = [statistics.fmean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
    return numbers == pytest.approx(want, abs=0.0501)


def interval(gaps):
    """Mean and 95 % interval; of one value, itself; of none, nothing."""
    mean = [statistics.fmean(gaps)] if gaps else []
    if len(gaps) < 2:
        return mean
    half = T975[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return [*mean, mean[0] - half, mean[0] + half]


def shown(text):
    """The numbers in a cell."""
    return [float(x) for x in re.findall(r"[+-]?\d[\d.]*", text.replace("*", ""))]


def test_every_row_of_all_measures():
    rows = table("all.md", "measures")
    assert len(rows) > 50
    for row in rows:
        every, seeds = runs(row["setting"], row["row"]), row["which seeds"].split(", ")
        assert sorted(every) == [int(x) for x in seeds], row
        columns = "final accuracy", "average incremental", "forgetting", "learning"
        for column, values in zip(columns, zip(*map(measured, every.values()))):
            assert cell(values, row[column]), (row, column, values)
        stored = statistics.fmean(r["parameters_stored"] for r in every.values()) / 1000
        assert float(row["stored"].strip(" k").replace(",", "")) == pytest.approx(stored, abs=0.51)


@pytest.mark.parametrize("name", ["others", "parts", "fixed_rank"])
def test_every_difference_and_its_interval(name):
    for row in table("README.md", name):
        setting = row.get("setting") or row["tasks of"]
        method, ham = row.get("method") or row["changed"], runs(setting, "ham")
        other = runs(setting, method)
        assert cell([measured(r)[0] for r in other.values()], row["final accuracy"]), row
        if "R = 8" in method and row.get("R = 8 − it"):
            cut = runs(setting, "ham, R = 8")
            gaps = [measured(cut[s])[0] - measured(r)[0] for s, r in other.items() if s in cut]
            assert shown(row["R = 8 − it"]) == pytest.approx(interval(gaps), abs=0.0501), row
        gaps = [measured(ham[s])[0] - measured(r)[0] for s, r in other.items() if s in ham]
        if method != "ham":
            assert shown(row["ham − it"]) == pytest.approx(interval(gaps), abs=0.0501), row


def test_every_difference_of_the_controls():
    columns = {"ham − sequential": ("sequential", 0), "ham − average": ("average", 0)}
    columns["forgetting: ham − sequential"] = ("sequential", 2)
    for row in table("README.md", "controls"):
        ham = runs(row["setting"], "ham")
        assert len(ham) == int(row["seeds of ham"])
        for column, (method, which) in columns.items():
            other = runs(row["setting"], method)
            gaps = [measured(ham[s])[which] - measured(other[s])[which] for s in ham if s in other]
            assert shown(row[column]) == pytest.approx(interval(gaps), abs=0.0501), (row, column)


def test_groupings_of_adapters_trained_alone():
    lines = (RESULTS / "validate" / "alone.jsonl").read_text("utf-8").splitlines()
    ends, rows = {}, table("all.md", "alone")
    for run in map(json.loads, lines):
        at = f"{run['rank']}", f"{run['scale']}", run["by"].split()[0]
        ends.setdefault(at, {}).setdefault(run["config"]["seed"], []).append(run["final_accuracy"])
    assert len(rows) == len(ends)
    for row in rows:
        *cut, by = row["R"], row["scale"], row["grouped by"]
        own, drawn = ends[*cut, by], ends[*cut, "random"]
        assert cell([x for values in own.values() for x in values], row["held-out accuracy"])
        gaps = [statistics.fmean(own[s]) - statistics.fmean(drawn[s]) for s in own]
        if by != "random":
            mean, low, high = interval(gaps)
            assert shown(row["it − random"]) == pytest.approx([mean, low, high], abs=0.0501)
            assert low < 0 < high  # as README.md says


def test_what_was_tried_for_each_method():
    lines = (RESULTS / "validate" / "screening.jsonl").read_text("utf-8").splitlines()
    tried = [
        ({"method": "ham"} | x.get("config", {}) | x["settings"], x) for x in map(json.loads, lines)
    ]
    rows, budget = table("all.md", "tuned"), ("dataset", "tasks", "images_per_class")
    usual = {*budget, "method", "lr", "penalty", "seed", "precision", "model", "img_size"}
    usual |= {"test_images_per_class"}
    assert len(rows) > 18
    for row in rows:
        here = ("cifar100", 20, 50) if "CIFAR" in row["setting"] else ("cub200", 10, None)
        own = [(s, run) for s, run in tried if s["method"] == row["method"]]
        assert len(own) == int(row["in all"])
        own = [x for x in own if (*map(x[0].get, budget),) == here and "code_change" not in x[1]]
        assert len(own) == int(row["runs"])
        ends = {}  # (rate, λ): accuracies; a cell of the table is a line or a column of this
        for s, run in own:
            if run["settings"].keys() <= usual:
                ends.setdefault((s["lr"], s.get("penalty") or 0), []).append(run["class-mean"][1])
        for place, column in enumerate(("rate: accuracy (runs)", "λ: accuracy (runs)")):
            found = {}  # the other of the two: cells
            for at, x in sorted(ends.items()):
                text = f"{at[place]:g}: {statistics.fmean(x):.1f} ({len(x)})"
                found.setdefault(at[1 - place], []).append(text)
            most = max(map(len, found.values()))
            longest = [", ".join(x) for x in found.values() if len(x) == most > 1]
            assert row[column] in (longest or [""])
        settings = [
            row["setting"],
            *[row["setting"].replace("T =", "GPU, T =")] * (None not in here),
        ]
        tests = [runs(setting, row["method"]) for setting in settings]
        rates = sorted({run["config"]["lr"] for seeds in tests for run in seeds.values()})
        assert row["rate of the rows"] == ", ".join(dict.fromkeys(f"{lr:.2g}" for lr in rates))


def test_what_the_readme_claims_and_what_of_it_survives_correction():
    text = (RESULTS.parent / "README.md").read_text("utf-8")
    text = text.split("| claim (abstract, reviews) | here |")[1].split("![")[0]
    names = [*["`average`", "`sequential`"] * 2, "first-task adaptation", "`sequential`"]
    assert re.findall(r"\*\*(.*?)\*\*", text) == names
    whole, few = "CIFAR-100, all images, T = 20", "CIFAR-100, 50 per class, T = 20"
    controls = {row["setting"]: row for row in table("README.md", "controls")}
    rows = table("README.md", "others")
    others = {row["method"]: row["ham − it"] for row in rows if "CUB" not in row["setting"]}
    birds = {row["method"]: row["ham − it"] for row in rows if "CUB" in row["setting"]}
    forgot, cub = "forgetting: ham − sequential", controls["CUB-200, T = 10"]
    bold = [controls[whole]["ham − average"], controls[whole]["ham − sequential"]]
    bold += [controls[few]["ham − sequential"]]
    bold += [controls[few.replace("T =", "GPU, T =")]["ham − average"]]
    assert all("**" in x and shown(x)[1] > 0 for x in [*bold, others["first"]])
    less = [controls[setting][forgot] for setting in (whole, few)]
    assert all("**" in x and shown(x)[2] < 0 for x in less)
    plain = others["safm"], others["o_lora"], cub["ham − sequential"], birds["safm"], birds["first"]
    assert all("**" not in x and shown(x)[1] > 0 for x in plain)
    assert (
        round(shown(bold[0])[0]) == round(shown(bold[1])[0]) == 3 and round(shown(less[0])[0]) == -6
    )
    assert shown(birds["sequential, 1e-4"])[1] > 0 > shown(birds["average, 3e-3"])[1]
    assert shown(cub[forgot])[1] > 0  # "more on CUB-200"
    for x in (others["ewc"], others["treelora"], *map(birds.get, ("ewc", "treelora", "o_lora"))):
        assert shown(x)[1] < 0 < shown(x)[2]  # "not shown"


def test_sentences_that_no_table_has():
    """Of Noise (a GPU's accuracy, the same bits), Other methods (leaves), Parts (a constant share)."""
    lines = (RESULTS / "validate" / "screening.jsonl").read_text("utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    end = {
        run["config"]["share"]: run["class-mean"][1]
        for run in held_out
        if run["name"] in ("share", "fp32") and run["config"]["seed"] == 1993
    }
    assert 0 < end[None] - end[0.7] < 1 and 1.7 < end[None] - end[0.3] < 2
    lora = [run for run in held_out if run["settings"].get("method") == "ewc_lora"]
    best = max(run["class-mean"][1] for run in lora)
    few = {
        "method": "ewc",
        "dataset": "cifar100",
        "tasks": 20,
        "images_per_class": 50,
        "seed": 1993,
    }
    ewc = [run for run in held_out if few.items() <= run.get("config", {}).items()]
    tried = {(run["config"]["seed"], run["config"]["lr"]) for run in lora}
    assert tried == {(1993, 3e-4), (1993, 1e-3), (1993, 3e-3)}
    assert 0 < max(run["class-mean"][1] for run in ewc) - best < 1 and 0 < end[None] - best < 1
    birds = {"method": "safm", "dataset": "cub200", "precision": "fp32"}
    safm = [run for run in held_out if birds.items() <= run.get("config", {}).items()]
    *_, low, high = sorted(safm, key=lambda run: run["class-mean"][1])  # 6e-4 lies between
    assert low["config"]["lr"] < 6.3e-4 < high["config"]["lr"] and len(safm) == 3
    for row, lr in (("treelora", 1e-3), ("treelora, gradients", 6.3e-4), ("safm", 6.3e-4)):
        rates = {run["config"]["lr"] for run in runs("CUB-200, T = 10", row).values()}
        assert [*rates] == pytest.approx([lr], rel=0.01)
    for file in RESULTS.glob("*-ham-*/results.json"):  # τ: "in no run did it act"
        run = json.loads(file.read_text("utf-8"))
        sizes = [[], *(task["group_sizes"] for task in run["tasks"])]
        for before, task in zip(sizes, run["tasks"]):
            if task["similarities"] and len(before) < run["config"]["g_max"]:
                assert max(task["similarities"]) < run["config"]["tau"]
    few, name = "CIFAR-100, 50 per class, T = 20", "CIFAR-100, 50 per class, GPU, T = 20"
    cpu, gpu = runs(few, "ham"), runs(name, "ham")
    assert len(gpu) == 5 and all(abs(measured(gpu[s])[0] - measured(cpu[s])[0]) < 0.3 for s in gpu)
    for again in ("typed", "resumed"):
        file = RESULTS / f"cifar100-T20-ham-i50-gpu-{again}-s1993" / "results.json"
        run = json.loads(file.read_text("utf-8"))
        assert run["accuracy_matrix"] == gpu[1993]["accuracy_matrix"]
        for one, other in zip(run["tasks"], gpu[1993]["tasks"], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
    whole = "CIFAR-100, all images, T = 20"  # three seeds on a GPU, then two on a CPU
    five = [
        {s: measured(r)[0] for s, r in runs(whole, row).items()} for row in ("ham", "sequential")
    ]
    assert [round(five[0][s] - five[1][s], 1) for s in (1996, 1997)] == [2.2, 1.9]
    first = [round(statistics.fmean(x[s] for s in (1993, 1994, 1995)), 1) for x in five]
    assert first == [70.3, 67.2] and len(five[0]) == len(five[1]) == 5
    bandit, drawn = (runs(name, row) for row in ("treelora", "treelora, random leaf"))
    gaps = [measured(bandit[s])[0] - measured(drawn[s])[0] for s in bandit]
    _, low, high = interval(gaps)
    assert len(gaps) == 3 and low < 0 < high
    for run in bandit.values():
        before, steps = 0, 0
        for t, record in enumerate(run["tasks"]):
            for taken in record["taken"]:
                steps += sum(taken)
                before += sum(n for n, leaf in zip(taken, record["leaves"]) if t - 1 in leaf)
        assert 0.6 < before / steps < 0.76
