# /// script
# requires-python = ">=3.10.12"
# dependencies = [
#   "torch>=2.6",
#   "torchvision>=0.21",
#   "timm>=1.0.15",
#   "numpy>=1.26",
#   "tqdm>=4.66",
#   "safetensors>=0.4.5",
# ]
# ///
"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), in one file. Unofficial.

A frozen vision transformer learns tasks 1..T with disjoint classes, one after the other, keeping no
image and never being told the task. Each task trains a LoRA adapter and an importance scalar on top
of the groups so far; by cosine similarity the adapter joins one of at most G_max groups; there it is
pruned, scaled and merged. All groups together are one module, folded into the weights for inference.

    python ham.py                                       # demo: nothing to download
    python ham.py --dataset cifar100 --tasks 20         # the main job (ViT-B/16: wants a GPU)
    python ham.py --help                                # every setting: default, range, source

Written without access to the paper's body. Each setting below is marked with its source: "abstract",
"third-party review" or "our choice". The equations (1) to (4) are numbered in our README.

symbol    name           shape           what it is
W0        w0             (d, k)          a frozen weight, one per adapted layer
B_i, A_i  b, a           (d, r), (r, k)  LoRA factors of task i; ΔW_i = B_i A_i, `delta_w`
α_i       alpha          ()              importance of task i's adapter
ΔW_G      groups[j]      (d, k)          adapter of group j: dense, or factors (d, r n), (r n, k)
α_G       alpha_groups   (M,)            one importance per group, trained with every task
M, G_max  g_max          int             groups so far, and the most there may be
τ         tau            float           similarity above which a task joins a group
ρ         rho            float           fraction of weights that pruning keeps
T         tasks          int             number of tasks;  C classes, D features, N images

Not here: other methods (extras/), rehearsal, drift correction, resuming, several GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ Config


class InputError(ValueError):
    """A setting or file the user can mend; the text says how. The command line exits with 2."""


