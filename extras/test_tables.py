"""Tests of the tables: by hand, from results/, and that README's sentences are what they show."""

import dataclasses
import functools
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

import ham
from extras import baselines, run_all, tables

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


@functools.cache
def runs_of(name):
    """label -> all seeds, of the rows of a table that were measured."""
    return {label: tables.load(run) for label, run in tables.measured(tables.TABLES[name]).items()}


def gap(name, one, other, key="final_accuracy"):
    """Points by which a row is above another, over the seeds both have, and its standard error."""
    runs = runs_of(name)
    return tables.paired(runs[one], runs[other], key)


def clear(name, one, other):
    """Is that difference bold in the tables?"""
    return tables.ahead(runs_of(name)[one], runs_of(name)[other]).startswith("**")


def write(folder, **result):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(result))


# ---------------------------------------------------------------------------------------- By hand


def test_claims_and_paired_differences_by_hand(tmp_path):
    finals = {"ham": (70.0, 74.0, 72.0), "sequential": (69.0, 71.0, 70.0), "average": (69.0, 75.0)}
    finals |= {"frozen": (50.0,), "joint": (76.0,)}
    rows = tables.methods("cub200", 10)
    for method, values in finals.items():
        for seed, x in zip((1993, 1994, 1995), values):
            result = {"config": {"seed": seed}, "final_accuracy": x, "forgetting": 80 - x}
            write(tmp_path / f"{rows[method]}-s{seed}", **result)
    runs = {m: tables.load(rows[m], tmp_path) for m in finals}
    points, error = tables.paired(runs["ham"], runs["sequential"])  # 1, 3 and 2
    assert points == 2 and error == pytest.approx(3**-0.5)
    assert tables.paired(runs["ham"], runs["frozen"]) == (20.0, None)
    line = tables.claims(tmp_path).splitlines()[-1]
    finals = "72.0 ± 2.0 | 70.0 ± 1.0 | 72.0 ± 4.2 | 50.0 | 76.0"
    assert f"{finals} | **+2.0 ± 0.6** | +0.0 ± 1.0 | 14 % | -20.0 / -19.0 | 3 |" in line


def test_a_difference_is_bold_from_two_standard_errors_over_three_seeds():
    def seeds(*finals):
        return [{"config": {"seed": i}, "final_accuracy": x} for i, x in enumerate(finals)]

    assert tables.ahead(seeds(5.0, 7.0, 6.0), seeds(4.0, 4.0, 4.0)) == "**+2.0 ± 0.6**"
    assert tables.ahead(seeds(4.0, 4.0, 4.0), seeds(5.0, 7.0, 6.0)) == "**-2.0 ± 0.6**"
    assert tables.ahead(seeds(5.0, 7.0, 4.5), seeds(4.0, 4.0, 4.0)) == "+1.5 ± 0.8"
    assert tables.ahead(seeds(5.0, 5.1), seeds(4.0, 4.0, 4.0)) == "+1.0 ± 0.0"
    assert tables.ahead(seeds(5.0), seeds(5.04, 5.0)) == "+0.0"  # not -0.0


def test_parts_and_related_superclasses_by_hand(tmp_path):
    listed = (ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").split()
    kinds = ["apt".index(kind) for kind in tables.KINDS]
    made = {"super": (60.0, kinds), "super-random": (59.0, [0] * 20), "random": (69.5, kinds)}
    for part, (final, groups) in (made | {"": (70.0, kinds)}).items():
        folder = tmp_path / f"{tables.PART}-{part}-s1993".replace("--", "-")
        r = {"config": {"seed": 1993}, "final_accuracy": final, "class_mean_oracle": 71.0}
        r |= {"forgetting": 9.0, "learning_accuracy": 80.0, "classes": listed}
        r["tasks"] = [{"group": group} for group in groups]
        write(folder, **r)
    lines = tables.parts(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["HAM", "70.0", ""],
        ["random group", "69.5", "+0.5"],
        ["HAM", "60.0", ""],
        ["random group", "59.0", "+1.0"],
    ]
    assert lines[1].endswith("| 9.0 | 80.0 | 1.5 | 1 |")
    # pairs of one kind: 10 animals 45, 4 plants and landscapes 6, 6 things 15, of 190 in all
    text = tables.related(tmp_path)
    assert "HAM 100 % of 66 pairs, random group 35 % of 190 pairs; of any two tasks 35 %" in text


# ---------------------------------------------------------------------- From the committed results


def test_tables_are_made_from_results():
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"<!-- table (\S+) -->", text), file
        assert tables.fill(text) == text, file


def test_figure_is_drawn_from_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tables.draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 300 and len(set(image.convert("L").tobytes())) > 50


