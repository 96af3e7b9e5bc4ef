# /// script
# requires-python = ">=3.10.12,!=3.11.0,!=3.11.1,!=3.11.2,!=3.11.3"
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
of the groups so far; by cosine similarity the adapter joins one of at most G_max groups; there it
is pruned, scaled and merged. All groups are folded into the weights for inference.

    python ham.py                                  # demo: nothing to download
    python ham.py --dataset cifar100 --tasks 20    # the main job (ViT-B/16: wants a GPU)
    python ham.py --help                           # every setting: default, range, source

Written without access to the paper's body: what is from the abstract, from a third-party review or
our choice is said at each place. The numbers (1) to (4) of the equations are our README's.

symbol    name           shape           what it is
W0        w0             (d, k)          a frozen weight, one per adapted layer
B_i, A_i  b, a           (d, r), (r, k)  LoRA factors of task i; ΔW_i = B_i A_i, `delta_w`
α_i       alpha          ()              importance of task i's adapter
ΔW_G      Group.delta_w  (d, k)          adapter of a group: dense, or factors (d, r n), (r n, k)
α_G       alpha_groups   (M,)            one importance per group, trained with every task
M, G_max  m, g_max       int             groups so far, and the most there may be
τ         tau            float           similarity above which a task joins a group
ρ         rho            float           fraction of weights that pruning keeps
T         tasks          int             number of tasks;  C classes, D features, N images

Not here: other methods (extras/), rehearsal, drift correction, resuming, several GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call
from tqdm import tqdm

from extras import datasets, demo, provenance, report

# ------------------------------------------------------------------------------------------ Config


class InputError(ValueError):
    """A setting or file the user can mend; the text says how. The command line exits with 2."""


def option(default, text, choices=None, low=-math.inf, high=math.inf):
    """One field of Config = one flag; `text`, choices and range are its line in --help."""
    limits = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    limits = f"one of {', '.join(choices)}" if choices else limits if low > -math.inf else ""
    meta = {"text": text, "choices": choices, "low": low, "high": high, "limits": limits}
    return field(default=default, metadata=meta)


METHODS = ("ham", "sequential", "average", "joint", "frozen")


@dataclass(frozen=True)
class Config:
    """Every setting. None: filled in by `resolve`, which also sets what does not apply to None."""

    # data
    dataset: str = option(
        "demo",
        "demo, cifar100, imagenet_r, cub200, tiny_imagenet, or a FOLDER with {train,test}/CLASS/*",
    )
    tasks: int = option(None, "T, number of tasks; default 20, demo and cub200 10", low=1)
    images_per_class: int = option(None, "first n training images of a class; default all", low=1)
    test_images_per_class: int = option(None, "first n test images; default all", low=1)
    validate: bool = option(False, "test on the last 10 percent of each class's training images")
    class_order: str = option("random", "random: by seed; natural; or a FILE, a class per line")
    split_file: str = option(
        None,
        "test images of imagenet_r or a FOLDER with CLASS/*, a path per line; default for "
        "imagenet_r extras/imagenet_r_test.txt, the public 24,000 and 6,000",
    )
    data_dir: str = option("data", "where data sets and decoded images lie")
    # model
    model: str = option(None, "timm ViT with its tag; default vit_base_patch16_224.augreg_in21k")
    weights: str = option(None, "file with the model's weights; default: timm downloads them")
    img_size: int = option(None, "side of the input, pixels; default the model's own", low=8)
    crop_pct: float = option(None, "crop; default cifar100 1, else the model's", low=0.1, high=1)
    norm: str = option("model", "the checkpoint's mean and std, or [0, 1]", ("model", "unit"))
    # method
    method: str = option(
        None,
        "ham, or a control: one LoRA trained on and on, the average of adapters trained alone, "
        "all classes as one task, no training; default ham, demo: ham, sequential, frozen",
        METHODS,
    )
    rank: int = option(8, "r, rank of an adapter (our choice)", low=1)
    layers: str = option("qkv", "layers with LoRA, any of qkv,proj,fc1,fc2 (our choice)")
    tau: float = option(0.1, "τ, join if s > τ; 1: open first (our choice)", low=-1, high=1)
    g_max: int = option(5, "G_max, most groups (the bound: abstract; 5: our choice)", low=1)
    grouping: str = option("cosine", "group to join (cosine: abstract)", ("cosine", "random"))
    rho: float = option(0.9, "ρ, fraction that pruning keeps (our choice)", low=1e-6, high=1)
    prune: str = option("factors", "prune A, B or B A (our choice)", ("factors", "product"))
    merge: str = option(
        "solution",
        "a group is the mean of what its tasks ended with, or the mean or the sum of what they "
        "added (our choice)",
        ("solution", "mean", "sum"),
    )
    gain: float = option(1.0, "factor of a new member's 1 / (n + 1) (our choice)", low=1)
    train_alpha: bool = option(True, "train α_i and every α_G (third-party review), or fix them")
    read_out: str = option("class-mean", "what classifies (our choice)", ("class-mean", "head"))
    # training
    epochs: int = option(None, "epochs per task (our choice); default 5, demo 10", low=1)
    batch_size: int = option(32, "images per step (our choice)", low=1)
    lr: float = option(
        None,
        "of A, B (our choice); default by method, data set and budget: results/README.md",
        low=1e-9,
    )
    lr_alpha: float = option(1e-2, "learning rate of α_i and α_G (our choice)", low=0)
    lr_head: float = option(1e-2, "learning rate of the head's rows (our choice)", low=0)
    seed: int = option(1993, "draws class order, A, shuffling and flips", low=0, high=2**32 - 1)
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N; auto: cuda where there is one")
    precision: str = option("auto", "auto: bf16 where it is native", ("auto", "bf16", "fp32"))
    out: str = option("runs", "folder for the result folders")
    name: str = option(None, "part of the result folder's name; tells budgets and ablations apart")


