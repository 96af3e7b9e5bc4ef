"""Tests of the tables: by hand, and that the committed ones are what results/ says."""

import json

import numpy as np
import pytest

pd = pytest.importorskip("pandas", reason="extras/requirements.txt is not installed")
pytest.importorskip("tabulate", reason="extras/requirements.txt is not installed")
stats = pytest.importorskip("scipy.stats", reason="extras/requirements.txt is not installed")
image = pytest.importorskip("matplotlib.image", reason="extras/requirements.txt is not installed")

from extras import figure, tables


def write(folder, method, seed, final, total=20, name="i50", **result):
    """A results.json with no more than what a table reads of it."""
    config = {"dataset": "cifar100", "tasks": total, "method": method, "name": name, "seed": seed}
    config |= {"model": "vit", "img_size": 160, "epochs": 5, "images_per_class": None}
    config["grouping"] = "cosine"
    plain = {"parameters_stored": 1_234_400, "parameters_trained": 9_400}
    plain |= {"config": config, "final_accuracy": final, "test_images_per_task": [600, 500]}
    plain |= {"forgetting": 80 - final, "hardware": "cpu", "versions": {"torch": "2", "timm": "1"}}
    run = folder / f"cifar100-T{total}-{method}-{name}-s{seed}"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(plain | result))


@pytest.fixture
def results(tmp_path):
    """One setting, of whose methods some have other seeds; a null, and keys that are missing."""
    finals = {"ham": (70.0, 74.0, 72.0), "sequential": (69.0, 71.0, 70.0), "average": (69.0, 75.0)}
    for method, values in (finals | {"ewc": (71.0, 70.0)}).items():
        for seed, final in enumerate(values, 1994 if method == "ewc" else 1993):
            tasks = [{"seconds": {"train": 10.0 * t}} for t in (1, seed - 1992)]
            write(tmp_path, method, seed, final, tasks=None if seed > 1994 else tasks)
    write(tmp_path, "frozen", 1993, 50.0)
    write(tmp_path, "joint", 1993, 76.0, total=1)
    return tmp_path


def test_controls_are_means_and_paired_differences(results):
    (line,) = tables.controls(results).reset_index().values.tolist()  # HAM − sequential: 1, 3, 2
    finals = ["72.0 ± 2.0", "70.0 ± 1.0", "72.0 ± 4.2", "50.0", "76.0"]
    # t of 2 degrees of freedom 4.303, standard deviation 1: 4.303 / √3 = 2.48; of 1: 12.706 / 1
    gaps = ["+2.0 [-0.5, +4.5]", "+0.0 [-12.7, +12.7]", "-2.0 [-4.5, +0.5]", "14 %", "3"]
    assert line == ["CIFAR-100, 50 per class, T = 20", *finals, *gaps]
    growth = tables.growth(results).loc["CIFAR-100, 50 per class, T = 20"]
    assert growth.tolist() == ["+2.0 [-0.5, +4.5]", "", "3"]


def test_the_headline_has_intervals_and_seeds(results):
    table = tables.headline(results)["CIFAR-100, T = 20"].to_dict()
    assert table == {
        "ham": "72.0 ± 5.0 (3)",  # 4.303 × 2 / √3 = 4.97
        "sequential": "70.0 ± 2.5 (3)",
        "average": "72.0 ± 38.1 (2)",  # 12.706 × 3
        "frozen": "50.0 (1)",
        "joint": "76.0 (1)",
    }
    assert (tables.headline(results)["CUB-200, T = 10"] == "–").all()


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
    assert text["c"] == "+0.0" and text["none"] == "–"  # one seed: never bold


def test_other_seeds_missing_rows_and_missing_figures(results):
    ham, _, ewc = tables.others(results).reset_index().values.tolist()  # no average, frozen, joint
    assert ham[1:] == ["ham", "72.0 ± 2.0", "", "8.0 ± 2.0", "–", "1,234 k", "3"]
    assert ewc[1:4] == ["ewc", "70.5 ± 0.7", "+2.5 [-3.9, +8.9]"]  # 3 and 2, seeds 1994 and 1995
    seconds = tables.costs(results)["training s"].droplevel(0)
    assert seconds["ham"] == "25 ± 7" and seconds["ewc"] == "30" and seconds["joint"] == "–"
    budget = tables.settings(results)
    want = ["vit", "160", "5", "all", "1,100", "cpu", "2", "1", ""]
    assert budget.loc["CIFAR-100, 50 per class, T = 20"].tolist() == want
    assert budget.loc["CUB-200, T = 10", "not measured"] == "all"
    assert tables.measures(results).iloc[-2]["which seeds"] == "1994, 1995"  # last: HAM's parts


