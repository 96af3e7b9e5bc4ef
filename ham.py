"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), in one file. Unofficial.

A frozen vision transformer learns tasks 1..T with disjoint classes, one after the other, keeping no
image and not being told the task at test time. Each task trains a LoRA adapter and an importance
scalar on top of the groups so far; by cosine similarity the adapter joins one of at most G_max
groups; there it is pruned, scaled and merged. For inference all groups are folded into one module.

    python ham.py                                  # demo: nothing to download
    python ham.py --dataset cifar100 --tasks 20    # the main job (ViT-B/16: needs a GPU)
    python ham.py --help                           # every setting: meaning, source, default

Written without access to the paper's body: what is from the abstract, from a third-party review or
our choice is said at each place. The numbers (1) to (4) of the equations are our README's.

symbol    name           shape           what it is (default)
W0        w0             (d, k)          a frozen weight, d outputs, k inputs, one per adapted layer
B_i, A_i  b, a           (d, r), (r, k)  LoRA factors of task i (r = 8); ΔW_i = B_i A_i
          adapter        layer: (b, a)   those of all layers, a dict; `flat` makes it one vector
α_i       alpha          ()              importance of task i's adapter
ΔW_G      Group.delta_w  layer: (d, k)   adapter of a group; or its factors if smaller or cut to R
α_G       alpha_groups   (M,)            one importance per group (Group.alpha), all trained
M, n      m, n           int             groups so far; members of a group
G_max     g_max          int             the most groups there may be (5)
τ         tau            float           similarity above which a task joins a group (0.1)
ρ         rho            float           fraction of entries of A and B that pruning keeps (0.9)
R         group_rank     int             rank that a group is cut back to (None: not at all)
T         tasks          int             number of tasks (10); C classes, D features, N images
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "timm>=1.0.31", "numpy>=1.26", "tqdm>=4.66"]
# ///
import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torchvision.datasets import CIFAR100, utils
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# -------------------------------------------------------------------------------------------- LoRA
# (1)  W = W0 + Σ_j α_Gj ΔW_Gj + α_i B_i A_i        h = W x
# Trained on task i: A_i, B_i, α_i and every α_Gj. Frozen: W0 and every ΔW_Gj (third-party review).
# There is one such W in each adapted layer: the qkv projection of every attention block (ours).


def effective_weight(w0, delta_w_groups, alpha_groups, b, a, alpha):
    """(1) The weight that a layer multiplies with while task i is trained.

    w0 (d, k), delta_w_groups (M, d, k), alpha_groups (M,), b (d, r), a (r, k), alpha () -> (d, k).
    Call it outside autocast: fp32 throughout, rounded once, where the layer multiplies.
    """
    return w0 + torch.tensordot(alpha_groups, delta_w_groups, dims=1) + alpha * (b @ a)


def new_adapter(w0, rank, seed):
    """B = 0, so that it changes no output; A uniform in ±1/√k, as LoRA's Kaiming with a = √5.

    w0: dict layer: (d, k) -> dict layer: (b (d, r), a (r, k)). Every task starts from one A: ours.
    """
    random, adapter = torch.Generator().manual_seed(seed), {}
    for name, w in w0.items():
        d, k = w.shape
        a = (2 * torch.rand(rank, k, generator=random) - 1) / math.sqrt(k)
        adapter[name] = (w.new_zeros(d, rank), a.to(w))
    return adapter


# ------------------------------------------------------------------------------------------- Group
# (2)  s_j = cos(ΔW_i, ΔW_Gj); join the most similar group if s_j > τ; else open one if M < G_max;
#      else join it all the same


def dense(delta_w):
    """An update as a matrix: factors (b (d, r), a (r, k)) or already (d, k) -> (d, k)"""
    return delta_w[0] @ delta_w[1] if isinstance(delta_w, tuple) else delta_w


def flat(delta_w):
    """The updates of all layers as one vector. dict layer: factors or (d, k) -> (P,)"""
    return torch.cat([dense(x).flatten() for x in delta_w.values()])


def cosine_similarity(vector, group_vectors):
    """(2) s_j = <ΔW_i, ΔW_Gj> / (|ΔW_i| |ΔW_Gj|). Similarity: abstract; cosine: review.

    vector (P,), group_vectors: M of (P,) -> list of M floats in [-1, 1]. Over all layers at once,
    with ΔW_i before it is pruned and without α_i: our choice.
    """
    return [F.cosine_similarity(vector, g, dim=0).clamp(-1, 1).item() for g in group_vectors]


def assign_group(similarities, tau, g_max):
    """(2) The index of the group to join, or M for a new one. Review; τ, a full set: our choice."""
    m = len(similarities)
    if m == 0 or (max(similarities) <= tau and m < g_max):
        return m
    return int(np.argmax(similarities))


# --------------------------------------------------------------------------- Prune, scale and merge
# (3)  P(x): the fraction ρ of largest magnitude, the rest 0
# (4)  ΔW_G <- share_i α_i P(B_i) P(A_i) + share_G α_G ΔW_G,  α_G <- 1


def prune(x, rho):
    """(3) Keep the round(ρ n) >= 1 entries of largest magnitude, zero the others.

    x: any shape, n entries; 0 < rho <= 1 -> same shape. Pruning: abstract; by magnitude, and of A
    and B each by itself, so that groups stay factors: our choice.
    """
    keep = max(1, round(rho * x.numel()))
    kept = x.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(x).flatten().index_copy(0, kept, x.flatten()[kept]).view_as(x)