# Among the best on held-out images (results/README.md); joint: HAM's for few. Many images a class
# mean many steps, which want lower rates: a LARGE data set has its own above FEW per class.
FEW, LARGE = 100, ("cifar100", "tiny_imagenet")  # 500 images per class
LEARNING_RATE = {"ham": 1e-3, "sequential": 3e-4, "average": 1e-2, "joint": 1e-3}
for large in LARGE:
    LEARNING_RATE |= {("ham", large): 3e-4, ("sequential", large): 1e-4, ("average", large): 3e-3}
LEARNING_RATE |= {("sequential", "cub200"): 1e-4, ("average", "cub200"): 3e-3}
LEARNING_RATE["sequential", "demo"] = 1e-3  # HAM's too, so that drift can be seen
TRAINING = ("rank", "layers", "epochs", "batch_size", "lr", "lr_head")
GROUPING = ("tau", "g_max", "grouping", "rho", "prune", "merge", "gain", "lr_alpha")


def resolve(config: Config) -> Config:
    """Fill in every None that has a value, check ranges, set what does not apply to None."""
    check_ranges(config)
    c = dataclasses.asdict(config)
    method = c["method"] = c["method"] or "ham"
    drawn = c["dataset"] == "demo"
    c["tasks"] = c["tasks"] or (10 if c["dataset"] in ("demo", "cub200") else 20)
    c["tasks"] = 1 if method == "joint" else c["tasks"]
    if drawn and (c["model"] not in (None, "demo_vit") or c["weights"]):
        raise InputError("the demo pre-trains its own model: drop --model and --weights")
    c["model"], cfg = model_cfg("demo_vit" if drawn else c["model"])
    c["img_size"] = c["img_size"] or cfg["input_size"][-1]
    whole = c["dataset"] in ("demo", "cifar100")  # a crop would cut off what little there is
    c["crop_pct"] = c["crop_pct"] or (1.0 if whole else cfg["crop_pct"])
    c["epochs"] = c["epochs"] or (10 if drawn else 5)
    few = c["dataset"] in LARGE and (c["images_per_class"] or math.inf) <= FEW
    own = None if few else LEARNING_RATE.get((method, c["dataset"]))
    c["lr"] = c["lr"] or own or LEARNING_RATE.get(method)
    if method == "average":  # one group that every adapter joins; nothing pruned, no scalars
        c |= dict.fromkeys(GROUPING) | {"train_alpha": False}
        c |= {"tau": -1.0, "g_max": 1, "rho": 1.0, "merge": "mean"}
    elif method in ("sequential", "joint", "frozen"):
        c |= dict.fromkeys(GROUPING) | {"train_alpha": False}
    if method == "frozen":
        c |= dict.fromkeys(TRAINING) | {"read_out": "class-mean"}
    c["device"], c["precision"] = pick_device(c["device"], c["precision"])
    return type(config)(**c)


def check_ranges(config):
    """Raise InputError for the first setting that is out of its range."""
    c = dataclasses.asdict(config)
    for f in dataclasses.fields(config):
        value, meta = c[f.name], f.metadata
        wrong = meta["choices"] and value not in meta["choices"]
        if isinstance(value, int | float):
            wrong = not meta["low"] <= value <= meta["high"]
        if wrong and value is not None:
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be {meta['limits']}")
    if c["layers"] and not set(c["layers"].split(",")) <= {"qkv", "proj", "fc1", "fc2"}:
        raise InputError(f"--layers {c['layers']}: any of qkv,proj,fc1,fc2, with commas between")
    for key in ("weights", "split_file", "class_order"):
        known = c[key] in (None, "random", "natural")
        if not known and not Path(c[key]).is_file():
            raise InputError(f"--{key.replace('_', '-')} {c[key]}: no such file")
    known = {"demo", *datasets.SOURCES}
    if c["dataset"] not in known and not Path(c["dataset"]).is_dir():
        what = f"one of {', '.join(sorted(known))} or a folder with {{train,test}}/CLASS/*"
        raise InputError(f"--dataset {c['dataset']}: must be {what}")
    if c["split_file"] and c["dataset"] in known - {"imagenet_r"}:
        raise InputError("--split-file is for imagenet_r and folders: the others have their own")
    if c["name"] and "/" in c["name"]:
        raise InputError(f"--name {c['name']}: part of a folder's name, without /")


# -------------------------------------------------------------------------------------------- LoRA
# (1)  W = W0 + Σ_j α_Gj ΔW_Gj + α_i B_i A_i        h = W x
# Trained on task i: A_i, B_i, α_i and every α_Gj. Frozen: W0 and every ΔW_Gj (third-party review).


