"""Make the tables and the figure of README.md and results/README.md from results/**/results.json.

python -m extras.tables            # rewrite what stands between the markers, and the figure
python -m extras.tables --check    # exit status 1 if that would change a table
"""

import argparse
import itertools
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


METHODS = ("ham", "sequential", "average", "frozen", "joint")
OTHERS = (*METHODS, "treelora", "safm", "sd_lora", "o_lora", "ewc")


def methods(data, tasks, name="", names=METHODS):
    """Rows of a table of methods: label -> the run's folder without its seed."""
    of = {m: 1 if m == "joint" else tasks for m in names}
    return {m: "-".join(filter(None, [data, f"T{of[m]}", m, name])) for m in names}


PART = "cifar100-T20-ham-i50"
TABLES = {
    "cifar100": methods("cifar100", 20, "i50", OTHERS),
    "cifar100-T50": methods("cifar100", 50, "i50", OTHERS),
    "cifar100-i250": methods("cifar100", 20, "i250", (*METHODS, "sd_lora", "o_lora", "ewc")),
    "cifar100-i250-T50": methods("cifar100", 50, "i250", ("ham", "sequential", "joint")),
    "cub200": methods("cub200", 10, "", OTHERS),
    "cub200-T20": methods("cub200", 20),
    "cifar100-T10": methods("cifar100", 10, "i50", OTHERS),
    "cifar100-T5": methods("cifar100", 5, "i50"),
    "cifar100-all": methods("cifar100", 20, "160px", ("ham", "sequential", "frozen")),
    "cifar100-224px": methods("cifar100", 20, "224px", ("ham", "sequential", "frozen", "joint")),
    "parts": {
        "HAM": PART,
        "one group": f"{PART}-one-group",
        "one group (gain 5)": f"{PART}-one-group-gain5",
        "random group": f"{PART}-random",
        "one group per task": f"{PART}-each-its-own",
        "sum (literal)": f"{PART}-sum",
        "mean of what was added": f"{PART}-mean",
        "no pruning": f"{PART}-rho1",
        "ρ = 0.5": f"{PART}-rho0.5",
        "ρ = 0.3": f"{PART}-rho0.3",
        "α fixed at 1": f"{PART}-no-alpha",
        "G_max = 2": f"{PART}-gmax2",
        "G_max = 10": f"{PART}-gmax10",
    },
    "superclasses": {"HAM": f"{PART}-super", "random group": f"{PART}-super-random"},
}
# The settings in which methods are compared: a line of the table of claims each, in this order.
SETTINGS = {
    "CIFAR-100, 50 per class, T = 5": "cifar100-T5",
    "CIFAR-100, 50 per class, T = 10": "cifar100-T10",
    "CIFAR-100, 50 per class, T = 20": "cifar100",
    "CIFAR-100, 50 per class, T = 50": "cifar100-T50",
    "CIFAR-100, 250 per class, T = 20": "cifar100-i250",
    "CIFAR-100, 250 per class, T = 50": "cifar100-i250-T50",
    "CIFAR-100, all images, T = 20": "cifar100-all",
    "CIFAR-100, all images, 224 px, T = 20": "cifar100-224px",
    "CUB-200, T = 10": "cub200",
    "CUB-200, T = 20": "cub200-T20",
}


def load(run, results=ROOT / "results"):
    """All seeds of a run, in order of the seed. A run that was never measured raises."""
    files = sorted(Path(results).glob(f"{run}-s[0-9]*/results.json"))
    if not files:
        raise FileNotFoundError(f"{results}/{run}-s*/results.json: measure it, extras/run_all.py")
    return [json.loads(file.read_text()) for file in files]


def measured(rows, results=ROOT / "results"):
    """label -> run, less the runs of which no seed is there."""
    return {k: run for k, run in rows.items() if any(Path(results).glob(f"{run}-s[0-9]*/*.json"))}


def paired(one, other, key="final_accuracy"):
    """Difference of two runs' means over the seeds both have; its standard error, None for one."""
    other = {r["config"]["seed"]: r[key] for r in other}
    both = [r[key] - other[s] for r in one if (s := r["config"]["seed"]) in other]
    error = statistics.stdev(both) / len(both) ** 0.5 if len(both) > 1 else None
    return statistics.mean(both), error