def test_every_run_of_the_tables_can_be_repeated():
    """run_all's flags parse, and a committed run of a table is one of run_all's, same settings."""
    rows = {run for table in tables.TABLES.values() for run in table.values()}
    assert rows == {re.sub(r"-s\d+$", "", name) for name in run_all.RUNS}
    for name, flags in run_all.RUNS.items():
        kind = ham.Config if run_all.program(flags) == ["ham.py"] else baselines.Config
        c = ham.resolve(baselines.prepare(ham.parse(flags.split(), kind))[0])
        parts = [c.dataset, f"T{c.tasks}", c.method, c.name, f"s{c.seed}"]
        assert name == "-".join(filter(None, parts))
        file = ROOT / "results" / name / "results.json"
        if file.is_file():
            stored = json.loads(file.read_text())["config"]
            paths = ("out", "data_dir", "weights", "device", "precision")
            now = {k: v for k, v in dataclasses.asdict(c).items() if k not in paths}
            assert {k: stored.get(k) for k in now} == now, name


# ------------------------------------------------------------------------------ README's sentences


def says(sentence):
    assert sentence in README, sentence


def compared():
    """The settings in which HAM and `sequential` were measured -> their rows."""
    found = {name: runs_of(name) for name in tables.SETTINGS.values()}
    return {name: runs for name, runs in found.items() if {"ham", "sequential"} <= set(runs)}


def test_readme_on_the_controls():
    says(
        "above `frozen` and `average` in every line that has them, above `sequential` in every line"
    )
    says("`sequential` in every line but T = 5.")
    below = [
        (name, control)
        for name, runs in compared().items()
        for control in {"frozen", "average", "sequential"} & set(runs)
        if gap(name, "ham", control)[0] <= 0
    ]
    assert below == [("cifar100-T5", "sequential")]
    says("with G_max = 5, nothing is merged")
    (run,) = runs_of("cifar100-T5")["ham"]
    assert run["tasks"][-1]["group_sizes"] == [1] * 5
    several = [name for name, runs in compared().items() if len(runs["ham"]) > 2]
    points = [gap(name, "ham", "sequential")[0] for name in several]
    says(f"HAM ends {min(points):.0f} to {max(points):.0f} points above one LoRA")
    points = [gap(n, "ham", "average")[0] for n, runs in compared().items() if "average" in runs]
    says(f"It is {min(points):.0f} to {max(points):.0f} above the mean of adapters trained alone")
    says("adapters trained alone (one seed in most settings)")
    seeds = [len(runs["average"]) for runs in compared().values() if "average" in runs]
    assert seeds.count(1) > len(seeds) / 2


def test_readme_on_growth():
    says(
        "is there from 10 tasks on (T = 10: one seed), but not clearly larger with 50 than with 20;"
    )
    says("that over `average` is smaller with 50.")
    gaps = tables.advantage()
    assert gaps[5][0] < 0 < min(gaps[t][0] for t in (10, 20, 50)) and len(gaps[10][2]) == 1
    assert abs(gaps[50][0] - gaps[20][0]) < math.hypot(gaps[50][1], gaps[20][1])
    short, long = (gap(name, "ham", "average") for name in ("cifar100", "cifar100-T50"))
    assert short[0] - long[0] > 2 * math.hypot(short[1], long[1])


def test_readme_on_forgetting():
    says(
        "**Less forgetting than `sequential`** from 10 tasks of CIFAR-100 on, for a little accuracy"
    )
    says("On CUB-200 HAM learns more, at ten times the learning rate, and forgets as much as")
    for name in set(compared()) - {"cifar100-T5"}:
        forgets, _ = gap(name, "ham", "sequential", "forgetting")
        learns, _ = gap(name, "ham", "sequential", "learning_accuracy")
        if name.startswith("cub200"):
            assert abs(forgets) < 1 and learns > 3
            assert gap(name, "ham", "average", "forgetting")[0] > 0
            assert len(runs_of(name)["average"]) == 1  # "and more than `average` (one seed)"
        else:
            assert forgets < -2 and -2.5 < learns < 0
    runs = runs_of("cub200")
    rates = [runs[m][0]["config"]["lr"] for m in ("ham", "sequential")]
    assert rates[0] == pytest.approx(10 * rates[1])


def test_readme_on_all_images():
    says("HAM ends no higher with all images than with 250 per class")
    half, every = (runs_of(name)["ham"][0] for name in ("cifar100-i250", "cifar100-all"))
    assert half["config"]["seed"] == every["config"]["seed"]
    points = every["final_accuracy"], half["final_accuracy"]
    assert points[0] <= points[1]
    says("({:.1f} and {:.1f} with seed 1993, on".format(*points))
    says("takes over 70 minutes on one thread")
    assert 70 < sum(every["seconds"].values()) / 60 < 75


