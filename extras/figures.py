"""Pictures of results/ and of one run, for README.md and reproduce.ipynb."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image

import ham

BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#999999"  # Okabe-Ito
LINES = [(BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "v"), ("black", ":", "^")]
LINES = [*LINES, (ORANGE, (0, (6, 1, 1, 1, 1, 1)), "D")]  # five lines at most in a panel
LINES = [dict(zip(("color", "linestyle", "marker"), line)) for line in LINES]
STYLE = {"figure.constrained_layout.use": True, "figure.facecolor": "white", "figure.dpi": 80}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def panels(columns=1, size=(10, 3), **how):
    """-> figure, its axes"""
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(1, columns, figsize=size, squeeze=False, **how)
    return fig, axes.flat[0] if columns == 1 else list(axes.flat)


def ticks(total):
    """Of tasks on an axis from 1 on."""
    return np.arange(1, total + 1, 1 if total <= 12 else 3)


# ------------------------------------------------------------------------------------- Of results/


def apart(heights, gap):
    """Heights of labels: these, moved up where two are nearer than gap."""
    heights = heights.sort_values()
    for i in range(1, len(heights)):
        heights.iloc[i] = max(heights.iloc[i], heights.iloc[i - 1] + gap)
    return heights


def accuracy(runs, ax=None):
    """Accuracy against tasks: means over seeds, bands from the lowest to the highest seed.

    runs: of one setting, as tables.runs has them; rows beyond five are left out.
    """
    fig, ax = (ax.figure, ax) if ax else panels(size=(7, 4))
    steps, ends = range(1, max(map(len, runs.tasks)) + 1), {}
    for (row, own), line in zip(runs.groupby("row", sort=False), LINES):
        curves = pd.DataFrame([[task["accuracy"] for task in tasks] for tasks in own.tasks])
        curves = curves.reindex(columns=range(len(steps))).ffill(axis="columns")  # joint: level
        ax.plot(steps, curves.mean(), **line, ms=4)
        ax.fill_between(steps, curves.min(), curves.max(), color=line["color"], alpha=0.15, lw=0)
        ends[row] = (curves.mean().iloc[-1], line["color"])
    heights = apart(pd.Series({row: end for row, (end, _) in ends.items()}), 2.2)
    for row, (end, color) in ends.items():
        ax.text(1.02 * len(steps), heights[row], f"{row} {end:.1f}", va="center", color=color)
    ax.set(title=runs.setting.iloc[0], xlabel="after task", ylabel="accuracy, all classes seen (%)")
    ax.locator_params("x", integer=True)
    return fig


def fixed_rank(few, many):
    """What groups of one adapter's rank cost and save: accuracy with few tasks, numbers stored with
    many. few, many: runs of one setting each, in which ham, sequential and ham, R = 8 were run.
    """
    fig, (left, right) = panels(2, size=(10, 4))
    accuracy(few, left)
    end = many.groupby("row")["parameters_stored"].mean()
    own = many.drop_duplicates("row").set_index("row")
    adapter = (end["ham"] - end["sequential"]) / (len(own.tasks["ham"]) - 1)
    for row, line in zip(few["row"].unique(), LINES):
        sizes = [task.get("group_sizes", [1]) for task in own.tasks[row]]
        adapters = np.array([sum(n) if row == "ham" else len(n) for n in sizes])
        stored = (end["sequential"] + adapter * (adapters - 1)) / 1e3
        right.plot(range(1, len(sizes) + 1), stored, **line, ms=4, markevery=3)
        how = {"va": "center", "color": line["color"]}
        right.text(1.02 * len(sizes), stored[-1], f"{row} {stored[-1]:,.0f} k", **how)
    right.set(title=many.setting.iloc[0], xlabel="after task", ylabel="numbers stored (thousands)")
    right.set_ylim(0, None)
    return fig


def stored(runs, controls):
    """Final accuracy against parameters kept, a panel per setting; hollow: one seed. controls: rows"""
    settings = runs.groupby("setting", sort=False)
    fig, axes = panels(len(settings), size=(4.5 * len(settings), 4))
    for ax, (setting, own) in zip(axes, settings):
        means = own.groupby("row")
        x, y = means["parameters_stored"].mean(), means["final_accuracy"].mean()
        seeds = means.size()
        column = (4 * np.log10(x)).round()
        left = y.index.isin(controls) | y.index.str.startswith("ham, ")
        for (_, is_left), near in y.groupby([column, left]):  # labels of neighbours, one column
            at = x[near.index].min() / 1.15 if is_left else 1.15 * x[near.index].max()
            for row, height in apart(near, 0.05 * (y.max() - y.min())).items():
                color = RED if row in controls else BLUE if row.startswith("ham") else "black"
                mark = {"marker": "s" if row in controls else "o", "color": color, "ms": 5}
                ax.plot(x[row], y[row], **mark, mfc="none" if seeds[row] == 1 else color)
                side = "right" if is_left else "left"
                ax.text(at, height, f"{row} {y[row]:.1f}", va="center", ha=side)
        ax.set(title=setting, xlabel="parameters stored", ylabel="final accuracy (%)", xscale="log")
        ax.set_xlim(x.min() / 14, 6 * x.max())
    return fig


# -------------------------------------------------------------------------------------- Of one run
# path: per step the loss, α_i and every α_G. records: results.json's `tasks`.


def first_images(data):
    """The first training image of each task, side by side."""
    strip = torch.cat([data.images("train", task)[0][0] for task in data.tasks], dim=2)
    strip = Image.fromarray(strip.permute(1, 2, 0).numpy())
    larger = max(1, 900 // strip.width)
    return strip.resize([larger * side for side in strip.size], Image.NEAREST).quantize(64)


def scalars(path, total):
    """(1) How α_i and every α_G move. total: T"""
    fig, axes = panels(2, sharey=True)
    per_task = len(path) // total
    step = np.arange(len(path)) / per_task + 1
    for task in range(total):
        own = slice(task * per_task, (task + 1) * per_task)
        axes[0].plot(step[own], [alpha for _, alpha, *_ in path[own]], color=BLUE)
    for j, line in zip(range(len(path[-1]) - 2), LINES):
        values = [row[j + 2] if j + 2 < len(row) else np.nan for row in path]
        axes[1].plot(step, values, lw=2, **line | {"marker": ""}, label=f"group {j}")
    for ax, title in zip(
        axes, (r"$\alpha_i$ of the task in training", r"$\alpha_G$ of every group")
    ):
        ax.axhline(1, color=GREY, lw=0.7, zorder=0)
        ax.set(title=title, xlabel="during task", xticks=ticks(total))
    fig.legend(loc="outside right center")
    return fig


def numbers(ax, matrix, is_light):
    """Write a small square matrix's entries into its image, black where `is_light(entry)`."""
    ax.spines[:].set_visible(False)
    for (y, x), value in np.ndenumerate(matrix):
        if len(matrix) <= 12 and not np.isnan(value):
            how = {"ha": "center", "va": "center", "fontsize": 10}
            ax.text(x, y, f"{round(value)}", color="black" if is_light(value) else "white", **how)