def ahead(one, other):
    """The paired difference of final accuracies, ± its standard error; bold where it is clear.

    Clear: more than two standard errors, over three seeds or more.
    """
    gap, error = paired(one, other)
    text = f"{round(gap, 1) + 0.0:+.1f}"  # + 0.0: not -0.0
    if error is None:
        return text
    seeds = {r["config"]["seed"] for r in one} & {r["config"]["seed"] for r in other}
    clear = len(seeds) > 2 and abs(gap) > 2 * error
    return f"**{text} ± {error:.1f}**" if clear else f"{text} ± {error:.1f}"


def cell(values, digits=1):
    """Mean, and ± standard deviation of two seeds or more; a dash where it does not apply."""
    if not values or None in values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def markdown(head, lines):
    """A Markdown table. head: headings; lines: lists of cells"""
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(x)} |" for x in lines)])


def stored(runs):
    """Parameters kept for the next task and for inference, in thousands; mean over seeds."""
    return f"{statistics.mean(r['parameters_stored'] for r in runs) / 1e3:,.0f} k"


def table(rows, results=ROOT / "results"):
    """Markdown table of accuracies (per cent) and parameters stored. rows: label -> run

    The difference to HAM is of the seeds both have, ± its standard error.
    """
    lines, ham = [], rows.get("ham") or rows.get("HAM")
    for label, run in rows.items():
        runs = load(run, results)
        cells = [cell([r[key] for r in runs]) for key in COLUMNS.values()]
        cells.insert(1, ahead(load(ham, results), runs) if ham not in (None, run) else "")
        lines.append(
            [label, *cells, stored(runs), ", ".join(str(r["config"]["seed"]) for r in runs)]
        )
    final, *more = COLUMNS
    return markdown(["", final, "ham − it", *more, "stored", "seeds"], lines)


def claims(results=ROOT / "results"):
    """HAM against the controls, a line per setting: what the abstract claims, as far as measured.

    Differences are of the seeds both have, ± their standard error. Forgetting is that above
    `frozen`'s, of the seeds both have.
    """
    lines = []
    for label, name in SETTINGS.items():
        runs = {m: load(r, results) for m, r in measured(TABLES[name], results).items()}
        if not {"ham", "sequential"} <= set(runs):
            continue
        ham, final = runs["ham"], {m: [r["final_accuracy"] for r in runs[m]] for m in runs}
        joint = runs.get("joint", [])  # the way is that of its seeds
        way = paired(joint, runs["sequential"])[0] if joint else 0
        of = [r for r in ham if r["config"]["seed"] in [x["config"]["seed"] for x in joint]]
        way = f"{100 * paired(of, runs['sequential'])[0] / way:.0f} %" if way > 0 else "–"
        forgot = [
            f"{paired(runs[m], runs['frozen'], 'forgetting')[0]:.1f}" if "frozen" in runs else "–"
            for m in ("ham", "sequential")
        ]
        cells = [cell(final.get(m)) for m in METHODS]
        gaps = [ahead(ham, runs[m]) if m in runs else "–" for m in ("sequential", "average")]
        lines.append([label, *cells, *gaps, way, " / ".join(forgot), str(len(ham))])
    return markdown(
        [
            "final accuracy",
            *METHODS,
            "ham − sequential",
            "ham − average",
            "of the way to joint",
            "forgetting above frozen's: ham / sequential",
            "seeds",
        ],
        lines,
    )


def others(results=ROOT / "results"):
    """HAM, `sequential` and the methods of extras/baselines.py: a line each, where one is measured.

    The difference to HAM is of the seeds both have, ± its standard error where these are several.
    """
    lines = []
    for label, name in SETTINGS.items():
        there = measured({m: r for m, r in TABLES[name].items() if m not in METHODS[2:]}, results)
        if set(there) <= set(METHODS):
            continue
        ham = load(there["ham"], results)
        for method, run in there.items():
            runs = load(run, results)
            keys = "final_accuracy", "forgetting", "task_known_accuracy"
            cells = [cell([r[k] for r in runs]) for k in keys]
            cells.insert(1, "" if method == "ham" else ahead(ham, runs))
            lines.append([label, method, *cells, stored(runs), str(len(runs))])
    head = ["", "method", "final accuracy", "ham − it", "forgetting", "task known", "stored"]
    return markdown([*head, "seeds"], lines)