def effective_weight(w0, groups, alpha_groups, b, a, alpha):
    """(1) The weight that a layer multiplies with while task i is trained.

    w0 (d, k), groups (M, d, k), alpha_groups (M,), b (d, r), a (r, k), alpha () -> (d, k).
    Call it outside autocast: a share of an update is below bf16's step at W0's size.
    """
    return w0 + torch.tensordot(alpha_groups, groups, dims=1) + alpha * (b @ a)


def new_adapter(w0, rank, seed):
    """B = 0, so that it changes no output; A Kaiming uniform, the same for every task of a run.

    w0: dict name: (d, k) -> dict name: (b (d, r), a (r, k)). One start: our choice.
    """
    random, adapter = torch.Generator().manual_seed(seed), {}
    for name, w in w0.items():
        d, k = w.shape
        a = (2 * torch.rand(rank, k, generator=random) - 1) / math.sqrt(k)
        adapter[name] = (w.new_zeros(d, rank), a.to(w))
    return adapter


# --------------------------------------------------------------------------------- Adapter algebra
# Pure functions. An update ΔW of one layer is a matrix (d, k) or factors (b, a) with ΔW = b @ a.


def dense(update):
    """An update as a matrix: (b (d, r), a (r, k)) or (d, k) -> (d, k)."""
    return update[0] @ update[1] if isinstance(update, tuple) else update


def factors(adapter):
    """The tensors of an adapter, layer by layer. dict name: (b, a) -> [b, a, b, a, ...]"""
    return [x for ba in adapter.values() for x in ba]


def flat(delta_w):
    """ΔW of all layers as one vector. dict name: update -> (P,)"""
    return torch.cat([dense(update).flatten() for update in delta_w.values()])


def cosine_similarity(delta, groups):
    """(2) s_j = <ΔW_i, ΔW_Gj> / (|ΔW_i| |ΔW_Gj|). Abstract; over all layers at once: our choice.

    delta (P,), groups: M vectors (P,) -> list of M floats in [-1, 1].
    """
    return [F.cosine_similarity(delta, group, dim=0).clamp(-1, 1).item() for group in groups]


def assign_group(similarities, tau, g_max):
    """(2) The index of the group to join, or M for a new one. Abstract; a full set: our choice.

    Join the most similar group if s > τ; else open one while M < G_max; else join it all the same.
    """
    m = len(similarities)
    if m == 0 or (max(similarities) <= tau and m < g_max):
        return m
    return int(np.argmax(similarities))


def prune(x, rho):
    """(3) Keep the round(ρ n) >= 1 entries of largest magnitude, zero the others.

    x: any shape, n entries -> same shape. Pruning: abstract; magnitude as measure: our choice.
    """
    keep = max(1, round(rho * x.numel()))
    kept = x.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(x).flatten().index_copy(0, kept, x.flatten()[kept]).view_as(x)


def prune_update(update, rho, how):
    """(3) for one layer's factors (b, a): each by itself ("factors"), or b @ a ("product")."""
    if how == "factors" or rho == 1:
        return tuple(prune(factor, rho) for factor in update)
    return prune(dense(update), rho)


def shares(n, alpha_group, alpha, how, gain=1.0):
    """(4) Scale: what the new member and its group of n are multiplied with before they are added.

    solution:  α_i ΔW_i / (n + 1) + α_G ΔW_G, at α_G = 1 the mean of what each task ended with
    mean:      (α_i ΔW_i + n α_G ΔW_G) / (n + 1), the mean of what each task added
    sum:       α_i ΔW_i + α_G ΔW_G, literal: concatenating factors adds their products
    With a gain, the new member's 1 / (n + 1) is min(n + 1, gain) / (n + 1): inf is the sum.
    """
    gain = math.inf if how == "sum" else gain
    new = min(n + 1, gain) / (n + 1)
    old = new * n / min(n, gain) if how == "mean" and n else 1.0
    return alpha * new, alpha_group * old


def merge(updates, weights):
    """(4) ΔW_G = Σ_m w_m ΔW_m for one layer, by concatenating factors along the rank (review).

    updates: m of (b (d, r_m), a (r_m, k)) or (d, k); weights: m floats -> (b, a) while these are
    smaller than ΔW_G, else dense. Adding A's and B's up would not do: cross terms B_1 A_2.
    """
    if not all(isinstance(update, tuple) for update in updates):
        return sum(w * dense(update) for w, update in zip(weights, updates))
    b = torch.cat([w * b for w, (b, _) in zip(weights, updates)], dim=1)  # (d, Σ r_m)
    a = torch.cat([a for _, a in updates], dim=0)  # (Σ r_m, k)
    return (b, a) if b.numel() + a.numel() < b.shape[0] * a.shape[1] else b @ a


# --------------------------------------------------------------------------------------------- HAM


@dataclass
class Group:
    """One group: its adapter ΔW_G, its importance α_G, the tasks that were merged into it."""

    delta_w: dict = field(default_factory=dict)  # name: (b, a) or (d, k)
    alpha: float = 1.0
    members: list = field(default_factory=list)


