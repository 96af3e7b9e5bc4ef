"""Make the tables and the figure of README.md and results/README.md from results/.

python -m extras.tables            # rewrite what stands between the markers, and the figure
python -m extras.tables --check    # exit status 1 if that would change a table

`runs` has a line per run, `summary` one per row of a setting; most tables are parts of these.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CONTROLS = ["ham", "sequential", "average", "frozen", "joint"]
OTHERS = ["treelora", "safm", "sd_lora", "o_lora", "ewc"]
METHODS = CONTROLS + OTHERS
SETTINGS = {  # in which methods are compared: data set, tasks, --name
    "CIFAR-100, 50 per class, T = 5": ("cifar100", 5, "i50"),
    "CIFAR-100, 50 per class, T = 10": ("cifar100", 10, "i50"),
    "CIFAR-100, 50 per class, T = 20": ("cifar100", 20, "i50"),
    "CIFAR-100, 50 per class, T = 50": ("cifar100", 50, "i50"),
    "CIFAR-100, 250 per class, T = 20": ("cifar100", 20, "i250"),
    "CIFAR-100, 250 per class, T = 50": ("cifar100", 50, "i250"),
    "CIFAR-100, all images, T = 20": ("cifar100", 20, "160px"),
    "CIFAR-100, all images, 224 px, T = 20": ("cifar100", 20, "224px"),
    "CUB-200, T = 10": ("cub200", 10, ""),
    "CUB-200, T = 20": ("cub200", 20, ""),
}
PARTS = {  # of HAM, CIFAR-100, T = 20: what tasks are made of, what was changed; --name
    ("random classes", "ham"): "i50",
    ("random classes", "one group"): "i50-one-group",
    ("random classes", "one group (gain 5)"): "i50-one-group-gain5",
    ("random classes", "random group"): "i50-random",
    ("random classes", "one group per task"): "i50-each-its-own",
    ("random classes", "sum (literal)"): "i50-sum",
    ("random classes", "mean of what was added"): "i50-mean",
    ("random classes", "no pruning"): "i50-rho1",
    ("random classes", "ρ = 0.5"): "i50-rho0.5",
    ("random classes", "ρ = 0.3"): "i50-rho0.3",
    ("random classes", "α fixed at 1"): "i50-no-alpha",
    ("random classes", "G_max = 2"): "i50-gmax2",
    ("random classes", "G_max = 10"): "i50-gmax10",
    ("superclasses", "ham"): "i50-super",
    ("superclasses", "random group"): "i50-super-random",
}
KINDS = "aaptpttaatpaaaaaaptt"  # of superclasses: animals, plants and landscapes, things
RUN = ["config.dataset", "config.tasks", "config.method", "config.name"]
ROWS = [  # setting, row, the run behind it
    (setting, method, data, 1 if method == "joint" else tasks, method, name)
    for setting, (data, tasks, name) in SETTINGS.items()
    for method in METHODS
] + [(*part, "cifar100", 20, "ham", name) for part, name in PARTS.items()]


def cell(values, digits=1):
    """Mean ± standard deviation over seeds; a dash where nothing was measured."""
    mean, spread = values.mean(), values.std()
    text = f"{mean:.{digits}f} ± {spread:.{digits}f}".removesuffix(" ± nan")
    return "–" if pd.isna(mean) else text


def ahead(gap):
    """Differences by seed -> mean ± standard error, bold: above two of these, three seeds or more."""
    mean, error = gap.mean(), gap.sem()
    text = f"{round(mean, 1) + 0.0:+.1f} ± {error:.1f}".removesuffix(" ± nan")  # + 0.0: not -0.0
    if gap.count() > 2 and abs(mean) > 2 * error:
        return f"**{text}**"
    return "–" if pd.isna(mean) else text


COLUMNS = {  # heading: key in results.json, what makes a cell of its values over seeds
    "final accuracy": ("final_accuracy", cell),
    "average incremental": ("average_incremental_accuracy", cell),
    "forgetting": ("forgetting", cell),
    "learning": ("learning_accuracy", cell),
    "task known": ("task_known_accuracy", cell),
    "by the head": ("head_accuracy", cell),
    "oracle means": ("class_mean_oracle", cell),
    "drift": ("drift", cell),
    "training s": ("seconds.train", lambda x: cell(x, 0)),
    "grouping and merging s": ("seconds.merge", cell),
    "training images/s": ("images_per_second.training", lambda x: cell(x, 0)),
    "inference images/s": ("images_per_second.inference", lambda x: cell(x, 0)),
    "trained per task": ("parameters_trained", lambda x: f"{x.mean() / 1e3:,.0f} k"),
    "peak memory GiB": ("peak_memory_bytes", lambda x: cell(x / 2**30)),
    "stored": ("parameters_stored", lambda x: f"{x.mean() / 1e3:,.0f} k"),
    "seeds": ("config.seed", "count"),
    "which seeds": ("config.seed", lambda x: ", ".join(map(str, x))),
}


def runs(results=RESULTS, settings=None):
    """A line per row and seed, of settings in which HAM was run. Nested keys: config.seed, ..."""
    files = sorted(Path(results).glob("*/results.json"))
    found = pd.json_normalize([json.loads(file.read_text("utf-8")) for file in files])
    found["config.name"] = found["config.name"].fillna("")
    r = pd.DataFrame(ROWS, columns=["setting", "row", *RUN]).merge(found)
    measured = set(settings or r.setting) & set(r.setting[r.row == "ham"])
    return r[r.setting.isin(measured)]


def by_seed(r, key="final_accuracy"):
    """Seeds × (setting, row) of one measure, nan where a row has not that seed."""
    return r.pivot(index="config.seed", columns=["setting", "row"], values=key)


def summary(r):
    """(setting, row) × COLUMNS, and HAM less the row over the seeds both have, as text."""
    which = ["setting", "row", "config.seed"]
    figures = list({key for key, _ in COLUMNS.values()} - {*which})
    r = r[which].join(r.reindex(columns=figures).astype(float))  # null, or in no run: nan
    r["drift"] = r["class_mean_oracle"] - r["final_accuracy"]
    table, final = r.groupby(which[:2], sort=False).agg(**COLUMNS), by_seed(r)
    table["ham − it"] = [ahead(final[s, "ham"] - final[s, row]) for s, row in table.index]
    table.loc[(slice(None), "ham"), "ham − it"] = ""
    return table


def markdown(table, *headings):
    """headings: those of the index, which becomes the first columns"""
    table = table.rename_axis(headings).reset_index()
    # cells stay as they are, and unpadded: a new figure changes one line
    return table.to_markdown(index=False, disable_numparse=True, stralign=None)


def claims(results=RESULTS):
    """HAM against its controls: what the abstract claims, as far as measured."""
    r, lines = runs(results, SETTINGS), {}
    final, forgetting = by_seed(r), by_seed(r, "forgetting")
    for setting in r.setting.unique():
        f, forgot = (x[setting].reindex(columns=CONTROLS) for x in (final, forgetting))
        mean = f.dropna(subset=["ham", "sequential", "joint"]).mean()
        way = 100 * (mean.ham - mean.sequential) / (mean.joint - mean.sequential)
        above = forgot.sub(forgot.frozen, axis="index").mean()
        above = f"{above.ham:.1f} / {above.sequential:.1f}"
        lines[setting] = f.agg(cell).to_dict() | {
            "ham − sequential": ahead(f.ham - f.sequential),
            "ham − average": ahead(f.ham - f.average),
            "of the way to joint": f"{way:.0f} %" if mean.joint > mean.sequential else "–",
            "forgetting above frozen's: ham / sequential": above.replace("nan", "–"),
            "seeds": f.ham.count(),
        }
    return markdown(pd.DataFrame.from_dict(lines, "index"), "final accuracy")


def growth(results=RESULTS):
    """Does the advantage grow with the number of tasks? Over all seeds, and on one that all have."""
    final = by_seed(runs(results, [s for s, (*_, name) in SETTINGS.items() if name == "i50"]))
    gaps = final.xs("ham", axis=1, level="row") - final.xs("sequential", axis=1, level="row")
    gaps = gaps.dropna(axis="columns", how="all")
    one = gaps.dropna().iloc[0]
    table = {"ham − sequential": gaps.agg(ahead), "seeds": gaps.count()}
    table[f"on seed {one.name} alone"] = one.map("{:+.1f}".format)
    return markdown(pd.DataFrame(table), "")


def others(results=RESULTS):
    """HAM, `sequential` and the methods of extras/baselines.py, where one of these was run."""
    r = runs(results, SETTINGS)
    r = r[r.setting.isin(r.setting[r.row.isin(OTHERS)])]
    table = summary(r[r.row.isin(["ham", "sequential", *OTHERS])])
    columns = ["final accuracy", "ham − it", "forgetting", "task known", "stored", "seeds"]
    return markdown(table[columns], "", "method")


def parts(results=RESULTS):
    """HAM's parts, each changed by itself. Drift: oracle means − final accuracy."""
    table = summary(runs(results, ["random classes", "superclasses"]))
    columns = ["final accuracy", "ham − it", "forgetting", "learning", "drift", "seeds"]
    return markdown(table[columns], "tasks of", "changed")


