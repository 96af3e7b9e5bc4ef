# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "timm>=1.0.22", "numpy>=1.26", "tqdm>=4.66"]
# ///
"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), in one file. Unofficial.

A frozen vision transformer learns tasks 1..T with disjoint classes, one after the other, keeping no
image and never being told the task. Each task trains a LoRA adapter and an importance scalar on top
of the groups so far; by cosine similarity the adapter joins one of at most G_max groups; there it
is pruned, scaled and merged. All groups are folded into the weights for inference.

    python ham.py                                  # demo: nothing to download
    python ham.py --dataset cifar100 --tasks 20    # the main job (ViT-B/16: needs a GPU)
    python ham.py --help                           # every setting: meaning, source, default

Written without access to the paper's body: what is from the abstract, from a third-party review or
our choice is said at each place. The numbers (1) to (4) of the equations are our README's.

symbol    name           shape           what it is
W0        w0             (d, k)          a frozen weight, one per adapted layer
B_i, A_i  b, a           (d, r), (r, k)  LoRA factors of task i; ΔW_i = B_i A_i, `delta_w`
α_i       alpha          ()              importance of task i's adapter
ΔW_G      Group.delta_w  (d, k)          adapter of a group: dense, or factors (d, r n), (r n, k)
α_G       alpha_groups   (M,)            one importance per group (Group.alpha), all trained
M, G_max  m, g_max       int             groups so far, and the most there may be
τ         tau            float           similarity above which a task joins a group
ρ         rho            float           fraction of weights that pruning keeps
T         tasks          int             number of tasks;  C classes, D features, N images

Not here: other methods (extras/), rehearsal, drift correction, several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout  # comes with torch
from PIL import Image, ImageOps
from torch.func import functional_call
from torchvision.datasets import CIFAR100, ImageFolder, utils
from tqdm import tqdm


class InputError(ValueError):
    """A setting or file that the user can fix; the text says how. The command line exits with 2."""


# -------------------------------------------------------------------------------------------- LoRA
# (1)  W = W0 + Σ_j α_Gj ΔW_Gj + α_i B_i A_i        h = W x
# Trained on task i: A_i, B_i, α_i and every α_Gj. Frozen: W0 and every ΔW_Gj (third-party review).


def effective_weight(w0, delta_w_groups, alpha_groups, b, a, alpha):
    """(1) The weight that a layer multiplies with while task i is trained.

    w0 (d, k), delta_w_groups (M, d, k), alpha_groups (M,), b (d, r), a (r, k), alpha () -> (d, k).
    Call it outside autocast: a share of an update is below bf16's step at W0's size.
    """
    return w0 + torch.tensordot(alpha_groups, delta_w_groups, dims=1) + alpha * (b @ a)


def new_adapter(w0, rank, seed):
    """B = 0, so that it changes no output; A Kaiming uniform (±1/√k), the same for every task.

    w0: dict layer: (d, k) -> dict layer: (b (d, r), a (r, k)). One start: our choice.
    """
    random, adapter = torch.Generator().manual_seed(seed), {}
    for name, w in w0.items():
        d, k = w.shape
        a = (2 * torch.rand(rank, k, generator=random) - 1) / math.sqrt(k)
        adapter[name] = (w.new_zeros(d, rank), a.to(w))
    return adapter


# ------------------------------------------------------------------------------------------- Group
# (2)  s_j = cos(ΔW_i, ΔW_Gj); join the most similar group if s > τ, else open one while M < G_max


def dense(delta_w):
    """An update as a matrix: factors (b (d, r), a (r, k)) or already (d, k) -> (d, k)"""
    return delta_w[0] @ delta_w[1] if isinstance(delta_w, tuple) else delta_w


def flat(delta_w):
    """The updates of all layers as one vector. dict layer: factors or (d, k) -> (P,)"""
    return torch.cat([dense(x).flatten() for x in delta_w.values()])


def cosine_similarity(vector, group_vectors):
    """(2) s_j = <ΔW_i, ΔW_Gj> / (|ΔW_i| |ΔW_Gj|). Similarity: abstract; cosine: review.

    vector (P,), group_vectors: M of (P,) -> list of M floats in [-1, 1]. Over all layers at once,
    before pruning and without α_i: our choice.
    """
    return [F.cosine_similarity(vector, g, dim=0).clamp(-1, 1).item() for g in group_vectors]


def assign_group(similarities, tau, g_max):
    """(2) The index of the group to join, or M for a new one. Abstract; a full set: our choice.

    Join the most similar group if s > τ; else open one while M < G_max; else join it all the same.
    """
    m = len(similarities)
    if m == 0 or (max(similarities) <= tau and m < g_max):
        return m
    return int(np.argmax(similarities))


# --------------------------------------------------------------------------- Prune, scale and merge
# (3)  P(x): the fraction ρ of largest magnitude, the rest 0
# (4)  ΔW_G <- share_i α_i P(B_i) P(A_i) + share_G α_G ΔW_G,  α_G <- 1


def prune(x, rho):
    """(3) Keep the round(ρ n) >= 1 entries of largest magnitude, zero the others.

    x: any shape, n entries -> same shape. Pruning: abstract; by magnitude, and of A and B each by
    itself, so that groups stay factors: our choice.
    """
    keep = max(1, round(rho * x.numel()))
    kept = x.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(x).flatten().index_copy(0, kept, x.flatten()[kept]).view_as(x)


def shares(n, how):
    """(4) Scale: the shares of a new member and of its group of n. int, str -> float, float

    solution:  α_i ΔW_i / (n + 1) + α_G ΔW_G, at α_G = 1 the mean of what its tasks ended with
    mean:      (α_i ΔW_i + n α_G ΔW_G) / (n + 1), the mean of what each task added
    sum:       α_i ΔW_i + α_G ΔW_G, literal: concatenating factors adds their products
    Scaling by importance: review; sharing a group out, and as which mean: our choice.
    """
    new = 1.0 if how == "sum" else 1 / (n + 1)
    return new, new * n if how == "mean" else 1.0


def merge(updates, scales):
    """(4) ΔW_G = Σ_m s_m ΔW_m for one layer, by concatenating factors along the rank (review).

    updates: m of (b (d, r_m), a (r_m, k)) or (d, k); scales: m floats -> (b, a) while these are
    smaller than ΔW_G, else dense. Adding A's and B's up would not do: cross terms B_1 A_2.
    """
    if not all(isinstance(update, tuple) for update in updates):
        return sum(s * dense(update) for s, update in zip(scales, updates, strict=True))
    b = torch.cat([s * b for s, (b, _) in zip(scales, updates, strict=True)], dim=1)  # (d, Σ r_m)
    a = torch.cat([a for _, a in updates], dim=0)  # (Σ r_m, k)
    return (b, a) if b.numel() + a.numel() < b.shape[0] * a.shape[1] else b @ a