@dataclass
class Trainable:
    """What task i trains (adapter, alpha, alpha_groups, head), and the frozen groups under it."""

    adapter: dict  # name: (b (d, r), a (r, k))
    groups: dict  # name: (M, d, k)
    alpha: torch.Tensor  # ()
    alpha_groups: torch.Tensor  # (M,)
    head: torch.Tensor = None  # (classes of the task, D), one row per class

    def weights(self, w0):
        """(1) for every layer. w0: dict name: (d, k) -> dict name: (d, k)"""
        weights = {}
        for name, w in w0.items():
            stacked = self.groups[name], self.alpha_groups
            weights[name] = effective_weight(w, *stacked, *self.adapter[name], self.alpha)
        return weights

    def parameters(self, c):
        """What the optimiser moves, at which rates: torch's parameter groups."""
        scalars = {"params": [self.alpha, self.alpha_groups], "lr": c.lr_alpha}
        groups = [{"params": factors(self.adapter), "lr": c.lr}]
        groups += [{"params": [self.head], "lr": c.lr_head}]
        return groups + [scalars] * c.train_alpha


class HAM:
    """What is carried from task to task: at most G_max groups. W0 is referred to, never changed."""

    def __init__(self, w0, config):
        self.w0, self.config, self.groups = w0, config, []
        self.draw = np.random.RandomState(config.seed)  # for --grouping random
        self.one_adapter = config.method in ("sequential", "joint")  # trained on and on

    def start(self):
        """Leaf tensors for task i. α_i starts at 1, each α_G where the task before left it.

        ham: a new adapter on all groups; average: on the bare model; sequential: the old adapter.
        """
        c, again = self.config, self.one_adapter and self.groups
        under = [] if self.one_adapter or c.method == "average" else self.groups
        adapter = self.groups[0].delta_w if again else new_adapter(self.w0, c.rank, c.seed)
        stacked = {  # w[None][:0]: an empty stack, for no groups
            name: torch.cat([w[None][:0], *(dense(g.delta_w[name])[None] for g in under)])
            for name, w in self.w0.items()
        }
        return Trainable(
            {name: tuple(x.clone().requires_grad_() for x in ba) for name, ba in adapter.items()},
            stacked,
            torch.ones((), device=c.device, requires_grad=c.train_alpha),
            torch.tensor([g.alpha for g in under], device=c.device, requires_grad=c.train_alpha),
        )

    def penalty(self, p, loss):
        """What is added to the cross-entropy: nothing in HAM."""
        return 0.0

    def finish(self, task, p):
        """After task i was trained: group, prune, scale, merge. -> what happened, plain numbers"""
        c, record = self.config, {"alpha": p.alpha.item(), "alpha_groups": p.alpha_groups.tolist()}
        adapter = {name: tuple(x.detach() for x in ba) for name, ba in p.adapter.items()}
        if self.one_adapter:
            self.groups = [Group(adapter)]
            return record | {"group": None, "similarities": None, "group_sizes": None}
        for group, value in zip(self.groups, record["alpha_groups"]):
            group.alpha = value
        similarities = cosine_similarity(flat(adapter), (flat(g.delta_w) for g in self.groups))
        j = assign_group(similarities, c.tau, c.g_max)
        if c.grouping == "random" and j < len(self.groups):
            j = int(self.draw.randint(len(self.groups)))  # not whether to join, but which
        if j == len(self.groups):
            self.groups.append(Group())
        self.join(self.groups[j], task, adapter, record["alpha"])
        sizes = [len(g.members) for g in self.groups]
        return record | {"group": j, "similarities": similarities, "group_sizes": sizes}

    def join(self, group, task, adapter, alpha):
        """(3), (4) Put task i into a group, in place; an empty one becomes α_i prune(ΔW_i)."""
        c, n = self.config, len(group.members)
        weights = shares(n, group.alpha, alpha, c.merge, c.gain or 1.0)
        for name, ba in adapter.items():
            new = prune_update(ba, c.rho, c.prune)
            old = [group.delta_w[name]] if n else []
            group.delta_w[name] = merge([new, *old], weights[: n + 1])
        group.members.append(task)
        group.alpha = 1.0  # the old α_G is in ΔW_G now (our choice)

    def kept(self):
        """The tensors that are stored for the next task and for inference."""
        updates = [update for group in self.groups for update in group.delta_w.values()]
        return [x for u in updates for x in (u if isinstance(u, tuple) else (u,))]

    def folded(self):
        """All groups in one module: W = W0 + Σ_j α_Gj ΔW_Gj. -> dict name: new (d, k)"""
        return {
            name: w + sum(g.alpha * dense(g.delta_w[name]) for g in self.groups)
            for name, w in self.w0.items()
        }


# -------------------------------------------------------------------------------------------- Head
# A class is a unit vector and a logit a cosine, whether the vector is trained or a class mean.

SCALE = 16.0  # of the cosines in the training loss (our choice)


def class_means(features, labels, classes):
    """Normalised mean of L2-normalised features. features (N, D), labels (N,) -> (C, D)"""
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[labels == c].mean(0) for c in classes]), dim=1)


def cosine_logits(features, rows):
    """features (N, D), rows (C, D) -> (N, C) in [-1, 1]"""
    return F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T


# -------------------------------------------------------------------------------------------- Data
# Images are decoded once, into one uint8 tensor; all else is batched, on the training device.