def efficiency(results=RESULTS):
    """What each method costs. `joint`, one task, stands in the first of its settings only."""
    r = runs(results, SETTINGS).drop_duplicates([*RUN, "config.seed"])
    return markdown(summary(r).loc[:, "training s":"stored"], "", "method")


def settings(results=RESULTS):
    """Each setting's budget and what was not measured in it; then all measures."""
    r = runs(results)
    r = r.assign(test_images=r["test_images_per_task"].map(sum))
    keys = [f"config.{key}" for key in ("model", "img_size", "epochs", "images_per_class")]
    keys += ["test_images", "hardware", "versions.torch", "versions.timm"]

    def distinct(values):  # no cap on the images per class: all
        found = sorted(set(values.dropna()))
        return " and ".join(x if isinstance(x, str) else f"{x:,g}" for x in found) or "all"

    def missing(setting):
        rows = set(r.row[r.setting == setting])
        return ", ".join(row for s, row, *_ in ROWS if s == setting and row not in rows)

    budget = r.groupby("setting", sort=False)[keys].agg(distinct)
    budget.columns = [key.split(".")[-1].replace("_", " ") for key in keys]
    budget["not measured"] = budget.index.map(missing)
    nothing = [setting for setting in SETTINGS if setting not in budget.index]
    nothing += ["ImageNet-R", "Tiny-ImageNet", "ViT-B/16"]
    columns = ["final accuracy", "ham − it", *list(COLUMNS)[1:7], "stored", "which seeds"]
    tables = [markdown(budget, ""), markdown(summary(r)[columns], "", "row")]
    return f"\n\nNot measured at all: {'; '.join(nothing)}.\n\n".join(tables)