def shares(n, how):
    """(4) Scale: the shares of a new member and of its group of n. int, str -> float, float

    solution:  the mean of what the tasks ended with, pruning aside. Task i trained on its group and
               ended with ΔW_G + α_i ΔW_i (at α_G = 1). By induction ΔW_G is the mean of what its
               n ended with: (n ΔW_G + ΔW_G + α_i ΔW_i) / (n + 1) = ΔW_G + α_i ΔW_i / (n + 1)
    mean:      the mean of what the tasks added, (α_i ΔW_i + n α_G ΔW_G) / (n + 1)
    sum:       α_i ΔW_i + α_G ΔW_G, literal: concatenating factors adds their products
    Scaling by importance: review; sharing a group out, and as which mean: our choice.
    """
    new = 1 / (n + 1)
    return {"solution": (new, 1.0), "mean": (new, new * n), "sum": (1.0, 1.0)}[how]


def merge(updates, scales, rank=None):
    """(4) ΔW_G = Σ_m s_m ΔW_m for one layer, by concatenating factors along the rank (review).

    updates: m of (b (d, r_m), a (r_m, k)) or (d, k); scales: m floats -> (b, a); without `rank`
    (d, k), as soon as that is no larger. (ΣB)(ΣA) would not do: it has cross terms B_1 A_2.
    rank: factors are cut back to it, dense updates are not, so that a group does not grow (ours).
    """
    if not all(isinstance(update, tuple) for update in updates):
        return sum(s * dense(update) for s, update in zip(scales, updates, strict=True))
    b = torch.cat([s * b for s, (b, _) in zip(scales, updates, strict=True)], dim=1)  # (d, Σ r_m)
    a = torch.cat([a for _, a in updates], dim=0)  # (Σ r_m, k)
    b, a = truncate(b, a, rank) if rank and rank < len(a) else (b, a)
    return (b, a) if rank or b.numel() + a.numel() < b.shape[0] * a.shape[1] else b @ a


def truncate(b, a, rank):
    """The matrix of this rank nearest to B A. b (d, n), a (n, k), n >= rank -> (d, rank), (rank, k)

    In Frobenius norm off by √(Σ σ²) of the singular values σ dropped, the least there is. With
    B = Q U and Aᵀ = P V only the core U Vᵀ, at most (n, n), is decomposed, never a (d, k) matrix.
    """
    (q, u), (p, v) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    core = (u @ v.T).nan_to_num()  # svd raises on NaN; by q or p the result is NaN all the same
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    return q @ left[:, :rank] * sigma[:rank], right[:rank] @ p.T


# --------------------------------------------------------------------------------------------- HAM


@dataclass
class Group:
    """One group: its adapter ΔW_G, its importance α_G, the tasks that were merged into it."""

    delta_w: dict  # layer: (b, a) or (d, k)
    alpha: float = 1.0
    members: list = field(default_factory=list)  # tasks, counted from 0


class Trainable:
    """What task i trains (adapter, alpha, alpha_groups, head), and the frozen groups under it."""

    def __init__(self, w0, groups, config, adapter=None):
        """adapter: to start from, default new. α_i starts at 1, α_G where it was left (ours)."""
        adapter = adapter or new_adapter(w0, config.rank, config.seed)
        tensor = next(iter(w0.values())).new_tensor
        self.alpha = tensor(1.0).requires_grad_(config.train_alpha)
        self.alpha_groups = tensor([g.alpha for g in groups]).requires_grad_(config.train_alpha)
        self.adapter = {n: tuple(x.clone().requires_grad_() for x in adapter[n]) for n in adapter}
        self.delta_w_groups = {}  # layer: (M, d, k)
        for name, w in w0.items():
            stack = [dense(g.delta_w[name]) for g in groups]
            self.delta_w_groups[name] = torch.stack(stack) if stack else w.new_zeros(0, *w.shape)

    def weights(self, w0):
        """(1) for every layer. w0: dict layer: (d, k) -> dict layer: (d, k)"""
        weights = {}
        for name, w in w0.items():
            groups, (b, a) = self.delta_w_groups[name], self.adapter[name]
            weights[name] = effective_weight(w, groups, self.alpha_groups, b, a, self.alpha)
        return weights

    def begin(self, features, labels, classes, config, steps):
        """Set `classes` and `head`. features (n, D), labels (n,), steps -> optimiser, schedule"""
        self.classes = torch.tensor(list(classes), device=features.device)
        # Plain means (ours): unit ones would turn too far at lr_head.
        self.head = class_means(features, labels, classes, unit=False).requires_grad_()
        factors = [x for ba in self.adapter.values() for x in ba]
        scalars = [self.alpha, self.alpha_groups]  # stay at 1 without `train_alpha`
        lr = config.lr or learning_rate(config.method, config.epochs * len(labels))
        rates = (factors, lr), ([self.head], config.lr_head), (scalars, config.lr_alpha)
        params = [{"params": tensors, "lr": rate} for tensors, rate in rates]
        optimiser = torch.optim.AdamW(params, weight_decay=0.0)
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def detached(self):
        """The adapter as plain tensors. -> dict layer: (b, a)"""
        return {name: tuple(x.detach() for x in ba) for name, ba in self.adapter.items()}