def test_a_method_shows_where_it_was_run_and_a_run_may_have_a_name_of_its_own(results, monkeypatch):
    assert "first" not in tables.settings(results).to_string()
    write(results, "first", 1993, 60.0)
    assert "first" in tables.others(results).index.get_level_values("method")
    write(results, "ham", 1993, 90.0, name="i50-law")
    setting = {"by the law": ("cifar100", 20, "i50", {"ham": "i50-law"})}
    monkeypatch.setattr(tables, "SETTINGS", setting)
    assert tables.controls(results).loc["by the law", "ham − sequential"] == "+21.0"


def test_noise_compares_runs_with_the_same_seed(tmp_path):
    def tasks(*accuracies, last=0):
        similarities = [[], [0.1], [0.3, 0.1], [0.2, 0.5]]  # the third joins 0, the fourth `last`
        rest = zip(accuracies, [0, 1, 0, last], similarities)
        return [{"accuracy": a, "group": g, "similarities": s} for a, g, s in rest]

    write(tmp_path, "ham", 1993, 70.0, tasks=tasks(90.0, 80.0, 75.0, 70.0))
    alone = tables.noise(tmp_path)
    assert alone.index.get_level_values("run").tolist() == ["ham", "all 1 HAM runs"]
    again = {"tasks": tasks(91.0, 78.5, 75.0, 70.5, last=1), "hardware": "another"}
    write(tmp_path, "ham", 1993, 70.5, name="i50-again", **again)
    write(tmp_path, "ham", 1994, 71.0, tasks=tasks(90.0, 80.0, 75.0, 71.0))  # not done again
    table = tables.noise(tmp_path).reset_index().values.tolist()
    assert table[0] == ["ham", "1993", "cpu", "70.0", "0.0", "0", "2", "2", "0.250"]
    assert table[1] == ["again", "1993", "another", "70.5", "1.5", "1", "2", "2", "0.250"]
    want = ["all 2 HAM runs", *5 * [""], "4", "4", "0.250"]  # -again is no result
    assert table[2] == want


