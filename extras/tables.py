"""Make the tables and pictures of README.md and of results/ from what is in results/.

python -m extras.tables            # rewrite what stands between markers, and the pictures
python -m extras.tables --check    # exit status 1 if that would change a table

A table is a DataFrame with text in its cells, for a notebook; `markdown` writes it for a README.
Accuracies in per cent: mean ± standard deviation over seeds. Differences: mean [95 % interval].
"""

import argparse
import json
import re
import string
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from extras import figures

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CONTROLS = ["ham", "sequential", "average", "frozen", "joint"]
OTHERS = ["first", "treelora", "safm", "sd_lora", "o_lora", "ewc", "ewc_lora", "onward"]
METHODS = CONTROLS + OTHERS
RANKS = {  # row: method, what is added to the setting's --name
    "ham, R = 8": ("ham", "R8"),
    "ham, R = 16": ("ham", "R16"),
    "ham, R = 8, random group": ("ham", "R8-random"),
    "ham, R = 8, by features": ("ham", "R8-features"),
    "ham, R = 8, least similar": ("ham", "R8-least"),
}
BESIDE = {  # likewise, of other methods
    "onward, random group": ("onward", "random"),
    "treelora, random leaf": ("treelora", "random"),
    "treelora, gradients": ("treelora", "before"),
    "sequential, 1e-4": ("sequential", "before"),
    "average, 3e-3": ("average", "before"),
    "o_lora, 3e-4": ("o_lora", "before"),
    "ewc, 1e-3": ("ewc", "before"),
}
DATA = {"cifar100": "CIFAR-100", "cub200": "CUB-200"}
DATA |= {"tiny_imagenet": "Tiny-ImageNet", "imagenet_r": "ImageNet-R"}
SETTINGS = {  # in which methods are compared: data set, tasks, --name
    "CIFAR-100, all images, T = 10": ("cifar100", 10, "all"),
    "CIFAR-100, all images, T = 20": ("cifar100", 20, "all"),
    "CIFAR-100, all images, T = 50": ("cifar100", 50, "all"),
    "CIFAR-100, all images, 224 px, T = 20": ("cifar100", 20, "224px"),
    "CIFAR-100, 50 per class, T = 5": ("cifar100", 5, "i50"),
    "CIFAR-100, 50 per class, T = 10": ("cifar100", 10, "i50"),
    "CIFAR-100, 50 per class, T = 20": ("cifar100", 20, "i50"),
    "CIFAR-100, 50 per class, T = 50": ("cifar100", 50, "i50"),
    "CIFAR-100, 250 per class, T = 20": ("cifar100", 20, "i250"),
    "CIFAR-100, 250 per class, T = 50": ("cifar100", 50, "i250"),
    "CIFAR-100, 50 per class, GPU, T = 10": ("cifar100", 10, "i50-gpu"),
    "CIFAR-100, 50 per class, GPU, T = 20": ("cifar100", 20, "i50-gpu"),
    "CIFAR-100, 50 per class, GPU, T = 50": ("cifar100", 50, "i50-gpu"),
    "CUB-200, T = 10": ("cub200", 10, ""),
    "CUB-200, T = 20": ("cub200", 20, ""),
    "CUB-200, T = 100": ("cub200", 100, ""),
}
HEADLINE = {"CIFAR-100, all images, T = 20": "CIFAR-100, T = 20"}
HEADLINE |= {"CIFAR-100, 50 per class, T = 20": "50 per class, T = 20"}
HEADLINE |= {"CUB-200, T = 10": "CUB-200, T = 10"}
CHANGED = {  # HAM on CIFAR-100, T = 20: what tasks are made of, or "noise"; what is changed: --name
    "random classes": {
        "ham": "i50",
        "one group": "i50-one-group",
        "one group (gain 5)": "i50-one-group-gain5",
        "random group": "i50-random",
        "one group per task": "i50-each-its-own",
        "sum (literal)": "i50-sum",
        "mean of what was added": "i50-mean",
        "no pruning": "i50-rho1",
        "ρ = 0.5": "i50-rho0.5",
        "ρ = 0.3": "i50-rho0.3",
        "α fixed at 1": "i50-no-alpha",
        "G_max = 2": "i50-gmax2",
        "G_max = 10": "i50-gmax10",
    },
    "random classes, GPU": {
        "ham": "i50-gpu",
        "random group": "i50-gpu-random",
        "no groups, 0.3 of each adapter": "i50-gpu-share0.3",
        "no groups, 0.5 of each adapter": "i50-gpu-share0.5",
        "no groups, 0.7 of each adapter": "i50-gpu-share0.7",
    },
    "superclasses": {"ham": "i50-super", "random group": "i50-super-random"},
    "noise": {
        "ham": "i50",
        "again": "i50-again",
        "typed, another CPU": "few",
        "fp32": "i50-fp32",
        "two threads": "i50-2threads",
        "a GPU": "i50-gpu",
    },
    "noise, GPU": {
        "ham": "i50-gpu",
        "typed": "i50-gpu-typed",
        "killed, resumed": "i50-gpu-resumed",
        "fp32": "i50-gpu-fp32",
    },
    "noise, all images": {"ham": "all", "a CPU": "160px"},
}
PARTS = ["random classes", "random classes, GPU", "superclasses"]
RUN = ["config.dataset", "config.tasks", "config.method", "config.name"]
BUILD = {"ham.py": "ham_sha256", "torch": "versions.torch", "timm": "versions.timm"}
BUILD |= {"on": "hardware", "precision": "config.precision"}