BUDGET = ["dataset", "tasks", "images_per_class", "test_images_per_class", "model", "img_size"]


def screened(results):
    """Every run of extras/screen.py, on held-out images, in the order they were made."""
    file = Path(results) / "validate" / "screening.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def side_by_side(results=RESULTS):
    """Methods on held-out images and one GPU that 16 runs shared, each at the best of its rates."""
    plain = {*BUDGET, "method", "lr", "seed"}
    found = [s for s in screened(results) if "NVIDIA" in s.get("hardware", "")]
    found = [s for s in found if set(s["settings"]) <= plain and "code_change" not in s]
    r = pd.json_normalize(found).rename(columns={"config.method": "row"})
    r["setting"] = [", ".join(str(s["config"][key] or "all") for key in BUDGET[:3]) for s in found]
    r["final_accuracy"], r["class_mean_oracle"] = r["class-mean"].str[1], r["oracle"]
    r["place"] = r.row.map(METHODS.index)
    r = r[r.setting.isin(r.setting[r.row == "ham"])].sort_values(["setting", "place"])
    # the best of the rates that have the most seeds
    rates = r.groupby(["setting", "row", "config.lr"])["final_accuracy"].agg(["count", "mean"])
    rates = rates.sort_values(["count", "mean"]).reset_index("config.lr")["config.lr"]
    rates = rates.groupby(["setting", "row"]).agg(["last", "count"])
    table = summary(r.merge(rates["last"].rename("config.lr").reset_index()))
    tried = rates["count"].map(" (of {})".format)
    table["lr (of tried)"] = rates["last"].map("{:g}".format) + tried
    columns = ["lr (of tried)", "final accuracy", "ham − it", "oracle means", "training s", "seeds"]
    return markdown(table[columns], "data, T, images per class", "method")


def law(results=RESULTS):
    """Held-out accuracy by learning rate and training images per task, CIFAR-100, 5 to 20 tasks."""
    plain, found = {*BUDGET, "method", "lr", "seed", "hardware"}, []
    for r in screened(results):
        c = r.get("config") or {"dataset": None}
        few = c["dataset"] == "cifar100" and (c["images_per_class"] or 0) >= 50
        if few and c["tasks"] in (5, 20) and set(r["settings"]) <= plain and "code_change" not in r:
            n = 100 * c["images_per_class"] // c["tasks"]
            found.append({"method": c["method"], "n": n, "lr": c["lr"], "end": r["class-mean"][1]})
    r = pd.DataFrame(found)
    cells = r.groupby(["method", "n", "lr"])["end"].agg(lambda x: f"{x.mean():.1f} ({len(x)})")
    table = cells.unstack("lr").fillna("").rename(columns="{:g}".format)
    order = sorted(table.index, key=lambda x: (METHODS.index(x[0]), x[1]))
    table = table.loc[order]
    return markdown(table, "method", "images per task")