# --------------------------------------------------------------------------------------------- HAM


@dataclass
class Group:
    """One group: its adapter ΔW_G, its importance α_G, the tasks that were merged into it."""

    delta_w: dict  # layer: (b, a) or (d, k)
    alpha: float = 1.0
    members: list = field(default_factory=list)


@dataclass
class Trainable:
    """What task i trains (adapter, alpha, alpha_groups, head), and the frozen groups under it."""

    adapter: dict  # layer: (b (d, r), a (r, k))
    delta_w_groups: dict  # layer: (M, d, k)
    alpha: torch.Tensor  # ()
    alpha_groups: torch.Tensor  # (M,)
    head: torch.Tensor = None  # (classes of the task, D), one row per class; `train_task` makes it

    def weights(self, w0):
        """(1) for every layer. w0: dict layer: (d, k) -> dict layer: (d, k)"""
        weights = {}
        for name, w in w0.items():
            under = self.delta_w_groups[name], self.alpha_groups
            weights[name] = effective_weight(w, *under, *self.adapter[name], self.alpha)
        return weights

    def parameters(self, config):
        """What the optimiser moves, at which rates: torch's parameter groups."""
        factors = {"params": [x for ba in self.adapter.values() for x in ba], "lr": config.lr}
        head = {"params": [self.head], "lr": config.lr_head}
        scalars = {"params": [self.alpha, self.alpha_groups], "lr": config.lr_alpha}
        return [factors, head, scalars] if config.train_alpha else [factors, head]

    def detached(self):
        """The adapter as plain tensors. -> dict layer: (b, a)"""
        return {name: tuple(x.detach() for x in ba) for name, ba in self.adapter.items()}


class HAM:
    """What is carried from task to task: at most G_max groups. W0 is referred to, never changed.

    w0: dict layer: (d, k); config: rank, tau, g_max, grouping, rho, merge, train_alpha, seed and
    device of the settings at the end of this file.
    """

    def __init__(self, w0, config):
        self.w0, self.config, self.groups = w0, config, []

    def start(self):
        """A new adapter on top of all groups."""
        return self.trainable(new_adapter(self.w0, self.config.rank, self.config.seed), self.groups)

    def trainable(self, adapter, groups):
        """Leaf tensors for task i. α_i starts at 1, each α_G where the task before left it."""
        stacks = {}  # w[None][:0]: an empty stack (0, d, k), for no groups
        for name, w in self.w0.items():
            stacks[name] = torch.cat([w[None][:0], *(dense(g.delta_w[name])[None] for g in groups)])
        leaf = {"device": self.config.device, "requires_grad": self.config.train_alpha}
        return Trainable(
            {name: tuple(x.clone().requires_grad_() for x in ba) for name, ba in adapter.items()},
            stacks,
            alpha=torch.ones((), **leaf),
            alpha_groups=torch.tensor([g.alpha for g in groups], **leaf),
        )

    def finish(self, task, trained):
        """After task i was trained: group, prune, scale, merge. -> what happened, plain numbers"""
        config, adapter, alpha = self.config, trained.detached(), trained.alpha.item()
        for group, value in zip(self.groups, trained.alpha_groups.tolist()):
            group.alpha = value
        similarities = cosine_similarity(flat(adapter), [flat(g.delta_w) for g in self.groups])
        j = assign_group(similarities, config.tau, config.g_max)  # (2)
        if config.grouping == "random" and j < len(self.groups):  # not whether to join, but which
            j = int(np.random.RandomState((config.seed, task)).randint(len(self.groups)))
        if j == len(self.groups):
            self.groups.append(Group({}))
        self.join(self.groups[j], task, adapter, alpha)
        return {
            "alpha": alpha,
            "alpha_groups": trained.alpha_groups.tolist(),
            "group": j,
            "similarities": similarities,
            "group_sizes": [len(g.members) for g in self.groups],
        }

    def join(self, group, task, adapter, alpha):
        """Put task i into a group, in place; an empty one becomes α_i P(B_i) P(A_i)."""
        rho, (new, old) = self.config.rho, shares(len(group.members), self.config.merge)
        for name, (b, a) in adapter.items():
            before = group.delta_w.get(name, (b[:, :0], a[:0]))  # of a new group: rank 0
            updates = (prune(b, rho), prune(a, rho)), before  # (3)
            group.delta_w[name] = merge(updates, (alpha * new, group.alpha * old))  # (4)
        group.members.append(task)
        group.alpha = 1.0  # the old α_G is in ΔW_G now; other groups keep theirs (our choice)

    def folded(self):
        """All groups in one module: W = W0 + Σ_j α_Gj ΔW_Gj. -> dict layer: new (d, k)"""
        return {
            name: w + sum(g.alpha * dense(g.delta_w[name]) for g in self.groups)
            for name, w in self.w0.items()
        }

    def state(self):
        """What `restore` needs: tensors and plain values."""
        return {"groups": [vars(group) for group in self.groups]}

    def restore(self, state):
        self.groups = [Group(**group) for group in state["groups"]]

    def stored(self):
        """The tensors that are kept for the next task and for inference."""
        updates = [x for group in self.groups for x in group.delta_w.values()]
        return [x for u in updates for x in (u if isinstance(u, tuple) else (u,))]


# ---------------------------------------------------------------------------------------- Controls


class Sequential(HAM):
    """One LoRA trained task after task, α = 1. With all classes as one task it is `joint`."""

    def start(self):
        """The adapter that the task before left, on the bare model."""
        return self.trainable(self.groups[0].delta_w, []) if self.groups else super().start()

    def finish(self, task, trained):
        self.groups = [Group(trained.detached())]
        return {"alpha": 1.0, "alpha_groups": []}


class Average(HAM):
    """The mean of adapters trained each alone: one group, α = 1, τ = -1, ρ = 1, `mean`."""

    def start(self):
        """A new adapter on the bare model."""
        return self.trainable(new_adapter(self.w0, self.config.rank, self.config.seed), [])


METHODS = {"ham": HAM, "sequential": Sequential, "average": Average, "joint": Sequential}
METHODS["frozen"] = HAM  # `run` gives it no layers: nothing is trained


# ---------------------------------------------------------------------------------- Head and train
# A class is a unit vector and a logit a cosine, whether the vector is trained or a class mean.


def class_means(features, labels, classes):
    """Normalised mean of L2-normalised features. features (N, D), labels (N,) -> (C, D)"""
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[labels == c].mean(0) for c in classes]), dim=1)


