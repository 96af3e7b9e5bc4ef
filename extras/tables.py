"""Make the tables and pictures of README.md and of results/ from what is in results/.

python -m extras.tables            # rewrite what stands between markers, the pictures, the CSV
python -m extras.tables --check    # exit status 1 if that would change a table or the CSV

A table is a DataFrame with text in its cells, for a notebook; `markdown` writes it for a README.
Accuracies in per cent: mean ± standard deviation over seeds. Differences: mean [95 % interval].
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CONTROLS = ["ham", "sequential", "average", "frozen", "joint"]
OTHERS = ["first", "treelora", "safm", "sd_lora", "o_lora", "ewc"]
METHODS = CONTROLS + OTHERS
DATA = {"cifar100": "CIFAR-100", "cub200": "CUB-200"}
DATA |= {"tiny_imagenet": "Tiny-ImageNet", "imagenet_r": "ImageNet-R"}
SETTINGS = {  # in which methods are compared: data set, tasks, --name; {method: a --name of its own}
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
# the first of these again, with nothing changed that should matter
NOISE = {"ham": "i50", "again": "i50-again", "two threads": "i50-2threads", "fp32": "i50-fp32"}
RATES = "CIFAR-100, T = 20"
COMPARED = [*SETTINGS, *dict.fromkeys(tasks for tasks, _ in PARTS)]
KINDS = "aaptpttaatpaaaaaaptt"  # of superclasses: animals, plants and landscapes, things
RUN = ["config.dataset", "config.tasks", "config.method", "config.name"]


def rows():
    """(setting, row, the run behind it) of every table but those of held-out images."""
    for setting, (data, tasks, name, *own) in SETTINGS.items():
        for method in METHODS:
            t, named = 1 if method == "joint" else tasks, dict(*own).get(method, name)
            yield setting, method, data, t, method, named
    changed = PARTS | {("noise", row): name for row, name in NOISE.items()}
    for (setting, row), name in changed.items():
        yield setting, row, "cifar100", 20, "ham", name
    for rate, name in {"3e-4": "i50", "by the law": "i50-law"}.items():
        yield RATES, f"sequential, {rate}", "cifar100", 20, "sequential", name
    yield RATES, "ham", "cifar100", 20, "ham", "i50"


def signed(x):
    """One digit and its sign."""
    return f"{round(x, 1) + 0.0:+.1f}"  # + 0.0: not -0.0


def half(x):
    """Half the width of the 95 % interval of a mean, by t: nan for one value."""
    return stats.t.ppf(0.975, x.count() - 1) * x.sem()


def cell(x, digits=1, spread=pd.Series.std):
    """Mean ± spread over seeds; a dash where nothing was measured."""
    text = f"{x.mean():.{digits}f} ± {spread(x):.{digits}f}".removesuffix(" ± nan")
    return text if x.count() else "–"


def holm(p):
    """p-values -> these after Holm's correction for as many as there are."""
    p = p.dropna().sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)


def differences(gaps):
    """Seeds × what is compared -> mean and 95 % interval by t, bold where Holm leaves p < 0.05."""
    n, mean, width, text = gaps.count(), gaps.mean(), half(gaps), {}
    p = holm(pd.Series(2 * stats.t.sf((mean / gaps.sem()).abs(), n - 1), gaps.columns))
    for key in gaps:
        m, w = mean[key], width[key]
        text[key] = f"{signed(m)} [{signed(m - w)}, {signed(m + w)}]" if n[key] > 1 else signed(m)
        text[key] = f"**{text[key]}**" if p.get(key, 1) < 0.05 else text[key].replace("+nan", "–")
    return pd.Series(text, gaps.columns)


def told(gaps):
    """{heading: seeds × settings} -> settings × headings, all of it one family for Holm."""
    return differences(pd.concat(gaps, axis="columns")).unstack(0).reindex(columns=gaps)


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
    "stored": ("parameters_stored", lambda x: f"{x.mean() / 1e3:,.0f} k"),
    "seeds": ("config.seed", lambda x: f"{x.count()}"),
    "which seeds": ("config.seed", lambda x: ", ".join(map(str, x))),
}