def rates(_=None):
    """The learning rates that the code takes where --lr is not given; no result is read."""
    import ham  # these want torch, the other tables do not
    from extras import baselines

    budgets = {
        "CIFAR-100, more than 100 images per class": ("cifar100", None),
        "CIFAR-100, at most 100": ("cifar100", 50),
        "CUB-200": ("cub200", None),
    }
    lines = []
    for method in (m for m in OTHERS if m != "frozen"):
        kind = {"method": method, "device": "cpu", "precision": "fp32"}
        budget = [{"dataset": data, "images_per_class": n} for data, n in budgets.values()]
        made = [baselines.prepare(baselines.Config(**kind, **b))[0] for b in budget]
        lines.append([method, *(f"{ham.resolve(c).lr:g}" for c in made)])
    return markdown(["--lr", *budgets], lines)


def efficiency(results=ROOT / "results"):
    """What each method costs: seconds, images per second, parameters, memory; mean over seeds."""
    lines, shown = [], set()
    for label, name in SETTINGS.items():
        for method, run in measured(TABLES[name], results).items():
            if run in shown:  # joint's one task is that of several settings
                continue
            shown.add(run)
            runs = load(run, results)
            speed = [[r["images_per_second"][k] for r in runs] for k in ("training", "inference")]
            lines.append(
                [
                    label,
                    method,
                    cell([r["seconds"]["train"] for r in runs], 0),
                    cell([r["seconds"]["merge"] for r in runs]),
                    *(cell(s, 0) for s in speed),
                    f"{runs[0]['parameters_trained'] / 1e3:,.0f} k",
                    stored(runs),
                    cell([r["peak_memory_bytes"] / 2**30 for r in runs]),
                ]
            )
    head = ["", "method", "training s", "grouping and merging s", "training images/s"]
    head += ["inference images/s", "trained per task", "stored", "peak memory GiB"]
    return markdown(head, lines)


BUDGET = ("dataset", "tasks", "images_per_class", "test_images_per_class", "model", "img_size")


def screened(results=ROOT / "results"):
    """Every run of extras/screen.py, in the order they were made."""
    file = Path(results) / "validate" / "screening.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def held_out(results=ROOT / "results"):
    """Methods side by side: held-out images, one GPU that 16 runs shared, each at its best rate.

    -> dict budget: dict method: (rate, number of rates tried, runs at that rate), plain settings only
    """
    found = {}
    for r in screened(results):
        plain = set(r["settings"]) <= {*BUDGET, "method", "lr", "seed"} and "code_change" not in r
        if plain and "NVIDIA" in r.get("hardware", ""):
            c = r["config"]
            budget = c["dataset"], c["tasks"], c["images_per_class"]
            r["final_accuracy"] = r["class-mean"][1]
            rates = found.setdefault(budget, {}).setdefault(c["method"], {})
            rates.setdefault(c["lr"], []).append(r)
    for of in found.values():
        for method, rates in of.items():
            # of the rates with the most seeds the best
            worth = {
                lr: (len(runs), statistics.mean(r["final_accuracy"] for r in runs))
                for lr, runs in rates.items()
            }
            best = max(worth, key=worth.get)
            of[method] = best, len(rates), rates[best]
    return {budget: of for budget, of in sorted(found.items(), key=str) if "ham" in of}  # not joint


def side_by_side(results=ROOT / "results"):
    """The table of `held_out`. Seconds are of training, comparable within a budget."""
    lines = []
    for (data, tasks, n), of in held_out(results).items():
        for method in (m for m in OTHERS if m in of):
            lr, tried, runs = of[method]
            end = [r["final_accuracy"] for r in runs]
            gap = "" if method == "ham" else ahead(of["ham"][2], runs)
            oracle = cell([r["oracle"] for r in runs])
            seconds = cell([r["seconds"]["train"] for r in runs], 0)
            cells = [f"{lr:g} (of {tried})", cell(end), gap, oracle, seconds, str(len(runs))]
            lines.append([f"{data}, {tasks}, {n or 'all'}", method, *cells])
    head = ["data, T, images per class", "method", "rate (of those tried)", "end", "ham − it"]
    return markdown([*head, "oracle means", "training s", "seeds"], lines)