def cosine_logits(features, class_rows):
    """features (N, D), class_rows (C, D) -> (N, C) in [-1, 1]"""
    return F.normalize(features, dim=1) @ F.normalize(class_rows, dim=1).T


def task_loss(trained, features, labels):
    """Cross-entropy over the task's classes only, of 16 times the cosines (our choice).

    features (n, D), labels (n,) in 0..classes of the task - 1 -> ()
    """
    return F.cross_entropy(16.0 * cosine_logits(features, trained.head), labels)


def train_task(vit, method, data, task, loss=task_loss):
    """Train A_i, B_i, α_i, every α_G and the task's head rows on the images of task i.

    AdamW without weight decay, learning rates falling to 0 by a cosine; horizontal flips; head rows
    start as the mean features of their class (all our choice).
    -> Trainable, log with one [loss, α_i] per step.
    """
    config, classes, trained = method.config, data.tasks[task], method.start()
    with torch.no_grad():
        weights = trained.weights(method.w0)
    features, labels = extract(vit, weights, data, "train", classes, config)
    # Means of the features as they are: rows of unit length would turn too far at this rate.
    means = [features[labels == c].mean(0) for c in classes]
    trained.head = torch.stack(means).clone().requires_grad_()
    images, labels = data.images("train", classes)[0], labels - classes[0]
    optimiser = torch.optim.AdamW(trained.parameters(config), weight_decay=0.0)
    steps = config.epochs * math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    random, log = torch.Generator().manual_seed(1000 * config.seed + task), []
    bar = tqdm(total=steps, desc=f"task {task + 1}/{config.tasks}", leave=False, disable=None)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(images), generator=random).split(config.batch_size):
            flip = torch.rand(len(batch), generator=random) < 0.5
            x = data.batch(images[batch], config.device, flip)  # (n, 3, S, S)
            weights = trained.weights(method.w0)  # (1), fp32, one weight per layer and step
            with autocast(config):
                features = functional_call(vit, weights, x)  # (n, D)
            value = loss(trained, features.float(), labels[batch.to(config.device)])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
            log.append(torch.stack([value.detach(), trained.alpha.detach()]))  # no synchronisation
            bar.update()
    bar.close()
    return trained, torch.stack(log).tolist()


# --------------------------------------------------------------------------- Evaluate and measures
# a[t][j]: accuracy (%) on the test images of task j after task t, over all classes seen so far.


@torch.inference_mode()
def extract(vit, weights, data, part, classes, config):
    """Features of the "train" or "test" images of some classes under given weights.

    weights: dict layer: (d, k) -> features (n, D) fp32, labels (n,), on the device
    """
    (images, labels), features = data.images(part, classes), []
    for batch in tqdm(images.split(128), f"{part} images", leave=False, disable=None):
        with autocast(config):
            features.append(functional_call(vit, weights, data.batch(batch, config.device)).float())
    return torch.cat(features), labels.to(config.device)