@dataclass
class Data:
    """Images of all classes. Classes are numbered by their place in the class order, 0..C-1."""

    pixels: torch.Tensor  # (N, 3, H, W) uint8, training and test images
    train: list  # per class: rows of pixels, (n,) long
    test: list
    names: list  # per class
    order: list  # per class: its number in the data set
    tasks: list  # per task: the range of its classes
    transform: dict  # what `prepare` has left to do

    def rows(self, part, classes):
        """Rows of the "train" or "test" images of some classes, and their classes. -> (n,), (n,)"""
        rows = [getattr(self, part)[c] for c in classes]
        labels = [torch.full_like(r, c) for r, c in zip(rows, classes)]
        return torch.cat(rows), torch.cat(labels)

    def batch(self, rows, device, flip=None):
        """rows (n,), flip (n,) bool -> (n, 3, size, size) float, what the model takes."""
        pixels = self.pixels.index_select(0, rows.to(self.pixels.device)).to(device)
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
    blocks = [block.split("\n") for block in Path(how).read_text("utf-8").strip().split("\n\n")]
    listed = [name for i in random.permutation(len(blocks)) for name in blocks[i]]
    if sorted(listed) != sorted(names):
        wrong = set(listed) ^ set(names) or {x for x in listed if listed.count(x) > 1}
        raise InputError(f"--class-order {how}: {n} classes, each once; see {sorted(wrong)}")
    return [names.index(name) for name in listed]


def split_tasks(n, tasks):
    """n classes -> ranges of consecutive ones; the first n % tasks of them hold one more."""
    if tasks > n:
        raise InputError(f"--tasks {tasks}: the data set has only {n} classes")
    return [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(n), tasks)]