def runs(results=RESULTS, settings=COMPARED):
    """A line per row and seed, of settings in which HAM was run. Nested keys: config.seed, ..."""
    files = sorted(Path(results).glob("*/results.json"))
    found = pd.json_normalize([json.loads(file.read_text("utf-8")) for file in files])
    found["config.name"] = found["config.name"].fillna("")
    found = found.reindex(columns=found.columns.union(["config.grouping", "tasks"]))
    found["config.grouping"] = found["config.grouping"].fillna("cosine")  # of experiments only
    seconds = [
        [t.get("seconds", {}) for t in x] if isinstance(x, list) else [] for x in found.tasks
    ]
    found["seconds.train"] = [sum(t.get("train", 0) for t in x) if x else None for x in seconds]
    r = pd.DataFrame(rows(), columns=["setting", "row", *RUN]).merge(found)
    return r[r.setting.isin({*settings} & {*r.setting[r.row == "ham"]})]


def by_seed(r, key="final_accuracy"):
    """Seeds × (row, setting) of one measure, nan where a row has not that seed."""
    return r.pivot(index="config.seed", columns=["row", "setting"], values=key)


def summary(r, columns, names=("setting", "method")):
    """(setting, row) × columns of COLUMNS; ham − it: HAM less the row, over the seeds both have."""
    which = ["setting", "row", "config.seed"]
    figures = list({key for key, _ in COLUMNS.values()} - {*which})
    r = r[which].join(r.reindex(columns=figures).astype(float))  # null, or in no run: nan
    r["drift"] = r["class_mean_oracle"] - r["final_accuracy"]
    table, final = r.groupby(which[:2], sort=False).agg(**COLUMNS), by_seed(r)
    gaps = {(s, row): final["ham", s] - final[row, s] for s, row in table.index if row != "ham"}
    table["ham − it"] = differences(pd.DataFrame(gaps))
    return table.fillna("")[columns].rename_axis(names)


def markdown(table):
    """As a README has it, the index as first columns."""
    if table.columns.nlevels > 1:
        table = table.set_axis(table.columns.map("{0[0]}, T = {0[1]}".format), axis="columns")
    # cells stay as they are, and unpadded: a new figure changes one line
    return table.reset_index().to_markdown(index=False, disable_numparse=True, stralign=None)


def headline(results=RESULTS):
    """Final accuracy of HAM and its controls: mean ± half of the 95 % interval (seeds)."""
    shown = {f"CIFAR-100, 50 per class, T = {t}": f"CIFAR-100, T = {t}" for t in (20, 50)}
    shown |= {"CUB-200, T = 10": "CUB-200, T = 10"}
    final = by_seed(runs(results, shown))
    table = final.agg(lambda x: f"{cell(x, spread=half)} ({x.count()})").unstack()
    table = table.reindex(CONTROLS, columns=shown).astype(object).fillna("–")
    return table.rename(columns=shown).rename_axis("method")


def controls(results=RESULTS):
    """HAM against its controls in every setting: what the abstract claims, as far as measured."""
    r = runs(results, SETTINGS)
    order = r.setting.unique()
    every = pd.MultiIndex.from_product([CONTROLS, order])
    f, forgot = (by_seed(r, key).reindex(columns=every) for key in ("final_accuracy", "forgetting"))
    table = pd.DataFrame({row: f[row].agg(cell) for row in CONTROLS})
    gaps = {f"ham − {row}": f.ham - f[row] for row in ("sequential", "average")}
    gaps["forgetting: ham − sequential"] = forgot.ham - forgot.sequential
    table = table.join(told(gaps))
    way = gaps["ham − sequential"].where(f.joint.notna()).mean()
    way /= (f.joint - f.sequential).where(f.ham.notna()).mean()
    table["of the way to joint"] = (100 * way).map("{:.0f} %".format).replace("nan %", "–")
    table["seeds"] = f.ham.count().map(str)
    return table.loc[order].rename_axis("setting")


def growth(results=RESULTS):
    """Does the advantage grow with the number of tasks?"""
    r = runs(results, [setting for setting, run in SETTINGS.items() if run[2] == "i50"])
    f, order = by_seed(r), r.setting.unique()
    gap = (f.ham - f.sequential)[order]
    more = gap.iloc[:, 1:].sub(gap[order[0]], axis="index")
    table = told({"ham − sequential": gap, f"more than at {order[0].split(', ')[-1]}": more})
    table["seeds"] = gap.count().map(str)
    return table.loc[order].astype(object).fillna("").rename_axis("setting")