def option(default, text, choices=None):
    """One field of Config = one flag of the command line; `text` is its line in --help."""
    return field(default=default, metadata=dict(help=text, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting. A field that is None is filled in by `resolve`, or does not apply."""

    # data
    dataset: str = option("demo", "demo | cifar100 | cub200 | FOLDER with {train,test}/CLASS/*")
    tasks: int | None = option(None, "T, number of tasks, 1..classes [20; demo and cub200 10]")
    images_per_class: int | None = option(None, "first n training images of each class [all]")
    test_images_per_class: int | None = option(None, "first n test images of each class [all]")
    validate: bool = option(False, "evaluate on the last 10 %% of each class's training images")
    class_order: str = option("random", "random: permutation drawn from the seed", ("random", "natural"))
    data_dir: str = option("data", "where data sets and the cache of decoded images lie")
    # model
    model: str | None = option(None, "timm ViT, full name with tag [vit_base_patch16_224.augreg_in21k]")
    weights: str | None = option(None, "file with the model's weights [timm downloads them]")
    img_size: int | None = option(None, "side of the input, pixels [the model's own; demo 32]")
    crop_pct: float | None = option(None, "centre crop, in (0, 1] [cifar100, demo 1; else model's]")
    norm: str = option("model", "model: the checkpoint's mean and std; unit: [0, 1]", ("model", "unit"))
    # method
    method: str | None = option(
        None,
        "HAM or a control: sequential, one LoRA trained on and on; average, of adapters trained alone; "
        "joint, all classes as one task; frozen, no training [ham; demo: ham, sequential, frozen]",
        ("ham", "sequential", "average", "joint", "frozen"),
    )
    rank: int | None = option(None, "r, rank of an adapter, >= 1 (our choice) [8]")
    layers: str | None = option(None, "linear layers with LoRA, of qkv,proj,fc1,fc2 (our choice) [qkv]")
    tau: float | None = option(None, "τ, joins if similarity > τ, -1..1; 1 opens first (our choice) [0.1]")
    g_max: int | None = option(None, "G_max, most groups, >= 1 (bound: abstract; value: our choice) [5]")
    grouping: str | None = option(None, "group to join (cosine: abstract) [cosine]", ("cosine", "random"))
    rho: float | None = option(None, "ρ, fraction pruning keeps, (0, 1] (our choice) [0.5]")
    prune: str | None = option(
        None, "prune A and B, or their product (our choice) [factors]", ("factors", "product")
    )
    merge: str | None = option(
        None,
        "group = mean of α-scaled members; their sum; mean of what tasks ended with (our choice) [mean]",
        ("mean", "sum", "solution"),
    )
    train_alpha: bool | None = option(None, "train α_i and α_G (third-party review) or fix at 1 [train]")
    read_out: str = option("class-mean", "which logits count (our choice)", ("class-mean", "head"))
    # training
    epochs: int | None = option(None, "epochs per task (our choice) [5; demo 8]")
    batch_size: int | None = option(None, "images per step (our choice) [32]")
    lr: float | None = option(None, "learning rate of A and B (our choice) [best tried, see README]")
    lr_alpha: float | None = option(None, "learning rate of α_i and α_G (our choice) [1e-2]")
    lr_head: float | None = option(None, "learning rate of the head's rows (our choice) [1e-2]")
    seed: int = option(1993, "class order, A's start, shuffling, flips; >= 0")
    # machine
    device: str = option("auto", "auto | cpu | cuda | cuda:N")
    precision: str = option("auto", "auto: bf16 where native", ("auto", "bf16", "fp32"))
    out: str = option("runs", "folder of result folders")
    name: str | None = option(None, "tells budgets and ablations apart in the folder's name")


# Best of three learning rates on held-out training images (results/README.md), per method and data set.
LEARNING_RATE = {"ham": 1e-3, "sequential": 3e-4, "average": 1e-3, "joint": 1e-3}
TRAINING = ("rank", "layers", "epochs", "batch_size", "lr", "lr_head")
GROUPING = ("tau", "g_max", "grouping", "rho", "prune", "merge", "train_alpha", "lr_alpha")
DEFAULTS = dict(rank=8, layers="qkv", epochs=5, batch_size=32, lr_head=1e-2, tau=0.1, g_max=5)
DEFAULTS |= dict(grouping="cosine", rho=0.5, prune="factors", merge="mean", train_alpha=True, lr_alpha=1e-2)


def resolve(config: Config) -> Config:
    """Fill in what is None, check every range. What does not apply to the method becomes None."""
    c = dataclasses.asdict(config)
    demo = c["dataset"] == "demo"
    c["method"] = c["method"] or "ham"
    c["tasks"] = 1 if c["method"] == "joint" else c["tasks"] or (10 if demo or c["dataset"] == "cub200" else 20)
    if demo and (c["model"] or c["weights"]):
        raise InputError("the demo pre-trains its own model: drop --model and --weights")
    c["model"], cfg = ("demo_vit", dict(DEMO_CFG)) if demo else timm_cfg(c["model"])
    c["img_size"] = c["img_size"] or cfg["input_size"][-1]
    c["crop_pct"] = c["crop_pct"] or (1.0 if c["dataset"] in ("cifar100", "demo") else cfg["crop_pct"])
    defaults = DEFAULTS | dict(lr=LEARNING_RATE.get(c["method"]), epochs=8 if demo else 5)
    for name in TRAINING + GROUPING:
        c[name] = defaults[name] if c[name] is None else c[name]
    if c["method"] == "average":  # one group that every adapter joins, nothing pruned, no scalars
        c |= dict(tau=-1.0, g_max=1, rho=1.0, merge="mean", train_alpha=False)
        c |= dict(grouping=None, prune=None, lr_alpha=None)
    elif c["method"] != "ham":
        c |= dict.fromkeys(GROUPING) | dict(train_alpha=False)
    if c["method"] == "frozen":
        c |= dict.fromkeys(TRAINING)
    c["device"] = pick_device(c["device"])
    c["precision"] = pick_precision(c["precision"], c["device"])
    check_ranges(c)
    return Config(**c)


def check_ranges(c):
    """Raise InputError naming the first flag that is out of its range."""
    bounds = dict.fromkeys(("tasks", "rank", "g_max", "epochs", "batch_size", "img_size"), (1, math.inf))
    bounds |= dict.fromkeys(("images_per_class", "test_images_per_class"), (1, math.inf))
    bounds |= dict.fromkeys(("lr", "lr_alpha", "lr_head"), (1e-12, 1e3)) | dict(seed=(0, 2**32 - 1))
    bounds |= dict(tau=(-1, 1), rho=(1e-9, 1), crop_pct=(1e-2, 1))
    for name, (low, high) in bounds.items():
        if c[name] is not None and not low <= c[name] <= high:
            raise InputError(f"--{name.replace('_', '-')} {c[name]} is outside {low} to {high}")
    if c["layers"] and not set(c["layers"].split(",")) <= {"qkv", "proj", "fc1", "fc2"}:
        raise InputError(f"--layers {c['layers']}: give a comma-separated choice of qkv,proj,fc1,fc2")
    if c["weights"] and not Path(c["weights"]).is_file():
        raise InputError(f"--weights {c['weights']}: no such file")


# -------------------------------------------------------------------------------------------- LoRA
# (1)  W = W0 + Σ_j α_Gj ΔW_Gj + α_i B_i A_i        h = W x
# Trained on task i: A_i, B_i, α_i and every α_Gj. Frozen: W0 and every ΔW_Gj (third-party review).


def effective_weight(w0, groups, alpha_groups, b, a, alpha):
    """(1) The weight a layer multiplies with while task i is trained.

    w0 (d, k), groups (M, d, k), alpha_groups (M,), b (d, r), a (r, k), alpha () -> (d, k).
    Call it outside autocast: a share of an update is below bf16's step at W0's size.
    """
    return w0 + torch.tensordot(alpha_groups, groups, dims=1) + alpha * (b @ a)


def lora_layers(vit, layers):
    """Names of the frozen weights that carry LoRA -> dict name: W0 (d, k), in the model's order."""
    found = {
        f"{name}.weight": module.weight
        for name, module in vit.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in layers.split(",")
    }
    if not found:
        raise InputError(f"--layers {layers}: the model has no such linear layers")
    return found


def new_adapter(w0, rank, seed):
    """B = 0, so it changes no output at first; A Kaiming uniform from the seed, so every task starts
    from the same A (our choice: then ΔW_i of different tasks can be compared).

    w0: dict name: (d, k) -> dict name: (b (d, r), a (r, k)).
    """
    generator, adapter = torch.Generator().manual_seed(seed), {}
    for name, weight in w0.items():
        d, k = weight.shape
        bound = 1 / math.sqrt(k)  # Kaiming uniform with a = sqrt(5), as LoRA's own code
        a = torch.rand(rank, k, generator=generator) * 2 * bound - bound
        adapter[name] = (torch.zeros(d, rank, device=weight.device), a.to(weight.device))
    return adapter


# --------------------------------------------------------------------------------- Adapter algebra
# Pure functions on tensors. An update ΔW of one layer is a tensor (d, k) or factors (b, a) with
# ΔW = b @ a; both are accepted everywhere.


def dense(update):
    """An update as a matrix: (b (d, r), a (r, k)) or (d, k) -> (d, k)."""
    return update[0] @ update[1] if isinstance(update, tuple) else update


def flat(delta_w):
    """ΔW of all layers as one vector (our choice: one cosine per adapter, not per layer). -> (P,)"""
    return torch.cat([dense(update).flatten() for update in delta_w.values()])


def cosine_similarity(delta, groups):
    """(2) s_j = <ΔW_i, ΔW_Gj> / (|ΔW_i| |ΔW_Gj|).  delta (P,), groups (M, P) -> (M,).  Abstract."""
    return F.cosine_similarity(groups, delta[None], dim=1)


def assign_group(similarities, tau, g_max):
    """(2) Index of the group to join, or M for a new one. Abstract; a full set: our choice.

    Join the most similar group if s > τ; else open one while M < G_max; else join it all the same.
    """
    m = len(similarities)
    best = int(np.argmax(similarities)) if m else 0
    return m if m < g_max and (m == 0 or similarities[best] <= tau) else best


def prune(x, rho):
    """(3) Keep the round(ρ n) >= 1 entries of largest magnitude, zero the rest. x any shape -> same.

    That less significant weights are dropped: abstract and review; by magnitude: our choice.
    """
    keep = max(1, round(rho * x.numel()))
    if keep == x.numel():
        return x
    kept = x.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(x).flatten().index_copy(0, kept, x.flatten()[kept]).view_as(x)


def prune_update(update, rho, how):
    """(3) on one layer's factors (b, a): each of them ("factors"), or ΔW itself ("product")."""
    if how == "factors" or rho == 1:
        return tuple(prune(factor, rho) for factor in update)
    return prune(dense(update), rho)


def shares(n, alpha_group, alpha, how):
    """(4) What the group (of n members) and the new member are multiplied with before they are added.

    mean:      (n α_G ΔW_G + α_i ΔW_i) / (n + 1), our reading of "scale": members average out
    sum:       α_G ΔW_G + α_i ΔW_i, literal: concatenation adds the products
    solution:  α_G ΔW_G + α_i ΔW_i / (n + 1), mean of what each task ended with
    """
    group, new = (n / (n + 1), 1 / (n + 1)) if how == "mean" else (1.0, 1.0)
    new = 1 / (n + 1) if how == "solution" else new
    return group * alpha_group, new * alpha


def merge(updates, weights):
    """(4) ΔW_G = Σ_m w_m ΔW_m for one layer, by concatenating factors along the rank (review).

    updates: list of (b (d, r_m), a (r_m, k)) or (d, k); weights: list of floats.
    -> factors (d, Σ r_m), (Σ r_m, k) while they are smaller than ΔW_G, else dense (d, k).
    Adding up A's and B's separately would not do: (B1 + B2)(A1 + A2) has cross terms.
    """
    if all(isinstance(update, tuple) for update in updates):
        b = torch.cat([w * b for w, (b, _) in zip(weights, updates)], dim=1)
        a = torch.cat([a for _, a in updates], dim=0)
        return (b, a) if b.numel() + a.numel() < b.shape[0] * a.shape[1] else b @ a
    return sum(w * dense(update) for w, update in zip(weights, updates))


# --------------------------------------------------------------------------------------------- HAM


@dataclass
class Group:
    """One group: its adapter, its importance α_G, and the tasks that were merged into it."""

    delta_w: dict  # layer name: factors (b, a) or dense (d, k)
    alpha: float = 1.0
    members: list = field(default_factory=list)


class HAM:
    """What is carried from task to task: at most G_max groups. W0 is referred to, never changed."""

    def __init__(self, w0, config):
        self.w0, self.config, self.groups = w0, config, []
        self.draw = np.random.RandomState(config.seed)  # for --grouping random

    def start(self):
        """What task i is trained from: its adapter, and the groups under it (frozen).

        ham: a new adapter on all groups. sequential, joint: the adapter of the tasks before, trained
        on. average: a new adapter on the bare model.
        """
        c = self.config
        if c.method in ("sequential", "joint") and self.groups:
            return self.groups[0].delta_w, []
        return new_adapter(self.w0, c.rank, c.seed), self.groups if c.method == "ham" else []

    def add(self, task, adapter, alpha, alpha_groups):
        """After task i was trained: group, prune, scale, merge. -> what happened, as plain numbers."""
        c = self.config
        for group, value in zip(self.groups, alpha_groups):
            group.alpha = value
        if c.method in ("sequential", "joint"):
            self.groups = [Group(adapter, 1.0, [*range(task + 1)])]
            return dict(group=None, similarities=None, group_sizes=None)
        similarities = self.similarities(adapter)
        j = assign_group(similarities, c.tau, c.g_max)
        if c.grouping == "random" and j < len(self.groups):
            j = int(self.draw.randint(len(self.groups)))
        if j == len(self.groups):
            self.groups.append(Group({}))
        self.groups[j] = self.join(self.groups[j], task, adapter, alpha)
        sizes = [len(group.members) for group in self.groups]
        return dict(group=j, similarities=similarities, group_sizes=sizes)

    def similarities(self, adapter):
        """(2) Cosine of the new adapter with each group's. -> list of M floats."""
        if not self.groups:
            return []
        return cosine_similarity(flat(adapter), torch.stack([flat(g.delta_w) for g in self.groups])).tolist()

    def join(self, group, task, adapter, alpha):
        """(3), (4) The group with task i in it; an empty one becomes α_i prune(ΔW_i)."""
        c, n = self.config, len(group.members)
        weights = shares(n, group.alpha, alpha, c.merge)
        delta_w = {}
        for name, update in adapter.items():
            pruned = prune_update(update, c.rho, c.prune)
            both = [group.delta_w[name], pruned] if n else [pruned]
            delta_w[name] = merge(both, weights[-len(both) :])
        return Group(delta_w, 1.0, group.members + [task])  # α_G is in ΔW_G now, and starts at 1 again

    def folded(self):
        """All groups in one module: W = W0 + Σ_j α_Gj ΔW_Gj, new tensors. -> dict name: (d, k)."""
        return {
            name: w0 + sum((g.alpha * dense(g.delta_w[name]) for g in self.groups), torch.zeros_like(w0))
            for name, w0 in self.w0.items()
        }

    def stored(self):
        """Numbers kept for the next task and for inference: groups and their α_G."""
        tensors = [t for g in self.groups for u in g.delta_w.values() for t in (u if type(u) is tuple else [u])]
        return sum(t.numel() for t in tensors) + (len(self.groups) if self.config.method == "ham" else 0)


# -------------------------------------------------------------------------------------------- Head
# A class is a unit vector, a logit a cosine, whether the vector was trained (head) or is a class mean.

SCALE = 16.0  # of the cosine in the training loss (our choice)


def class_means(features, labels, classes):
    """Normalised mean of L2-normalised features. features (N, D), labels (N,) -> (len(classes), D)."""
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[labels == c].mean(0) for c in classes]), dim=1)