class HAM:
    """At most G_max groups, carried from task to task. w0: dict layer: (d, k) in fp32, copied."""

    def __init__(self, w0, config):
        self.w0 = {name: w.detach().clone() for name, w in w0.items()}
        self.config, self.groups = config, []

    def start(self):
        """Task i trains a new adapter on top of all groups."""
        return Trainable(self.w0, self.groups, self.config)

    def finish(self, task, trained):
        """Group, prune, scale and merge task i, once, before the next `start`. -> what happened"""
        adapter, alpha = trained.detached(), trained.alpha.item()
        alpha_groups = trained.alpha_groups.tolist()  # none where it was trained alone
        for group, value in zip(self.groups, alpha_groups):
            group.alpha = value
        similarities = cosine_similarity(flat(adapter), [flat(g.delta_w) for g in self.groups])
        j = self.choose(task, similarities)  # (2)
        if j == len(self.groups):
            self.groups.append(Group({}))
        self.join(self.groups[j], task, adapter, alpha)  # (3), (4)
        record = {"alpha": alpha, "alpha_groups": alpha_groups, "similarities": similarities}
        return record | {"group": j, "group_sizes": [len(g.members) for g in self.groups]}

    def choose(self, task, similarities):
        """(2) The index of the group that task i joins, or M for a new one: to be overridden."""
        return assign_group(similarities, self.config.tau, self.config.g_max)

    def join(self, group, task, adapter, alpha):
        """Put task i into a group, in place; an empty one becomes α_i P(B_i) P(A_i), cut back."""
        rho, (new, old) = self.config.rho, shares(len(group.members), self.config.merge)
        for name, (b, a) in adapter.items():
            updates, scales = [(prune(b, rho), prune(a, rho))], [alpha * new]  # (3)
            if group.members:
                updates, scales = [*updates, group.delta_w[name]], [*scales, group.alpha * old]
            group.delta_w[name] = merge(updates, scales, self.config.group_rank)  # (4)
        group.members.append(task)
        group.alpha = 1.0  # the old α_G is in ΔW_G now; other groups keep theirs (our choice)

    def folded(self):
        """All groups in one module: W = W0 + Σ_j α_Gj ΔW_Gj. -> dict layer: new (d, k)"""
        added = lambda name: sum(g.alpha * dense(g.delta_w[name]) for g in self.groups)  # 0 if none
        return {name: w + added(name) for name, w in self.w0.items()}

    def state(self):
        """What `restore` needs: copies of tensors, and plain values."""
        return {"groups": [copy.deepcopy(vars(group)) for group in self.groups]}

    def restore(self, state):
        self.groups = [Group(**group) for group in copy.deepcopy(state["groups"])]


# ---------------------------------------------------------------------------------------- Controls


class Sequential(HAM):
    """One LoRA trained task after task, α = 1 by METHODS; `joint`: all classes as one task."""

    def start(self):
        """The adapter that the task before left, on the bare model."""
        adapter = self.groups[0].delta_w if self.groups else None
        return Trainable(self.w0, [], self.config, adapter)

    def finish(self, task, trained):
        self.groups = [Group(trained.detached())]
        return {}


class Average(HAM):
    """The mean of adapters trained separately: by METHODS one group, α = 1, nothing pruned."""

    def start(self):
        """A new adapter on the bare model."""
        return Trainable(self.w0, [], self.config)


AVERAGE = {"train_alpha": False, "tau": -1.0, "g_max": 1, "rho": 1.0, "merge": "mean"}
METHODS = {  # its class, and the settings that `resolve` overrides
    "ham": (HAM, {}),
    "sequential": (Sequential, {"train_alpha": False}),
    "average": (Average, AVERAGE | {"group_rank": None}),
    "joint": (Sequential, {"train_alpha": False, "tasks": 1}),
    "frozen": (HAM, {"read_out": "class-mean"}),  # `run` gives it no layers: nothing is trained
}


# ---------------------------------------------------------------------------------- Head and train
# A logit is a cosine with a class's row. Training uses the head's rows; classification, by default,
# class means, taken after the merge of their task (no image is kept to renew them).

LOGIT_SCALE = 16.0  # of the cosines in the loss (our choice)


def class_means(features, labels, classes, unit=True):
    """Unit means of unit features, or plain means. features (N, D), labels (N,) -> (C, D)"""
    features = F.normalize(features, dim=1) if unit else features
    means = torch.stack([features[labels == c].mean(0) for c in classes])
    if not means.isfinite().all():
        raise InputError(f"{[*classes]}: one has no image, or features are not finite: lower --lr")
    return F.normalize(means, dim=1) if unit else means


def cosine_logits(features, class_rows):
    """features (N, D), class_rows (C, D) -> (N, C) in [-1, 1]"""
    return F.normalize(features, dim=1) @ F.normalize(class_rows, dim=1).T


def task_loss(trained, features, labels):
    """Cross-entropy over the task's classes (ours). features (n, D), labels (n,), of these -> ()"""
    targets = (labels[:, None] != trained.classes).cumprod(1).sum(1)  # of other labels: C, refused
    return F.cross_entropy(LOGIT_SCALE * cosine_logits(features, trained.head), targets)


def train_task(vit, method, data, task, loss=task_loss):
    """Train A_i, B_i, α_i, every α_G and the head on task i. -> Trainable, last epoch's mean loss

    data: `tasks`, `images` and `prepare` as of `Data`. Horizontal flips: our choice.
    """
    config, classes, trained = method.config, data.tasks[task], method.start()
    pixels, _ = data.images("train", classes)
    features, labels = extract(vit, trained.weights(method.w0), data, "train", classes, config)
    steps = math.ceil(len(pixels) / config.batch_size)  # per epoch
    optimiser, schedule = trained.begin(features, labels, classes, config, config.epochs * steps)
    random, losses = torch.Generator().manual_seed(1000 * config.seed + task), []
    for _ in tqdm(range(config.epochs), f"task {task + 1}, epochs", leave=False, disable=None):
        for rows in torch.randperm(len(pixels), generator=random).split(config.batch_size):
            x = data.prepare(pixels[rows], flip=torch.rand(len(rows), generator=random) < 0.5)
            weights = trained.weights(method.w0)  # (1), fp32, one weight per layer and step
            features = forward(vit, weights, x, config)  # (n, D)
            value = loss(trained, features, labels[rows.to(labels.device)])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
            losses.append(value.detach())  # a GPU would wait for `.item()`
    return trained, sum(torch.stack(losses[-steps:]).tolist()) / steps