def screening(results=RESULTS):
    """What was tried on held-out images, in the order it was tried."""
    lines = []
    for r in screened(results):
        s = {"batch_size": 32, "images_per_class": "all", "method": "ham"} | r["settings"]
        budget = [s[key] for key in (*BUDGET[:3], "batch_size")]
        budget += ["GPU"] if "NVIDIA" in r.get("hardware", "") else []
        tried = {k: v for k, v in s.items() if k not in (*BUDGET, "method", "batch_size")}
        tried = [s["method"], *(f"{k} {v}".removesuffix(".0") for k, v in tried.items())]
        tried += [r["code_change"]] if "code_change" in r else []
        figures = [
            cell(pd.Series([x], dtype=float)) for x in (*r["class-mean"], r["head"][1], r["oracle"])
        ]
        sizes = " ".join(map(str, r["group_sizes"] or "–"))
        tasks = f"{r['tasks_learnt'] // 2}, {r['tasks_learnt']}"
        lines.append([", ".join(map(str, budget)), ", ".join(tried), tasks, *figures, sizes])
    columns = ["data, T, images per class, batch", "settings", "after tasks", "half-way", "end"]
    columns += ["end, by the head", "oracle means", "group sizes"]
    return markdown(pd.DataFrame(lines, columns=columns).set_index(columns[0]), columns[0])


def related(results=RESULTS):
    """Where tasks are superclasses: are those in one group of one kind more often than any two?"""
    listed = (ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").split("\n\n")
    kind = {name: k for k, names in zip(KINDS, listed) for name in names.split()}
    pairs = [("any two", a == b) for a, b in itertools.combinations(KINDS, 2)]
    r = runs(results, ["superclasses"])
    for row, tasks, classes in zip(r.row, r.tasks, r.classes):
        first = [kind[name] for name in classes[::5]]  # each task's first class
        for (i, a), (j, b) in itertools.combinations(enumerate(first), 2):
            if tasks[i]["group"] == tasks[j]["group"]:
                pairs.append((f"in one group, {row}", a == b))
    same = pd.DataFrame(pairs, columns=["tasks", "same"]).groupby("tasks", sort=False).same
    share = (100 * same.mean()).map("{:.0f} %".format)
    return markdown(pd.DataFrame({"pairs": same.count(), "of one kind": share}), "tasks")


def fill(text, results=RESULTS):
    """Replace what stands between <!-- table NAME --> and <!-- end -->."""
    makers = [claims, growth, others, parts, related, settings, efficiency, side_by_side]
    makers += [law, screening]
    made = {maker.__name__: maker for maker in makers}
    between = re.compile(r"(<!-- table (\S+) -->).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda m: f"{m[1]}\n{made[m[2]](results)}\n{m[3]}", text)


def figure(results=RESULTS):
    """Accuracy against tasks: means over seeds, bands from the lowest to the highest seed."""
    panels = list(runs(results, SETTINGS).groupby("setting", sort=False))
    rows = -(-len(panels) // 3)
    fig, axes = plt.subplots(rows, 3, squeeze=False, figsize=(14, 3.4 * rows), layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    looks = {"ham": "o-", "sequential": "s--", "average": "v-.", "frozen": "^:"}
    for ax, (setting, s) in zip(axes.flat, panels):
        for method, tasks in s.groupby("row", sort=False)["tasks"]:
            curves = pd.DataFrame([[task["accuracy"] for task in run] for run in tasks])
            if method == "joint":  # one task: a line at its height
                ax.axhline(curves[0].mean(), color="#999999", lw=1, label="joint")
                continue
            steps, color = curves.columns + 1, f"C{METHODS.index(method)}"
            ax.plot(steps, curves.mean(), looks.get(method, "-"), color=color, ms=4, label=method)
            ax.fill_between(steps, curves.min(), curves.max(), color=color, alpha=0.2, lw=0)
        ax.set(title=setting, xlabel="after task", ylabel="accuracy, all classes seen (%)")
        ax.locator_params("x", integer=True)
        ax.legend(frameon=False, fontsize=8, ncols=2)
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    for file in (ROOT / "README.md", RESULTS / "README.md"):
        text = file.read_text("utf-8")
        new = fill(text)
        if check and new != text:
            raise SystemExit(f"{file} is not what results/ says: python -m extras.tables")
        if new != text:
            file.write_text(new, "utf-8")
    if not check:
        figure().savefig(RESULTS / "accuracy.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
