"""Adapters trained alone, then grouped: do similar tasks share an adapter better than random ones?

    python -m extras.alone --dataset cifar100 --tasks 20 --images-per-class 50 --validate --lr 3e-3

Every task's adapter is trained on the bare model from the same start, so that no grouping changes an
adapter: all groupings are tried on the same ones. Chained adapters hardly know which tasks are kin;
these do. The first G_max tasks open groups; a later one joins the group to whose members it is most
similar on average (not to their mean: that grows with the group) until it is full. A group is the
mean of its pruned members, cut back to rank R, whereby it matters who shares it; the model is
W0 + scale · Σ_G ΔW_G.

adapter   cosine of B A, all layers as one vector
gradient  cosine of the loss's gradient by B before training, every other image
features  cosine of the tasks' mean frozen features
random    drawn, as many tasks in each group; two draws
"""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ham
from extras import baselines, demo
from extras.run_all import commit

GROUPINGS = ("adapter", "random", "random 2", "features", "gradient")
PATHS = ("out", "data_dir", "weights")  # a file's digest says which


@dataclass(frozen=True)
class Config(baselines.Config):
    """Settings of what is tried on one set of adapters."""

    ranks: str = "2,8"  # ranks that groups are cut to, with commas between
    scales: str = "1"  # of the sum of groups
    by: str = ",".join(GROUPINGS)  # how tasks are grouped


def train(vit, data, w0, config):
    """-> per task: its adapter, dict layer: (b, a); what it is compared by, dict name: (P,)"""
    method, adapters, vectors = ham.Average(w0, config), [], []
    for task, classes in enumerate(data.tasks):
        features, labels = ham.extract(vit, {}, data, "train", classes, config)
        start = method.start()
        start.begin(features, labels, classes, config, 1)
        pixels = data.images("train", classes)[0][::2]
        for x, y in zip(pixels.split(config.batch_size), labels[::2].split(config.batch_size)):
            x = ham.forward(vit, start.weights(w0), data.prepare(x), config)
            (len(y) * ham.task_loss(start, x, y)).backward()
        adapter = ham.train_task(vit, method, data, task)[0].detached()
        adapters.append(adapter)
        gradient = torch.cat([b.grad.flatten() for b, _ in start.adapter.values()])
        mean = F.normalize(features, dim=1).mean(0)
        vectors.append({"adapter": ham.flat(adapter), "gradient": gradient, "features": mean})
        print(f"task {task + 1}/{config.tasks} trained", flush=True)
    return adapters, vectors


def group(vectors, g_max):
    """Which group each task joins, by its mean cosine with the members. T of (P,) -> T ints

    A group is full at T / G_max: else size, which matters by itself, would differ between groupings.
    """
    unit = F.normalize(torch.stack(vectors), dim=1)
    similar, places = (unit @ unit.T).cpu().numpy(), list(range(min(g_max, len(vectors))))
    for task in range(len(places), len(vectors)):
        members = [np.flatnonzero(np.equal(places, j)) for j in range(g_max)]
        free = [j for j in range(g_max) if len(members[j]) * g_max < len(vectors)]
        places.append(max(free, key=lambda j: similar[task, members[j]].mean()))
    return places


def shuffled(places, g_max, seed):
    """The same sizes, other members: the first G_max tasks still open groups."""
    return places[:g_max] + np.random.RandomState(seed).permutation(places[g_max:]).tolist()


def evaluate(vit, data, w0, config, adapters, places, scale):
    """Final accuracy, class means taken after each task as ham.learn does. -> per cent"""
    method, rows = ham.HAM(w0, config), []
    for task, classes in enumerate(data.tasks):
        if places[task] == len(method.groups):
            method.groups.append(ham.Group({}))
        method.join(method.groups[places[task]], task, adapters[task], 1.0)
        folded = method.folded()
        weights = {name: torch.lerp(w, folded[name], scale) for name, w in w0.items()}
        taught = ham.extract(vit, weights, data, "train", classes, config)
        rows.append(ham.class_means(*taught, classes))
    every = range(len(data.names))
    features, labels = ham.extract(vit, weights, data, "test", every, config)
    return ham.accuracies(ham.cosine_logits(features, torch.cat(rows)), labels, [every])[0]


def listed(text, kind, known=None):
    """A setting with commas between. -> list of kind"""
    try:
        values = [kind(x) for x in text.split(",")]
    except ValueError as error:
        raise ham.InputError(f"{text}: {error}; numbers with commas between") from error
    if unknown := [x for x in values if known and x not in known]:
        raise ham.InputError(f"{', '.join(unknown)}: must be of {', '.join(known)}")
    return values


def run(config):
    """Train, or take what an earlier call has trained; then a line per grouping, rank and scale."""
    every = itertools.product(
        listed(config.ranks, int), listed(config.scales, float), listed(config.by, str, GROUPINGS)
    )
    idle = ["method", "merge", "gain", "share", "grouping", "tau", "group_rank", "read_out"]
    idle = [k for k in [*idle, "lr_alpha"] if getattr(config, k) != getattr(Config, k)]
    if other := [f"--{k.replace('_', '-')}" for k in idle]:
        raise ham.InputError(f"{', '.join(other)}: groups are means of adapters trained alone here")
    if min(listed(config.ranks, int)) < 1:
        raise ham.InputError(f"--ranks {config.ranks}: a rank is at least 1")
    if not config.lr or str(demo.MODEL) in config.model:
        raise ham.InputError("give --dataset and --lr: no rate was found for this")
    config = dataclasses.replace(config, merge="mean", train_alpha=False)
    vit, method, data, _ = baselines.prepare(config)
    folder, w0, config = Path(config.out), method.w0, method.config
    folder.mkdir(parents=True, exist_ok=True)
    about = ham.about(vit, config, data)
    about["config"] = {k: x for k, x in about["config"].items() if k not in PATHS}
    free = ("ranks", "scales", "by", "g_max", "rho", "name")
    key = repr({k: x for k, x in about["config"].items() if k not in free})
    file = folder / f"alone-{hashlib.sha256(key.encode()).hexdigest()[:8]}.pt"
    if not file.is_file():
        print("all tasks are trained, then written: once stopped, it starts anew", flush=True)
        trained = train(vit, data, w0, config)
        ham.write(file, lambda f: torch.save(trained, f))
    adapters, vectors = torch.load(file, config.device, weights_only=True)
    kin = {by: group([x[by] for x in vectors], config.g_max) for by in vectors[0]}
    for draw, by in enumerate(("random", "random 2")):
        kin[by] = shuffled(kin["adapter"], config.g_max, (config.seed, draw))
    for rank, scale, by in every:
        used = dataclasses.replace(config, group_rank=rank)
        final = evaluate(vit, data, w0, used, adapters, kin[by], scale)
        line = {"by": by, "rank": rank, "scale": scale, "final_accuracy": final}
        line |= {"groups": kin[by], "commit": commit()}
        line |= {k: about[k] for k in ("config", "hardware", "versions", "ham_sha256")}
        with (folder / "alone.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        print(f"{by}, R = {rank}, scale {scale:g}: {final:.1f} %", flush=True)


if __name__ == "__main__":
    ham.main(None, run, Config)