def forward(vit, weights, x, config):
    """Features (n, D) of x (n, 3, S, S) under given weights; bf16, if at all, inside the model."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return functional_call(vit, weights, x).float()


@torch.inference_mode()
def extract(vit, weights, data, part, classes, config):
    """Features (n, D) and labels (n,) of "train" or "test" images; weights {}: the bare model."""
    pixels, labels = data.images(part, classes)
    split = tqdm(pixels.split(128), f"{part} images", leave=False, disable=None)
    features = torch.cat([forward(vit, weights, data.prepare(x), config) for x in split])
    return features, labels.to(features.device)


# ---------------------------------------------------------------------------------------- Measures
# a[t][j]: accuracy (%) on the test images of task j after task t, over all classes seen; from 0.


def accuracies(logits, labels, tasks):
    """A row a[t]: per cent right, per task. logits (N, C), labels (N,), tasks: ranges of labels"""
    right, labels = (logits.argmax(1) == labels).cpu(), labels.cpu()  # some devices lack fp64
    return [100 * right[(labels >= t[0]) & (labels <= t[-1])].double().mean().item() for t in tasks]


def measures(matrix, sizes):
    """What an accuracy matrix says, per cent; t + 1 cells in row t. sizes: test images per task"""
    so_far = [sum(x * n for x, n in zip(row, sizes)) / sum(sizes[: len(row)]) for row in matrix]
    last, old = matrix[-1], range(len(matrix) - 1)  # after the last task; all tasks before it
    forgetting = [max(row[j] for row in matrix[j:-1]) - last[j] for j in old]
    transfer = [last[j] - matrix[j][j] for j in old]
    return {
        "final_accuracy": so_far[-1],  # so_far: A_t
        "average_incremental_accuracy": sum(so_far) / len(so_far),
        "forgetting": sum(forgetting) / max(len(old), 1),  # best before the last task, less last
        "backward_transfer": sum(transfer) / max(len(old), 1),  # last less just learnt
        "learning_accuracy": sum(row[-1] for row in matrix) / len(matrix),
    }


# --------------------------------------------------------------------------------------------- Run


class InputError(ValueError):
    """A setting or file that the user can fix; the text says how. The command line exits with 2."""


@contextlib.contextmanager
def input_error(what, cure):
    """Turn any exception inside, of whichever library, into an InputError of one line."""
    try:
        yield
    except Exception as error:
        reason = re.split(r"(?<=\w)\. ", " ".join(str(error).split()))[0]  # then comes advice
        raise InputError(f"{what}: {reason or type(error).__name__:.300}; {cure}") from error


def run(config):
    """One method over all tasks, as `python ham.py --dataset ...`. -> what results.json holds"""
    config = resolve(config)
    vit = build_vit(config)
    data = load_data(config, vit)
    w0 = {} if config.method == "frozen" else lora_layers(vit, config.layers)
    if w0 and config.lr is None:
        n = config.epochs * sum(data.sizes("train")) / config.tasks
        config = replace(config, lr=learning_rate(config.method, n))
    return learn(vit, METHODS[config.method][0](w0, config), data)


def learn(vit, method, data, loss=task_loss):
    """The loop over tasks, or what a stopped run has left of it. -> what results.json holds"""
    config, (folder, state) = method.config, open_run(vit, method, data)
    results, class_rows = state["results"], state["class_rows"]
    if len(results["tasks"]) < config.tasks:  # save once before training, to fail early
        save(folder / "trial", vit, method, data, state)
        shutil.rmtree(folder / "trial")
    for task in range(len(results["tasks"]), config.tasks):
        began, classes, record = time.perf_counter(), data.tasks[task], {}
        if method.w0:
            trained, mean_loss = train_task(vit, method, data, task, loss)  # (1)
            record = {"loss": mean_loss} | method.finish(task, trained)  # (2), (3), (4)
            class_rows["head"][list(classes)] = trained.head.detach()
        middle, weights, seen = time.perf_counter(), method.folded(), classes[-1] + 1
        means = class_means(*extract(vit, weights, data, "train", classes, config), classes)
        class_rows["class-mean"][list(classes)] = means
        features, labels = extract(vit, weights, data, "test", range(seen), config)
        logits = cosine_logits(features, class_rows[config.read_out][:seen])
        results["accuracy_matrix"].append(accuracies(logits, labels, data.tasks[: task + 1]))
        results |= measures(results["accuracy_matrix"], data.sizes("test"))
        record |= {"accuracy": results["final_accuracy"], "forgetting": results["forgetting"]}
        record["seconds"] = {"train": middle - began, "evaluate": time.perf_counter() - middle}
        results["tasks"].append(record)
        write(folder / "state.pt", lambda f: torch.save(state | {"method": method.state()}, f))
        line = "task {:2}/{}  accuracy {accuracy:4.1f}  forgetting {forgetting:4.1f}"
        groups = f"  groups {record['group_sizes']}" if "group" in record else ""
        print(line.format(task + 1, config.tasks, **record) + groups, flush=True)
    if not (folder / "results.json").is_file():
        save(folder, vit, method, data, state)
    print(f"final accuracy {results['final_accuracy']:.1f} %, written: {folder}\n", flush=True)
    return results


def open_run(vit, method, data):
    """The run's folder and state: new, or a stopped or complete run's, to which `method` is set."""
    c, results = method.config, about(vit, method.config, data)
    parts = Path(c.dataset).absolute().name, f"T{c.tasks}", c.method, c.name, f"s{c.seed}"
    folder = Path(c.out) / re.sub(r"[/\\]", "-", "-".join(filter(None, parts)))
    zeros = torch.zeros(len(data.names), vit.num_features, device=data.device)
    state = {"results": results, "class_rows": {"class-mean": zeros, "head": zeros.clone()}}
    folder.mkdir(parents=True, exist_ok=True)
    with input_error(f"{folder} has a broken file", "move the folder away"):
        if (folder / "results.json").is_file():
            state["results"] = json.loads((folder / "results.json").read_text("utf-8"))
        elif (folder / "state.pt").is_file():
            state = torch.load(folder / "state.pt", data.device, weights_only=True)
            method.restore(state["method"])
        old, new = (asdict(type(c)()) | x["config"] for x in (state["results"], results))
    free = {"out", "data_dir", "device", "dataset", "weights"}  # dataset, weights: by sha256
    other = sorted(f"{k} ({old.get(k)})" for k in {*old, *new} - free if old.get(k) != new.get(k))
    if other:
        raise InputError(f"{folder} holds a run with other {', '.join(other)}: choose a --name")
    cfg, done = data.cfg, f"{len(state['results']['tasks'])} of {c.tasks} tasks learnt"
    train, test = (f"{sum(data.sizes(part))} {part}" for part in ("train", "test"))
    print(f"{new['model']} at {new['img_size']} px, mean {cfg['mean']}, std {cfg['std']}")
    print(f"{folder}: {train} and {test} images, lr {c.lr}, {c.precision}, {done}", flush=True)
    return folder, state


def about(vit, config, data):
    """What results.json holds before the first task: settings, versions, hardware, data."""
    sha256 = lambda file: hashlib.sha256(Path(file).read_bytes()).hexdigest()
    images = hashlib.sha256(repr((data.names, data.sizes("train"), data.sizes("test"))).encode())
    for pixels in data.pixels.values():
        images.update(pixels.numpy())
    cpuinfo, cfg, cuda = Path("/proc/cpuinfo"), vit.pretrained_cfg, "cuda" in config.device
    name = re.search("model name\t: (.*)|$", cpuinfo.read_text() if cpuinfo.is_file() else "")[1]
    name = torch.cuda.get_device_name(config.device) if cuda else name or sys.platform
    tagged = f"{cfg['architecture']}.{cfg.get('tag') or ''}".rstrip(".")  # whose mean and std
    found = {"model": config.model if ":" in config.model else tagged}
    found |= {"weights_sha256": config.weights and sha256(config.weights)}
    found |= {"images_sha256": images.hexdigest(), "img_size": data.cfg["input_size"][-1]}
    return {
        "config": asdict(config) | found,
        "ham_sha256": sha256(__file__),
        "versions": {m.__name__: str(m.__version__) for m in (torch, torchvision, timm, np)},
        "hardware": f"{name}, {torch.get_num_threads()} threads",
        "classes": data.names,
        "test_images_per_task": data.sizes("test"),
        "accuracy_matrix": [],
        "tasks": [],
    }


def save(folder, vit, method, data, state):
    """The folded model as timm writes it, with unit class rows as its head; then results.json."""
    results, rows = state["results"], state["class_rows"][method.config.read_out]
    stored = [x for x in tree_leaves(method.state()) if torch.is_tensor(x)] + [rows]
    results["parameters_stored"] = sum(x.numel() for x in stored)  # W0 aside
    text, model = json.dumps(results, indent=1, allow_nan=False) + "\n", copy.deepcopy(vit).cpu()
    with input_error(f"saving in {folder}", "disk full? timm < 1.0.31? head not one linear layer?"):
        model.reset_classifier(len(rows))
        head = {"weight": F.normalize(rows, dim=1), "bias": torch.zeros(len(rows))}
        head = {f"{vit.pretrained_cfg['classifier']}.{k}": x for k, x in head.items()}
        model.load_state_dict(vit.state_dict() | method.folded() | head, strict=True)
        how, names = {"img_size": data.cfg["input_size"][-1]}, {"label_names": data.names}
        timm.models.save_for_hf(model, folder, names, how, safe_serialization=True)
        timm.create_model(f"local-dir:{folder}", pretrained=True)  # refuse what timm cannot read
    for file in (folder / "config.json", folder / "model.safetensors"):
        content = file.read_bytes()  # timm's is readable by its owner only, and not synced
        write(file, lambda f, content=content: f.write(content))
    write(folder / "results.json", lambda f: f.write(text.encode()))  # says: all is there


def write(file, dump):
    """Write a file whole or not at all, even in a power cut. dump: writes into an open file"""
    part, cure = file.with_name(f"{file.name}.part"), "free some space, then rerun the command"
    with input_error(f"writing {file}", cure), open(part, "wb") as f:
        dump(f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(file)


# -------------------------------------------------------------------------------------------- Data
# All images are decoded into memory at the start: SMALL's at their own size, others at the model's.

ARCHIVES = {
    "cifar100": CIFAR100.url,
    "cub200": "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "imagenet_r": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "tiny_imagenet": "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
}
FACTS = {  # md5 of the archive; number of training and of test images
    "cifar100": (CIFAR100.tgz_md5, 50_000, 10_000),
    "cub200": ("97eceeb196236b17998738112f37df78", 5_994, 5_794),
    "imagenet_r": ("a61312130a589d0ca1a8fca1f2bd3337", 24_000, 6_000),
    "tiny_imagenet": ("90528d7ca1a48142e341f4ef8d21d0de", 100_000, 10_000),
}
SMALL = {"cifar100": {"input_size": (3, 32, 32)}, "tiny_imagenet": {"input_size": (3, 64, 64)}}


@dataclass
class Data:
    """Images by class. Classes are numbered by their place in the class order, 0..C-1."""

    pixels: dict  # "train" and "test": (N, 3, H, W) uint8, class after class
    labels: dict  # "train" and "test": (N,) ascending
    names: list  # per class
    tasks: list  # per task: the range of its classes; the first C % T hold one more
    cfg: dict  # timm's, of the model: input_size, interpolation, mean, std, ...
    device: str

    def images(self, part, classes):
        """The "train" or "test" images of a range of classes. -> (n, 3, H, W) uint8, (n,)"""
        ends = torch.tensor([classes[0], classes[-1] + 1])
        a, b = torch.searchsorted(self.labels[part], ends)
        return self.pixels[part][a:b], self.labels[part][a:b]

    def sizes(self, part):
        """Number of "train" or "test" images of each task."""
        return [len(self.images(part, task)[1]) for task in self.tasks]

    def prepare(self, pixels, flip=None):
        """Resize, flip and normalise. (n, 3, H, W) uint8, flip (n,) bool -> (n, 3, S, S) float"""
        x, side = pixels.to(self.device).float(), self.cfg["input_size"][-1]
        if x.shape[2:] != (side, side):  # timm's test transform; PIL rounds after each axis
            # antialias, though it enlarges: it selects PIL's cubic kernel (a = -0.5)
            for size in ((x.shape[-2], side), (side, side)):  # the width, then the height
                x = F.interpolate(x, size, mode=self.cfg["interpolation"], antialias=True)
                x = x.round_().clamp_(0, 255)
        if flip is not None:
            x = torch.where(flip.to(self.device)[:, None, None, None], x.flip(3), x)
        mean, std = (torch.tensor(self.cfg[k], device=self.device) for k in ("mean", "std"))
        return x.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def load_data(config, vit):
    """Read, order, split, cap and decode a data set. -> Data"""
    name, cfg = config.dataset, timm.data.resolve_model_data_config(vit)
    cure = f"known are {', '.join(ARCHIVES)} and FOLDER/{{train,test}}/CLASS/**"
    if name in ARCHIVES:
        cure = f"put {ARCHIVES[name]} into {config.data_dir}, or move away what is wrong there"
    with input_error(f"--dataset {name}", cure):
        images, names, tests = read(name, Path(config.data_dir))
        names, labels = np.unique(names, return_inverse=True)  # sorted: each data set's own order
        names, tests = names.tolist(), np.asarray(tests)
        found = (len(tests) - tests.sum().item(), tests.sum().item())
        if name in FACTS and found != FACTS[name][1:]:
            raise ValueError(f"{found} training and test images instead of {FACTS[name][1:]}")
    if config.tasks > len(names) // 2:
        raise InputError(f"--tasks {config.tasks}: each needs 2 of the {len(names)} classes")
    order = np.random.RandomState(config.seed).permutation(len(names)).tolist()  # the field's
    order = sorted(order) if config.class_order == "natural" else order
    chosen, pixels, places = {"train": [], "test": []}, {}, {}
    for label in order:
        train, test = (np.flatnonzero((labels == label) & (tests == t)) for t in (False, True))
        if config.validate:  # the last 10 %, at least 3
            train, test = np.split(train, [-max(3, len(train) // 10)])
        if not len(train) or not len(test):
            raise InputError(f"{names[label]} needs images in both, train and test, named alike")
        chosen["train"].append(train[: config.images_per_class])
        chosen["test"].append(test[: config.test_images_per_class])
    for part, rows in chosen.items():
        places[part] = torch.arange(len(order)).repeat_interleave(torch.tensor([*map(len, rows)]))
        pixels[part] = decode([images[i] for i in np.concatenate(rows)], cfg | SMALL.get(name, {}))
    tasks = [range(x[0], x[-1] + 1) for x in np.array_split(np.arange(len(order)), config.tasks)]
    return Data(pixels, places, [names[x] for x in order], tasks, cfg, config.device)


def read(name, data_dir):
    """-> for each of N images: a file or (H, W, 3) uint8, its class, is it a test image"""
    root = Path(name)
    if name in ARCHIVES:
        root = data_dir / ARCHIVES[name].split("/")[-1].split(".")[0]
        part = root.with_name(root.name + ".part")
        if not root.is_dir():  # renamed in the end: whole or not at all
            utils.download_and_extract_archive(ARCHIVES[name], data_dir, part, md5=FACTS[name][0])
            (part / root.name).rename(root)
            shutil.rmtree(part)
    if name == "cifar100":  # pickles of 32 px images
        train, test = (CIFAR100(data_dir, part) for part in (True, False))
        names = [train.classes[label] for label in train.targets + test.targets]
        return np.concatenate([train.data, test.data]), names, np.arange(len(names)) >= len(train)
    if name == "cub200":  # tables: where an image lies, on which side of the split it is
        tables = (root / f"{x}.txt" for x in ("images", "train_test_split"))
        files, train = (np.loadtxt(table, str)[:, 1] for table in tables)
        return [root / "images" / x for x in files], [x.split("/")[0] for x in files], train == "0"
    if name == "imagenet_r":  # CLASS/*, and a public list of those that are test images
        (files, names), here = image_folder(root), Path(__file__).parent
        lists = [here / x / "imagenet_r_test.txt" for x in ("", "extras")]  # beside this file, or
        listed = {*next(filter(Path.is_file, lists), lists[0]).read_text("utf-8").split()}
        return files, names, [f"{x.parent.name}/{x.name}" in listed for x in files]
    files, names = image_folder(root / "train")
    if name == "tiny_imagenet":  # its validation images are the test images, all in one folder
        tests, test_names = np.loadtxt(root / "val" / "val_annotations.txt", str)[:, :2].T
        tests = [root / "val" / "images" / x for x in tests]
    else:
        tests, test_names = image_folder(root / "test")
    return [*files, *tests], [*names, *test_names], [False] * len(files) + [True] * len(tests)


def image_folder(root):
    """What Pillow reads in ROOT/CLASS/**, sorted, nothing hidden. -> N files, N class names"""
    inside = [x for y in root.iterdir() if y.is_dir() for x in y.rglob("*")]  # along no links
    inside = [x.relative_to(root) for x in sorted(inside, key=str) if x.is_symlink() or x.is_file()]
    inside = [x for x in inside if not any(part.startswith(".") for part in x.parts)]
    known = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN}
    images = [x for x in inside if x.suffix.lower() in known]
    if left_out := [x.name for x in inside if x.suffix.lower() not in known]:
        print(f"{root}: {len(left_out)} left out, not named as images: {left_out[:3]}")
    return [root / x for x in images], [x.parts[0] for x in images]


def decode(images, cfg):
    """Files -> (N, 3, S, S) uint8, by timm's test transform; arrays as they are, (N, 3, H, W)."""
    if isinstance(images[0], np.ndarray):  # decoded already
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    transform = timm.data.create_transform(**cfg, use_prefetcher=True)  # not normalised: `prepare`
    pixels = torch.empty(len(images), *cfg["input_size"], dtype=torch.uint8)

    def load(i):  # -> None, or what is wrong
        try:
            image = Image.open(images[i])
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bit per channel: convert it")
            image.getexif()  # keeps the orientation; exif_transpose fails on other, malformed tags
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image)  # as a viewer would show it
            pixels[i] = torch.as_tensor(transform(image.convert("RGB")))
        except Exception as error:  # noqa: BLE001 PIL has many
            return f"{images[i]} ({error})"

    done = thread_map(load, range(len(images)), desc="decoding", leave=False, disable=None)
    if bad := [x for x in done if x]:
        raise InputError(f"{len(bad)} images cannot be read: {', '.join(bad[:3])}")
    return pixels


# ---------------------------------------------------------------------------------------- Backbone


def build_vit(config):
    """timm's ViT with its weights and no head, frozen: images -> features (N, D)."""
    source = "its own? an LFS pointer?" if config.weights else "a file, where there is no network"
    cure = f"check --model (a ViT?), --weights ({source}), --device {config.device}"
    with input_error(f"{config.model}, {config.weights or 'from the Hub'}", cure):
        how = {"pretrained": not config.weights, "img_size": config.img_size}
        vit = timm.create_model(config.model, **how)
        vit.reset_classifier(0)  # not before: only with its head is timm strict
        torch.backends.cudnn.allow_tf32 = False  # else a GPU's fp32 has 10 bits in patch_embed
        if config.weights:  # all but a head; position embeddings are resampled by timm
            adapt = sys.modules[type(vit).__module__].checkpoint_filter_fn
            body = lambda x, _: {k: v for k, v in adapt(x, vit).items() if not k.startswith("head")}
            timm.models.load_checkpoint(vit, config.weights, filter_fn=body, weights_only=True)
        for module in (x for x in vit.modules() if hasattr(x, "fused_attn")):
            module.fused_attn &= "cpu" not in config.device  # slower in backward on a CPU
        side = config.img_size or vit.pretrained_cfg["input_size"][-1]
        small = {"crop_pct": 1.0} if config.dataset in SMALL else {}
        vit.pretrained_cfg = vit.pretrained_cfg | {"input_size": (3, side, side)} | small
        vit.requires_grad_(False).eval().to(config.device)
        features = vit(torch.zeros(1, 3, side, side, device=config.device))
        if features.shape != (1, vit.num_features) or not features.isfinite().all():
            raise ValueError("what it makes of an image is not one finite vector")
        return vit


def lora_layers(vit, layers):
    """The frozen weights that carry LoRA. layers: "qkv,proj" -> dict layer: W0 (d, k), a view"""
    linear = {k: x for k, x in vit.named_modules() if isinstance(x, torch.nn.Linear)}
    names, wanted = {k.split(".")[-1] for k in linear}, set(layers.split(","))
    if not wanted <= names:
        raise InputError(f"--layers {layers}: this model's are {','.join(sorted(names))}")
    found = [(k, x) for k, x in linear.items() if k.split(".")[-1] in wanted]
    return {f"{k}.weight": x.weight.detach() for k, x in found}


# ---------------------------------------------------------------------- Settings and command line

# Constant c of a method, searched (not joint's) on held-out CIFAR-100, DeiT-Tiny, 160 px, 5 epochs;
# beyond 1,875 images a rate falls: more steps move features further. Elsewhere: extras/screen.py.
LEARNING_RATE = {"ham": 1e-3, "sequential": 8e-4, "average": 1e-2, "joint": 1e-3}


def learning_rate(method, n):
    """Of A and B, for n training images seen per task (ours): c min(1, 1875 / n); joint's is c."""
    return LEARNING_RATE[method] * (1.0 if method == "joint" else min(1.0, 1875 / n))


@dataclass(frozen=True)
class Config:
    """The settings of HAM in one file. In brackets: from the abstract, a review, or our choice."""

    dataset: str = "demo"  # demo, cifar100, cub200, imagenet_r, tiny_imagenet or a FOLDER
    tasks: int = 10  # T, number of tasks; joint has 1
    images_per_class: int = None  # first n training images of a class; default all
    test_images_per_class: int = None  # first n test images of a class; default all
    validate: bool = False  # test on the last tenth, at least 3, of a class's training images
    class_order: Literal["random", "natural"] = "random"  # random: by seed; natural: the data's own
    data_dir: str = "data"  # where data sets lie or are downloaded to
    model: str = "vit_base_patch16_224.augreg_in21k"  # timm ViT with its tag
    weights: str = None  # file with the model's weights; default: timm downloads them
    img_size: int = None  # side of the input, pixels; default the model's own
    method: Literal[tuple(METHODS)] = "ham"  # ham, or a control; the demo runs three
    rank: int = 8  # r, rank of an adapter (ours)
    layers: str = "qkv"  # layers with LoRA, any of qkv,proj,fc1,fc2 (ours)
    tau: float = 0.1  # join above this cosine; else open a group, while fewer than g_max (ours)
    g_max: int = 5  # most groups (a limit: abstract; 5: ours)
    rho: float = 0.9  # fraction of A and of B that pruning keeps (ours)
    group_rank: int = None  # R, rank to which a group is cut at each merge; default: none (ours)
    merge: Literal["solution", "mean", "sum"] = "solution"  # running mean, plain mean, sum (ours)
    train_alpha: bool = True  # train alpha_i and every alpha_G (review); off: they stay 1
    read_out: Literal["class-mean", "head"] = "class-mean"  # classifier at test time (ours)
    epochs: int = 5  # epochs per task (ours)
    batch_size: int = 32  # images per step (ours)
    lr: float = None  # rate of A and B; default by images seen, found for DeiT-Tiny, 160 px (ours)
    lr_alpha: float = 1e-2  # learning rate of alpha_i and alpha_G (ours)
    lr_head: float = 1e-2  # learning rate of the head's rows (ours)
    seed: int = 1993  # draws class order, A, shuffling and flips
    device: str = None  # cpu, cuda, cuda:N; default cuda where there is one
    precision: Literal["bf16", "fp32"] = None  # inside the model; default bf16 where it is native
    out: str = "runs"  # folder for the result folders
    name: str = None  # part of the result folder's name; keeps runs with other settings apart


def resolve(config):
    """A copy with device and precision filled in; refuses values that are out of range."""
    c = vars(config).copy()
    limits = {"seed": (-1, 2**32 - 1), "tau": (-2, 1), "rho": (0, 1)}
    for f in (f for f in fields(config) if c[f.name] is not None):
        given, choices = c[f.name], get_args(f.type)
        value = c[f.name] = given if choices else f.type(given)  # a path, numpy's numbers
        flag = f"--{f.name.replace('_', '-')} {given}"
        exact = f.type is float or str(value) == str(given)
        if not exact or (choices and value not in choices):
            raise InputError(f"{flag}: must be {' or '.join(choices) or f.type.__name__}")
        above, most = limits.get(f.name, (0, math.inf))
        if f.type in (int, float) and not above < value <= most:
            raise InputError(f"{flag}: must be in ({above}, {most}]")
    first = "cuda" if torch.cuda.is_available() else "cpu"
    c["device"] = (c["device"] or first).replace("cpu:0", "cpu")  # torch.load knows no cpu:0
    native = (getattr(torch.cpu, f"_is_{x}_supported", bool)() for x in ("avx512_bf16", "amx_tile"))
    native = torch.cuda.is_bf16_supported(False) if "cuda" in c["device"] else any(native)
    c["precision"] = c["precision"] or ("bf16" if native else "fp32")
    return type(config)(**c | METHODS.get(c["method"], (None, {}))[1])


def main(argv=None, do=run, kind=Config):
    """The command line: one flag per setting, its comment the help; an error is one line."""
    parser = argparse.ArgumentParser(None, argparse.SUPPRESS, kind.__doc__, allow_abbrev=False)
    source = "".join(inspect.getsource(c) for c in kind.__mro__[-2::-1])  # Config's first
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for f in fields(kind):
        text, flag = comments[f.name].replace("%", "%%"), f"--{f.name.replace('_', '-')}"
        text += f" (default {f.default})" if f.default not in (None, False) else ""
        how = {"type": f.type, "metavar": getattr(f.type, "__name__", "").upper()}
        how = {"metavar": "|".join(get_args(f.type))} if get_args(f.type) else how
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else how
        parser.add_argument(flag, default=f.default, help=text, **how)
    config = kind(**vars(parser.parse_args(argv)))
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # a notebook has none
    if config.dataset == "demo":
        here = Path(__file__).with_name("extras").is_dir()
        if not here or config.weights or config.model != kind.model:
            parser.error("the demo has drawings and a model of its own, in extras/: give --dataset")
        from extras import demo

        do = lambda config, do=do: demo.main(do, config)
    try:
        do(config)
    except KeyboardInterrupt:
        parser.exit(130, "ham.py: stopped; the same command goes on after the last task above\n")
    except torch.OutOfMemoryError:
        parser.error(f"no memory left on {config.device}: lower --batch-size or --img-size")
    except (InputError, OSError) as error:  # OSError: a disk that is full, a read-only folder
        parser.error("".join(x if x.isprintable() else "?" for x in str(error)))


if __name__ == "__main__":
    main()