def pruning(adapter, rho):
    """(3) Which entries of B and A are dropped, and how much of |ΔW| is left at other ρ."""
    fig, axes = panels(3)
    for ax, letter, matrices in zip(axes, "BA", zip(*adapter.values())):
        size = torch.cat([x.abs().flatten() for x in matrices]).cpu()
        kept = torch.cat([ham.prune(x, rho).flatten() != 0 for x in matrices]).cpu()
        bins = torch.linspace(0, size.quantile(0.995).item(), 40).tolist()
        look = {"stacked": True, "color": ["black", "#56B4E9"], "label": ["dropped", "kept"]}
        ax.hist([size[~kept].numpy(), size[kept].numpy()], bins, **look)
        ax.set(title=f"entries of {letter}, ρ = {rho}", xlabel="magnitude", yticks=[])
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes[0].legend()
    rhos = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    ways = {
        "B and A, each by itself": lambda b, a, x: (ham.prune(b, x), ham.prune(a, x)),
        "the product BA": lambda b, a, x: ham.prune(b @ a, x),
    }
    for (label, way), line in zip(ways.items(), LINES):
        pruned = [ham.flat({n: way(b, a, x) for n, (b, a) in adapter.items()}) for x in rhos]
        left = [(x.norm() / ham.flat(adapter).norm()).item() for x in pruned]
        axes[2].plot(rhos, left, **line, ms=5, label=label)
    axes[2].set(title="share of |ΔW| that is left", xlabel="ρ", ylim=(0, 1.05))
    axes[2].legend(fontsize=10)
    return fig


def weights(ways, groups):
    """(4) How much each task counts in its group in the end. ways: dict label: (T,)"""
    fig, ax = panels()
    order = [task for group in groups for task in group.members]
    for (label, weight), line in zip(ways.items(), LINES):
        line = line | {"linestyle": "", "mfc": "none" if "1" in label else line["color"]}
        ax.plot(range(len(order)), weight[order], **line, ms=8, mew=2, label=label)
    for end in np.cumsum([len(group.members) for group in groups])[:-1]:
        ax.axvline(end - 0.5, color=GREY, lw=1)
    names = [task + 1 for task in order]
    ax.set(xticks=range(len(order)), xticklabels=names, xlabel="task, group by group")
    ax.set(title="how much each task counts in its group in the end", ylim=(0, None))
    fig.legend(loc="outside right center")
    return fig


