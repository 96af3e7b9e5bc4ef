"""Tests of the tables: by hand, and that the committed ones are what results/ says."""

import json

import matplotlib.image
import pandas as pd
import pytest

from extras import tables


def write(folder, method, seed, final, total=20, name="i50", **result):
    """A results.json with no more than what a table reads of it."""
    config = {"dataset": "cifar100", "tasks": total, "method": method, "name": name, "seed": seed}
    config |= {"model": "vit", "img_size": 160, "epochs": 5, "images_per_class": None}
    result |= {"parameters_stored": 1_234_400, "parameters_trained": 9_400}
    result |= {"config": config, "final_accuracy": final, "test_images_per_task": [600, 500]}
    result |= {"forgetting": 80 - final, "hardware": "cpu", "versions": {"torch": "2", "timm": "1"}}
    run = folder / f"cifar100-T{total}-{method}-{name}-s{seed}"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(result))


def cells(markdown):
    return [[x.strip() for x in line.split("|")[1:-1]] for line in markdown.splitlines()]


@pytest.fixture
def results(tmp_path):
    """One setting, of whose methods some have other seeds; a null, and keys that are missing."""
    finals = {"ham": (70.0, 74.0, 72.0), "sequential": (69.0, 71.0, 70.0), "average": (69.0, 75.0)}
    for method, values in (finals | {"ewc": (71.0, 70.0)}).items():
        for seed, final in enumerate(values, 1994 if method == "ewc" else 1993):
            write(tmp_path, method, seed, final, peak_memory_bytes=None if seed > 1993 else 2**31)
    write(tmp_path, "frozen", 1993, 50.0)
    write(tmp_path, "joint", 1993, 76.0, total=1)
    return tmp_path


def test_claims_are_means_and_paired_differences(results):
    (line,) = cells(tables.claims(results))[2:]  # HAM − sequential: 1, 3 and 2
    finals = ["72.0 ± 2.0", "70.0 ± 1.0", "72.0 ± 4.2", "50.0", "76.0"]
    gaps = ["**+2.0 ± 0.6**", "+0.0 ± 1.0", "14 %", "-20.0 / -19.0", "3"]
    assert line == ["CIFAR-100, 50 per class, T = 20", *finals, *gaps]
    assert cells(tables.growth(results))[2][1:] == ["**+2.0 ± 0.6**", "3", "+1.0"]


def test_a_difference_is_bold_from_two_standard_errors_over_three_seeds():
    cases = {(1, 3, 2): "**+2.0 ± 0.6**", (-1, -3, -2): "**-2.0 ± 0.6**", (1, 3, 0.5): "+1.5 ± 0.8"}
    cases |= {(1, 2): "+1.5 ± 0.5", (-0.04,): "+0.0", (): "–"}
    for gap, text in cases.items():
        assert tables.ahead(pd.Series(gap, dtype=float)) == text


def test_other_seeds_missing_rows_and_missing_figures(results):
    ham, _, ewc = cells(tables.others(results))[2:]  # neither average nor frozen nor joint
    assert ham[1:] == ["ham", "72.0 ± 2.0", "", "8.0 ± 2.0", "–", "1,234 k", "3"]
    assert ewc[1:4] == ["ewc", "70.5 ± 0.7", "+2.5 ± 0.5"]  # 3 and 2, seeds 1994 and 1995
    memory = {line[1]: line[7] for line in cells(tables.efficiency(results))[2:]}
    assert memory["ham"] == "2.0" and memory["ewc"] == "–"
    budget, nothing, measures = tables.settings(results).split("\n\n")
    missing = "treelora, safm, sd_lora, o_lora"
    assert cells(budget)[2][1:] == ["vit", "160", "5", "all", "1,100", "cpu", "2", "1", missing]
    assert "CUB-200, T = 10;" in nothing and ", 50 per class, T = 20;" not in nothing
    assert cells(measures)[-2][-1] == "1994, 1995"  # last: ham among its parts


def test_parts_and_related_superclasses(tmp_path):
    listed = (tables.ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").split()
    kinds = ["apt".index(kind) for kind in tables.KINDS]
    made = {"": (70.0, kinds), "-random": (69.5, kinds), "-super": (60.0, kinds)}
    for part, (final, groups) in (made | {"-super-random": (59.0, [0] * 20)}).items():
        r = {"class_mean_oracle": 71.0, "classes": listed, "tasks": [{"group": g} for g in groups]}
        write(tmp_path, "ham", 1993, final, name=f"i50{part}", **r)
    lines = [[line[1], line[2], line[3], line[6]] for line in cells(tables.parts(tmp_path))[2:]]
    assert lines[:2] == [["ham", "70.0", "", "1.0"], ["random group", "69.5", "+0.5", "1.5"]]
    assert lines[2:] == [["ham", "60.0", "", "11.0"], ["random group", "59.0", "+1.0", "12.0"]]
    # pairs of one kind: 10 animals 45, 4 plants and landscapes 6, 6 things 15, of 190 in all
    shares = [line[1:] for line in cells(tables.related(tmp_path))[2:]]
    assert shares == [["190", "35 %"], ["66", "100 %"], ["190", "35 %"]]


def test_the_committed_tables_are_what_results_say():
    for file in (tables.ROOT / "README.md", tables.RESULTS / "README.md"):
        text = file.read_text("utf-8")
        assert "<!-- table" in text and tables.fill(text) == text, file


def test_the_figure_is_drawn(tmp_path):
    tables.figure().savefig(tmp_path / "a.png", dpi=40)
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05