def autocast(config):
    """bf16 inside the model; adapters, scalars, weights (1) and class means stay fp32."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


def accuracies(logits, labels, tasks):
    """Per cent right among all C classes, for each task; then of all images with the task known.

    logits (N, C), labels (N,), tasks: ranges of classes -> list of floats, float
    """
    right, per_task, known = logits.argmax(1) == labels, [], 0
    for t in tasks:
        own = (labels >= t[0]) & (labels <= t[-1])
        per_task.append(100 * right[own].double().mean().item())
        known += (logits[own, t[0] : t[-1] + 1].argmax(1) + t[0] == labels[own]).sum().item()
    return per_task, 100 * known / len(labels)


def accuracy_so_far(per_task, sizes):
    """A_t = correct / all test images seen so far. per_task: a[t]; sizes: test images per task."""
    return sum(x * n for x, n in zip(per_task, sizes)) / sum(sizes[: len(per_task)])


def forgetting(matrix):
    """Mean over j < T of max_{t<T} a[t][j] - a[T][j]; 0 for T = 1. Label-space growth included."""
    last = len(matrix) - 1
    drops = [max(matrix[t][j] for t in range(j, last)) - matrix[last][j] for j in range(last)]
    return sum(drops) / last if last else 0.0


def measures(matrix, sizes):
    """The summary of an accuracy matrix in results.json; per cent, unrounded."""
    so_far, last = [accuracy_so_far(per_task, sizes) for per_task in matrix], len(matrix) - 1
    gained = [matrix[last][j] - matrix[j][j] for j in range(last)]
    return {
        "final_accuracy": so_far[-1],
        "average_incremental_accuracy": sum(so_far) / len(so_far),
        "forgetting": forgetting(matrix),
        "backward_transfer": sum(gained) / last if last else 0.0,  # mean over j < T
        "learning_accuracy": sum(per_task[-1] for per_task in matrix) / len(matrix),
    }


# --------------------------------------------------------------------------------------------- Run

PARTS = ("train", "merge", "class_means", "evaluate")  # of a task's seconds, in their order
RECORD = ("loss", "alpha", "alpha_groups", "group", "similarities", "group_sizes")
RECORD += ("images_per_second", "head_accuracy")  # of a task; None where nothing is trained


def run(config):
    """One method over all tasks, as from the command line. Config -> what results.json holds"""
    given, config = config, resolve(config)
    every = given, type(given)(), config
    asked, default, used = ({(k, str(v)) for k, v in vars(c).items()} for c in every)
    if ignored := sorted(k for k, _ in asked - default - used if k != "model"):  # it got its tag
        print(f"{config.method} ignores {', '.join(ignored)}", flush=True)
    data, vit = load_data(config), build_vit(config)
    w0 = {} if config.method == "frozen" else lora_layers(vit, config.layers)
    if w0 and config.lr is None:
        n = sum(data.sizes("train")) / config.tasks
        config = dataclasses.replace(config, lr=learning_rate(config.method, n))
    return learn(vit, METHODS[config.method](w0, config), data)


def learn(vit, method, data, loss=task_loss):
    """The loop over tasks, or what a stopped run has left of it. -> what results.json holds"""
    with result_folder(method.config) as folder:
        if (folder / "results.json").is_file():
            print(f"{folder} is complete; --restart runs it again", flush=True)
            return json.loads((folder / "results.json").read_text("utf-8"))
        state, sizes = begin(folder, vit, method, data), data.sizes("train")
        class_rows, records, config = state["class_rows"], state["records"], method.config
        for task in range(len(records), config.tasks):
            classes, record, times = data.tasks[task], dict.fromkeys(RECORD), [time.perf_counter()]
            if method.w0:
                trained, log = train_task(vit, method, data, task, loss)  # (1)
            times.append(time.perf_counter())
            if method.w0:
                record |= method.finish(task, trained)  # (2) group, (3) prune, (4) scale, merge
                class_rows["head"][list(classes)] = trained.head.detach()
                losses = [value for value, _ in log[-(len(log) // config.epochs) :]]  # last epoch
                record["loss"] = sum(losses) / len(losses)
                record["images_per_second"] = config.epochs * sizes[task] / (times[1] - times[0])
            times.append(time.perf_counter())
            weights = method.folded()
            means = class_means(*extract(vit, weights, data, "train", classes, config), classes)
            if not means.isfinite().all():
                raise InputError(f"task {task + 1}: not finite any more; lower --lr {config.lr}")
            class_rows["class-mean"][list(classes)] = means
            times.append(time.perf_counter())
            tested = extract(vit, weights, data, "test", range(classes[-1] + 1), config)
            record |= evaluate(*tested, class_rows, state["matrix"], data, config.read_out)
            times.append(time.perf_counter())
            record["seconds"] = dict(zip(PARTS, np.diff(times).tolist()))
            records.append(record)
            write_state(folder, state | {"method": method.state()})
            print_task(records, config)
        return save(folder, vit, method, data, state)


def begin(folder, vit, method, data):
    """Print all that figures depend on. -> the state of a new run, or that of a stopped one"""
    about = data.transform | vars(method.config) | {"threads": torch.get_num_threads()}
    about |= {f"{part} images": sum(data.sizes(part)) for part in ("train", "test")}
    print(", ".join(f"{k} {v}" for k, v in about.items() if v is not None), flush=True)
    if (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", method.config.device, weights_only=True)
        method.restore(state["method"])
        print(f"{folder}: {len(state['records'])} tasks are learnt, going on", flush=True)
        return state
    zeros = torch.zeros(len(data.names), vit.num_features, device=method.config.device)
    class_rows = {"class-mean": zeros} | ({"head": zeros.clone()} if method.w0 else {})
    state = {"settings": settings(method.config), "class_rows": class_rows, "records": []}
    return state | {"matrix": {read_out: [] for read_out in class_rows}}


def write_state(folder, state):
    """Whole or not at all: written beside, renamed."""
    buffer = io.BytesIO()  # a full disk is then an OSError
    torch.save(state, buffer)
    (folder / "state.part").write_bytes(buffer.getbuffer())
    (folder / "state.part").replace(folder / "state.pt")


def evaluate(features, labels, class_rows, matrix, data, read_out):
    """Add a row to each matrix, of the test images of the tasks so far. -> the task's measures

    features (N, D), labels (N,) ascending; class_rows: dict read-out: (C, D)
    """
    seen, sizes, record = [t for t in data.tasks if t[0] <= labels[-1]], data.sizes("test"), {}
    for name, rows in class_rows.items():
        logits = cosine_logits(features, rows[: seen[-1][-1] + 1])
        per_task, known = accuracies(logits, labels, seen)
        matrix[name].append(per_task)
        record[f"{name.replace('-', '_')}_accuracy"] = accuracy_so_far(per_task, sizes)
        if name == read_out:
            record |= {"accuracy": accuracy_so_far(per_task, sizes), "task_known_accuracy": known}
    return record | {"forgetting": forgetting(matrix[read_out])}


def summary(vit, method, data, state):
    """What results.json holds; accuracies in per cent, unrounded."""
    config, every, n = method.config, range(len(data.names)), data.sizes("test")
    records, matrix, weights = state["records"], state["matrix"][config.read_out], method.folded()
    seconds = {part: sum(r["seconds"][part] for r in records) for part in PARTS}
    oracle = class_means(*extract(vit, weights, data, "train", every, config), every)
    features, labels = extract(vit, weights, data, "test", every, config)
    stored = [*method.stored(), state["class_rows"][config.read_out]]
    trained, speed = 0, dict.fromkeys(("training", "inference"))
    if method.w0:
        trained = sum(config.rank * sum(w.shape) for w in method.w0.values())
        trained += len(data.tasks[0]) * vit.num_features
        speed["training"] = config.epochs * sum(data.sizes("train")) / seconds["train"]
        speed["inference"] = int(sum(np.cumsum(n))) / seconds["evaluate"]
    keys = "task_known_accuracy", "head_accuracy", "class_mean_accuracy"
    return {
        "config": dataclasses.asdict(config),
        **measures(matrix, n),
        **{key: records[-1][key] for key in keys},
        "class_mean_oracle": accuracies(cosine_logits(features, oracle), labels, [every])[1],
        "accuracy_matrix": matrix,
        "tasks": records,
        "test_images_per_task": n,
        "classes": data.names,
        "class_order": data.order,
        "parameters_trained": trained,
        "parameters_stored": sum(x.numel() for x in stored),
        "seconds": seconds,
        "images_per_second": speed,
        **environment(config),
    }


def print_task(records, config):
    """A line for the last task; testing takes longer with every task."""
    r, t, last = records[-1], len(records), config.tasks
    text = f"task {t:2}/{last} accuracy {r['accuracy']:4.1f}  forgetting {r['forgetting']:4.1f}"
    if config.method == "ham":
        s, j = r["similarities"], r["group"]
        how = f"joins {j} ({s[j]:+.2f})" if j < len(s) else f"opens {j}"
        text += f"  α {r['alpha']:.2f}  {how:15}"
    *fixed, tests = (sum(r["seconds"][part] for r in records) for part in PARTS)
    left = (last / t - 1) * sum(fixed) + (last * (last + 1) / (t * (t + 1)) - 1) * tests
    print(f"{text}  {tqdm.format_interval(left)} left", flush=True)


# -------------------------------------------------------------------------------------------- Save


@contextlib.contextmanager
def result_folder(config):
    """The run's folder, locked; refuses one that holds a run with other settings or is in use."""
    parts = [Path(config.dataset).name, f"T{config.tasks}", config.method, config.name]
    folder = Path(config.out) / "-".join(filter(None, [*parts, f"s{config.seed}"]))
    cure, new, old = "give this one a --name or another --out", settings(config), {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            try:
                if (folder / "results.json").is_file():
                    old = json.loads((folder / "results.json").read_text("utf-8"))
                    old |= old["config"]
                elif (folder / "state.pt").is_file():
                    old = torch.load(folder / "state.pt", "cpu", weights_only=True)["settings"]
            except Exception as error:
                what = f"{folder} holds a broken file, or another program's ({error!r:.99})"
                raise InputError(f"{what}: move it away; or {cure}") from error
            if other := [k for k, v in new.items() if old.get(k, v) != v]:
                raise InputError(f"{folder} holds a run with other {', '.join(other)}: {cure}")
            if config.restart:
                for name in ("state.pt", "results.json", "model.safetensors", "config.json"):
                    (folder / name).unlink(missing_ok=True)
            yield folder
    except Timeout:
        raise InputError(f"{folder}: another run is writing there; {cure}") from None


def settings(config):
    """What makes a run another one: not where things lie, but what the files hold."""
    paths = ("out", "data_dir", "weights", "split_file", "restart")
    files = {"weights_sha256": sha256(config.weights), "split_sha256": sha256(split_file(config))}
    return {k: v for k, v in vars(config).items() if k not in paths} | files


def save(folder, vit, method, data, state):
    """The folded model as timm writes it, with unit class means as its head, then results.json."""
    results, size = summary(vit, method, data, state), data.transform["size"]
    class_rows = state["class_rows"][method.config.read_out]
    model = copy.deepcopy(vit).cpu()
    model.reset_classifier(len(data.names))
    head = {"head.weight": F.normalize(class_rows, dim=1), "head.bias": class_rows[:, 0] * 0}
    model.load_state_dict(vit.state_dict() | method.folded() | head, strict=True)
    about = {k: data.transform[k] for k in ("mean", "std", "interpolation")}
    about |= {"input_size": (3, size, size), "crop_pct": method.config.crop_pct}
    about = {"label_names": data.names, "pretrained_cfg": about}
    made = {"img_size": size} | getattr(vit, "made_with", {})  # the demo's ViT is no timm name
    timm.models.save_for_hf(model, folder, about, made, safe_serialization=True)
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (folder / "results.part").write_text(text, "utf-8")
    (folder / "results.part").replace(folder / "results.json")  # says: all is there
    keys = "final_accuracy", "average_incremental_accuracy", "forgetting"
    print(", ".join(f"{key.replace('_', ' ')} {results[key]:.1f} %" for key in keys))
    print(f"written: {folder}\n", flush=True)
    return results


def sha256(file):
    """Hexadecimal digest of a file, None for no file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def environment(config):
    """What else the figures depend on: versions, hardware, files."""
    cuda, name, cpuinfo = "cuda" in config.device, platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # Linux
        name = cpuinfo.read_text().partition("model name\t: ")[2].partition("\n")[0] or name
    name = torch.cuda.get_device_name(config.device) if cuda else name
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm, np)}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "hardware": f"{name}, {torch.get_num_threads()} threads",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(config.device) if cuda else None,
        "ham_sha256": sha256(__file__),
        **{k: v for k, v in settings(config).items() if k.endswith("sha256")},
    }


# -------------------------------------------------------------------------------------------- Data
# Images are decoded once, into one uint8 tensor; all else is batched, on the training device.

ARCHIVES = {
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "imagenet_r": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "cub200": "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "tiny_imagenet": "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
}
MD5 = {
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
    "imagenet_r": "a61312130a589d0ca1a8fca1f2bd3337",
    "cub200": "97eceeb196236b17998738112f37df78",
    "tiny_imagenet": "90528d7ca1a48142e341f4ef8d21d0de",
}
IMAGES = {"cifar100": (50_000, 10_000), "imagenet_r": (24_000, 6_000)}  # training, test
IMAGES |= {"cub200": (5_994, 5_794), "tiny_imagenet": (100_000, 10_000)}
SMALL = {"demo": 32, "cifar100": 32, "tiny_imagenet": 64}  # pixels; resized batch by batch


@dataclass
class Data:
    """Images of all classes. Classes are numbered by their place in the class order, 0..C-1."""

    pixels: torch.Tensor  # (N, 3, H, W) uint8, training and test images
    train: list  # per class: indices into pixels, (n,) long
    test: list
    names: list  # per class
    order: list  # per class: its number in the data set
    tasks: list  # per task: the range of its classes
    transform: dict  # what `prepare` has left to do

    def images(self, part, classes):
        """Indices of the "train" or "test" images of some classes, and their classes. (n,), (n,)"""
        own = [getattr(self, part)[c] for c in classes]
        return torch.cat(own), torch.cat([torch.full_like(x, c) for x, c in zip(own, classes)])

    def sizes(self, part):
        """Number of "train" or "test" images of each task."""
        return [len(self.images(part, task)[0]) for task in self.tasks]

    def batch(self, images, device, flip=None):
        """images (n,), flip (n,) bool -> (n, 3, size, size) float, what the model takes."""
        pixels = self.pixels.index_select(0, images.to(self.pixels.device)).to(device)
        return prepare(pixels, **self.transform, flip=None if flip is None else flip.to(device))


def prepare(pixels, size, crop_pct, interpolation, mean, std, flip=None):
    """As timm's test transform: resize to floor(size / crop_pct), crop the centre, normalise.

    pixels (n, 3, H, H) uint8, flip (n,) bool -> (n, 3, size, size) float. antialias=True also where
    it enlarges: it selects PIL's cubic kernel (a = -0.5); interpolate's own is another (a = -0.75).
    """
    x, side = pixels, math.floor(size / crop_pct)
    if x.shape[-1] != side:
        x = x.float()
        for to in ((x.shape[-1], side), (side, side)):  # width, then height, 8 bit between, as PIL
            x = F.interpolate(x, to, mode=interpolation, antialias=True).round_().clamp_(0, 255)
    edge = round((side - size) / 2)
    x = x[..., edge : edge + size, edge : edge + size]
    if flip is not None:  # while it is 8 bit, if it is
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return x.float().div_(255).sub_(mean).div_(std)


def class_order(names, how, seed):
    """The order in which classes arrive, as numbers in the data set's own order.

    random: the field's seeded permutation; natural: label order; else a file with a class name per
    line. Where blank lines divide it into blocks, the seed draws the order of the blocks.
    """
    random, n = np.random.RandomState(seed), len(names)
    if how in ("random", "natural"):
        return random.permutation(n).tolist() if how == "random" else list(range(n))
    blocks = re.split(r"\n\s*\n", Path(how).read_text("utf-8-sig").strip())
    listed = [x.strip() for i in random.permutation(len(blocks)) for x in blocks[i].split("\n")]
    if sorted(listed) != sorted(names):
        wrong = set(listed) ^ set(names) or {x for x in listed if listed.count(x) > 1}
        raise InputError(f"--class-order {how}: {n} classes, each once; see {sorted(wrong)[:3]}")
    return [names.index(name) for name in listed]


def load_data(config):
    """Read, order, split and cap the data set of a resolved configuration. -> Data"""
    pixels, labels, tests, names = read(config)
    order, train, test = class_order(names, config.class_order, config.seed), [], []
    if config.tasks > len(order):
        raise InputError(f"--tasks {config.tasks}: the data set has only {len(order)} classes")
    for label in order:
        learn, judge = (np.flatnonzero((labels == label) & (tests == t)) for t in (False, True))
        if config.validate:  # the last 10 %, at least 3
            learn, judge = np.split(learn, [-max(3, len(learn) // 10)])
        if not len(learn) or not len(judge):
            raise InputError(f"{names[label]}: {len(learn)} training and {len(judge)} test images")
        train.append(torch.from_numpy(learn[: config.images_per_class]))
        test.append(torch.from_numpy(judge[: config.test_images_per_class]))
    cfg, small = pretrained_cfg(config.model), config.dataset in SMALL  # others: already cropped
    mean, std = (cfg.mean, cfg.std) if config.norm == "model" else ((0.0,) * 3, (1.0,) * 3)
    transform = {"size": config.img_size, "crop_pct": config.crop_pct if small else 1.0}
    transform |= {"interpolation": cfg.interpolation, "mean": mean, "std": std}
    if "cuda" in config.device and pixels.nbytes < torch.cuda.mem_get_info(config.device)[0] / 2:
        pixels = pixels.to(config.device)
    # The first C % T tasks hold one class more.
    tasks = [range(x[0], x[-1] + 1) for x in np.array_split(np.arange(len(order)), config.tasks)]
    if 1 in map(len, tasks):
        print("a task of one class: its cross-entropy is 0, so that it trains nothing", flush=True)
    return Data(pixels, train, test, [names[x] for x in order], order, tasks, transform)


def read(config):
    """A data set in its own order -> pixels (N, 3, S, S) uint8, labels, is it for tests, names."""
    name, data_dir, split = config.dataset, Path(config.data_dir), split_file(config)
    if name == "demo":
        return demo().read(config.seed)
    root, wanted = Path(name), IMAGES.get(name)
    cure = f"; known are demo, {', '.join(ARCHIVES)} or FOLDER/{{train,test}}/CLASS/*"
    try:
        if wanted:
            archive = data_dir / ARCHIVES[name].split("/")[-1]
            root = data_dir / archive.name.split(".")[0]
            cure = f"; {root} is made of {archive} (md5 {MD5[name]}), which comes from "
            cure += f"{ARCHIVES[name]}: move away what is wrong, or put it there by hand"
            if not root.is_dir():
                fetch(ARCHIVES[name], MD5[name], root)
        images, labels, tests, names = read_layout(name, root, split)
        labels, tests = np.asarray(labels), np.asarray(tests)
        found = (int((~tests).sum()), int(tests.sum()))
        if wanted and (sum(found) != sum(wanted) or (found != wanted and not config.split_file)):
            raise ValueError(f"{found} training and test images instead of {wanted}")
        images = images if torch.is_tensor(images) else decode(images, root, config)
        return images, labels, tests, names
    except Exception as error:  # of torchvision, PIL, tarfile, the network: each has its own
        raise InputError(f"--dataset {name}: {error}{cure}") from error


def fetch(url, md5, root):
    """Make a data set's folder from its archive, downloaded unless it lies beside it, whole."""
    part = root.with_name(root.name + ".part")
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(part.with_suffix(".lock")):
        if not root.is_dir():  # else made by another run, meanwhile
            utils.download_and_extract_archive(url, root.parent, part, md5=md5)
            (part / root.name).rename(root)
            shutil.rmtree(part)


def read_layout(name, root, split):
    """The official layouts -> files or pixels, labels, is it a test image (all N), class names."""
    if name == "cub200":  # tables that give each image a class and a side of the split
        tables = "images", "image_class_labels", "train_test_split", "classes"
        files, labels, train, names = (np.loadtxt(root / f"{x}.txt", str)[:, 1] for x in tables)
        files = [root / "images" / x for x in files]
        return files, labels.astype(int) - 1, train == "0", names.tolist()
    if split:  # CLASS/*, and a list of those that are test images
        every, listed = ImageFolder(root), set(split.read_text("utf-8-sig").split("\n")) - {""}
        files = [x for x, _ in every.samples]
        relative = [Path(x).relative_to(root).as_posix() for x in files]
        if missing := listed - set(relative):
            raise ValueError(f"{len(missing):,} of {split} are not there: {sorted(missing)[:3]}")
        return files, every.targets, [x in listed for x in relative], every.classes
    if name == "cifar100":  # pickles of 32 px images
        train, test = (CIFAR100(root.parent, part) for part in (True, False))
        files = torch.from_numpy(np.concatenate([train.data, test.data])).permute(0, 3, 1, 2)
        files, labels = files.contiguous(), train.targets + test.targets
    elif name == "tiny_imagenet":  # its validation images are the test images, all in one folder
        train = ImageFolder(root / "train")
        test = np.loadtxt(root / "val" / "val_annotations.txt", str)
        files = [x for x, _ in train.samples] + [root / "val" / "images" / x for x in test[:, 0]]
        labels = train.targets + [train.class_to_idx[x] for x in test[:, 1]]
    else:
        train, test = (ImageFolder(root / part) for part in ("train", "test"))
        if other := set(train.classes) ^ set(test.classes):
            raise ValueError(f"{len(other)} classes in train or test only: {sorted(other)[:3]}")
        files, labels = zip(*(train.samples + test.samples))
    return files, labels, np.arange(len(labels)) >= len(train), train.classes


def split_file(config):
    """The list of test images in use; None where the data set says itself which they are."""
    if config.split_file or config.dataset != "imagenet_r":
        return config.split_file and Path(config.split_file)
    for folder in (Path(__file__).parent, Path(__file__).parent / "extras"):
        if (folder / "imagenet_r_test.txt").is_file():
            return folder / "imagenet_r_test.txt"
    raise InputError("imagenet_r_test.txt is not beside ham.py or in extras/: --split-file")


def read_image(file):
    """An image as a viewer would show it, in RGB. -> PIL's"""
    try:
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I"):
            raise OSError("more than 8 bit per channel: convert it")
        return image.convert("RGB")
    except Exception as error:  # noqa: BLE001, PIL has many for broken files
        raise ValueError(f"{file} is not a readable image ({error})") from None


def decode(files, root, config):
    """Image files -> (N, 3, S, S) uint8, resized and cropped by timm's own test transform.

    Written once, whole or not at all, named by a hash of what went in; mapped: may exceed memory.
    """
    small, cfg = SMALL.get(config.dataset), pretrained_cfg(config.model)
    how = {"input_size": (3, *[small or config.img_size] * 2), "interpolation": cfg.interpolation}
    how["crop_pct"] = 1.0 if small else config.crop_pct
    stats = [(str(file)[len(str(root)) :], Path(file).stat()) for file in files]
    key = json.dumps([how, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]])
    key = f"{how['input_size'][1]}px-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = Path(config.data_dir) / "cache"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # data that are shared often are read-only
        folder = Path(tempfile.gettempdir()) / "ham-cache"
        folder.mkdir(exist_ok=True)
    cache = folder / f"{root.name}-{key}.npy"
    resize, crop = timm.data.create_transform(**how).transforms[:2]
    pixels = lambda file: np.asarray(crop(resize(read_image(file)))).transpose(2, 0, 1).tobytes()
    with FileLock(cache.with_suffix(".lock")), ThreadPoolExecutor() as pool:
        if not cache.is_file():
            part, shape = cache.with_suffix(".part"), (len(files), *how["input_size"])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with part.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for i in tqdm(range(0, len(files), 1000), "decoding, thousands", disable=None):
                    file.writelines(pool.map(pixels, files[i : i + 1000]))
            part.rename(cache)
    try:
        return torch.from_numpy(np.load(cache, mmap_mode="c"))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{cache} is broken ({error}): delete it") from None