def rows():
    """Which run is behind which row. -> DataFrame: setting, row, and what RUN names"""
    found = []
    for setting, (data, tasks, name) in SETTINGS.items():
        for method in METHODS:
            found.append((setting, method, data, 1 if method == "joint" else tasks, method, name))
        for row, (method, part) in (RANKS | BESIDE).items():
            found.append((setting, row, data, tasks, method, f"{name}-{part}".strip("-")))
    for setting, changed in CHANGED.items():
        for row, name in changed.items():
            found.append((setting, row, "cifar100", 20, "ham", name))
    run = ("cifar100", 20, "sequential", "i50-law")
    found.append(("CIFAR-100, 50 per class, T = 20", "sequential, by the law", *run))
    found.sort(key=lambda line: [*SETTINGS, *CHANGED].index(line[0]))
    return pd.DataFrame(found, columns=["setting", "row", *RUN])


def runs(results=RESULTS, settings=None, only=None):
    """A line per row and seed, of settings in which HAM was run. Nested keys: config.seed, ..."""
    files = sorted(Path(results).glob("*/results.json"))
    found = pd.json_normalize([json.loads(file.read_text("utf-8")) for file in files])
    found["config.name"] = found["config.name"].fillna("")
    seconds = [[task["seconds"]["train"] for task in tasks] for tasks in found["tasks"]]
    found["seconds.train"] = [sum(x) for x in seconds]
    found["build"] = builds_of(found)
    r = rows().merge(found)
    same = r["hardware"] == r.groupby(["setting", "row"])["hardware"].transform("first")
    r["seconds.train"] = r["seconds.train"].where(same)  # a mean of two machines says nothing
    r = r[r["setting"].isin(settings or r["setting"])]
    r = r[r["setting"].isin(r["setting"][r["row"] == "ham"])]
    return r[r["row"].isin(only or r["row"])]


def builds_of(found):
    """What made each run: A1, A2, ..., B1, ... One letter: trained a first task to the same bits.

    Whether it did is seen where two runs, with one seed and data set, end their first task with the
    same loss to its last digit; that holds over third builds, too. A build may have no such run.
    """
    build = found[[*BUILD.values()]].agg(" ".join, axis="columns")
    loss = pd.Series([tasks[0].get("loss") if tasks else None for tasks in found["tasks"]])
    first = found["config.dataset"] + " " + found["config.seed"].astype(str) + loss.map(repr)
    first, group = first.where(loss.notna(), build), build
    for _ in build.unique():  # as long as a chain of builds can be
        group = group.groupby(first).transform("min").groupby(build).transform("min")
    often = lambda names: sorted(names.unique(), key=lambda x: (-(names == x).sum(), x))
    named = {}
    for letter, part in zip(string.ascii_uppercase, often(group)):
        named |= {x: f"{letter}{i}" for i, x in enumerate(often(build[group == part]), 1)}
    return build.map(named)


# ------------------------------------------------------------------------------------------- Cells


def signed(x):
    """One digit and its sign, two where one would be 0.0."""
    return f"{x:+.1f}" if abs(x) >= 0.05 else f"{x:+.2f}"