def screening(results=ROOT / "results"):
    """What was tried on held-out images (extras/screen.py), in the order it was tried."""
    lines = []
    for r in screened(results):
        s = {"batch_size": 32, "images_per_class": "all", "method": "ham"} | r["settings"]
        budget = f"{s['dataset']}, {s['tasks']}, {s['images_per_class']}, {s.pop('batch_size')}"
        what = [
            f"{k.replace('_', '-')} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in s.items()
            if k not in (*BUDGET, "method")
        ]
        what = ", ".join([s["method"], *what, *filter(None, [r.get("code_change")])])
        figures = [r["class-mean"][0], r["class-mean"][1], r["head"][1], r["oracle"]]
        learnt = f"{r['tasks_learnt'] // 2}, {r['tasks_learnt']}"
        budget += ", GPU" if "NVIDIA" in r.get("hardware", "") else ""
        sizes = " ".join(map(str, r["group_sizes"] or [])) or "–"
        lines.append([budget, what, learnt, *(cell([x]) for x in figures), sizes])
    head = ["data, T, images per class, batch", "settings", "after tasks", "half-way", "end"]
    head += ["end, by the head", "oracle means", "group sizes"]
    return markdown(head, lines)


def parts(results=ROOT / "results"):
    """HAM's parts, each switched off by itself, and the random group where tasks are superclasses.

    The difference is of the seeds both have, ± its standard error; drift: oracle means − final.
    """
    lines = []
    for name, data in (("parts", "random classes"), ("superclasses", "superclasses")):
        there = measured(TABLES[name], results)
        ham = load(there["HAM"], results)
        for label, run in there.items():
            runs = load(run, results)
            drift = [r["class_mean_oracle"] - r["final_accuracy"] for r in runs]
            cells = [cell([r["final_accuracy"] for r in runs])]
            cells += ["" if label == "HAM" else ahead(ham, runs)]
            cells += [cell([r[k] for r in runs]) for k in ("forgetting", "learning_accuracy")]
            lines.append([data, label, *cells, cell(drift), str(len(runs))])
    head = ["tasks of", "changed", "final accuracy", "ham − it", "forgetting", "learning", "drift"]
    return markdown([*head, "seeds"], lines)


# animals, plants and landscapes, things: CIFAR-100's superclasses in the order of the file
KINDS = "aaptpttaatpaaaaaaptt"