# ---------------------------------------------------------------------------------------- Backbone


def demo():
    """The demo's drawings and its pre-trained model, the one thing that is not in this file."""
    try:
        from extras import demo
    except ImportError:
        raise InputError("no extras/demo.py, which draws: try --dataset cifar100") from None
    return demo


def pretrained_cfg(model):
    """timm's configuration of a model's weights: mean, std, input_size, ... model: name with tag"""
    try:
        if model == "demo_vit":
            return demo().PRETRAINED_CFG
        return timm.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:
        raise InputError(f"--model {model}: {error} timm.list_models() has all") from None


def build_vit(config):
    """timm's ViT with its weights and no head, frozen: images -> features (N, D)."""
    cure = "is it this model's file?" if config.weights else "a ViT? no network: --weights FILE"
    how = {"pretrained": not config.weights, "num_classes": 0, "img_size": config.img_size}
    try:
        if config.model == "demo_vit":
            vit = demo().pretrained(config.seed, config.device, config.precision)
        else:
            vit = timm.create_model(config.model, **how)
        if config.weights:
            load_weights(vit, config.weights)
    except Exception as error:  # each format and each way to download has errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise InputError(f"weights of {config.model}: {reason} ({cure})") from error
    if not all(hasattr(block, "attn") for block in getattr(vit, "blocks", [None])):
        raise InputError(f"--model {config.model}: no vision transformer of attention blocks")
    if config.img_size % vit.patch_embed.patch_size[0]:
        raise InputError(f"--img-size {config.img_size}: no multiple of {config.model}'s patches")
    for block in vit.blocks:  # on a CPU the fused kernel's backward takes half of a bf16 step
        block.attn.fused_attn &= "cpu" not in config.device
    return vit.requires_grad_(False).eval().to(config.device)