def half(x):
    """Half the width of the 95 % interval of a mean, by t: nan for one value."""
    return stats.t.ppf(0.975, x.count() - 1) * x.sem()


def cell(x, digits=1):
    """Mean ± standard deviation over seeds; a dash where nothing was measured."""
    text = f"{x.mean():.{digits}f} ± {x.std():.{digits}f}".removesuffix(" ± nan")
    return text if x.count() else "–"


def holm(p):
    """p-values -> these after Holm's correction for as many as there are."""
    p = p.dropna().sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)


def differences(gaps):
    """Seeds × what is compared -> mean and 95 % interval by t, bold where Holm leaves p < 0.05."""
    text = {}
    p = 2 * stats.t.sf((gaps.mean() / gaps.sem()).abs(), gaps.count() - 1)
    p = holm(pd.Series(p, gaps.columns))
    for key, gap in gaps.items():
        mean, width, n = gap.mean(), half(gap), gap.count()
        interval = f" [{signed(mean - width)}, {signed(mean + width)}]" if n > 1 else ""
        text[key] = f"{signed(mean)}{interval}" if n else "–"
        text[key] = f"**{text[key]}**" if p.get(key, 1) < 0.05 else text[key]
    return pd.Series(text, gaps.columns)


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
    "builds": ("build", lambda x: ", ".join(sorted({*x}))),
}


def by_seed(r, key="final_accuracy"):
    """Seeds × (row, setting) of one measure, nan where a row has not that seed."""
    return r.pivot(index="config.seed", columns=["row", "setting"], values=key)


def summary(r, columns, names=("setting", "method")):
    """(setting, row) × columns of COLUMNS; ham − it: HAM less the row, over the seeds both have."""
    which = ["setting", "row", "config.seed", "build"]
    keys = list({key for key, _ in COLUMNS.values()} - {*which})
    r = r[which].join(r.reindex(columns=keys).astype(float))  # null, or in no run: nan
    r["drift"] = r["class_mean_oracle"] - r["final_accuracy"]
    table, final = r.groupby(which[:2], sort=False).agg(**COLUMNS), by_seed(r)
    gaps = {(s, row): final["ham", s] - final[row, s] for s, row in table.index if row != "ham"}
    table["ham − it"] = differences(pd.DataFrame(gaps))
    return table.fillna("")[columns].rename_axis(names)


def markdown(table):
    """As a README has it, the index as first columns, unpadded: a new figure changes one line."""
    if table.columns.nlevels > 1:
        table = table.set_axis(table.columns.map("{0[0]}, T = {0[1]}".format), axis="columns")
    flat = table.reset_index()
    if table.index.nlevels == 2:  # a setting stands in its first line only
        flat.iloc[:, 0] = flat.iloc[:, 0].mask(flat.iloc[:, 0] == flat.iloc[:, 0].shift(), "")
    return flat.to_markdown(index=False, disable_numparse=True, stralign=None)


# ------------------------------------------------------------------------------------------ Tables


def headline(results=RESULTS):
    """Final accuracy of HAM and its controls: mean [95 % interval] (seeds)."""

    def interval(x):
        low, high = x.mean() - half(x), x.mean() + half(x)
        text = f"{x.mean():.1f} [{low:.1f}, {high:.1f}] ({x.count()})"
        return text.replace(" [nan, nan]", "")

    table = by_seed(runs(results, [*HEADLINE])).agg(interval).unstack()
    table = table.reindex(CONTROLS, columns=HEADLINE).astype(object).fillna("–")
    return table.rename(columns=HEADLINE).rename_axis("method")


def first_runs(results=RESULTS):
    """What the headline's runs of HAM with the first seed print, and how long they took."""
    r = runs(results, [*HEADLINE], ["ham"]).drop_duplicates("setting")
    seconds = [sum(sum(task["seconds"].values()) for task in tasks) for tasks in r["tasks"]]
    table = pd.DataFrame(
        {
            "last line": [f"final accuracy {x:.1f} %" for x in r["final_accuracy"]],
            "minutes": [f"{x / 60:.0f}" for x in seconds],
            "on": r["hardware"].str.replace(" 1 threads", " one thread")
            + ", "
            + r["config.precision"],
        }
    )
    table = table.set_axis(r["setting"].map(HEADLINE)).rename_axis("run")
    return table.loc[[x for x in HEADLINE.values() if x in table.index]]