def related(results=ROOT / "results"):
    """Where tasks are superclasses: are those in one group of one kind more often than any two?"""
    listed = (ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").strip()
    kind = {name: k for k, names in zip(KINDS, listed.split("\n\n")) for name in names.split()}
    shares = []
    for label, run in measured(TABLES["superclasses"], results).items():
        same, together = 0, 0
        for r in load(run, results):
            kinds = [kind[name] for name in r["classes"][::5]]  # each task's first class
            groups = [task["group"] for task in r["tasks"]]
            for i, j in itertools.combinations(range(len(groups)), 2):
                together += groups[i] == groups[j]
                same += groups[i] == groups[j] and kinds[i] == kinds[j]
        shares.append(f"{label} {100 * same / together:.0f} % of {together} pairs")
    any_two = list(itertools.combinations(KINDS, 2))
    chance = 100 * statistics.mean(a == b for a, b in any_two)
    what = "Tasks of one group that are of one kind (animals; plants and landscapes; things)"
    return f"{what}: {', '.join(shares)}; of any two tasks {chance:.0f} %."


def advantage(results=ROOT / "results"):
    """HAM's final accuracy less sequential's for each T on CIFAR-100, over the seeds both have.

    -> dict T: (points, standard error or None, dict seed: points)
    """
    gaps = {}
    for name in ("cifar100-T5", "cifar100-T10", "cifar100", "cifar100-T50"):
        pair = measured({m: TABLES[name][m] for m in ("ham", "sequential")}, results)
        if len(pair) == 2:
            ham, other = (load(run, results) for run in pair.values())
            both = {r["config"]["seed"] for r in ham} & {r["config"]["seed"] for r in other}
            alone = {
                s: paired([r for r in ham if r["config"]["seed"] == s], other)[0] for s in both
            }
            gaps[ham[0]["config"]["tasks"]] = (*paired(ham, other), alone)
    return gaps


def growth(results=ROOT / "results"):
    """Does the advantage grow with the number of tasks? Over all seeds, and on the first alone."""
    gaps = advantage(results)
    points = [
        f"{gap:.1f} with {t} (one seed)"
        if len(alone) == 1
        else f"{gap:.1f} ± {error:.1f} with {t} ({len(alone)} seeds)"
        for t, (gap, error, alone) in gaps.items()
    ]
    what = "HAM's points above `sequential` by the number of tasks, CIFAR-100, 50 per class"
    first = min(set.intersection(*(set(alone) for *_, alone in gaps.values())))
    one = ", ".join(f"{alone[first]:.1f}" for *_, alone in gaps.values())
    return f"{what} (± standard error): {', '.join(points)}. On seed {first} alone: {one}."


def settings(results=ROOT / "results"):
    """Every measured setting: its budget, its table, the rows that were not measured."""
    text, nothing = [], []
    for name, rows in TABLES.items():
        there = measured(rows, results)
        if set(there) <= {"joint", "frozen", "HAM"}:  # HAM: the row that parts has from elsewhere
            nothing.append(name)
            continue
        run = load(next(iter(there.values())), results)[0]
        c, every = run["config"], [r for name in there.values() for r in load(name, results)]
        torch, timm = (
            " and ".join(sorted({r["versions"][k] for r in every})) for k in ("torch", "timm")
        )
        text.append(
            f"**{name}**: {c['model']}, {c['img_size']} px, {c['images_per_class'] or 'all'} training "
            f"images per class, {sum(run['test_images_per_task']):,} test images, {c['tasks']} tasks, "
            f"{c['epochs']} epochs, {run['hardware']}, torch {torch}, timm {timm}."
        )
        text.append(table(there, results))
        missing = [label for label in rows if label not in there]
        text += [f"Not measured: {', '.join(missing)}."] if missing else []
    nothing += ["ImageNet-R", "Tiny-ImageNet", "ViT-B/16"]
    return "\n\n".join([*text, f"**Not measured at all**: {', '.join(nothing)}."])


def made(name, results=ROOT / "results"):
    """The table of that name, Markdown."""
    makers = [claims, growth, others, rates, settings, efficiency, side_by_side]
    makers += [screening, parts, related]
    return {maker.__name__: maker for maker in makers}[name](results)


def fill(text, results=ROOT / "results"):
    """Replace what stands between <!-- table NAME --> and <!-- end -->."""
    between = re.compile(r"(<!-- table (\S+) -->).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda m: f"{m[1]}\n{made(m[2], results)}\n{m[3]}", text)


def figure(results=ROOT / "results"):
    """Accuracy against tasks, a panel for each setting in which `sequential` was measured.

    Lines are means, bands go from the lowest to the highest seed. -> matplotlib's figure
    """
    import matplotlib.pyplot as plt  # not needed for the tables

    looks = {"ham": "C0o-", "sequential": "C1s--", "average": "C2v-.", "frozen": "C3^:"}
    looks |= {m: f"C{i}-" for i, m in enumerate(OTHERS) if m not in METHODS}
    shown = {k: n for k, n in SETTINGS.items() if "sequential" in measured(TABLES[n], results)}
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    size = {"figsize": (4.6 * columns, 3.4 * rows), "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, squeeze=False, **size)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, (title, name) in zip(axes.flat, shown.items()):
        for label, run in measured(TABLES[name], results).items():
            curves = [[t["accuracy"] for t in r["tasks"]] for r in load(run, results)]
            if label == "joint":  # one task: a line at its height
                ax.axhline(curves[0][0], color="#999999", lw=1, label="joint")
                continue
            steps, mean = range(1, len(curves[0]) + 1), [statistics.mean(x) for x in zip(*curves)]
            width = 1.5 if label in METHODS else 0.8
            (line,) = ax.plot(steps, mean, looks[label], ms=4, lw=width, label=label)
            low, high = [min(x) for x in zip(*curves)], [max(x) for x in zip(*curves)]
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
        ax.set(title=title, xlabel="after task", ylabel="accuracy, all classes seen (%)")
        ax.locator_params("x", integer=True)
        ax.legend(frameon=False, fontsize=8, ncols=2)
    return fig


def draw(file, results=ROOT / "results"):
    """Write the figure, without a screen."""
    import matplotlib

    matplotlib.use("agg")
    figure(results).savefig(file, dpi=80, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        old = file.read_text(encoding="utf-8")
        new = fill(old)
        if check and new != old:
            raise SystemExit(f"{file.name} is not what results/ says: python -m extras.tables")
        if not check:
            file.write_text(new, encoding="utf-8")
    if not check:
        draw(ROOT / "results" / "accuracy.png")


if __name__ == "__main__":
    main()
