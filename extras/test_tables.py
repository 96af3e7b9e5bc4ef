"""Tests of the tables: by hand, and that the committed ones are what results/ says."""

import json
import re

import numpy as np
import pytest

pd = pytest.importorskip("pandas", reason="extras/requirements.txt is not installed")
pytest.importorskip("tabulate", reason="extras/requirements.txt is not installed")
stats = pytest.importorskip("scipy.stats", reason="extras/requirements.txt is not installed")
image = pytest.importorskip("matplotlib.image", reason="extras/requirements.txt is not installed")

from extras import figures, tables


def write(folder, method, seed, final, total=20, name="i50", **result):
    """A results.json with no more than what a table reads of it."""
    config = {"dataset": "cifar100", "tasks": total, "method": method, "name": name, "seed": seed}
    config |= {"model": "vit", "img_size": 160, "epochs": 5, "images_per_class": None}
    config |= {"precision": "fp32", "lr": 3e-4}
    plain = {
        "ham_sha256": "0123456789",
        "parameters_stored": 1_234_400,
        "parameters_trained": 9_400,
    }
    plain |= {"config": config, "final_accuracy": final, "test_images_per_task": [600, 500]}
    plain |= {"forgetting": 80 - final, "hardware": "cpu", "versions": {"torch": "2", "timm": "1"}}
    plain["tasks"] = []
    run = folder / f"cifar100-T{total}-{method}-{name}-s{seed}"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(plain | result))


@pytest.fixture
def results(tmp_path):
    """One setting, of whose methods some have other seeds; a null, and keys that are missing."""
    finals = {"ham": (70.0, 74.0, 72.0), "sequential": (69.0, 71.0, 70.0), "average": (69.0, 75.0)}
    for method, values in (finals | {"ewc": (71.0, 70.0)}).items():
        for seed, final in enumerate(values, 1994 if method == "ewc" else 1993):
            tasks = [{"seconds": {"train": 10.0 * t}} for t in range(seed - 1992)][-1:] * 2
            write(tmp_path, method, seed, final, tasks=tasks)
    write(tmp_path, "frozen", 1993, 50.0)
    write(tmp_path, "joint", 1993, 76.0, total=1)
    return tmp_path


def test_controls_are_means_and_paired_differences(results):
    (line,) = tables.controls(results).reset_index().values.tolist()  # HAM − sequential: 1, 3, 2
    finals = ["72.0 ± 2.0", "70.0 ± 1.0", "72.0 ± 4.2", "50.0", "76.0"]
    # t of 2 degrees of freedom 4.303, standard deviation 1: 4.303 / √3 = 2.48; of 1: 12.706 / 1
    gaps = ["+2.0 [-0.5, +4.5]", "+0.00 [-12.7, +12.7]", "-2.0 [-4.5, +0.5]", "3"]
    assert line == ["CIFAR-100, 50 per class, T = 20", *finals, *gaps]
    growth = tables.growth(results).loc["CIFAR-100, 50 per class, T = 20"]
    assert growth.tolist() == ["+2.0 [-0.5, +4.5]", "", "3", ""]


def test_the_headline_has_intervals_and_seeds(results):
    table = tables.headline(results)["50 per class, T = 20"].to_dict()
    assert table == {
        "ham": "72.0 [67.0, 77.0] (3)",  # 4.303 × 2 / √3 = 4.97
        "sequential": "70.0 [67.5, 72.5] (3)",
        "average": "72.0 [33.9, 110.1] (2)",  # 12.706 × 3
        "frozen": "50.0 (1)",
        "joint": "76.0 (1)",
    }
    assert (tables.headline(results)["CUB-200, T = 10"] == "–").all()
    first = tables.first_runs(results).loc["50 per class, T = 20"]
    assert first.tolist() == ["final accuracy 70.0 %", "0", "cpu, fp32"]