def load_weights(vit, file):
    """Every weight from a file, position embeddings resampled by timm; a head may be left over."""
    # timm itself is not strict where a model has no head: what is missing would stay random.
    adapt = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda x, _: x)
    state = adapt(timm.models.load_state_dict(file, weights_only=True), vit)
    state = {k: x for k, x in state.items() if not k.startswith("head")}
    missing, surplus = vit.load_state_dict(state, strict=False)
    if missing or surplus:
        raise ValueError(f"{file} lacks {missing[:3]} ..., has besides {surplus[:3]} ...")


def lora_layers(vit, layers):
    """The frozen weights that carry LoRA. layers: "qkv,proj" -> dict layer: W0 (d, k)."""
    linear = [(k, x) for k, x in vit.named_modules() if isinstance(x, torch.nn.Linear)]
    wanted = layers.split(",")
    found = {f"{k}.weight": x.weight for k, x in linear if k.split(".")[-1] in wanted}
    if {k.split(".")[-2] for k in found} != set(wanted):
        raise InputError(f"--layers {layers}: any of qkv,proj,fc1,fc2, with commas between")
    return found


# ---------------------------------------------------------------------- Settings and command line

# Constant c of each method; `learning_rate` has the law. Among the best on held-out images of
# CIFAR-100 (results/README.md); the form is our choice: at one rate, a longer task drifts further.
LEARNING_RATE = {"ham": 1e-3, "sequential": 8e-4, "average": 1e-2, "joint": 1e-3}