def test_readme_on_the_parts():
    says(
        "**Which group a task joins makes no difference** that three seeds show, with random classes"
    )
    says("With α fixed at 1 it ends as high.")
    draws = []
    for name, changed in {
        "parts": ["random group", "one group (gain 5)", "α fixed at 1", "no pruning"],
        "superclasses": ["random group"],
    }.items():
        for label in changed:
            points, error = gap(name, "HAM", label)
            assert abs(points) < 2 * error < 0.5 and len(runs_of(name)[label]) == 3, label
        draws.append([[t["group"] for t in r["tasks"]] for r in runs_of(name)["random group"]])
    assert draws[0] == draws[1]  # "the same three random draws"

    says("without it, in a group per task, two thirds of the lead over `sequential` are gone")
    far, lead = (
        gap("parts", "HAM", "one group per task")[0],
        gap("cifar100", "ham", "sequential")[0],
    )
    assert far / lead == pytest.approx(2 / 3, abs=0.1)
    says("Five groups end above one, two and ten, and above a group for each task")
    lower = "one group", "G_max = 2", "G_max = 10", "one group per task", "mean of what was added"
    for label in lower:
        assert gap("parts", "HAM", label)[0] > 0 and clear("parts", "HAM", label), label
    assert gap("parts", "HAM", "one group", "learning_accuracy")[0] > 0
    assert gap("parts", "HAM", "one group per task", "forgetting")[0] < 0
    points = gap("parts", "HAM", "mean of what was added")[0]
    says(f"old tasks fade (*mean of what was added*), ends {points:.1f} lower.")
    points = [gap("parts", "HAM", f"ρ = {rho}")[0] for rho in (0.5, 0.3)]
    says("dropping half costs {:.1f}, and 0.7 of them {:.1f}.".format(*points))
    assert {len(runs) for runs in runs_of("parts").values()} == {3}
    says("and sums in five groups end where one group per task does.")
    assert abs(gap("parts", "sum (literal)", "one group per task")[0]) < 0.5


def test_readme_on_other_methods():
    says("TreeLoRA and SAFM, as written here, end within a point of `sequential` and `frozen`.")
    for name in ("cifar100", "cub200"):
        for one, other in (("treelora", "sequential"), ("safm", "frozen")):
            assert abs(gap(name, one, other)[0]) < 1
    says("**HAM is half a point above the best of them, O-LoRA, and one above EWC at T = 20 of")
    says(
        "at T = 50 (O-LoRA alone) and on CUB-200, with one seed, it is not shown to be above them."
    )
    for method, points in (("o_lora", 0.5), ("ewc", 1.0)):
        assert abs(gap("cifar100", "ham", method)[0] - points) < 0.25
        assert clear("cifar100", "ham", method)
    seeds = {
        (name, m): len(runs[m])
        for name, runs in compared().items()
        for m in {"o_lora", "ewc"} & set(runs)
        if name != "cifar100"
    }
    assert seeds == {("cifar100-T50", "o_lora"): 1, ("cub200", "o_lora"): 1, ("cub200", "ewc"): 1}


def test_readme_on_held_out_images():
    found = tables.held_out()
    few, long, many = (found["cifar100", t, n] for t, n in ((20, 50), (50, 50), (20, 250)))
    bird = found["cub200", 10, None]

    def above(of, method):
        return tables.paired(of["ham"][2], of[method][2])[0]

    says(
        "at T = 20 HAM is less than a point above both, with 50 and with 250 images per class, and"
    )
    assert all(0 < above(of, m) < 1 for of in (few, many) for m in ("o_lora", "ewc"))
    says(
        "above EWC (at its rate for T = 20) and below O-LoRA (one seed), on CUB-200 below both (one"
    )
    assert {len(of[m][2]) for of, m in ((long, "o_lora"), (bird, "o_lora"), (bird, "ewc"))} == {1}
    assert above(long, "o_lora") < 0 < above(long, "ewc")
    assert max(above(bird, "o_lora"), above(bird, "ewc")) < 0
    points = above(bird, "sequential"), -above(bird, "average")
    says("there HAM is {:.1f} above `sequential` and {:.1f} below `average`.".format(*points))
    assert {len(bird[m][2]) for m in ("ham", "sequential", "average")} == {1}  # "one seed"

    def times(of, method):
        seconds = [
            statistics.mean(r["seconds"]["train"] for r in of[m][2]) for m in (method, "ham")
        ]
        return f"{seconds[0] / seconds[1]:.1f} times"

    says(f"this version of TreeLoRA trained for {times(bird, 'treelora')} as long as HAM")
    says(f"SAFM {times(bird, 'safm')}, EWC {times(bird, 'ewc')}, O-LoRA {times(bird, 'o_lora')}")
    says(f"(at T = 50 {times(long, 'o_lora')}, before its")


def test_readme_on_tau():
    """Every run of HAM under results/, whatever its own τ is."""
    says("has a cosine near 0 with them (at most 0.13):")
    says("in every run of HAM under Measured the first G_max tasks opened a group each.")
    files = sorted((ROOT / "results").glob("*-ham-*/results.json"))
    runs = [json.loads(file.read_text()) for file in files]
    for r in runs:
        found, most = [s for task in r["tasks"] for s in task["similarities"]], r["config"]["g_max"]
        assert max(found) < 0.13
        assert [task["group"] for task in r["tasks"]][:most] == list(range(most))
    assert runs