def rates(results=RESULTS):
    """`sequential` at the rate of the other tables, and at the law's."""
    columns = ["final accuracy", "ham − it", "forgetting", "seeds"]
    return summary(runs(results, [RATES]), columns)


def others(results=RESULTS):
    """HAM, `sequential` and the methods of extras/baselines.py, where one of these was run."""
    r = runs(results, SETTINGS)
    r = r[r.setting.isin(r.setting[r.row.isin(OTHERS)])]
    r = r[r.row.isin(["ham", "sequential", *OTHERS])]
    columns = ["final accuracy", "ham − it", "forgetting", "task known", "stored", "seeds"]
    return summary(r, columns)


def parts(results=RESULTS):
    """HAM's parts, each changed by itself. Drift: oracle means − final accuracy."""
    columns = ["final accuracy", "ham − it", "forgetting", "learning", "drift", "seeds"]
    return summary(runs(results, COMPARED[len(SETTINGS) :]), columns, ["tasks of", "changed"])


def costs(results=RESULTS):
    """What each method costs. `joint`, one task, stands in the first of its settings only."""
    r = runs(results, SETTINGS).drop_duplicates([*RUN, "config.seed"])
    return summary(r, ["training s", "stored", "seeds"])


def measures(results=RESULTS):
    """Every measure of every row."""
    return summary(runs(results), [*list(COLUMNS)[:7], "stored", "which seeds"], ["setting", "row"])


def settings(results=RESULTS):
    """Each setting's budget, and which methods run elsewhere were not measured in it."""
    r = runs(results)
    r = r.assign(test_images=r["test_images_per_task"].map(sum))
    keys = [f"config.{key}" for key in ("model", "img_size", "epochs", "images_per_class")]
    keys += ["test_images", "hardware", "versions.torch", "versions.timm"]

    def distinct(values):  # no cap on the images per class: all
        found = sorted(set(values.dropna()))
        return " and ".join(x if isinstance(x, str) else f"{x:,g}" for x in found) or "all"

    table = r.groupby("setting", sort=False)[keys].agg(distinct)
    table.columns = [key.split(".")[-1].replace("_", " ") for key in keys]
    found = set(zip(r.setting, r.row))
    wanted = pd.DataFrame(rows()).rename(columns={0: "setting", 1: "row"})
    wanted = wanted[wanted.row.isin(r.row) & wanted.setting.isin(COMPARED)]
    for setting, every in wanted.groupby("setting", sort=False).row:
        missing = [row for row in every if (setting, row) not in found]
        table.loc[setting, "not measured"] = "all" if [*every] == missing else ", ".join(missing)
    return table.fillna("–")


def noise(results=RESULTS):
    """How far a run moves where nothing that matters is changed, and how near joins are to a tie."""

    def margin(r):  # of joins: the best similarity, and this less the second
        found = [(t["group"], sorted(t["similarities"])) for tasks in r.tasks for t in tasks]
        best = pd.DataFrame([s[-2:] for group, s in found if max(group, 1) < len(s)])
        figures = {"joins": f"{len(best)}", "above 0.1": f"{(best[1] > 0.1).sum()}"}
        return figures | {"median margin": f"{(best[1] - best[0]).median():.3f}"}

    every, lines = runs(results), {}
    r = runs(results, ["noise"])
    seeds = set(r["config.seed"][r.row != "ham"]) or {1993}
    for _, seed in r[r["config.seed"].isin(seeds)].groupby("config.seed"):
        ways = [pd.DataFrame(tasks) for tasks in seed.tasks]  # the first: ham
        for way, (_, run) in zip(ways, seed.iterrows()):
            lines[run.row, f"{run['config.seed']}", run.hardware] = {
                "final accuracy": f"{run.final_accuracy:.1f}",
                "largest difference of A_t": f"{(way.accuracy - ways[0].accuracy).abs().max():.1f}",
                "tasks in another group": f"{(way.group != ways[0].group).sum()}",
            } | margin(seed[seed.row == run.row])
    every = every[(every["config.method"] == "ham") & (every["config.grouping"] == "cosine")]
    every = every.drop_duplicates([*RUN, "config.seed"])
    lines[f"all {len(every)} HAM runs", "", ""] = margin(every)
    return pd.DataFrame(lines).T.fillna("").rename_axis(["run", "seed", "hardware"])


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
    return pd.DataFrame({"pairs": same.count().map(str), "of one kind": share})