def similarities(records, tau):
    """(2) What each new adapter's similarity with each group was, and which group it joined."""
    fig, ax = panels()
    for j, line in zip(range(len(records[-1]["group_sizes"])), LINES):
        seen = [(t, r["similarities"]) for t, r in enumerate(records, 1)]
        seen = [(t, similarities[j]) for t, similarities in seen if j < len(similarities)]
        ax.plot(*zip(*seen), **line | {"linestyle": ""}, ms=6, label=f"group {j}")
    for t, record in enumerate(records):
        j, s = record["group"], record["similarities"]
        if j == len(s):
            where = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 10}
            ax.annotate(f"opens {j}", (t + 1, 0.02), **where)
        else:
            ax.plot(t + 1, s[j], "o", ms=13, mfc="none", mec="black")
    ax.plot([], [], "o", ms=13, mfc="none", mec="black", label="joined")
    ax.axhline(tau, color=GREY, lw=1)
    ax.text(0.45, tau, "τ", va="bottom")
    ax.set(title="similarity of a new adapter with each group", xlabel="task")
    ax.set(xlim=(0.4, len(records) + 0.6), xticks=ticks(len(records)))
    ax.margins(y=0.2)
    fig.legend(loc="outside right center")
    return fig


def ageing(cosine, tasks):
    """How far class means have drifted. cosine (C,), tasks: ranges of classes"""
    fig, ax = panels(size=(10, 2.6))
    ax.plot(range(1, len(tasks) + 1), [cosine[[*x]].mean() for x in tasks], **LINES[0])
    for task, classes in enumerate(tasks, 1):
        ax.plot([task] * len(classes), cosine[[*classes]], "_", color="black")
    title = "cosine of a class mean as taken with that of the same images under the final model"
    ax.set(title=title, xlabel="task (dashes: its classes)", xticks=ticks(len(tasks)))
    return fig


def loss(path, total):
    """The loss of every step, and its mean over 9 steps. total: T"""
    fig, ax = panels(size=(10, 2.6))
    per_task, values = len(path) // total, np.array([loss for loss, *_ in path])
    for task, own in enumerate(values[: per_task * total].reshape(total, per_task), 1):
        step = task + np.arange(per_task) / per_task
        ax.semilogy(step, own, color="#cccccc", lw=0.7)
        ax.semilogy(step, np.convolve(np.pad(own, 4, "edge"), np.ones(9) / 9, "valid"), color=BLUE)
    ax.set(title="loss (blue: mean of 9 steps)", xlabel="during task", xticks=ticks(total))
    ax.set_ylim(max(values.min(), 1e-3) / 1.5, None)
    return fig


def matrix(a):
    """The accuracy matrix. a: T lists, of 1 to T accuracies"""
    square = np.array([row + [np.nan] * (len(a) - len(row)) for row in a])
    fig, ax = panels(size=(6, 5))
    image = ax.imshow(square, cmap="cividis", vmin=0)
    numbers(ax, square, lambda value: value > 0.55 * np.nanmax(square))
    fig.colorbar(image, shrink=0.8, label="accuracy (%)")
    at = ticks(len(a))
    ax.set(xticks=at - 1, yticks=at - 1, xticklabels=at, yticklabels=at)
    ax.set(xlabel="on task j", ylabel="after task t", title="accuracy matrix of HAM")
    return fig


def compared(results):
    """Accuracy after each task, and forgetting per task. results: dict method: results.json"""
    fig, axes = panels(2, size=(10, 3.2))
    for (name, result), line in zip(results.items(), LINES):
        a = result["accuracy_matrix"]
        total, after = len(a), [task["accuracy"] for task in result["tasks"]]
        lost = [max(row[j] for row in a[j:-1]) - a[-1][j] for j in range(total - 1)]
        axes[0].plot(range(1, total + 1), after, **line, ms=5)
        axes[1].plot(range(1, total), lost, **line, ms=5, label=name)
    axes[0].set(title="accuracy, all classes seen (%)", xlabel="after task", ylim=(0, None))
    axes[1].set(title="forgetting per task (points)", xlabel="task")
    axes[0].set_xticks(ticks(total))
    axes[1].set_xticks(ticks(total - 1))
    fig.legend(loc="outside right center")
    return fig