def controls(results=RESULTS):
    """HAM against its controls in every setting: what the abstract claims, as far as measured."""
    r = runs(results, [*SETTINGS])
    order = r["setting"].unique()
    every = pd.MultiIndex.from_product([CONTROLS, order])
    final, forgot = (by_seed(r, x).reindex(columns=every) for x in ("final_accuracy", "forgetting"))
    table = pd.DataFrame({row: final[row].agg(cell) for row in CONTROLS})
    gaps = {f"ham − {row}": final["ham"] - final[row] for row in ("sequential", "average")}
    gaps["forgetting: ham − sequential"] = forgot["ham"] - forgot["sequential"]
    told = differences(pd.concat(gaps, axis="columns")).unstack(0)  # one family for Holm
    table = table.join(told.reindex(columns=gaps))
    table["seeds of ham"] = final["ham"].count().map(str)
    return table.loc[order].rename_axis("setting")


def growth(results=RESULTS):
    """Does the advantage grow with the number of tasks? Last: its slope on log T, by seed."""
    r = runs(results, [setting for setting, run in SETTINGS.items() if run[2] == "i50"])
    final, order = by_seed(r), r["setting"].unique()
    gap = (final["ham"] - final["sequential"])[order]
    more = gap.iloc[:, 1:].sub(gap[order[0]], axis="index")
    doublings, whole = np.log2([SETTINGS[setting][1] for setting in order]), gap.dropna()
    if len(order) > 1:
        slopes = [np.polyfit(doublings, x, 1)[0] for x in whole.to_numpy()]
        gap = gap.assign(**{"every doubling of T": pd.Series(slopes, whole.index, float)})
    gaps = {"ham − sequential": gap, f"more than at {order[0].split(', ')[-1]}": more}
    table = differences(pd.concat(gaps, axis="columns")).unstack(0).reindex(columns=gaps)
    table["seeds"] = gap.count().map(str)
    table["seeds of both"] = more.count().map(str)
    return table.loc[list(gap)].astype(object).fillna("").rename_axis("setting")


def others(results=RESULTS):
    """HAM and the methods of extras/baselines.py, where one has more than one seed."""
    r = runs(results, [*SETTINGS], ["ham", *OTHERS, *BESIDE])
    r = r[r.groupby(["setting", "row"])["row"].transform("size") > 1]
    r = r[r["setting"].isin(r["setting"][r["row"].isin(OTHERS)])]
    columns = ["final accuracy", "ham − it", "forgetting", "task known", "stored", "seeds"]
    return summary(r, columns)


def parts(results=RESULTS):
    """HAM's parts, each changed by itself. Drift: oracle means − final accuracy."""
    columns = ["final accuracy", "ham − it", "forgetting", "learning", "drift", "seeds"]
    r = runs(results, PARTS)
    return summary(r, columns, ["tasks of", "changed"])


def fixed_rank(results=RESULTS):
    """Groups cut back to rank R: what is stored, and what that costs."""
    r = runs(results, [*SETTINGS], ["ham", *RANKS])
    r, cut = r[r["setting"].isin(r["setting"][r["row"].isin(RANKS)])], next(iter(RANKS))
    table = summary(r, ["final accuracy", "ham − it", "forgetting", "stored", "seeds"])
    final, rest = by_seed(r), [(s, row) for s, row in table.index if row not in ("ham", cut)]
    gaps = pd.DataFrame({(s, row): final.get((cut, s), np.nan) - final[row, s] for s, row in rest})
    table.insert(2, "R = 8 − it", differences(gaps) if rest else "")
    return table.fillna("")


def measures(results=RESULTS):
    """Every measure of every row."""
    r = runs(results, [*SETTINGS, *PARTS])
    columns = [*list(COLUMNS)[:7], "training s", "stored", "which seeds", "builds"]
    return summary(r, columns, ["setting", "row"])