def screening(results=RESULTS):
    """Every run of extras/screen.py, on held-out images, in the order they were made."""
    file, lines = Path(results) / "validate" / "screening.jsonl", []
    named = ["dataset", "tasks", "images_per_class", "test_images_per_class", "model", "img_size"]
    named += ["batch_size", "method", "lr", "penalty", "seed"]
    for r in map(json.loads, file.read_text("utf-8").splitlines()):
        s = {"images_per_class": "all", "batch_size": 32, "method": "ham", "seed": 1993}
        s["tasks"] = r.get("config", {}).get("tasks")
        s |= r["settings"] | {k: r.get("config", r["settings"]).get(k) for k in ("lr", "penalty")}
        changed = [f"{k} {v}".removesuffix(".0") for k, v in s.items() if k not in named]
        line = [DATA[s["dataset"]], *(s[k] for k in named[1:3]), s["batch_size"], s["method"]]
        line += [", ".join(changed + [r[k] for k in ["code_change"] if k in r])]
        line += [f"{s[k]:g}" if s[k] else None for k in ("lr", "penalty")]
        line += [s["seed"], r["tasks_learnt"]]
        line += [*r["class-mean"], r.get("head", [None, None])[1], r.get("oracle")]
        line += [" ".join(map(str, r["group_sizes"] or [])), r.get("seconds", {}).get("train")]
        lines.append([*line, r.get("hardware", "CPU")])
    columns = (
        "data set, tasks, images per class, batch size, method, changed, learning rate, λ, seed"
    )
    columns += ", tasks learnt, half-way, end, end by the head, oracle means, group sizes"
    return pd.DataFrame(lines, columns=[*columns.split(", "), "training s", "hardware"])


def held_out(r, setting):
    """Lines of `screening` as `summary` takes runs; setting: a format of data set, T, images, ...

    Of lines that are alike the first counts: a budget's later ones had to repeat it.
    """
    names = {"end": "final_accuracy", "oracle means": "class_mean_oracle", "seed": "config.seed"}
    r = r.rename(columns=names | {"training s": "seconds.train"})
    budget = zip(*(r[k] for k in ("data set", "tasks", "images per class", "batch size")))
    r["setting"] = [setting.format(*b, rate=rate) for b, rate in zip(budget, r["learning rate"])]
    r = r[r.setting.isin(r.setting[r.row == "ham"])]
    return r.drop_duplicates(["setting", "row", "learning rate", "config.seed"])


def side_by_side(results=RESULTS):
    """Methods on held-out images and one GPU that 16 runs shared, each at the best of its rates."""
    from extras.baselines import PENALTY  # here: it brings torch

    r = screening(results)
    r = r[r["λ"].isna() | (r["λ"] == r.method.map(PENALTY).map("{:g}".format))]
    r = r[r.hardware.str.contains("NVIDIA") & (r.changed == "") & (r["batch size"] == 32)]
    r = held_out(r.rename(columns={"method": "row"}), "{}, T = {}, {}")
    r = r.assign(place=r.row.map(METHODS.index)).sort_values(["setting", "place"], kind="stable")
    # the best of the rates that have the most seeds
    rates = r.groupby(["setting", "row", "learning rate"])["final_accuracy"].agg(["count", "mean"])
    rates = rates.sort_values(["count", "mean"]).reset_index("learning rate")
    rates = rates.groupby(["setting", "row"])["learning rate"]
    columns = ["final accuracy", "ham − it", "oracle means", "training s", "seeds"]
    r = r.merge(rates.last().reset_index())
    table = summary(r, columns, ["data, T, images per class", "method"])
    table.insert(0, "lr (of tried)", rates.last() + rates.size().map(" (of {})".format))
    return table