def pick_rows(train_labels, test_labels, order, c):
    """Rows of every class's training and test images; the test images lie behind the others.

    --validate: the last 10 % (at least 3) of a class's training images are its test images.
    """
    train, test = [], []
    for label in order:
        learn = np.flatnonzero(train_labels == label)
        judge = len(train_labels) + np.flatnonzero(test_labels == label)
        if c.validate:
            learn, judge = np.split(learn, [-max(3, len(learn) // 10)])
        if not len(learn) or not len(judge):
            raise InputError(f"class {label}: {len(learn)} training and {len(judge)} test images")
        train.append(torch.from_numpy(learn[: c.images_per_class]))
        test.append(torch.from_numpy(judge[: c.test_images_per_class]))
    return train, test


def load_data(c):
    """Read, order, split and cap the data set of a resolved configuration. -> Data"""
    cfg = model_cfg(c.model)[1]
    read = demo.read if c.dataset == "demo" else datasets.read
    try:
        pixels, *labels, names = read(c, cfg)
    except OSError as error:
        raise InputError(f"--dataset {c.dataset}, --data-dir {c.data_dir}: {error}") from None
    order = class_order(names, c.class_order, c.seed)
    train, test = pick_rows(*map(np.asarray, labels), order, c)
    small = c.dataset in ("demo", "cifar100", "tiny_imagenet")  # others are cropped when decoded
    transform = {"size": c.img_size, "crop_pct": c.crop_pct if small else 1.0}
    transform |= {k: cfg[k] for k in ("interpolation", "mean", "std")}
    if c.norm == "unit":
        transform |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if "cuda" in c.device and pixels.nbytes < torch.cuda.mem_get_info(c.device)[0] / 2:
        pixels = pixels.to(c.device)
    names = [names[label] for label in order]
    return Data(pixels, train, test, names, order, split_tasks(len(names), c.tasks), transform)


# ---------------------------------------------------------------------------------------- Measures
# a[t][j]: accuracy (%) on the test images of task j after task t, over all classes seen so far.


def accuracy_so_far(row, sizes):
    """A_t = correct / all test images seen so far. row: a[t], sizes: test images of every task."""
    return sum(a * n for a, n in zip(row, sizes)) / sum(sizes[: len(row)])


def forgetting(matrix):
    """Mean over j < T of max_{t<T} a[t][j] - a[T][j]; 0 for T = 1. Label-space growth included."""
    last = len(matrix) - 1
    drops = [max(matrix[t][j] for t in range(j, last)) - matrix[last][j] for j in range(last)]
    return sum(drops) / last if last else 0.0


def backward_transfer(matrix):
    """Mean over j < T of a[T][j] - a[j][j]; 0 for T = 1."""
    last = len(matrix) - 1
    return sum(matrix[last][j] - matrix[j][j] for j in range(last)) / last if last else 0.0


def measures(matrix, sizes):
    """The summary of an accuracy matrix in results.json; per cent, unrounded."""
    so_far = [accuracy_so_far(row, sizes) for row in matrix]
    return {
        "final_accuracy": so_far[-1],
        "average_incremental_accuracy": sum(so_far) / len(so_far),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "learning_accuracy": sum(row[-1] for row in matrix) / len(matrix),
    }


# ------------------------------------------------------------------------------------------- Train


def train_task(vit, ham, data, task):
    """Train A_i, B_i, α_i, every α_G and the task's head rows; cross-entropy over its classes only.

    AdamW without weight decay, learning rates falling to 0 by a cosine; horizontal flips; head rows
    start as class means (all our choice). -> Trainable, log with one [loss, α_i] per step.
    """
    c, classes, p = ham.config, data.tasks[task], ham.start()
    rows, labels = data.rows("train", classes)
    labels = (labels - classes[0]).to(c.device)
    with torch.no_grad():
        features = extract(vit, p.weights(ham.w0), data, rows, c)
    # Means of the features as they are: rows of unit length would turn too far at this rate.
    means = [features[labels == k].mean(0) for k in range(len(classes))]
    p.head = torch.stack(means).clone().requires_grad_()
    optimiser = torch.optim.AdamW(p.parameters(c), weight_decay=0.0)
    steps = c.epochs * math.ceil(len(rows) / c.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    random, log = torch.Generator().manual_seed(1000 * c.seed + task), []
    with tqdm(total=steps, desc=f"task {task + 1}/{c.tasks}", leave=False, disable=None) as bar:
        for _ in range(c.epochs):
            for batch in torch.randperm(len(rows), generator=random).split(c.batch_size):
                flip = torch.rand(len(batch), generator=random) < 0.5
                x, y = data.batch(rows[batch], c.device, flip), labels[batch.to(c.device)]
                loss = train_step(vit, ham, p, x, y, optimiser)
                schedule.step()
                log.append(torch.stack([loss.detach(), p.alpha.detach()]))  # no synchronisation
                if not bar.disable and bar.n % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    return p, torch.stack(log).tolist()


def train_step(vit, ham, p, x, y, optimiser):
    """One step on x (n, 3, S, S), y (n,) in 0..classes of the task - 1. -> loss ()"""
    weights = p.weights(ham.w0)  # (1), fp32, one weight per layer and step
    with autocast(ham.config):
        features = functional_call(vit, weights, x)
    loss = F.cross_entropy(SCALE * cosine_logits(features.float(), p.head), y)
    optimiser.zero_grad()
    (loss + ham.penalty(p, loss)).backward()
    optimiser.step()
    return loss


# ---------------------------------------------------------------------------------------- Evaluate


@torch.inference_mode()
def extract(vit, weights, data, rows, c, batch_size=128):
    """Features of images under given weights. rows (n,) -> (n, D) fp32, on the device"""
    features = []
    for batch in rows.split(batch_size):
        with autocast(c):
            features.append(functional_call(vit, weights, data.batch(batch, c.device)).float())
    return torch.cat(features)


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


class Classifier(torch.nn.Module):
    """A finished run as a plain module: the ViT with all groups folded in, one row per class."""

    def __init__(self, vit, rows, names, transform):
        super().__init__()
        self.vit, self.names = vit, names
        self.register_buffer("rows", rows)  # (C, D)
        self.transform = timm.data.create_transform(**transform)

    def forward(self, x):
        """x (N, 3, S, S), normalised -> cosine logits (N, C)"""
        return cosine_logits(self.vit(x), self.rows)

    @torch.inference_mode()
    def predict(self, images):
        """List of PIL images -> list of class names."""
        x = torch.stack([self.transform(image.convert("RGB")) for image in images])
        return [self.names[i] for i in self(x.to(self.rows.device)).argmax(1)]


def load(folder):
    """A run's folder -> Classifier on the CPU, fp32, in eval mode."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{file} is not there: give the folder that a run names at its end")
    with safe_open(file, "pt") as stored:
        about = {key: json.loads(value) for key, value in stored.metadata().items()}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    rows = tensors.pop("rows")
    vit = create_vit(about["config"]["model"], about["config"]["img_size"])
    vit.load_state_dict(tensors, strict=True)
    return Classifier(vit, rows, about["names"], about["transform"]).eval()


# ---------------------------------------------------------------------------- Backbone and machine


def pick_device(device, precision):
    """Resolve auto: cuda where there is one; bf16 on it and on CPUs with bf16 instructions."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: auto, cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # mkldnn's counts emulation
    native = "cuda" in device or any(getattr(torch.cpu, check, bool)() for check in checks)
    return device, ("bf16" if native else "fp32") if precision == "auto" else precision


def model_cfg(name):
    """A model's full name with tag, and timm's configuration of its weights (mean, std, ...)."""
    if name == "demo_vit":
        return name, demo.CFG
    name = name or "vit_base_patch16_224.augreg_in21k"
    try:
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:
        raise InputError(f"--model {name}: {error}") from None
    if cfg is None:
        raise InputError(f"--model {name}: unknown to timm; timm.list_models('vit*') has the names")
    return f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture, cfg.to_dict()


def create_vit(model, img_size, **pretrained):
    """timm's ViT without a head: images -> features (N, D)."""
    if model == "demo_vit":
        return demo.create_vit()
    return timm.create_model(model, num_classes=0, img_size=img_size, **pretrained)


def build_vit(c):
    """The frozen backbone with its weights, in eval mode."""
    file = {"file": c.weights, "custom_load": False} if c.weights else {}
    try:
        vit = create_vit(c.model, c.img_size, pretrained=True, pretrained_cfg_overlay=file)
    except Exception as error:  # noqa: BLE001, each format has errors of its own
        cure = "is it this model's file?" if c.weights else "no network? give the file: --weights"
        reason = type(error).__name__ + ": " + str(error).strip().partition("\n")[0]
        raise InputError(f"weights {c.weights or ''} of {c.model}: {reason} ({cure})") from None
    patch = vit.patch_embed.patch_size[0] if hasattr(vit, "blocks") else math.inf
    if c.img_size % patch or (c.model == "demo_vit" and c.img_size != 32):
        raise InputError(
            f"--img-size {c.img_size}: {c.model} takes multiples of {patch}, the demo 32"
        )
    if c.model == "demo_vit":
        vit.load_state_dict(demo.pretrained(c.seed, c.device, c.precision))
    if "cpu" in c.device:  # there the fused kernel's backward takes half of a bf16 training step
        for block in vit.blocks:
            block.attn.fused_attn = False
    return vit.requires_grad_(False).eval().to(c.device)


def lora_layers(vit, layers):
    """The frozen weights that carry LoRA. layers: "qkv,proj" -> dict name: W0 (d, k)."""
    found = {
        f"{name}.weight": module.weight
        for name, module in vit.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in layers.split(",")
    }
    if not found:
        raise InputError(f"--layers {layers}: the model has no such linear layers")
    return found


def autocast(c):
    """bf16 inside the model; adapters, scalars, weights (1) and class means stay fp32."""
    kind = torch.device(c.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=c.precision == "bf16")


# --------------------------------------------------------------------------------------------- Run

RECORD = ("loss", "alpha", "alpha_groups", "group", "similarities", "group_sizes")
RECORD += ("images_per_second", "head_accuracy")  # null in a task's record where nothing is trained


class Learner:
    """The loop's state: what HAM carries, a row per class for each read-out, what was measured."""

    def __init__(self, vit, ham, data):
        self.vit, self.ham, self.data, self.c = vit, ham, data, ham.config
        self.train_sizes = [sum(len(data.train[k]) for k in task) for task in data.tasks]
        self.sizes = [sum(len(data.test[k]) for k in task) for task in data.tasks]
        self.seen = np.cumsum(self.sizes).tolist()  # test images after each task
        read_outs = ["class-mean", "head"] if ham.w0 else ["class-mean"]
        zeros = torch.zeros(len(data.names), vit.num_features, device=self.c.device)
        self.rows = {name: zeros.clone() for name in read_outs}
        self.matrix, self.known, self.records = {name: [] for name in read_outs}, {}, []
        self.seconds = {"train": 0.0, "merge": 0.0, "class_means": 0.0, "evaluate": 0.0}
        lora = sum(self.c.rank * sum(w.shape) for w in ham.w0.values())
        self.trained = lora + len(data.tasks[0]) * vit.num_features if ham.w0 else 0
        if not ham.w0:  # frozen features never change: extracted once
            self.features = functools.cache(self.features)

    def learn(self, task):
        """One task: train, group and merge, take class means, evaluate. Appends its record."""
        before, record = dict(self.seconds), dict.fromkeys(RECORD)
        if self.ham.w0:
            p, log = self.timed("train", self.train, task)
            losses = [loss for loss, _ in log[-(len(log) // self.c.epochs) :]]  # of the last epoch
            if not all(map(math.isfinite, losses)):
                raise InputError(f"task {task + 1}: the loss is not finite; lower --lr {self.c.lr}")
            self.rows["head"][list(self.data.tasks[task])] = p.head.detach()
            record["loss"] = sum(losses) / len(losses)
            record |= self.timed("merge", self.ham.finish, task, p)
            images = self.train_sizes[task] * self.c.epochs
            record["images_per_second"] = images / (self.seconds["train"] - before["train"])
        self.weights = self.ham.folded()
        self.timed("class_means", self.take_class_means, task)
        self.timed("evaluate", self.evaluate, task)
        record["seconds"] = {k: self.seconds[k] - before[k] for k in before}
        for name, matrix in self.matrix.items():
            record[f"{name.replace('-', '_')}_accuracy"] = accuracy_so_far(matrix[-1], self.sizes)
        record["accuracy"] = accuracy_so_far(self.matrix[self.c.read_out][-1], self.sizes)
        record["forgetting"] = forgetting(self.matrix[self.c.read_out])
        self.records.append(record)

    def train(self, task):
        return train_task(self.vit, self.ham, self.data, task)

    def timed(self, what, function, *args):
        """Call a function and add its seconds to those spent on `what`."""
        start, result = time.perf_counter(), function(*args)
        if "cuda" in self.c.device:
            torch.cuda.synchronize(self.c.device)
        self.seconds[what] += time.perf_counter() - start
        return result

    def features(self, part, task):
        """Features and labels of a task's images, with all groups folded into the weights."""
        rows, labels = self.data.rows(part, self.data.tasks[task])
        return extract(self.vit, self.weights, self.data, rows, self.c), labels.to(self.c.device)

    def take_class_means(self, task):
        """Class means of a task's training images, once, after its merge."""
        classes = self.data.tasks[task]
        self.rows["class-mean"][list(classes)] = class_means(*self.features("train", task), classes)

    def evaluate(self, task):
        """One pass over the test images of all classes seen: a row of each read-out's matrix."""
        seen = self.data.tasks[: task + 1]
        parts = [self.features("test", j) for j in range(task + 1)]
        self.tested = features, labels = [torch.cat(x) for x in zip(*parts)]
        for name, rows in self.rows.items():
            logits = cosine_logits(features, rows[: seen[-1][-1] + 1])
            per_task, self.known[name] = accuracies(logits, labels, seen)
            self.matrix[name].append(per_task)

    def oracle(self):
        """Accuracy of class means of all training images under the final model: never a result."""
        parts = [self.features("train", task) for task in range(self.c.tasks)]
        features, labels = (torch.cat(x) for x in zip(*parts))
        rows = class_means(features, labels, range(len(self.data.names)))
        features, labels = self.tested
        return accuracies(cosine_logits(features, rows), labels, [range(len(rows))])[1]  # one task

    def results(self):
        """What results.json holds of the measurements; per cent, unrounded."""
        c, last, second = self.c, self.records[-1], {"training": None, "inference": None}
        if self.ham.w0:
            second["training"] = sum(self.train_sizes) * c.epochs / self.seconds["train"]
            second["inference"] = sum(self.seen) / self.seconds["evaluate"]
        return {
            **measures(self.matrix[c.read_out], self.sizes),
            "task_known_accuracy": self.known[c.read_out],
            "head_accuracy": last["head_accuracy"],
            "class_mean_accuracy": last["class_mean_accuracy"],
            "class_mean_oracle": self.oracle(),
            "accuracy_matrix": self.matrix[c.read_out],
            "tasks": self.records,
            "test_images_per_task": self.sizes,
            "classes": self.data.names,
            "class_order": self.data.order,
            "parameters_trained": self.trained,  # per task, LoRA and head
            "parameters_stored": sum(x.numel() for x in [*self.ham.kept(), self.rows[c.read_out]]),
            "seconds": self.seconds,
            "images_per_second": second,
        }


def result_folder(c):
    """The run's folder; refuses one that holds another configuration."""
    parts = [Path(c.dataset).name, f"T{c.tasks}", c.method, c.name, f"s{c.seed}"]
    folder = Path(c.out) / "-".join(filter(None, parts))
    if (folder / "results.json").is_file():
        old = json.loads((folder / "results.json").read_text())
        files = {"weights": c.weights, "split": datasets.split_file(c)}  # compared by content
        paths = ("out", "data_dir", "weights", "split_file")
        new = {k: v for k, v in dataclasses.asdict(c).items() if k not in paths}
        other = [k for k in new if old["config"].get(k) != new[k]]
        other += [k for k in files if old.get(f"{k}_sha256") != provenance.sha256(files[k])]
        if other:
            cure = "give this one a --name or another --out"
            raise InputError(f"{folder} holds a run with other {', '.join(other)}: {cure}")
    return folder


def run(config, method=HAM, loop=Learner):
    """One method over the sequence of tasks; writes results.json and model.safetensors.

    -> dict, what results.json holds. Raises InputError for a setting or file the user can mend.
    method, loop: subclasses of HAM and Learner for methods that are not here (extras/baselines.py).
    """
    c = resolve(config)
    folder, vit, data = result_folder(c), build_vit(c), load_data(c)
    ham = method({} if c.method == "frozen" else lora_layers(vit, c.layers), c)
    learner = loop(vit, ham, data)
    report.start(learner)
    for task in range(c.tasks):
        learner.learn(task)
        report.task(learner)
    results = {"config": dataclasses.asdict(c)} | learner.results() | provenance.environment(c)
    save(folder, results, learner)
    report.end(results, folder)
    return results


def save(folder, results, learner):
    """results.json, and the folded model with what `load` needs; each appears whole or not."""
    c, transform = learner.c, dict(learner.data.transform)
    transform |= {"input_size": (3, transform.pop("size"), c.img_size), "crop_pct": c.crop_pct}
    about = {"config": results["config"], "names": learner.data.names, "transform": transform}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "part"
    if learner.weights is not None:  # None: no single set of weights is the model (extras)
        tensors = learner.vit.state_dict() | learner.weights | {"rows": learner.rows[c.read_out]}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, part, {key: json.dumps(value) for key, value in about.items()})
        part.replace(folder / "model.safetensors")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    part.replace(folder / "results.json")


# ------------------------------------------------------------------------------------ Command line


def fail(message):
    """A mistake the user can mend: one line, exit status 2."""
    print(f"ham.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse(argv=None, kind=Config, manual=__doc__):
    """Command line -> Config: one flag per field, the manual made of the fields' own texts."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=manual, formatter_class=raw, allow_abbrev=False)
    parser.error = fail  # argparse's own would print the whole usage first
    for f in dataclasses.fields(kind):
        notes = [f"default {f.default}"] if f.default is not None else []
        notes += [f.metadata["limits"]] if f.metadata["limits"] else []
        typed = {"type": {"int": int, "float": float}.get(f.type, str), "metavar": f.type.upper()}
        how = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else typed
        text = f"{f.metadata['text']} [{'; '.join(notes)}]".removesuffix(" []")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **how)
    return kind(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line."""
    config = parse(argv)
    try:
        if config.dataset == "demo" and not config.method:
            demo.compare(run, config)
        else:
            run(config)
    except InputError as error:
        fail(error)


if __name__ == "__main__":
    main()