def settings(results=RESULTS):
    """The budget behind each setting's rows, and what made them: see `builds`."""
    r = runs(results)
    r["test images"] = r["test_images_per_task"].map(sum)
    keys = ["config.model", "config.img_size", "config.epochs", "config.images_per_class"]
    keys += ["test images", "config.precision", "build"]

    def distinct(values):  # no cap on the images per class: all
        found = sorted({x if isinstance(x, str) else f"{x:,g}" for x in values.dropna()})
        return ", ".join(found) or "all"

    table = r.groupby("setting", sort=False)[keys].agg(distinct)
    return table.rename(columns=lambda key: key.split(".")[-1].replace("_", " "))


def builds(results=RESULTS):
    """What made the runs, and how many. A letter's first tasks have the same bits: `builds_of`."""
    r = runs(results).drop_duplicates([*RUN, "config.seed"])
    r["ham_sha256"] = r["ham_sha256"].str[:7]
    table = r.groupby("build").agg(**{name: (key, "first") for name, key in BUILD.items()})
    return table.assign(runs=r["build"].value_counts().map(str))


def noise(results=RESULTS):
    """How far a run moves where nothing that matters is changed, and how near joins are to a tie."""
    r, lines = runs(results, ["noise", "noise, GPU", "noise, all images"]), {}
    for (setting, seed), own in r.groupby(["setting", "config.seed"]):
        first = own[own["row"] == "ham"].iloc[0]
        for run in own[own["row"] != "ham"].itertuples():
            joins = [
                sorted(t["similarities"])[-2:]
                for t in run.tasks
                if len(t["similarities"]) == 5  # all groups are open: best and second
            ]
            a, b = (pd.DataFrame(tasks) for tasks in (run.tasks, first["tasks"]))
            images = "all" if "all" in setting else "50"
            lines[images, run.row, f"{seed}", run.hardware] = {
                "final accuracy": f"{run.final_accuracy:.1f}",
                "largest difference of A_t": f"{(a.accuracy - b.accuracy).abs().max():.1f}",
                "tasks in another group": f"{(a.group != b.group).sum()}",
                "joins": f"{len(joins)}",
                "above 0.1": f"{sum(best > 0.1 for _, best in joins)}",
                "median margin": f"{np.median([best - second for second, best in joins]):.3f}",
            }
    return pd.DataFrame(lines).T.rename_axis(["per class", "run", "seed", "hardware"])


def held_out(results=RESULTS):
    """Every finished run of extras/screen.py, on held-out images: budget by budget, rate by rate."""
    from extras.baselines import ham  # with their rates; here: it brings torch

    lines = (Path(results) / "validate" / "screening.jsonl").read_text("utf-8").splitlines()
    usual = {"images_per_class": "all", "img_size": 160, "batch_size": 32, "epochs": 5}
    budget, found = ["dataset", "tasks", *usual], {}
    hidden = ["method", "lr", "penalty", "seed", "model", "test_images_per_class", "first_tasks"]
    for run in map(json.loads, lines):
        if run["class-mean"][1] is None:  # stopped early
            continue
        config = run.get("config", {})  # resolved: what was left to its default
        s = {"method": "ham", "tasks": config.get("tasks")} | usual | run["settings"]
        s |= {k: config[k] for k in ("lr", "penalty", "precision") if config.get(k)}
        s = {k: x for k, x in s.items() if (k, x) != ("precision", "bf16")}
        changed = [f"{k} {x}".removesuffix(".0") for k, x in s.items() if k not in budget + hidden]
        changed += ["GPU"] if "NVIDIA" in run.get("hardware", "") else []
        changed += [run["code_change"]] if "code_change" in run else []
        changed += [f"λ = {s['penalty']:g}"] if s.get("penalty") else []
        line = *(s[k] for k in budget), run["tasks_learnt"], s["method"], ", ".join(changed)
        rates, lr = found.setdefault(line, {}), s.get("lr") or 0.0
        rates.setdefault(lr, []).append(run["class-mean"][1])
    table, classes = {}, {"cifar100": (100, 500), "cub200": (200, 30)}  # and images of each

    def order(line):
        data, tasks, n, *rest, method, changed = line
        return data, tasks, 10**6 if n == "all" else n, rest, METHODS.index(method), changed

    for line in sorted(found, key=order):
        data, tasks, n, _, _, epochs, _, method, _ = line
        seen = epochs * classes[data][0] // tasks * (classes[data][1] if n == "all" else n)
        rates = {lr: f"{np.mean(x):.1f} ({len(x)})" for lr, x in sorted(found[line].items())}
        rates = [f"{lr:g}: {text}" if lr else f"default: {text}" for lr, text in rates.items()]
        table[DATA[data], *map(str, line[1:])] = {
            "by the law": f"{ham.learning_rate(method, seen):.2g}",
            "rate: accuracy (runs)": ", ".join(rates),
        }
    names = ["data", "T", "images per class", "px", "batch", "epochs", "after task", "method"]
    return pd.DataFrame(table).T.rename_axis([*names, "changed"])