def test_parts_and_related_superclasses(tmp_path):
    listed = (tables.ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").split()
    kinds = ["apt".index(kind) for kind in tables.KINDS]
    made = {"": (70.0, kinds), "-random": (69.5, kinds), "-super": (60.0, kinds)}
    for part, (final, groups) in (made | {"-super-random": (59.0, [0] * 20)}).items():
        r = {"class_mean_oracle": 71.0, "classes": listed, "tasks": [{"group": g} for g in groups]}
        write(tmp_path, "ham", 1993, final, name=f"i50{part}", **r)
    table = tables.parts(tmp_path).reset_index()
    lines = table[["changed", "final accuracy", "ham − it", "drift"]].values.tolist()
    assert lines[:2] == [["ham", "70.0", "", "1.0"], ["random group", "69.5", "+0.5", "1.5"]]
    assert lines[2:] == [["ham", "60.0", "", "11.0"], ["random group", "59.0", "+1.0", "12.0"]]
    # pairs of one kind: 10 animals 45, 4 plants and landscapes 6, 6 things 15, of 190 in all
    shares = tables.related(tmp_path).values.tolist()
    assert shares == [["190", "35 %"], ["66", "100 %"], ["190", "35 %"]]


def test_choices_by_hand(tmp_path):
    assert tables.choices(tmp_path).empty
    tasks = [{"leaves": [], "taken": []}, {"leaves": [[0]], "taken": [[4], [4]]}]
    tasks += [{"leaves": [[0], [1]], "taken": [[2, 2], [4, 0]]}]  # equal shares; always one's
    tasks += [{"leaves": [[2], [0], [1]], "taken": [[5, 0, 0], [1, 2, 1]]}]
    write(tmp_path, "treelora", 1993, 60.0, tasks=tasks)
    table = tables.choices(tmp_path).reset_index().values.tolist()
    # 1 and 0 of ln 2; 0 and (2 × ¼ ln 4 + ½ ln 2) / ln 3 = 0.946
    assert table[0] == ["1", "9", "0.50", "0.00", "1.00", "3", "1.00", "0.33"]
    assert table[1] == ["2", "8", "0.47", "0.00", "0.95", "1", "0.50", "0.33"]


def test_held_out_lines(tmp_path):
    """Any number of lines: the law has those at the defaults, side by side those of one GPU."""
    lines, data = [], {"dataset": "cifar100", "tasks": 5, "images_per_class": 125}
    for method, lr, seed, end in (
        ("ham", 1e-3, 1993, 60.0),
        ("ham", 1e-3, 1996, 62.0),
        ("ham", 3e-4, 1993, 70.0),  # higher, but on one seed
        ("sequential", 1e-4, 1993, 50.0),
        ("sequential", 1e-4, 1996, 51.0),
    ):
        line = {"settings": data | {"method": method, "lr": lr, "seed": seed}, "config": {"lr": lr}}
        line |= {"class-mean": [80.0, end], "head": [70.0, 55.123], "oracle": 65.0}
        line |= {"tasks_learnt": 5, "group_sizes": [2, 3], "hardware": "NVIDIA"}
        lines += [line | {"seconds": {"train": 9.0}}]
    lines += [lines[0] | {"code_change": "another scale"}, lines[0] | {"tasks_learnt": 3}]
    changed = lines[0]["settings"] | {"rho": 1.0, "lr": None}
    lines += [lines[0] | {"settings": changed, "class-mean": [80.0, 59.0]}]
    for penalty, end in ((0.5, 58.0), (5.0, 57.0)):  # the first is the default
        config = {"lr": 1e-3, "penalty": penalty}
        line = lines[0] | {"config": config, "class-mean": [80.0, end]}
        lines += [line | {"settings": data | config | {"method": "o_lora", "seed": 1993}}]
    (tmp_path / "validate").mkdir()
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "validate" / "screening.jsonl").write_text(text)
    law = tables.law(tmp_path)
    assert law.loc["ham", "", 2500].tolist() == [
        "0.00015",
        "0.0003: 70.0 (1), 0.001: 61.0 (2)",
        "2",
    ]
    assert law.loc["o_lora", "5", 2500].tolist() == ["0.00015", "0.001: 57.0 (1)", "1"]
    table = tables.side_by_side(tmp_path).reset_index().values.tolist()
    setting = "CIFAR-100, T = 5, 125"
    assert table[0][:4] == [setting, "ham", "0.001 (of 2)", "61.0 ± 1.4"]
    assert table[1][1:5] == ["sequential", "0.0001 (of 1)", "50.5 ± 0.7", "**+10.5 [+4.1, +16.9]**"]
    assert [line[1] for line in table[2:]] == ["o_lora"] and table[2][3] == "58.0"  # its λ
    table = tables.tried(tmp_path).reset_index().values.tolist()
    assert table[0] == [f"{setting}, batch 32, rate 0.001", "ham", "61.0 ± 1.4", "", "2"]
    assert [line[1:] for line in table[1:]] == [
        ["another scale", "60.0", "+0.0", "1"],
        ["rho 1", "59.0", "+1.0", "1"],
    ]
    csv = tables.screening(tmp_path)
    assert csv["changed"].tolist()[5:8] == ["another scale", "", "rho 1"]
    assert csv.iloc[0].tolist()[:5] == ["CIFAR-100", 5, 125, 32, "ham"] and len(csv) == 10


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
    pages = [tables.RESULTS / name for name in ("README.md", "all.md")]
    shown = "".join(page.read_text("utf-8") for page in pages)
    assert len(pages[0].read_text("utf-8").split()) <= 4000
    assert all(f"<!-- table {name} -->" in shown for name in tables.TABLES)


@pytest.mark.parametrize("figure", [tables.accuracy_figure, tables.stored_figure])
def test_figures_are_drawn(figure, tmp_path):
    figure().savefig(tmp_path / "a.png", dpi=40)
    assert image.imread(tmp_path / "a.png").std() > 0.05
    assert all(len(ax.get_lines()) <= 5 for ax in tables.accuracy_figure().axes)


def test_the_demos_rates_are_the_best_of_those_tried_and_none_is_at_an_edge():
    from extras import demo, measure_demo

    found = json.loads(measure_demo.FILE.read_text("utf-8"))
    for method, tried in found["tried"].items():
        rates = sorted(tried, key=float)
        best = max(rates, key=lambda lr: sum(tried[lr]))
        assert float(best) == demo.RATES[method] and best not in (rates[0], rates[-1])
        assert [float(lr) for lr in rates] == pytest.approx(measure_demo.GRID)
    assert not {*found["draws"]} & {run["seed"] for run in found["runs"]}


def test_picture_of_the_method_is_what_its_program_draws():
    assert (tables.RESULTS / "method.svg").read_text("utf-8") == figure.method()