def test_growth_has_the_slope_on_log_t(tmp_path):
    """Gaps 1, 2 at T = 5; 2, 4 at 10; 6, 6 at 20: with x = -1, 0, 1 slopes are 2.5 and 2."""
    for total, gaps in {5: (1, 2), 10: (2, 4), 20: (6, 6)}.items():
        for seed, gap in enumerate(gaps, 1993):
            write(tmp_path, "ham", seed, 60.0 + gap, total)
            write(tmp_path, "sequential", seed, 60.0, total)
    growth = tables.growth(tmp_path)
    assert growth.index[-1] == "every doubling of T" and len(growth) == 4
    assert growth.iloc[-1].tolist() == ["+2.2 [-0.9, +5.4]", "", "2", ""]  # 12.706 × 0.25


def test_holm_by_hand():
    # times 4, 3, 2, 1 in rising order, never below the one before, never above 1
    p = tables.holm(pd.Series({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005, "e": np.nan}))
    np.testing.assert_allclose(p[["d", "b", "c", "a"]], [0.02, 0.03, 0.06, 0.06], rtol=1e-12)
    assert len(p) == 4 and tables.holm(pd.Series([0.8, 0.9])).tolist() == [1.0, 1.0]


def test_differences_are_as_scipy_has_them_and_bold_only_where_holm_leaves_them():
    gaps = pd.DataFrame({"a": [1.0, 1.2, 1.1], "b": [1, 3, 2], "c": [-0.04] + 2 * [np.nan]})
    gaps = gaps.assign(none=np.nan, d=[-2.0, -2.1, np.nan])
    text, bold = tables.differences(gaps), []
    tested = {key: stats.ttest_1samp(gaps[key].dropna(), 0) for key in "abd"}
    for key, t in tested.items():  # Holm by its own words: step down until one fails
        low, high = t.confidence_interval()
        assert f"[{low:+.1f}, {high:+.1f}]" in text[key]
    for step, key in enumerate(sorted(tested, key=lambda key: tested[key].pvalue)):
        if tested[key].pvalue > 0.05 / (len(tested) - step):
            break
        bold.append(key)
    assert bold == ["a", "d"] == [key for key in gaps if "**" in text[key]]
    assert text["a"] == "**+1.1 [+0.9, +1.3]**" and text["b"] == "+2.0 [-0.5, +4.5]"
    assert text["c"] == "-0.04" and text["none"] == "–"  # one seed: never bold


def test_other_seeds_missing_rows_and_missing_figures(results):
    ham, ewc = tables.others(results).reset_index().values.tolist()  # no average, frozen, joint
    assert ham[1:] == ["ham", "72.0 ± 2.0", "", "8.0 ± 2.0", "–", "1,234 k", "3"]
    assert ewc[1:4] == ["ewc", "70.5 ± 0.7", "+2.5 [-3.9, +8.9]"]  # 3 and 2, seeds 1994 and 1995
    measures = tables.measures(results).loc["CIFAR-100, 50 per class, T = 20"]
    seconds = measures["training s"]
    assert seconds["ham"] == "20 ± 20" and seconds["ewc"] == "30 ± 14" and seconds["joint"] == "0"
    assert measures["which seeds"]["ewc"] == "1994, 1995"
    write(results, "ewc", 1996, 72.0, tasks=[{"seconds": {"train": 5e3}}], hardware="slow")
    elsewhere = tables.measures(results).loc["CIFAR-100, 50 per class, T = 20", "ewc"]
    assert (elsewhere["training s"], elsewhere["which seeds"]) == ("30 ± 14", "1994, 1995, 1996")
    (results / "cifar100-T20-ewc-i50-s1996" / "results.json").unlink()
    budget = tables.settings(results)
    want = ["vit", "160", "5", "all", "1,100", "fp32", "A1"]
    assert budget.loc["CIFAR-100, 50 per class, T = 20"].tolist() == want
    assert tables.builds(results).loc["A1"].tolist() == ["0123456", "2", "1", "cpu", "fp32", "12"]