def cosine_logits(features, rows):
    """features (N, D), rows (C, D) -> (N, C), in [-1, 1]."""
    return F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T


# -------------------------------------------------------------------------------------------- Data
# Images are decoded once into one uint8 tensor; all that follows is batched on the training device.


@dataclass
class Data:
    """Images of all classes, classes numbered by their place in the class order (0..C-1)."""

    pixels: torch.Tensor  # (N, 3, H, W) uint8, training and test images
    train: list  # per class: rows of pixels (long tensor)
    test: list
    names: list  # per class
    order: list  # per class: its number in the data set
    tasks: list  # per task: its classes (range)
    transform: dict  # size, crop_pct, interpolation, mean, std: what is left to do to a batch

    def rows(self, part, classes):
        """Rows and labels of the images of some classes. part: "train" or "test". -> (n,), (n,)"""
        per_class = getattr(self, part)
        labels = [torch.full((len(per_class[c]),), c) for c in classes]
        return torch.cat([per_class[c] for c in classes]), torch.cat(labels)

    def batch(self, rows, device, flip=None):
        """rows (n,), flip (n,) bool or None -> (n, 3, size, size) float, ready for the model."""
        x = prepare(self.pixels[rows.to(self.pixels.device)].to(device), **self.transform)
        return x if flip is None else torch.where(flip.to(device)[:, None, None, None], x.flip(3), x)


def prepare(pixels, size, crop_pct, interpolation, mean, std):
    """As timm's test transform: resize to floor(size / crop_pct), centre crop, normalise.

    pixels (n, 3, H, H) uint8 -> (n, 3, size, size) float. antialias=True also where it enlarges: that
    selects PIL's bicubic kernel (a = -0.5), which plain interpolate does not use.
    """
    x, side = pixels.float(), math.floor(size / crop_pct)
    if x.shape[-1] != side:
        x = F.interpolate(x, size=side, mode=interpolation, antialias=True).round_().clamp_(0, 255)
    edge = round((side - size) / 2)
    x = x[..., edge : edge + size, edge : edge + size] / 255
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def class_order(n, how, seed):
    """Order in which n classes arrive: the field's seeded permutation, or label order."""
    return list(range(n)) if how == "natural" else np.random.RandomState(seed).permutation(n).tolist()