def learning_rate(method, n):
    """Of A and B, for n training images per task: c min(1, 375 / n); joint's is c."""
    return LEARNING_RATE[method] * (1.0 if method == "joint" else min(1.0, 375 / n))


def option(default, text, choices=None):
    """One field of Config = one flag; its text and choices are its lines in --help."""
    return field(default=default, metadata={"text": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting. None: filled in by `resolve`, which also sets what does not apply to None."""

    dataset: str = option("demo", f"demo, {', '.join(ARCHIVES)}, or FOLDER/{{train,test}}/CLASS/*")
    tasks: int = option(None, "T, number of tasks; default 20, demo and cub200 10")
    images_per_class: int = option(None, "first n training images of a class; default all")
    test_images_per_class: int = option(None, "first n test images of a class; default all")
    validate: bool = option(False, "test on the last 10 %% of a class's training images")
    class_order: str = option("random", "random: by seed; natural; or a FILE, a class per line")
    split_file: str = option(None, "list of test images, of imagenet_r or of FOLDER/CLASS/*")
    data_dir: str = option("data", "where data sets and decoded images lie")
    model: str = option(None, "timm ViT with its tag; default vit_base_patch16_224.augreg_in21k")
    weights: str = option(None, "file with the model's weights; default: timm downloads them")
    img_size: int = option(None, "side of the input, pixels; default the model's own")
    crop_pct: float = option(None, "crop; default cifar100 1, else the model's")
    norm: str = option("model", "the weights' mean and std, or [0, 1]", ("model", "unit"))
    method: str = option(
        None,
        "ham; controls: one LoRA trained task after task, the average of adapters trained alone, "
        "all classes as one task, no training; default ham, demo: ham, sequential and frozen",
        tuple(METHODS),
    )
    rank: int = option(8, "r, rank of an adapter (ours)")
    layers: str = option("qkv", "layers with LoRA, any of qkv,proj,fc1,fc2 (ours)")
    tau: float = option(0.1, "τ, join if s > τ; 1: open first (ours)")
    g_max: int = option(5, "G_max, most groups (that there is one: abstract; 5: ours)")
    grouping: str = option("cosine", "the group to join (cosine: review)", ("cosine", "random"))
    rho: float = option(0.9, "ρ, fraction of A and of B that pruning keeps (ours)")
    merge: str = option(
        "solution",
        "a group is the mean of what its tasks ended with, or the mean or the sum of what they "
        "added (ours)",
        ("solution", "mean", "sum"),
    )
    train_alpha: bool = option(True, "train α_i and every α_G (third-party review), or fix them")
    read_out: str = option("class-mean", "what classifies (ours)", ("class-mean", "head"))
    epochs: int = option(None, "epochs per task (ours); default 5, demo 10")
    batch_size: int = option(32, "images per step (ours)")
    lr: float = option(
        None,
        "learning rate of A and B (ours); default c min(1, 375 / n), n training images per task, "
        f"c {', '.join(f'{k} {c:g}' for k, c in LEARNING_RATE.items())} (joint: c)",
    )
    lr_alpha: float = option(1e-2, "learning rate of α_i and α_G (ours)")
    lr_head: float = option(1e-2, "learning rate of the head's rows (ours)")
    seed: int = option(1993, "draws class order, A, shuffling and flips")
    device: str = option("auto", "auto, cpu, cuda, cuda:N; auto: cuda where there is one")
    precision: str = option("auto", "auto: bf16 where it is native", ("auto", "bf16", "fp32"))
    out: str = option("runs", "folder for the result folders")
    name: str = option(None, "part of the result folder's name; tells budgets and ablations apart")
    restart: bool = option(False, "forget what a run of these settings has left")


TITLES = {"dataset": "data", "model": "model", "method": "method", "epochs": "training"}
TITLES |= {"device": "machine"}  # --help has a title before these fields
TRAINED = ("rank", "layers", "epochs", "batch_size", "lr", "lr_head")  # frozen has none
GROUPED = ("tau", "g_max", "grouping", "rho", "merge", "lr_alpha")  # only ham has groups


def resolve(config):
    """Fill in what does not depend on the images, refuse what cannot be. Config -> Config"""
    check(config)
    c, method, drawn = dataclasses.asdict(config), config.method or "ham", config.dataset == "demo"
    c |= {k: str(v) for k, v in c.items() if isinstance(v, Path)}
    c |= {k: v.item() for k, v in c.items() if isinstance(v, np.generic)}
    if drawn and (config.model not in (None, "demo_vit") or config.weights):
        raise InputError("the demo pre-trains its own model: drop --model and --weights")
    model = "demo_vit" if drawn else config.model or "vit_base_patch16_224.augreg_in21k"
    cfg = pretrained_cfg(model)
    tasks = 10 if config.dataset in ("demo", "cub200") else 20
    c["method"], c["tasks"] = method, 1 if method == "joint" else config.tasks or tasks
    c["model"] = f"{model.split('.')[0]}.{cfg.tag}" if cfg.tag else model
    c["img_size"] = config.img_size or cfg.input_size[-1]
    whole = config.dataset in ("demo", "cifar100")  # a crop would cut off what little there is
    c["crop_pct"] = config.crop_pct or (1.0 if whole else cfg.crop_pct)
    c["epochs"] = config.epochs or (10 if drawn else 5)
    if method != "ham":
        c |= dict.fromkeys(GROUPED) | {"train_alpha": False}
    if method == "average":  # one group that every adapter joins; nothing pruned
        c |= {"tau": -1.0, "g_max": 1, "rho": 1.0, "merge": "mean"}
    if method == "frozen":
        c |= dict.fromkeys(TRAINED) | {"read_out": "class-mean"}
    if config.device == "auto":
        c["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto":  # mkldnn's own check counts emulation, too
        native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = "cuda" in c["device"] or any(getattr(torch.cpu, f, bool)() for f in native)
        c["precision"] = "bf16" if native else "fp32"
    return type(config)(**c)


def check(config):
    """Raise InputError for the first setting that cannot be."""
    for f in dataclasses.fields(config):
        name, value, choices = f.name, getattr(config, f.name), f.metadata["choices"]
        flag = f"--{name.replace('_', '-')} {value}"
        if value is None:
            continue
        if choices and value not in choices:
            raise InputError(f"{flag}: must be one of {', '.join(choices)}")
        if name == "seed" and not 0 <= value < 2**32:
            raise InputError(f"{flag}: must be from 0 to 2^32 - 1")
        most = 1 if name in ("rho", "crop_pct") else sys.float_info.max
        if f.type in ("int", "float") and name not in ("seed", "tau") and not 0 < value <= most:
            raise InputError(f"{flag}: must be above 0" + " and at most 1" * (most == 1))
        file = name in ("weights", "split_file", "class_order")
        if file and value not in ("random", "natural") and not Path(value).is_file():
            raise InputError(f"{flag}: no such file")
    if config.split_file and config.dataset in {"demo", *ARCHIVES} - {"imagenet_r"}:
        raise InputError("--split-file is for imagenet_r and folders: the others have their own")
    try:
        torch.empty(0, device=config.device.replace("auto", "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {config.device}: {str(error).splitlines()[0]}") from None


def fail(message, status=2):
    """One line that says the cure, and the exit status."""
    sys.exit(print(f"ham.py: {message}", file=sys.stderr) or status)


def parse(argv=None, kind=Config, manual=__doc__):
    """Command line -> Config: one flag per field, the manual made of the fields' own texts."""
    usage, title = "%(prog)s [--flag value ...]", manual.partition("\n")[0]
    parser = argparse.ArgumentParser(usage=usage, description=title, allow_abbrev=False)
    parser.error, group = fail, parser  # argparse's own error would print the usage first
    for f in dataclasses.fields(kind):
        group = parser.add_argument_group(TITLES[f.name]) if f.name in TITLES else group
        text, choices = f.metadata["text"], f.metadata["choices"]
        text += f" [{' | '.join(choices)}]" if choices else ""
        text += f" (default {f.default})" if f.default not in (None, False) else ""
        how = {"type": {"int": int, "float": float}.get(f.type, str), "metavar": f.type.upper()}
        how = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else how
        flag = f"--{f.name.replace('_', '-')}"
        group.add_argument(flag, default=f.default, help=text, **how)
    return kind(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # terminals that have no α
    config = parse(argv)
    try:
        if config.dataset == "demo" and not config.method:
            demo().compare(run, config)
        else:
            run(config)
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on after the last task above", status=130)
    except BrokenPipeError:  # python ham.py | head
        os._exit(141)
    except OSError as error:  # a disk that is full, a folder that is read-only
        fail(f"--out {config.out}? {error}; when that is fixed, the same command goes on")


if __name__ == "__main__":
    main()