def test_builds_with_a_first_task_of_the_same_bits_have_one_letter(tmp_path):
    for method, seed, sha, loss in (
        ("ham", 1993, "a", 0.1),
        ("sequential", 1993, "b", 0.1),  # the same bits as a's
        ("sequential", 1994, "b", 0.2),
        ("ham", 1994, "c", 0.2),  # as b's, so as a's
        ("ham", 1995, "d", 0.2),  # another seed: says nothing
        ("average", 1993, "e", 0.1 + 2**-55),  # the last digit
        ("frozen", 1993, "f", None),  # trains nothing
        ("frozen", 1994, "a", None),
    ):
        tasks = [{"loss": loss, "seconds": {"train": 1.0}}]
        write(tmp_path, method, seed, 50.0, ham_sha256=sha, tasks=tasks)
    made = tables.builds(tmp_path)["ham.py"].to_dict()
    assert {made[x] for x in ("A1", "A2", "A3")} == {*"abc"} and {*made.values()} == {*"abcdef"}
    assert {x[0] for x in made} == {*"ABCD"} and tables.builds(tmp_path)["runs"]["A1"] == "2"
    assert tables.measures(tmp_path)["builds"].xs("ham", level="row").tolist()[0].count(",") == 2


def test_noise_compares_runs_with_the_same_seed(tmp_path):
    def tasks(*accuracies, last=0):
        full = [0.0] * 3  # five groups; the third task joins 0, the fourth `last`
        similarities = [[], [0.1], [*full, 0.1, 0.3], [*full, 0.2, 0.5]]
        rest = zip(accuracies, [0, 1, 0, last], similarities)
        seconds = {"train": 1.0}
        return [
            {"accuracy": a, "group": g, "similarities": s, "seconds": seconds} for a, g, s in rest
        ]

    write(tmp_path, "ham", 1993, 70.0, tasks=tasks(90.0, 80.0, 75.0, 70.0))
    again = {"tasks": tasks(91.0, 78.5, 75.0, 70.5, last=1), "hardware": "another"}
    write(tmp_path, "ham", 1993, 70.5, name="i50-again", **again)
    write(tmp_path, "ham", 1994, 71.0, tasks=tasks(90.0, 80.0, 75.0, 71.0))  # not done again
    table = tables.noise(tmp_path).reset_index().values.tolist()
    assert table == [["50", "again", "1993", "another", "70.5", "1.5", "1", "2", "2", "0.250"]]


def test_parts_and_groups_of_a_fixed_rank(tmp_path):
    for part, final in {"": 70.0, "-random": 69.5, "-super": 60.0, "-super-random": 59.0}.items():
        write(tmp_path, "ham", 1993, final, name=f"i50{part}", class_mean_oracle=71.0)
    write(tmp_path, "ham", 1993, 69.0, name="i50-R8", parameters_stored=400_000)
    write(tmp_path, "ham", 1993, 67.0, name="i50-R8-random")
    table = tables.parts(tmp_path).reset_index()
    lines = table[["changed", "final accuracy", "ham − it", "drift"]].values.tolist()
    assert lines[:2] == [["ham", "70.0", "", "1.0"], ["random group", "69.5", "+0.5", "1.5"]]
    assert lines[2:] == [["ham", "60.0", "", "11.0"], ["random group", "59.0", "+1.0", "12.0"]]
    ham, cut, drawn = tables.fixed_rank(tmp_path).reset_index().values.tolist()
    assert ham[1:5] == ["ham", "70.0", "", ""] and ham[6] == "1,234 k"
    assert cut[1:] == ["ham, R = 8", "69.0", "+1.0", "", "11.0", "400 k", "1"]
    assert drawn[1:5] == ["ham, R = 8, random group", "67.0", "+3.0", "+2.0"]