def tuned(results=RESULTS):
    """What was tried for each method, as it runs now, where methods are compared, and what is used.

    Rates at the λ with which most were tried, λ at such a rate. *runs*: with all else that was tried.
    """
    lines = (Path(results) / "validate" / "screening.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    r = pd.DataFrame([{"method": "ham"} | x.get("config", {}) | x["settings"] for x in lines])
    r = r.reindex(columns=r.columns.union(["penalty", "tasks"]))  # some know of none
    r = r.fillna({"penalty": 0, "images_per_class": 0})  # 0: all
    r["accuracy"] = [x["class-mean"][1] for x in lines]
    usual = "method lr penalty seed precision dataset tasks images_per_class test_images_per_class"
    usual = {*usual.split(), "model", "img_size"}
    r["plain"] = [x["settings"].keys() <= usual for x in lines]
    every, used, table = r.groupby("method").size(), runs(results), {}
    used["at"] = used["setting"].str.replace(", GPU", "")
    r = r[["code_change" not in x for x in lines]]

    def found(own, name, fixed):
        """A value: accuracy (runs), ... of the setting `name`"""
        most = own.groupby(fixed)[name].nunique().idxmax()
        found = own[own[fixed] == most].groupby(name)["accuracy"].agg(["mean", "size"])
        found = [f"{x:g}: {mean:.1f} ({n:.0f})" for x, mean, n in found.itertuples()]
        return ", ".join(found) if len(found) > 1 else ""

    for setting in "CIFAR-100, 50 per class, T = 20", "CUB-200, T = 10":
        data, tasks, name = SETTINGS[setting]
        same = {"dataset": data, "tasks": tasks, "images_per_class": 50 if name else 0}
        here = r[(r[[*same]] == pd.Series(same)).all(axis="columns")]
        for method in sorted(here["method"][here["plain"]].unique(), key=METHODS.index):
            own = here[here["method"] == method]
            rates = used["config.lr"][(used["at"] == setting) & (used["row"] == method)]
            table[setting, method] = {
                "rate: accuracy (runs)": found(own[own["plain"]], "lr", "penalty"),
                "rate of the rows": ", ".join(f"{lr:.2g}" for lr in sorted(rates.unique())),
                "λ: accuracy (runs)": found(own[own["plain"]], "penalty", "lr"),
                "runs": str(len(own)),
                "in all": str(every[method]),
            }
    return pd.DataFrame(table).T.rename_axis(["setting", "method"])


def alone(results=RESULTS):
    """Groupings of adapters that were trained alone, by extras/alone.py, on held-out images."""
    lines = (Path(results) / "validate" / "alone.jsonl").read_text("utf-8").splitlines()
    r = pd.json_normalize([json.loads(line) for line in lines])
    r = r.drop_duplicates(["rank", "scale", "by", "config.seed"])  # repeated
    r = r.sort_values(["rank", "scale"], kind="stable")
    r["drawn"] = r["by"].str.startswith("random")
    same = ["rank", "scale", "config.seed"]
    drawn = r[r["drawn"]].groupby(same)["final_accuracy"].mean().rename("random")
    r = r.join(drawn, on=same)
    r["gap"] = (r["final_accuracy"] - r["random"]).mask(r["drawn"])
    r["by"] = r["by"].mask(r["drawn"], "random")
    rows = r.groupby(["rank", "scale", "by"], sort=False)
    table = pd.DataFrame({"held-out accuracy": rows["final_accuracy"].agg(cell)})
    gaps = {key: own.set_index("config.seed")["gap"] for key, own in rows if own["gap"].count()}
    table["it − random"] = differences(pd.DataFrame(gaps))
    table["seeds"] = rows["config.seed"].nunique().map(str)
    return table.fillna("").rename(str).rename_axis(["R", "scale", "grouped by"])


def demo(results=RESULTS):
    """`python ham.py` over ten seeds, each method at the best of one grid of rates on other draws."""
    found = json.loads((Path(results) / "demo.json").read_text("utf-8"))
    r = pd.DataFrame(found["runs"])
    final = r.pivot(index="seed", columns="method", values="final_accuracy")
    table = pd.DataFrame(index=CONTROLS)
    for key in ("final_accuracy", "forgetting", "learning_accuracy"):
        table[key.split("_")[0]] = r.groupby("method")[key].agg(cell)
    table["ham − it"] = differences(final[["ham"]].values - final.drop(columns="ham"))
    table["rate"] = r.groupby("method")["lr"].first().map("{:g}".format).replace("nan", "")
    return table.fillna("").rename_axis("method")


def demo_rates(results=RESULTS):
    """The final accuracies that the demo's rates were chosen by."""
    found = json.loads((Path(results) / "demo.json").read_text("utf-8"))["tried"]
    table = pd.DataFrame(found).map(lambda draws: f"{np.mean(draws):.1f}").T
    return table.reindex([x for x in CONTROLS if x in found]).rename_axis("method")


def grid(paper=None, results=RESULTS):
    """The paper's grid, final accuracy: its own figures, where someone has typed them; what was
    measured here; what others published. Empty: not measured.
    paper: {(method, data set, T): value}, e.g. {("HAM", "CIFAR-100", 20): 90.1}
    """
    paper = {("HAM", "CIFAR-100", 20): ""} | (paper or {})
    lines = [("the paper", f"{method} (paper)", *at, f"{x}") for (method, *at), x in paper.items()]
    r = runs(results, [*SETTINGS], METHODS)
    for (setting, row), x in r.groupby(["setting", "row"], sort=False):
        model, px, n = x[["config.model", "config.img_size", "config.images_per_class"]].iloc[0]
        n = "all images" if pd.isna(n) else f"{n:.0f} images per class"
        data, tasks, _ = SETTINGS[setting]
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


def one(run):
    """One run as a line of the grid. run: what ham.run returns, a results.json holds"""
    c, keys = run["config"], ["final accuracy", "average incremental", "forgetting", "learning"]
    about = {"data set": DATA.get(c["dataset"], Path(c["dataset"]).name), "T": f"{c['tasks']}"}
    about |= {"method": c["method"], "seed": f"{c['seed']}"}
    about |= {key: f"{run[COLUMNS[key][0]]:.1f}" for key in keys}
    return pd.DataFrame([about]).set_index("data set")


TABLES = [headline, first_runs, controls, growth, parts, fixed_rank, others, demo]
TABLES += [tuned, held_out, alone, demo_rates, noise, grid, settings, builds, measures]
TABLES = {table.__name__: table for table in TABLES}


def fill(text, results=RESULTS):
    """Replace what stands between <!-- table NAME --> and <!-- end -->."""
    between = re.compile(r"(<!-- table (\S+) -->).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda m: f"{m[1]}\n{markdown(TABLES[m[2]](results=results))}\n{m[3]}", text)


def pictures(results=RESULTS):
    """-> dict file name: figure"""
    main, cub = "CIFAR-100, all images, T = 20", "CUB-200, T = 10"
    few = [setting for setting in SETTINGS if ", 50 per" in setting and "T = 20" in setting]
    stored = runs(results, [*few, cub], [*METHODS, *list(RANKS)[:1]])
    gpu = [f"CIFAR-100, 50 per class, GPU, T = {tasks}" for tasks in (20, 50)]
    cut = (runs(results, [setting], ["ham", "ham, R = 8", "sequential"]) for setting in gpu)
    return {
        "accuracy.svg": figures.accuracy(runs(results, [main], CONTROLS)),
        "stored.svg": figures.stored(stored, CONTROLS[1:]),
        "fixed_rank.svg": figures.fixed_rank(*cut),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    for file in (ROOT / "README.md", RESULTS / "README.md", RESULTS / "all.md"):
        old = file.read_text("utf-8")
        new = fill(old)
        if check and new != old:
            raise SystemExit(f"{file} is not what results/ says: python -m extras.tables")
        file.write_text(new, "utf-8")
    if not check:
        for name, figure in pictures().items():
            plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": ""}
            figure.savefig(RESULTS / name, metadata={"Date": None})


if __name__ == "__main__":
    main()