def split_tasks(n, tasks):
    """n classes in order -> `tasks` ranges; the first n % tasks of them hold one class more."""
    if tasks > n:
        raise InputError(f"--tasks {tasks}: the data set has only {n} classes")
    return [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(n), tasks)]


def pick_rows(train_labels, test_labels, order, c):
    """Rows of each class's training and test images; test images lie behind the training images.

    --validate: the last 10 % (at least 3) of a class's training images become its test images.
    """
    train, test = [], []
    for label in order:
        learn = np.flatnonzero(train_labels == label)
        judge = len(train_labels) + np.flatnonzero(test_labels == label)
        if c.validate:
            held_out = max(3, len(learn) // 10)
            learn, judge = learn[:-held_out], learn[-held_out:]
        if not len(learn) or not len(judge):
            raise InputError(f"class {label} has {len(learn)} training and {len(judge)} test images")
        train.append(torch.from_numpy(learn[: c.images_per_class]))
        test.append(torch.from_numpy(judge[: c.test_images_per_class]))
    return train, test


def load_data(c, cfg):
    """The data set of the configuration. cfg: the model's timm configuration (mean, std, ...)."""
    readers = dict(demo=read_demo, cifar100=read_cifar100, cub200=read_cub200)
    read = readers.get(c.dataset, read_folder)
    pixels, train_labels, test_labels, names = read(c, cfg)
    order = class_order(len(names), c.class_order, c.seed)
    train, test = pick_rows(np.asarray(train_labels), np.asarray(test_labels), order, c)
    mean, std = (cfg["mean"], cfg["std"]) if c.norm == "model" else ((0.0,) * 3, (1.0,) * 3)
    decoded = c.dataset not in ("demo", "cifar100")  # image files are cropped when they are decoded
    left = dict(size=c.img_size, crop_pct=1.0 if decoded else c.crop_pct, interpolation=cfg["interpolation"])
    left |= dict(mean=mean, std=std)
    if "cuda" in c.device and pixels.nbytes < torch.cuda.mem_get_info(c.device)[0] / 2:
        pixels = pixels.to(c.device)
    names = [names[label] for label in order]
    return Data(pixels, train, test, names, order, split_tasks(len(names), c.tasks), left)


def read_cifar100(c, cfg):
    """torchvision's CIFAR-100, downloaded into --data-dir where it is not there yet; 32 px."""
    try:
        parts = [torchvision.datasets.CIFAR100(c.data_dir, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-100 is not in {c.data_dir} and its download failed ({error}): put cifar-100-python.tar.gz "
            "from https://www.cs.toronto.edu/~kriz/ there by hand, or name another --data-dir"
        ) from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    return pixels.contiguous(), parts[0].targets, parts[1].targets, parts[0].classes


def read_cub200(c, cfg):
    """CUB-200-2011 as its authors unpack it, with their split."""
    root = Path(c.data_dir) / "CUB_200_2011"
    if not (root / "train_test_split.txt").is_file():
        raise InputError(
            f"{root} is not there: unpack CUB_200_2011.tgz (data.caltech.edu/records/65de6-vp158) into "
            f"{c.data_dir}, or name another --data-dir"
        )
    column = lambda name: [line.split()[1] for line in (root / name).read_text().splitlines()]  # noqa: E731
    labels = np.array(column("image_class_labels.txt"), int) - 1
    is_train = np.array(column("train_test_split.txt")) == "1"
    paths = np.array([root / "images" / name for name in column("images.txt")])
    pixels = decode([*paths[is_train], *paths[~is_train]], c, cfg)
    return pixels, labels[is_train], labels[~is_train], column("classes.txt")


def read_folder(c, cfg):
    """FOLDER/{train,test}/CLASS/*: any files PIL can read; classes in sorted order."""
    root, paths, labels = Path(c.dataset), [], dict(train=[], test=[])
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise InputError(
            f"--dataset {c.dataset}: give demo, cifar100, cub200 or a folder with train/CLASS/* and test/CLASS/*"
        )
    names = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    for part in labels:
        for label, name in enumerate(names):
            found = sorted((root / part / name).glob("[!.]*"))
            paths += found
            labels[part] += [label] * len(found)
    return decode(paths, c, cfg), labels["train"], labels["test"], names


def decode(paths, c, cfg):
    """Image files -> (N, 3, S, S) uint8, resized and cropped by timm's own test transform for size S.

    Written once to --data-dir/cache and memory-mapped; the name is a hash of all that went into it.
    """
    wanted = dict(input_size=(3, c.img_size, c.img_size), crop_pct=c.crop_pct, interpolation=cfg["interpolation"])
    resize_and_crop = timm.data.create_transform(**wanted).transforms[:2]
    key = json.dumps([wanted, [(str(p), p.stat().st_size) for p in paths]])
    name = f"{Path(c.dataset).name}-{c.img_size}px-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    cache, shape = Path(c.data_dir) / "cache" / name, (len(paths), 3, c.img_size, c.img_size)
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        array = np.lib.format.open_memmap(part, "w+", np.uint8, shape)

        def decode_one(i):
            try:
                image = ImageOps.exif_transpose(Image.open(paths[i])).convert("RGB")
            except OSError as error:
                raise InputError(f"{paths[i]} is not a readable image ({error}): mend or remove it") from None
            for step in resize_and_crop:
                image = step(image)
            array[i] = np.asarray(image).transpose(2, 0, 1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bar = tqdm(pool.map(decode_one, range(len(paths))), "decoding images", len(paths), disable=no_bar())
            for _ in bar:
                pass
        array.flush()
        part.rename(cache)
    return torch.from_numpy(np.load(cache, mmap_mode="c"))


# The demo: classes drawn by formula. A class is a shape, a texture and a colour; place, size, angle,
# background and noise vary from image to image.

DEMO_CFG = dict(input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
DEMO_VIT = dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=0)
DEMO_SHAPES = "disc ring cross triangle square hexagon trefoil star".split()
DEMO_TEXTURES = "plain striped checked ringed dotted".split()
DEMO_COLOURS = "red yellow green cyan blue magenta".split()
DEMO_PRETRAIN, DEMO_CLASSES = 40, 30  # classes for pre-training, and others for the tasks


def draw_class(rng, name, n):
    """n images of one class, "colour texture shape" -> (n, 3, 32, 32) uint8."""
    colour, texture, shape = name.split()
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    vary = lambda low, high, *more: rng.uniform(low, high, (n, 1, 1, *more))  # noqa: E731
    size, turn = vary(0.4, 0.75), vary(0, 2 * np.pi)
    x, y = (x - vary(-0.3, 0.3)) / size, (y - vary(-0.3, 0.3)) / size
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    polygon = lambda k: np.cos(np.pi / k) / np.cos(angle % (2 * np.pi / k) - np.pi / k) - r  # noqa: E731
    inside = dict(  # above 0 inside the shape
        disc=lambda: 0.85 - r,
        ring=lambda: 0.3 - abs(r - 0.65),
        cross=lambda: np.minimum(0.32 - np.minimum(abs(x), abs(y)), 0.9 - np.maximum(abs(x), abs(y))),
        triangle=lambda: polygon(3),
        square=lambda: polygon(4),
        hexagon=lambda: polygon(6),
        trefoil=lambda: 0.65 + 0.35 * np.cos(3 * angle) - r,
        star=lambda: 0.65 + 0.35 * np.cos(5 * angle) - r,
    )[shape]()
    wave = dict(
        plain=lambda: 1 + 0 * r,
        striped=lambda: np.sin(9 * x),
        checked=lambda: np.sin(7 * x) * np.sin(7 * y) * 3,
        ringed=lambda: np.sin(13 * r),
        dotted=lambda: np.cos(8 * x) + np.cos(8 * y) - 0.6,
    )[texture]()
    mask = np.clip(inside * size * 8 + 0.5, 0, 1)[..., None]
    hue = DEMO_COLOURS.index(colour) / 6 + vary(-0.06, 0.06, 1)
    rgb = np.clip(abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * vary(0.6, 1, 1)
    shade = 0.25 + 0.75 * np.clip(wave + 0.5, 0, 1)[..., None]
    slope = vary(-0.3, 0.3, 3) * np.linspace(-1, 1, 32)[:, None]
    image = mask * shade * rgb + (1 - mask) * (vary(0.1, 0.9, 3) + slope)
    image = image + rng.normal(0, 0.12, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(0, 3, 1, 2)


def demo_classes(seed):
    """Names of the classes to pre-train on and of those for the tasks, disjoint."""
    names = [f"{c} {t} {s}" for s in DEMO_SHAPES for t in DEMO_TEXTURES for c in DEMO_COLOURS]
    names = np.random.RandomState(seed).permutation(names)[: DEMO_PRETRAIN + DEMO_CLASSES].tolist()
    return names[:DEMO_PRETRAIN], names[DEMO_PRETRAIN:]


def read_demo(c, cfg):
    """60 training and 40 test images of each class."""
    names, rng = demo_classes(c.seed)[1], np.random.RandomState(c.seed)
    images = np.stack([draw_class(rng, name, 100) for name in names])  # (C, 100, 3, 32, 32)
    parts = images[:, :60].reshape(-1, 3, 32, 32), images[:, 60:].reshape(-1, 3, 32, 32)
    labels = np.repeat(np.arange(len(names)), 60), np.repeat(np.arange(len(names)), 40)
    return torch.from_numpy(np.concatenate(parts)), *labels, names


@functools.lru_cache(1)
def pretrain_demo(seed, device, precision, per_class=250, epochs=6, batch_size=64):
    """Train the demo's model on its own classes. -> state dict without a head."""
    names, rng = demo_classes(seed)[0], np.random.RandomState(seed + 1)
    pixels = torch.from_numpy(np.concatenate([draw_class(rng, name, per_class) for name in names]))
    labels = torch.arange(len(names)).repeat_interleave(per_class).to(device)
    torch.manual_seed(seed)
    vit = timm.models.VisionTransformer(**DEMO_VIT).to(device)
    head = torch.nn.Linear(vit.num_features, len(names)).to(device)
    steps = epochs * math.ceil(len(pixels) / batch_size)
    optimiser = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    todo = torch.cat([torch.randperm(len(pixels)) for _ in range(epochs)]).chunk(steps)
    norm = {k: DEMO_CFG[k] for k in ("crop_pct", "interpolation", "mean", "std")}
    for rows in tqdm(todo, f"pre-training on {len(names)} other classes", leave=False, disable=no_bar()):
        x = prepare(pixels[rows].to(device), 32, **norm)
        with autocast(device, precision):
            logits = head(vit(x))
        loss = F.cross_entropy(logits.float(), labels[rows.to(device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in vit.state_dict().items()}


# ---------------------------------------------------------------------------------------- Measures
# a[t][j]: accuracy (%) on the test images of task j after task t, over all classes seen so far.


def accuracy_so_far(row, sizes):
    """A_t = correct / all test images of the classes seen. row: a[t], sizes: test images per task."""
    return sum(a * n for a, n in zip(row, sizes)) / sum(sizes[: len(row)])


def forgetting(matrix):
    """Mean over j < T of max_{t<T} a[t][j] - a[T][j]; 0 for T = 1. Holds the label space's growth too."""
    last = len(matrix) - 1
    drops = [max(matrix[t][j] for t in range(j, last)) - matrix[last][j] for j in range(last)]
    return sum(drops) / last if last else 0.0


def backward_transfer(matrix):
    """Mean over j < T of a[T][j] - a[j][j]; 0 for T = 1."""
    last = len(matrix) - 1
    return sum(matrix[last][j] - matrix[j][j] for j in range(last)) / last if last else 0.0


def measures(matrix, sizes):
    """What results.json holds of an accuracy matrix; per cent, unrounded."""
    so_far = [accuracy_so_far(row, sizes) for row in matrix]
    return dict(
        final_accuracy=so_far[-1],
        average_incremental_accuracy=sum(so_far) / len(so_far),
        forgetting=forgetting(matrix),
        backward_transfer=backward_transfer(matrix),
        learning_accuracy=sum(matrix[j][j] for j in range(len(matrix))) / len(matrix),
    )


# ------------------------------------------------------------------------------------------- Train


def autocast(device, precision):
    """bf16 where it pays; parameters, adapters and scalars stay fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@dataclass
class Trainable:
    """What task i trains (adapter, alpha, alpha_groups, head), and the frozen groups under it."""

    adapter: dict  # name: (b (d, r), a (r, k))
    groups: dict  # name: (M, d, k)
    alpha: torch.Tensor  # ()
    alpha_groups: torch.Tensor  # (M,)
    head: torch.Tensor | None = None  # (classes of the task, D)

    def weights(self, w0):
        """(1) for every adapted layer: one weight per layer and step. -> dict name: (d, k)"""
        return {
            name: effective_weight(w, self.groups[name], self.alpha_groups, *self.adapter[name], self.alpha)
            for name, w in w0.items()
        }


def start_task(ham):
    """Leaf tensors for the next task. α_i starts at 1, each α_G where the task before left it."""
    c, (adapter, under) = ham.config, ham.start()
    groups = {name: [dense(g.delta_w[name]) for g in under] for name in ham.w0}
    return Trainable(
        {name: tuple(x.clone().requires_grad_() for x in pair) for name, pair in adapter.items()},
        {n: torch.stack(groups[n]) if under else w0.new_zeros(0, *w0.shape) for n, w0 in ham.w0.items()},
        torch.ones((), device=c.device, requires_grad=c.train_alpha),
        torch.tensor([g.alpha for g in under], device=c.device, requires_grad=c.train_alpha),
    )


def optimiser_for(p, c, steps):
    """AdamW without weight decay; all learning rates fall to 0 by a cosine within the task."""
    factors = [x for pair in p.adapter.values() for x in pair]
    groups = [dict(params=factors, lr=c.lr), dict(params=[p.head], lr=c.lr_head)]
    if c.train_alpha:
        groups.append(dict(params=[p.alpha, p.alpha_groups], lr=c.lr_alpha))
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def train_task(vit, ham, data, task):
    """Train A_i, B_i, α_i, every α_G and the task's head rows; cross-entropy over its classes only.

    -> Trainable, log: one (loss, α_i) per step. The rows start as class means (our choice).
    """
    c, classes = ham.config, data.tasks[task]
    rows, labels = data.rows("train", classes)
    labels = (labels - classes[0]).to(c.device)
    p = start_task(ham)
    with torch.no_grad():
        features = extract(vit, p.weights(ham.w0), data, rows, c)
    p.head = class_means(features, labels, range(len(classes))).clone().requires_grad_()
    steps = c.epochs * math.ceil(len(rows) / c.batch_size)
    optimiser, schedule = optimiser_for(p, c, steps)
    random, log = torch.Generator().manual_seed(1000 * c.seed + task), []
    bar = tqdm(total=steps, desc=f"task {task + 1}/{c.tasks}", leave=False, disable=no_bar())
    for _ in range(c.epochs):
        for batch in torch.randperm(len(rows), generator=random).split(c.batch_size):
            x = data.batch(rows[batch], c.device, flip=torch.rand(len(batch), generator=random) < 0.5)
            weights = p.weights(ham.w0)
            with autocast(c.device, c.precision):
                features = functional_call(vit, weights, x)
            logits = SCALE * cosine_logits(features.float(), p.head)
            loss = F.cross_entropy(logits, labels[batch.to(c.device)])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            log.append(torch.stack([loss.detach(), p.alpha.detach()]))  # no .item(): no synchronisation
            if len(log) % 20 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    bar.close()
    return p, torch.stack(log).tolist()


# ---------------------------------------------------------------------------------------- Evaluate


@torch.inference_mode()
def extract(vit, weights, data, rows, c, batch_size=128):
    """Features of some images under some weights. rows (n,) -> (n, D) fp32 on the device."""
    features = []
    for part in rows.split(batch_size):
        with autocast(c.device, c.precision):
            features.append(functional_call(vit, weights, data.batch(part, c.device)).float())
    return torch.cat(features)


def accuracies(logits, labels, tasks):
    """Per cent right over all C classes, per task; and over all images, among each one's own task.

    logits (N, C), labels (N,), tasks: ranges of classes -> list of floats, float (task known).
    """
    right = logits.argmax(1) == labels
    of_task = [(labels >= t[0]) & (labels <= t[-1]) for t in tasks]
    known = [logits[m][:, t[0] : t[-1] + 1].argmax(1) + t[0] == labels[m] for m, t in zip(of_task, tasks)]
    per_task = [100 * right[m].double().mean().item() for m in of_task]
    return per_task, 100 * torch.cat(known).double().mean().item()


class Classifier(torch.nn.Module):
    """A finished run as a plain module: the ViT with all groups folded in, and one row per class."""

    def __init__(self, vit, rows, names, transform):
        super().__init__()
        self.vit, self.names = vit, names
        self.register_buffer("rows", rows)  # (C, D)
        self.transform = timm.data.create_transform(**transform)

    def forward(self, x):
        """x (N, 3, S, S), normalised -> cosine logits (N, C)."""
        return cosine_logits(self.vit(x), self.rows)

    @torch.inference_mode()
    def predict(self, images):
        """List of PIL images -> list of class names."""
        x = torch.stack([self.transform(image.convert("RGB")) for image in images]).to(self.rows.device)
        return [self.names[i] for i in self(x).argmax(1)]


def load(folder):
    """A run's folder -> Classifier on the CPU, in eval mode, fp32."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{file} is not there: give the folder that a run names at its end")
    with safe_open(file, "pt") as stored:
        about = {key: json.loads(value) for key, value in stored.metadata().items()}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}
    rows = tensors.pop("rows")
    vit = create_vit(about["config"]["model"], about["config"]["img_size"])
    vit.load_state_dict(tensors, strict=True)
    return Classifier(vit, rows, about["names"], about["transform"]).eval()


# ------------------------------------------------------------------------------------- Environment


def no_bar():
    """Bars on a terminal only; elsewhere lines."""
    return not sys.stderr.isatty()


def say(text=""):
    """One line, at once, also into a file."""
    print(text, flush=True)


def pick_device(device):
    """auto -> cuda where there is one, else cpu."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def pick_precision(precision, device):
    """auto -> bf16 on a GPU and on CPUs with bf16 instructions; mkldnn's check would count emulation."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = "cuda" in device or any(getattr(torch.cpu, check, bool)() for check in checks)
    return ("bf16" if native else "fp32") if precision == "auto" else precision


def timm_cfg(name):
    """Full model name with tag, and timm's configuration of its checkpoint."""
    name = name or "vit_base_patch16_224.augreg_in21k"
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"--model {name}: {error}") from None
    if cfg is None or not timm.is_model(name):
        raise InputError(f"--model {name}: timm has no such model; timm.list_models('vit*') has the names")
    return f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture, cfg.to_dict()


def create_vit(model, img_size, **pretrained):
    """timm's ViT without a head: images -> features (N, D)."""
    if model == "demo_vit":
        return timm.models.VisionTransformer(**DEMO_VIT)
    return timm.create_model(model, num_classes=0, img_size=img_size, **pretrained)


def build_vit(c):
    """The frozen backbone with its weights, in eval mode. On a CPU attention is unfused, module by
    module: the fused kernel's bf16 backward takes half of a training step there."""
    file = dict(file=c.weights, custom_load=False) if c.weights else {}
    try:
        vit = create_vit(c.model, c.img_size, pretrained=True, pretrained_cfg_overlay=file)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = "is it this model's file?" if c.weights else "no network? Give its file with --weights."
        raise InputError(f"weights of {c.model} ({c.weights or 'timm hub'}): {reason} {cure}") from None
    if c.model == "demo_vit":
        vit.load_state_dict(pretrain_demo(c.seed, c.device, c.precision))
    if c.device == "cpu":
        for block in vit.blocks:
            block.attn.fused_attn = False
    return vit.requires_grad_(False).eval().to(c.device)


def peak_memory(device):
    """Bytes: of the GPU's allocator, or of the process (None where the system does not tell)."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sha256(file):
    """Hexadecimal digest of a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


SOURCE_SHA256 = sha256(__file__)  # taken when imported: a later edit is not what ran


def environment(c):
    """What the figures came from: versions, hardware, memory, source."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(c.device) if "cuda" in c.device else platform.machine()
    return dict(
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__),
        hardware=f"{name}, {torch.get_num_threads()} threads",
        peak_memory_bytes=peak_memory(c.device),
        commit=commit or None,
        ham_sha256=SOURCE_SHA256,
        weights_sha256=sha256(c.weights) if c.weights else None,
    )


# --------------------------------------------------------------------------------------------- Run


class Learner:
    """The sequence of tasks: what HAM carries, one row per class for each read-out, what was measured."""

    def __init__(self, vit, ham, data, c):
        self.vit, self.ham, self.data, self.c = vit, ham, data, c
        shape = (len(data.names), vit.num_features)
        self.rows = {"class-mean": torch.zeros(shape, device=c.device)}
        if c.method != "frozen":
            self.rows["head"] = torch.zeros(shape, device=c.device)
        self.matrix = {name: [] for name in self.rows}
        self.known, self.tasks = {}, []
        self.seconds = dict(train=0.0, merge=0.0, class_means=0.0, evaluate=0.0)
        self.bank = {}  # frozen features never change: rows -> features

    def features(self, part, task):
        """Features and labels of one task's images with all groups folded into the weights."""
        rows, labels = self.data.rows(part, self.data.tasks[task])
        if (part, task) in self.bank:
            return self.bank[part, task], labels.to(self.c.device)
        features = extract(self.vit, self.weights, self.data, rows, self.c)
        if self.c.method == "frozen":
            self.bank[part, task] = features
        return features, labels.to(self.c.device)

    def timed(self, what, function, *args):
        """Call a function and add its seconds to self.seconds[what]."""
        start = time.perf_counter()
        result = function(*args)
        if "cuda" in self.c.device:
            torch.cuda.synchronize()
        self.seconds[what] += time.perf_counter() - start
        return result

    def learn(self, task):
        """One task: train, group and merge, take class means, evaluate. -> the task's record."""
        before, record = dict(self.seconds), {}
        if self.c.method != "frozen":
            p, log = self.timed("train", train_task, self.vit, self.ham, self.data, task)
            record = self.timed("merge", self.merge, task, p, log)
        self.weights = self.ham.folded()
        self.timed("class_means", self.take_class_means, task)
        self.timed("evaluate", self.evaluate, task)
        record |= {f"{name.replace('-', '_')}_accuracy": accuracy_so_far(m[-1], self.sizes()) for name, m in self.matrix.items()}
        record["accuracy"] = record[f"{self.c.read_out.replace('-', '_')}_accuracy"]
        record["forgetting"] = forgetting(self.matrix[self.c.read_out])
        record["seconds"] = {k: self.seconds[k] - before[k] for k in before}
        images = sum(len(self.data.train[k]) for k in self.data.tasks[task]) * (self.c.epochs or 0)
        record["images_per_second"] = images / record["seconds"]["train"] if images else None
        self.tasks.append(record)
        return record

    def merge(self, task, p, log):
        """Hand the trained task over to HAM and keep its head. -> plain numbers for the record."""
        losses = [loss for loss, _ in log[-(len(log) // self.c.epochs) :]]
        if not all(map(math.isfinite, losses)):
            raise InputError(f"the loss of task {task + 1} is not finite: lower --lr {self.c.lr}")
        self.rows["head"][list(self.data.tasks[task])] = p.head.detach()
        adapter = {name: tuple(x.detach() for x in pair) for name, pair in p.adapter.items()}
        numbers = dict(alpha=p.alpha.item(), alpha_groups=p.alpha_groups.tolist())
        numbers["loss"] = sum(losses) / len(losses)
        return numbers | self.ham.add(task, adapter, **{k: numbers[k] for k in ("alpha", "alpha_groups")})

    def take_class_means(self, task):
        """Class means of the task's training images, once, after the merge."""
        classes = self.data.tasks[task]
        self.rows["class-mean"][list(classes)] = class_means(*self.features("train", task), classes)

    def evaluate(self, task):
        """One pass over the test images of all classes seen fills row `task` of both matrices."""
        parts = [self.features("test", j) for j in range(task + 1)]
        features, labels = (torch.cat(x) for x in zip(*parts))
        seen = self.data.tasks[: task + 1]
        for name, rows in self.rows.items():
            logits = cosine_logits(features, rows[: seen[-1][-1] + 1])
            per_task, self.known[name] = accuracies(logits, labels, seen)
            self.matrix[name].append(per_task)

    def sizes(self):
        """Test images per task."""
        return [sum(len(self.data.test[c]) for c in classes) for classes in self.data.tasks]

    def oracle(self):
        """Accuracy with the class means of all training images under the final model. Never a result."""
        tasks = range(len(self.data.tasks))
        rows = torch.cat([class_means(*self.features("train", t), self.data.tasks[t]) for t in tasks])
        features, labels = (torch.cat(x) for x in zip(*(self.features("test", t) for t in tasks)))
        return accuracies(cosine_logits(features, rows), labels, [range(len(rows))])[0][0]

    def results(self):
        """Everything measured, as results.json holds it: plain numbers, per cent, unrounded."""
        final = {name: accuracy_so_far(m[-1], self.sizes()) for name, m in self.matrix.items()}
        trained = sum(map(len, self.data.train)) * (self.c.epochs or 0)
        tested = sum(sum(self.sizes()[: t + 1]) for t in range(len(self.tasks)))
        return dict(
            classes=self.data.names,
            class_order=self.data.order,
            **measures(self.matrix[self.c.read_out], self.sizes()),
            task_known_accuracy=self.known[self.c.read_out],
            head_accuracy=final.get("head"),
            class_mean_accuracy=final["class-mean"],
            class_mean_oracle=self.oracle(),
            accuracy_matrix=self.matrix[self.c.read_out],
            tasks=self.tasks,
            test_images_per_task=self.sizes(),
            parameters_trained=trainable_numbers(self.ham, self.data),
            parameters_stored=self.ham.stored() + self.rows[self.c.read_out].numel(),
            seconds=self.seconds,
            images_per_second=dict(
                training=trained / self.seconds["train"] if trained else None,
                inference=tested / self.seconds["evaluate"] if self.c.method != "frozen" else None,
            ),
        )


def trainable_numbers(ham, data):
    """Numbers trained in the last task: factors, head rows, α_i and at most G_max α_G."""
    c = ham.config
    if c.method == "frozen":
        return 0
    factors = sum(c.rank * sum(w0.shape) for w0 in ham.w0.values())
    return factors + (1 + min(c.g_max, c.tasks - 1) if c.train_alpha else 0)


def result_folder(c):
    """Folder of the run; refuses one that holds another configuration."""
    parts = [Path(c.dataset).name, f"T{c.tasks}", c.method, *([c.name] if c.name else []), f"s{c.seed}"]
    folder = Path(c.out) / "-".join(parts)
    file = folder / "results.json"
    if file.is_file():
        old, new = json.loads(file.read_text())["config"], dataclasses.asdict(c)
        other = [k for k in new if k not in ("out", "data_dir", "weights") and old.get(k) != new[k]]
        if other:
            raise InputError(
                f"{file} holds a run with other settings ({', '.join(other)}): give this one a --name or --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(config):
    """One method over the sequence of tasks; writes results.json and model.safetensors.

    -> dict, what results.json holds. Raises InputError for a setting or file the user can mend.
    """
    c = resolve(config)
    folder = result_folder(c)
    cfg = DEMO_CFG if c.model == "demo_vit" else timm_cfg(c.model)[1]
    data = load_data(c, cfg)
    vit = build_vit(c)
    ham = HAM({} if c.method == "frozen" else lora_layers(vit, c.layers), c)
    learner = Learner(vit, ham, data, c)
    say_start(learner)
    for task in range(c.tasks):
        learner.learn(task)
        say_task(learner)
    results = dict(config=dataclasses.asdict(c), **learner.results(), **environment(c))
    save(folder, results, learner)
    say_end(results, folder)
    return results


def save(folder, results, learner):
    """results.json, and the folded model with what `load` needs. Each file appears whole or not."""
    t = learner.data.transform
    about = dict(config=results["config"], names=learner.data.names)
    about["transform"] = {k: t[k] for k in ("interpolation", "mean", "std")}
    about["transform"] |= dict(input_size=(3, t["size"], t["size"]), crop_pct=learner.c.crop_pct)
    tensors = learner.vit.state_dict() | learner.weights | dict(rows=learner.rows[learner.c.read_out])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "part", {key: json.dumps(value) for key, value in about.items()})
    (folder / "part").replace(folder / "model.safetensors")
    (folder / "part").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "part").replace(folder / "results.json")


# ------------------------------------------------------------------------------------ Command line


def say_start(learner):
    """The block a run begins with: everything its figures depend on."""
    c, data, t = learner.c, learner.data, learner.data.transform
    count = {part: sum(map(len, getattr(data, part))) for part in ("train", "test")}
    order = " ".join(map(str, data.order[:6]))
    held_out = "held-out training" if c.validate else "test"
    say(f"method   {c.method}   seed {c.seed}")
    hub = "pre-trained on 40 other drawn classes" if c.dataset == "demo" else "of the timm hub"
    say(f"model    {c.model}, weights {c.weights or hub}")
    say(f"input    {c.img_size} px, crop {c.crop_pct}, mean {t['mean']}, std {t['std']}")
    say(f"device   {c.device}, {c.precision}, {torch.get_num_threads()} threads")
    say(f"data     {c.dataset}: {len(data.names)} classes, {c.tasks} tasks, order {order} ...")
    say(f"         {count['train']} training images, {count['test']} {held_out} images")
    if c.method != "frozen":
        number = f"{trainable_numbers(learner.ham, data):,} trained per task"
        say(f"LoRA     rank {c.rank} on {len(learner.ham.w0)} layers ({c.layers}), {number}, lr {c.lr:g}")
    if c.method == "ham":
        say(f"groups   {c.merge}, {c.grouping}, tau {c.tau}, g_max {c.g_max}, rho {c.rho} of {c.prune}")


def seconds_left(learner):
    """Estimate from the tasks so far: training by images, evaluation by images of all classes seen."""
    done, data, sizes = len(learner.tasks), learner.data, learner.sizes()
    train = [sum(len(data.train[c]) for c in classes) for classes in data.tasks]
    test = [sum(sizes[: t + 1]) for t in range(len(sizes))]
    learning = sum(v for k, v in learner.seconds.items() if k != "evaluate")
    per_image = learning / sum(train[:done]), learner.seconds["evaluate"] / sum(test[:done])
    return per_image[0] * sum(train[done:]) + per_image[1] * (sum(test[done:]) + sum(train) + sizes[-1])


def say_task(learner):
    """One line per task."""
    r, done, c = learner.tasks[-1], len(learner.tasks), learner.c
    text = f"task {done:3}/{c.tasks}  accuracy {r['accuracy']:5.1f}  forgetting {r['forgetting']:5.1f}"
    if c.method == "ham":
        s, j = r["similarities"], r["group"]
        joined = f"joins group {j} (s {s[j]:+.3f})" if j < len(s) else f"opens group {j}"
        text += f"  α {r['alpha']:.2f}  {joined:24}"
    left = seconds_left(learner)
    text += f"  {sum(r['seconds'].values()):5.1f} s"
    say(text + (f"  ({left / 60:.1f} min left)" if done < c.tasks else ""))
    if done == 1 and left > 3600:
        say("         shorter: --images-per-class, --test-images-per-class, --epochs, --img-size, a smaller --model")


def say_end(results, folder):
    """The final table."""
    for key in ("final_accuracy", "average_incremental_accuracy", "forgetting", "learning_accuracy"):
        say(f"{key.replace('_', ' '):30}{results[key]:6.1f} %")
    speed = {k: f"{v:.0f}" if v else "-" for k, v in results["images_per_second"].items()}
    say(f"images per second             training {speed['training']}, inference {speed['inference']}")
    say(f"written to                    {folder}/results.json, model.safetensors\n")


def demo(config):
    """HAM beside one LoRA trained on and on, and no training at all: three calls of `run`."""
    table = {}
    for method in ("ham", "sequential", "frozen"):
        table[method] = run(dataclasses.replace(config, method=method))
    columns = ("final_accuracy", "average_incremental_accuracy", "forgetting", "learning_accuracy")
    say(f"{'':12}" + "".join(f"{c.replace('_accuracy', '').replace('_', ' '):>22}" for c in columns))
    for method, results in table.items():
        say(f"{method:12}" + "".join(f"{results[c]:22.1f}" for c in columns))
    say("forgetting of `frozen` is the growth of the label space alone")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"ham.py: {message}\n")


def parse(argv=None):
    """Command line -> Config: one flag per field; the manual is the fields' own text."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="[value]: default where it depends on method or data set.",
    )
    types = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = next(t for t in (typing.get_args(types[f.name]) or (types[f.name],)) if t is not type(None))
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        text = dict(help=f.metadata["help"] + default, default=f.default)
        flag = "--" + f.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], **text)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line. Exit status 2 and one line for a mistake the user can mend."""
    config = parse(argv)
    try:
        demo(config) if config.dataset == "demo" and not config.method else run(config)
    except InputError as error:
        Parser().error(str(error))


if __name__ == "__main__":
    main()