def test_held_out_runs_by_budget_and_rate(tmp_path):
    lines, data = [], {"dataset": "cifar100", "tasks": 5, "images_per_class": 125}
    for method, lr, seed, end in (
        ("ham", 1e-3, 1993, 60.0),
        ("ham", 1e-3, 1996, 62.0),
        ("ham", 3e-4, 1993, 70.0),
        ("sequential", 1e-4, 1993, 50.0),
    ):
        line = {"settings": data | {"method": method, "lr": lr, "seed": seed}, "config": {"lr": lr}}
        lines += [line | {"class-mean": [80.0, end], "tasks_learnt": 5}]
    lines += [lines[0] | {"code_change": "another scale"}, lines[0] | {"tasks_learnt": 3}]
    lines += [lines[0] | {"class-mean": [80.0, None]}]  # stopped early
    lines += [lines[0] | {"settings": lines[0]["settings"] | {"rho": 1.0, "lr": None}}]
    config = {"lr": 1e-3, "penalty": 0.5}
    settings = data | config | {"method": "o_lora", "seed": 1993}
    lines += [lines[0] | {"config": config, "settings": settings}]
    (tmp_path / "validate").mkdir()
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "validate" / "screening.jsonl").write_text(text)
    table = tables.held_out(tmp_path).droplevel([0, 1, 2, 3, 4, 5])["rate: accuracy (runs)"]
    assert table.to_dict() == {
        ("3", "ham", ""): "0.001: 60.0 (1)",
        ("5", "ham", ""): "0.0003: 70.0 (1), 0.001: 61.0 (2)",
        ("5", "ham", "another scale"): "0.001: 60.0 (1)",
        ("5", "ham", "rho 1"): "0.001: 60.0 (1)",
        ("5", "sequential", ""): "0.0001: 50.0 (1)",
        ("5", "o_lora", "λ = 0.5"): "0.001: 60.0 (1)",
    }
    law = tables.held_out(tmp_path)["by the law"]
    assert set(law.xs("ham", level="method")) == {"0.00015"}  # 2,500 images, five times
    few = settings | {"images_per_class": 50, "seed": 1993}  # where methods are compared
    for lr, penalty, end in ((1e-3, 0.5, 60.0), (3e-3, 0.5, 64.0), (1e-3, 5.0, 58.0)):
        config = {"lr": lr, "penalty": penalty, "tasks": 20}
        line = {"config": config, "settings": few | config, "class-mean": [80.0, end]}
        lines += [lines[0] | line]
    lines += [lines[-3] | {"class-mean": [80.0, 61.0]}]  # again
    lines += [lines[-1] | {"settings": lines[-1]["settings"] | {"rho": 1.0}}]
    lines += [lines[-1] | {"code_change": "another penalty"}]
    (tmp_path / "validate" / "screening.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for method in ("ham", "o_lora"):
        write(tmp_path, method, 1993, 70.0)
    ((index, row),) = tables.tuned(tmp_path).iterrows()
    assert index == ("CIFAR-100, 50 per class, T = 20", "o_lora")
    rates, weights = "0.001: 60.5 (2), 0.003: 64.0 (1)", "0.5: 60.5 (2), 5: 58.0 (1)"
    assert row.tolist() == [rates, "0.0003", weights, "5", "7"]


def test_groupings_against_the_mean_of_the_draws_of_their_seed(tmp_path):
    lines = []
    for seed, ends in ((1993, [60.0, 50.0, 52.0]), (1994, [64.0, 58.0, 62.0])):
        for by, end in zip(("adapter", "random", "random 2"), ends):
            line = {"by": by, "rank": 2, "scale": 0.4, "final_accuracy": end}
            lines.append(json.dumps(line | {"config": {"seed": seed}}))
    (tmp_path / "validate").mkdir()
    (tmp_path / "validate" / "alone.jsonl").write_text("\n".join([*lines, lines[0]]))  # repeated
    table = tables.alone(tmp_path)
    assert table.index.tolist() == [("2", "0.4", "adapter"), ("2", "0.4", "random")]
    assert table.loc[("2", "0.4", "adapter")].tolist() == ["62.0 ± 2.8", "+6.5 [-25.3, +38.3]", "2"]
    assert table.loc[("2", "0.4", "random")].tolist() == ["55.5 ± 5.5", "", "2"]


def test_the_grid_has_the_papers_own_figures_where_someone_types_them(results):
    grid = tables.grid(results=results)
    here = grid.xs("here: vit, 160 px, all images").loc["ham"]
    assert here["CIFAR-100", 20] == "72.0 ± 2.0" and here["ImageNet-R", 20] == ""
    assert (grid.loc["the paper", "HAM (paper)"] == "").all()
    published = grid.xs("SD-LoRA", level="method")["ImageNet-R", 20]
    assert published.tolist() == ["75.26"]  # as printed
    paper = {("HAM", "ImageNet-R", 20): 1.5, ("L2P", "Tiny-ImageNet", 20): 2}
    typed = tables.grid(paper, results).loc["the paper"]
    assert typed.loc["HAM (paper)", ("ImageNet-R", 20)] == "1.5"
    assert typed.loc["L2P (paper)", ("Tiny-ImageNet", 20)] == "2"
    assert "ImageNet-R, T = 20" in tables.markdown(grid).splitlines()[0]


def test_the_committed_tables_are_what_results_say(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    tables.main()
    assert "<!-- table" in (tables.ROOT / "README.md").read_text("utf-8")
    pages = [tables.RESULTS / name for name in ("README.md", "all.md")] + [
        tables.ROOT / "README.md"
    ]
    shown = "".join(page.read_text("utf-8") for page in pages)
    long, _, short = (page.read_text("utf-8") for page in pages)
    assert len(long.split()) <= 4000  # what a person reads in an hour
    assert len(re.sub(r"[|]|-{3,}", "", short).split()) <= 1500  # in ten minutes; no bars of tables
    assert all(f"<!-- table {name} -->" in shown for name in tables.TABLES)


def test_figures_are_drawn(tmp_path):
    figures = tables.pictures()
    for figure in figures.values():
        figure.savefig(tmp_path / "a.png", dpi=40)
        assert image.imread(tmp_path / "a.png").std() > 0.05
    assert len(figures["accuracy.svg"].axes[0].get_lines()) == 5


def test_what_is_stored_ends_at_what_runs_have_stored():
    setting = "CIFAR-100, 50 per class, GPU, T = 50"
    runs = tables.runs(settings=[setting], only=["ham", "sequential", "ham, R = 8"])
    _, right = figures.fixed_rank(runs, runs).axes
    ends = [line.get_ydata()[-1] for line in right.get_lines()]
    stored = runs.groupby("row")["parameters_stored"].mean()[runs["row"].unique()]
    assert ends == pytest.approx(stored / 1e3) and len(ends) == 3


def test_labels_are_moved_apart_in_their_order():
    heights = figures.apart(pd.Series({"b": 1.1, "a": 1.0, "c": 5.0}), 0.5)
    assert heights.to_dict() == {"a": 1.0, "b": 1.5, "c": 5.0}


def test_the_demos_rates_are_the_best_of_those_tried_and_none_is_at_an_edge():
    from extras import demo, measure_demo

    found = json.loads(measure_demo.FILE.read_text("utf-8"))
    for method, tried in found["tried"].items():
        rates = sorted(tried, key=float)
        best = max(rates, key=lambda lr: sum(tried[lr]))
        assert float(best) == demo.RATES[method] and best not in (rates[0], rates[-1])
        assert [float(lr) for lr in rates] == pytest.approx(measure_demo.GRID)
    assert not {*found["draws"]} & {run["seed"] for run in found["runs"]}