def tried(results=RESULTS):
    """HAM with something changed, on held-out images, at one budget and rate."""
    r = screening(results)
    r = r[(r.method == "ham") & (r["tasks learnt"] == r.tasks)]
    r = r.assign(row=r.changed.where(r.changed != "", "ham"))
    r = held_out(r, "{}, T = {}, {}, batch {}, rate {rate}")
    r = r[r.setting.isin(r.setting[r.row != "ham"])].assign(place=r.row != "ham")
    r = r.sort_values(["setting", "place"], kind="stable")
    return summary(r, ["final accuracy", "ham − it", "seeds"], ["budget", "changed"])


def law(results=RESULTS):
    """Held-out accuracy by λ, images per task, learning rate; CIFAR-100, T = 5, 20; the law's."""
    from extras.baselines import learning_rate  # here: it brings torch

    r = screening(results)
    r = r[(r["data set"] == "CIFAR-100") & (r.changed == "") & (r["batch size"] == 32)]
    r = r[r.tasks.isin([5, 20]) & (r["tasks learnt"] == r.tasks) & (r["images per class"] != "all")]
    r = r[r["images per class"] >= 50].fillna({"λ": ""})
    r["images per task"] = (100 * r["images per class"] // r.tasks).astype(int)
    end = r.groupby(["method", "λ", "images per task", "learning rate"])["end"]
    end = end.agg(lambda x: f"{x.mean():.1f} ({len(x)})").sort_index(
        level=3, key=lambda x: x.astype(float)
    )
    tried = (end.index.get_level_values(3) + ": " + end).groupby(level=[0, 1, 2])
    table = pd.DataFrame({"rate: accuracy (runs)": tried.agg(", ".join), "rates": tried.size()})
    rates = [f"{learning_rate(m, 5 * n):.2g}" for m, _, n in table.index]  # of 5 epochs
    table.insert(0, "by the law", rates)
    order = sorted(table.index, key=lambda x: (METHODS.index(x[0]), float(x[1] or 0), x[2]))
    return table.loc[order].astype(str)


def elsewhere(results=RESULTS):
    """Held-out accuracy by rate at other sizes and epochs, after the first tasks; the law's."""
    from extras.baselines import learning_rate  # here: it brings torch

    lines = (Path(results) / "validate" / "screening.jsonl").read_text("utf-8").splitlines()
    found = {}
    for r in map(json.loads, lines):
        if "first_tasks" in r["settings"]:
            c = r["config"]
            n = 100 * c["images_per_class"] // c["tasks"]
            key = c["method"], f"{c['img_size']}", f"{c['epochs']}", f"{n}", f"{r['tasks_learnt']}"
            found.setdefault(key, {}).setdefault(c["lr"], []).append(r["class-mean"][1])
    table = {}
    for (method, px, epochs, n, tasks), tried in found.items():
        text = [f"{lr:g}: {np.mean(x):.1f} ({len(x)})" for lr, x in sorted(tried.items())]
        rate = f"{learning_rate(method, int(n) * int(epochs)):.2g}"
        table[method, px, epochs, n, tasks] = [rate, ", ".join(text)]
    columns = ["by the law", "rate: accuracy (runs)"]
    names = ["method", "px", "epochs", "n", "tasks learnt"]
    table = pd.DataFrame.from_dict(table, "index", columns=columns)
    table.index = pd.MultiIndex.from_tuples(table.index, names=names)
    return table.sort_index(key=lambda x: x if x.name == "method" else x.astype(int))


def demo(results=RESULTS):
    """`python ham.py` over ten seeds, each method at the best of one grid of rates on other draws."""
    found = json.loads((Path(results) / "demo.json").read_text("utf-8"))
    r = pd.DataFrame(found["runs"])
    final = r.pivot(index="seed", columns="method", values="final_accuracy")
    table = pd.DataFrame(index=["ham", "sequential", "average", "frozen", "joint"])
    for key in ("final_accuracy", "forgetting", "learning_accuracy"):
        table[key.split("_")[0]] = r.groupby("method")[key].agg(cell)
    table["ham − it"] = differences(final[["ham"]].values - final.drop(columns="ham"))
    tried = {
        m: ", ".join(f"{lr}: {np.mean(x):.1f}" for lr, x in t.items())
        for m, t in found["tried"].items()
    }
    table["rate"] = r.groupby("method")["lr"].first().map("{:g}".format)
    table["tried, mean of two other draws"] = pd.Series(tried)
    return table.replace("nan", "").fillna("").rename_axis("method")


def choices(results=RESULTS, run="cifar100-T20-treelora-i50-s1993"):
    """Whose gradient each layer of TreeLoRA was drawn to: neither all alike nor always one's?

    Entropy: of the choices while a task was trained, over that of equal shares.
    """
    file, lines = Path(results) / run / "results.json", {}
    tasks = json.loads(file.read_text("utf-8"))["tasks"] if file.is_file() else []
    taken = [np.array(task["taken"]) for task in tasks[2:]]  # from two earlier tasks on
    for layer in range(len(taken[0]) if taken else 0):
        n = [x[layer] for x in taken]
        entropy = [stats.entropy(x) / np.log(len(x)) for x in n]
        lines[f"{layer + 1}"] = {
            "choices": f"{sum(map(sum, n)):,}",
            "entropy": f"{np.mean(entropy):.2f}",
            "from": f"{min(entropy):.2f}",
            "to": f"{max(entropy):.2f}",
            "favourite, last task": f"{tasks[-1]['leaves'][n[-1].argmax()][0] + 1}",
            "its share": f"{n[-1].max() / n[-1].sum():.2f}",
            "equal share": f"{1 / len(n[-1]):.2f}",
        }
    return pd.DataFrame(lines).T.rename_axis("layer")


def grid(paper=None, results=RESULTS):
    """The paper's grid, final accuracy: its own figures, where someone has typed them; what was
    measured here; what others published. Empty: not measured.
    paper: {(method, data set, T): value}, e.g. {("HAM", "CIFAR-100", 20): 90.1}
    """
    paper = {("HAM", "CIFAR-100", 20): ""} | (paper or {})
    lines = [("the paper", f"{method} (paper)", *at, f"{x}") for (method, *at), x in paper.items()]
    r = runs(results, SETTINGS)
    for (setting, row), x in r.groupby(["setting", "row"], sort=False):
        model, px, n = x[["config.model", "config.img_size", "config.images_per_class"]].iloc[0]
        n = "all images" if pd.isna(n) else f"{n:.0f} images per class"
        data, tasks, *_ = SETTINGS[setting]
        here = f"here: {model.split('_patch')[0]}, {px} px, {n}"
        lines.append((here, row, DATA[data], tasks, cell(x["final_accuracy"])))
    published = pd.read_csv(ROOT / "extras" / "published_results.csv", dtype=str)
    for p in published.itertuples():
        where = f"{p.backbone}: {', '.join(p.source.split(', ')[:2])}"
        lines.append((where, p.method, p.dataset, int(p.tasks), p.final_accuracy))
    names = ["figures of", "method", "data set", "T"]
    table = pd.DataFrame(lines, columns=[*names, "x"]).pivot_table(
        "x", names[:2], names[2:], aggfunc=" / ".join, fill_value="", sort=False
    )
    place = [*DATA.values()].index
    return table[sorted(table, key=lambda at: (place(at[0]), at[1]))]


def row(method, data, tasks, results=RESULTS):
    """Every run of one row of the grid, or, where there is none, the command that makes one."""
    names = {name: key for key, name in DATA.items()}
    r = runs(results, SETTINGS)
    here = (r["config.dataset"] == names[data]) & (
        r["setting"].map(lambda s: SETTINGS[s][1]) == tasks
    )
    r = r[here & (r.row == method)]
    if r.empty:
        program = "-m extras.baselines" if method in OTHERS else "ham.py"
        flags = f"--dataset {names[data]} --tasks {tasks} --method {method}"
        return pd.DataFrame({"not measured here": [f"python {program} {flags}"]})
    keys = ["final_accuracy", "average_incremental_accuracy", "forgetting", "learning_accuracy"]
    figures = r[keys].map("{:.1f}".format)
    figures.columns = [key.removesuffix("_accuracy").replace("_", " ") for key in keys]
    about = r[["setting", "config.seed", "config.lr"]].astype(str)
    return about.set_axis(["setting", "seed", "rate"], axis="columns").join(figures)


TABLES = [headline, controls, growth, parts, related, others, settings, measures, costs, noise]
TABLES += [rates, choices, side_by_side, law, elsewhere, tried, grid, demo]
TABLES = {table.__name__: table for table in TABLES}


def fill(text, results=RESULTS):
    """Replace what stands between <!-- table NAME --> and <!-- end -->."""
    between = re.compile(r"(<!-- table (\S+) -->).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda m: f"{m[1]}\n{markdown(TABLES[m[2]](results=results))}\n{m[3]}", text)


def apart(heights, gap):
    """Heights of labels: these, moved up where two are nearer than gap."""
    heights = heights.sort_values()
    for i in range(1, len(heights)):
        heights.iloc[i] = max(heights.iloc[i], heights.iloc[i - 1] + gap)
    return heights


def accuracy_figure(results=RESULTS, setting="CIFAR-100, 50 per class, T = 20"):
    """Accuracy against tasks: means over seeds, bands from the lowest to the highest seed."""
    colors = ["#0072B2", "#D55E00", "#000000", "#009E73", "#666666"]  # Okabe and Ito
    r = runs(results, [setting])
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    steps, ends = range(1, max(map(len, r.tasks)) + 1), {}
    for row, color, style in zip(CONTROLS, colors, ["o-", "s--", "v-.", "^:", "-"]):
        curves = [[task["accuracy"] for task in tasks] for tasks in r.tasks[r.row == row]]
        if curves:
            curves = pd.DataFrame(curves).reindex(columns=range(len(steps))).ffill(axis="columns")
            ax.plot(steps, curves.mean(), style, color=color, ms=4)  # joint: one task, a level line
            ax.fill_between(steps, curves.min(), curves.max(), color=color, alpha=0.15, lw=0)
            ends[row] = curves.mean().iloc[-1]
    for row, height in apart(pd.Series(ends), 2.2).items():
        text = {"va": "center", "color": colors[CONTROLS.index(row)]}
        ax.text(1.02 * len(steps), height, f"{row} {ends[row]:.1f}", **text)
    ax.set(title=setting, xlabel="after task", ylabel="accuracy, all classes seen (%)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params("x", integer=True)
    return fig


def stored_figure(results=RESULTS, settings=("CIFAR-100, 50 per class, T = 20", "CUB-200, T = 10")):
    """Final accuracy against the parameters that are kept, backbone aside, for all methods."""
    fig, axes = plt.subplots(1, len(settings), figsize=(9, 4), layout="constrained", squeeze=False)
    for ax, setting in zip(axes.flat, settings):
        r = runs(results, [setting]).groupby("row")
        x, y = r["parameters_stored"].mean(), r["final_accuracy"].mean()
        column, ours = (4 * np.log10(x)).round(), y.index.isin(CONTROLS[1:])  # labels left
        for (_, left), near in y.groupby([column, ours]):
            at = x[near.index].min() / 1.15 if left else 1.15 * x[near.index].max()
            for row, height in apart(near, 0.05 * (y.max() - y.min())).items():
                color = "#0072B2" if row == "ham" else "#D55E00" if row in CONTROLS else "#000000"
                ax.plot(x[row], y[row], "s" if row in CONTROLS else "o", color=color, ms=5)
                side = "right" if left else "left"
                ax.text(at, height, f"{row} {y[row]:.1f}", va="center", ha=side)
        ax.set(title=setting, xlabel="parameters stored", ylabel="final accuracy (%)", xscale="log")
        ax.set_xlim(x.min() / 8, 6 * x.max())
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    readmes = [ROOT / "README.md", RESULTS / "README.md", RESULTS / "all.md"]
    made = {file: fill(file.read_text("utf-8")) for file in readmes}
    csv = screening().round(2).to_csv(index=False, lineterminator="\n")
    made[RESULTS / "validate" / "screening.csv"] = csv
    for file, new in made.items():
        if check and new != file.read_text("utf-8"):
            raise SystemExit(f"{file} is not what results/ says: python -m extras.tables")
        if not check:
            file.write_text(new, "utf-8")
    if not check:
        plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "", "savefig.facecolor": "w"}
        for name, figure in ("accuracy", accuracy_figure()), ("stored", stored_figure()):
            figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
