"""Other methods on ham.py's data, backbone, training, read-out and measures.

    python -m extras.baselines --method treelora --dataset cifar100 --tasks 20

ham       experiments on it: --grouping random, --gain, --share, --superclasses
onward    HAM, but a group is one adapter of fixed rank, from which its next task starts (ours)
sd_lora   after SD-LoRA (ICLR 2025): one fixed direction per task, all magnitudes learnt
o_lora    after O-LoRA (EMNLP 2023): a new subspace per task, orthogonal to the earlier ones
ewc       elastic weight consolidation (PNAS 2017, one penalty for all tasks) on one LoRA's factors
ewc_lora  after EWC-LoRA (ICLR 2026): the same on the product ΔW of a new adapter for each task
first     first-session adaptation: an adapter for task 1, then only class means (APER, RanPAC)
treelora  TreeLoRA (arXiv 2506.10355): one LoRA, drawn to what it was after a similar earlier task
safm      Sparse Adapter Fusion (arXiv 2602.02502): each block reuses, adds or leaves out an adapter

What differs from ham.HAM is here: what is trained (`start`), added to the loss (`penalty`), kept
(`finish`); safm has a loop and a read-out of its own. treelora and safm were written from their
papers' text, point by point at each, with what their public code does otherwise; of the others
values are as public summaries give them. What is our choice is marked.
"""

import dataclasses
import functools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import ham

# ----------------------------------------------------------------------------------- The short ones


def factors(adapter):
    """B and A of all layers. dict layer: (b, a) -> list of tensors"""
    return [x for ba in adapter.values() for x in ba]


def vector(tensors):
    """Tensors of P elements in all -> (P,), new"""
    return torch.cat([x.flatten() for x in tensors])


GROUPINGS = ("cosine", "random", "least", "features")


def drawn(seed, task, n):
    """One of n groups, another for each seed and task."""
    return int(np.random.RandomState((seed, task)).randint(n))


def by_features(features, task, groups):
    """Cosines of a task's mean features with its groups' tasks'. features (T, D) -> M floats"""
    return ham.cosine_similarity(features[task], [features[g.members].mean(0) for g in groups])


class Variant(ham.HAM):
    """HAM with another group, or with larger shares for the newcomer.

    grouping: whether to join is decided as in HAM, which group is drawn (random), is the one least
    similar (least) or most similar by its tasks' mean frozen features (features).
    gain: a new member's share 1 / (n + 1) becomes min(n + 1, gain) / (n + 1); --merge solution.
    share: it becomes this, a constant; with --g-max 1 --no-train-alpha there is no grouping left.
    """

    features = None  # (T, D), set by `prepare`; a task looks at its own and at earlier ones

    def choose(self, task, similarities):
        j, how = super().choose(task, similarities), self.config.grouping
        if j == len(self.groups) or how == "cosine":
            return j
        if how == "random":
            return drawn(self.config.seed, task, len(self.groups))
        if how == "least":
            return int(np.argmin(similarities))
        return int(np.argmax(by_features(self.features, task, self.groups)))

    def join(self, group, task, adapter, alpha):
        n, c = len(group.members), self.config
        step = c.share * (n + 1) if c.share else min(n + 1, c.gain or 1)
        super().join(group, task, adapter, alpha * step)


class Onward(ham.HAM):
    """A group is one adapter that goes on: a task starts from that of its group. Ours, no source.

    Chosen before training: while there is room a new group, then the one to whose tasks' mean frozen
    features the task's is most similar, or one drawn. Only the others are frozen, their α_G trained.
    ΔW_G <- (n α_G ΔW_G + α_i B_i A_i) / (n + 1), what its tasks ended with, cut back to rank r.
    """

    features = None  # (T, D), set by `prepare`; a task looks at its own and at earlier ones

    def start(self):
        task, c = sum(len(group.members) for group in self.groups), self.config
        self.similarities = by_features(self.features, task, self.groups)
        self.j = ham.assign_group(self.similarities, 1.0, c.g_max)
        if c.grouping == "random" and self.j < len(self.groups):
            self.j = drawn(c.seed, task, len(self.groups))
        self.others = self.groups[: self.j] + self.groups[self.j + 1 :]
        adapter = None  # a new one
        if self.j < len(self.groups):
            group = self.groups[self.j]
            adapter = {name: (group.alpha * b, a) for name, (b, a) in group.delta_w.items()}
        return ham.Trainable(self.w0, self.others, c, adapter)

    def finish(self, task, trained):
        alpha, alphas = trained.alpha.item(), trained.alpha_groups.tolist()
        for group, value in zip(self.others, alphas, strict=True):
            group.alpha = value
        if self.j == len(self.groups):
            self.groups.append(ham.Group({}))
        same = {"rho": 1.0, "merge": "mean", "group_rank": self.config.rank}
        mean = ham.HAM({}, dataclasses.replace(self.config, **same))
        mean.join(self.groups[self.j], task, trained.detached(), alpha)
        sizes = [len(group.members) for group in self.groups]
        scalars = {"alpha": alpha, "alpha_groups": alphas, "group": self.j, "group_sizes": sizes}
        return scalars | {"similarities": self.similarities}

    def state(self):
        """With the features of the tasks so far, to be counted; `prepare` makes them anew."""
        seen = sum(len(group.members) for group in self.groups)
        return super().state() | {"features": self.features[:seen].clone()}


class First(ham.Sequential):
    """The first task's adapter, then nothing moves: class means under those weights.

    First-session adaptation, what APER and RanPAC build on. (APER puts the frozen features beside
    these, RanPAC a random projection behind them: left out. SimpleCIL is ham.py's `frozen`.)
    Head rows of later tasks stay 0.
    """

    fixed = None  # before the first task

    def finish(self, task, trained):
        record = super().finish(task, trained)
        self.freeze()
        return record

    def freeze(self):
        """What has no layers is not trained: ham.learn goes by `w0`. May be called twice."""
        self.fixed, self.w0 = self.folded(), {}

    def folded(self):
        return self.fixed or super().folded()

    def restore(self, state):
        super().restore(state)
        if self.groups:
            self.freeze()


class SDLoRA(ham.HAM):
    """ΔW = Σ_k α_k ΔW_k: every task adds a direction, which stays; all α_k are learnt on.

    One α per task and none per layer, directions not normalised (HAM's parametrisation): ours.
    """

    def finish(self, task, trained):
        record = {"alpha": trained.alpha.item(), "alpha_groups": trained.alpha_groups.tolist()}
        for group, value in zip(self.groups, record["alpha_groups"]):
            group.alpha = value
        self.groups.append(ham.Group(trained.detached(), record["alpha"], [task]))
        return record


class OLoRA(SDLoRA):
    """loss + λ Σ_k |A_k A_iᵀ|²; ΔW = Σ_k ΔW_k, every α_k = 1.

    The public code adds |entries|, scales ΔW by lora_alpha / r and drops out its input; none here.
    """

    def start(self):
        """HAM starts every task from the same A, this one each in a place of its own."""
        seed = 1000 * self.config.seed + len(self.groups)
        adapter = ham.new_adapter(self.w0, self.config.rank, seed)
        return ham.Trainable(self.w0, self.groups, self.config, adapter)

    def penalty(self, trained, loss):
        if not self.groups:
            return torch.zeros_like(loss)
        overlap = 0.0
        for name, (_, a) in trained.adapter.items():
            taken = torch.cat([group.delta_w[name][1] for group in self.groups])  # all A_k
            overlap = overlap + (taken @ a.T).square().sum()
        return self.config.penalty * overlap


class EWC(ham.Sequential):
    """loss + λ/2 Σ F (θ - θ*)²; θ* the factors after the last task, F summed over all earlier ones.

    F: mean squared gradient of the batches' mean losses while a task was trained (our choice). Of A
    and B, entry by entry.
    """

    fisher = 0.0  # before the first task

    def start(self):
        trained = super().start()
        self.before = vector(factors(trained.detached()))  # θ*
        self.squares, self.steps = 0.0, 0
        return trained

    def penalty(self, trained, loss):
        theta = factors(trained.adapter)
        gradient = vector(torch.autograd.grad(loss, theta, retain_graph=True))
        self.squares, self.steps = self.squares + gradient**2, self.steps + 1
        moved = vector(theta) - self.before
        return self.config.penalty / 2 * (self.fisher * moved**2).sum()

    def finish(self, task, trained):
        self.fisher = self.fisher + self.squares / self.steps
        return super().finish(task, trained)

    def state(self):
        return super().state() | {"fisher": self.fisher}

    def restore(self, state):
        super().restore(state)
        self.fisher = state["fisher"]


class Watched(ham.Trainable):
    """Adds up the squared gradients of the loss by W, of every backward pass."""

    def weights(self, w0):
        weights, self.squares = super().weights(w0), getattr(self, "squares", {})

        def add(name, gradient):
            self.squares[name] = self.squares.get(name, 0.0) + gradient**2

        for name, w in weights.items():
            w.register_hook(functools.partial(add, name))
        return weights


class EWCLoRA(EWC):
    """loss + λ/2 Σ F ΔW_i²; a new adapter for each task, then added to W0; F of W, not of A and B.

    EWC-LoRA (arXiv 2602.17559), by its abstract and public code. There F is from one more pass over
    a learnt task's images; λ is 1e7, here searched; A's and B's are added up apart, which is another
    matrix than the one learnt; LoRA on k and v, r = 10; 20 epochs, batch 128, linear heads.
    """

    def start(self):
        self.steps = 0
        return Watched(self.w0, self.groups, self.config)

    def penalty(self, trained, loss):
        """Of the factors, past W: W's gradient is the loss's alone."""
        self.steps += 1
        if not self.groups:
            return torch.zeros_like(loss)
        moved = {name: ham.dense(x) ** 2 for name, x in trained.adapter.items()}
        return self.config.penalty / 2 * sum((self.fisher[x] * moved[x]).sum() for x in moved)

    def finish(self, task, trained):
        before = self.fisher or dict.fromkeys(self.w0, 0.0)
        self.fisher = {x: before[x] + trained.squares[x] / self.steps for x in before}
        groups = [ham.Group(trained.detached()), *self.groups]  # the task's, and what was added
        for x in self.w0:
            updates = [group.delta_w[x] for group in groups]
            groups[0].delta_w[x] = ham.merge(updates, [1.0] * len(updates))
        self.groups = groups[:1]
        return {}


# ----------------------------------------------------------------------------------------- TreeLoRA
# loss + λ/L Σ_l |θ_l - θ_kl|₁: in each layer l of L, θ_l, the factors A and B, is drawn to θ_kl, what
# it was after an earlier task; which task (k), a bandit finds out on a tree of the tasks.
#
# Paper (arXiv 2506.10355; public code)           here
# g, ĝ_k: gradients (3.1, 3.2); in practice the   the adapters, A and B (the gradient form, with two
#   LoRA adapters themselves (3.3; public: A)       backward passes a step, was here up to 11e2c84)
# λ 0.1 to 1 times the sum over layers (public:   λ times the mean over layers of L1 distances, which
#   an inner product, scaled to the loss; grows     have a unit: λ searched over decades, constant
#   within each epoch from 0)
# tree: halves at the median L1 distance from     the same, made anew after each task; paper: a task
#   the node's mean; δ: that median (public:        is put into the nearest leaf (public: anew)
#   inner products of differences to the task
#   before)
# depth 5 (public: level d splits by layer d)     depth 5, by layers 0, L / 5, ... 4 L / 5 of L
# a node can hold several tasks                   a leaf does beyond 32: their mean
# merging leaves when storage runs out            left out
# Eq. 2, per layer; leaf: μ̂ - 2 sqrt(log t / n)   the same, times σ, the spread of a leaf's distances
#   inner: one term in print, least of children's   max(least child's, its own - δ), as in Coquelin
#   less δ (public: leaves only, tasks drawn by     and Munos, whom it cites
#   softmax)
# μ̂: mean of |g - ĝ_k|₁ where k was taken         of |θ - θ_k|₁ - |θ - θ_root|₁: else when it was
#   (public: g is a running sum); begun once        matters more than which, as θ moves on; begun
#   (Algorithm 1; public: each epoch)               for each task, whose arms are others
# sparse updates: LoRA's factors                  the same
# LoRA depth (its Table 4): some of the layers    all --layers
# use: the last adapter; Fig. 2 (b) puts those    the last adapter
#   of the similar group together
# rate 0.005, constant; batch 192, 20 or 50       rate searched, cosine; batch and epochs as of
#   epochs; λ outside the rate in Eq. 3             others; λ inside Adam's step
# ViTs: on HiDe's task decomposition (the task    one LoRA trained on, class means: left out
#   is inferred, then predicted within)
# Table 5: a random leaf instead of the bandit's  --grouping random

DEEPEST = 5


@dataclass(eq=False)
class Node:
    """Earlier tasks in one branch of the tree; a leaf where it has no children."""

    tasks: list
    theta: list  # per layer (P,), the mean of what its tasks ended with
    delta: list  # per layer δ, the median L1 distance of its tasks from it
    children: list

    def leaves(self):
        return [leaf for x in self.children for leaf in x.leaves()] if self.children else [self]


def grow(tasks, thetas, level=0):
    """K-D tree: a level halves the tasks at the median L1 distance from their mean in one layer.

    tasks: list of ints; thetas: per task, per adapted layer (P,) -> Node
    """
    layers = range(len(thetas[0]))
    mean = [torch.stack([thetas[k][l] for k in tasks]).mean(0) for l in layers]
    far = [torch.stack([(thetas[k][l] - mean[l]).abs().sum() for k in tasks]) for l in layers]
    node, levels = Node(tasks, mean, [x.median().item() for x in far], []), min(DEEPEST, len(far))
    if len(tasks) > 1 and level < levels:
        order = far[level * len(far) // levels].argsort(stable=True).tolist()
        half = (len(tasks) + 1) // 2
        parts = [sorted(tasks[i] for i in part) for part in (order[:half], order[half:])]
        node.children = [grow(part, thetas, level + 1) for part in parts]
    return node


class Bandit:
    """Which leaf next, in one layer: down from the root, each time to the smallest bound (Eq. 2,
    as read above), or, with draw, a RandomState, to a child at random.

    The bound is meant for distances with a spread of about 1, so its width takes their own unit,
    σ: of a leaf's distances around their mean, over all leaves (ours).
    """

    def __init__(self, root, layer, draw=None):
        self.root, self.layer, self.draw = root, layer, draw
        self.n, self.mean, self.squares = Counter(), Counter(), Counter()  # per node

    def sigma(self):
        """Pooled over leaves; while none was taken twice, of all distances."""
        own = [node for node in self.n if not node.children]
        if len(own) == self.n[self.root]:
            own = [self.root]
        free = self.n[self.root] - len(own)
        return math.sqrt(sum(self.squares[node] for node in own) / max(1, free))

    def bound(self, node, sigma):
        """(2) of the paper; -inf where nothing is known. -> float"""
        if not self.n[node]:
            return -math.inf
        width = 2 * sigma * math.sqrt(math.log(self.n[self.root]) / self.n[node])
        own = self.mean[node] - width
        if not node.children:
            return own
        return max(min(self.bound(x, sigma) for x in node.children), own - node.delta[self.layer])

    def choose(self):
        """-> nodes from the root to a leaf"""
        path, sigma = [self.root], None if self.draw else self.sigma()
        while children := path[-1].children:
            if self.draw:
                path.append(children[self.draw.randint(len(children))])
            else:
                path.append(min(children, key=lambda node: self.bound(node, sigma)))
        return path

    def saw(self, path, distance):
        """What is seen at a leaf counts for all that it belongs to."""
        for node in path:
            self.n[node] += 1
            off = distance - self.mean[node]
            self.mean[node] += off / self.n[node]
            self.squares[node] += off * (distance - self.mean[node])


class TreeLoRA(ham.Sequential):
    """One LoRA trained task after task, and what it was after each of them."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.thetas = []  # per task, per layer (P,)

    def start(self):
        self.bandits, draw = [], None
        if self.config.grouping == "random":
            draw = np.random.RandomState((self.config.seed, len(self.thetas)))
        if self.thetas:
            root = grow(list(range(len(self.thetas))), self.thetas)
            self.bandits = [Bandit(root, layer, draw) for layer in range(len(root.theta))]
        return super().start()

    def penalty(self, trained, loss):
        """λ/L Σ_l |θ_l - θ_kl|₁, of the leaf that each layer chooses; it sees how far it is."""
        if not self.bandits:
            return torch.zeros_like(loss)
        theta = [vector(ba) for ba in trained.adapter.values()]
        paths = [bandit.choose() for bandit in self.bandits]

        def far(at):  # (L,), from the first or the last node of each path
            near = [path[at].theta[layer] for layer, path in enumerate(paths)]
            return torch.stack([(x - y).abs().sum() for x, y in zip(theta, near)])

        distances = far(-1)
        for bandit, path, seen in zip(self.bandits, paths, (distances - far(0)).tolist()):
            bandit.saw(path, seen)
        return self.config.penalty * distances.mean()

    def finish(self, task, trained):
        self.thetas.append([vector(ba) for ba in trained.detached().values()])
        leaves = self.bandits[0].root.leaves() if self.bandits else []
        record = {"leaves": [leaf.tasks for leaf in leaves]}  # earlier tasks
        record["taken"] = [[bandit.n[leaf] for leaf in leaves] for bandit in self.bandits]
        return super().finish(task, trained) | record

    def state(self):
        return super().state() | {"thetas": self.thetas[:-1]}  # the last is the group

    def restore(self, state):
        super().restore(state)
        last = [[vector(ba) for ba in group.delta_w.values()] for group in self.groups]
        self.thetas = state["thetas"] + last


# --------------------------------------------------------------------------------------------- SAFM
# Paper (arXiv 2602.02502, for GPT-2; public code)  here
# search: warm-up of new adapters, 3 epochs         1 epoch
#   then 3 epochs of weights over {empty, all       1 epoch, new adapters trained on; all layers at
#   earlier ones of the layer, new}, layer by         once
#   layer; w starts at α = 0.11, β = 0.08, -β;      the same values
#   softmax; arg max                                the same
#   no search in one layer (5 or 6 of 12): new      the same, block depth / 2
# tuning: 12 epochs                                 the rest, 3 of 5: as many steps as others take
#   loss + λ Σ_l cos(h_l, h_l-1), h what leaves     the same; λ searched
#   block l; 0 where l is empty; λ 0.1 or 0.4
#   reused adapters too, with pseudo-replay         not these: replay needs a generator
# adapter: bottleneck behind each block             LoRA on --layers
# use: a task's own adapters; how the task is       no task: class by class under its task's
#   known is not said (public: it is given)           weights, all cosines compared; T passes
# rate 1.75e-4 of all, w too; batch 8               rate searched, of w 0.1; batch as of others
# optimiser, schedule: not said to start anew       anew in each stage, the head, too

FIRST = {"empty": 0.11, "old": 0.08, "new": -0.08}  # the weights w that a search starts from
SEARCH = 0.1  # their learning rate (ours): there are 8 steps, not thousands, to turn their order


def block_of(name):
    return ".".join(name.split(".")[:2])  # blocks.3.attn.qkv.weight -> blocks.3


def middle(blocks):
    """The block that always gets a new adapter, lest a task should end with none: 6 of 12."""
    return list(blocks)[(len(blocks) - 1) // 2]


class Search(ham.Trainable):
    """The decision stage: the new adapters and the weights of all candidates are trained."""

    def __init__(self, w0, config, adapter, pool):
        super().__init__(w0, [], config, adapter)
        self.pool = pool  # block: earlier adapters, dict layer: (b, a)
        self.w = {}  # block: (earlier + 2,), but for the middle one, which is not searched
        for block, old in pool.items():
            first = [FIRST["empty"], *[FIRST["old"]] * len(old), FIRST["new"]]
            self.w[block] = torch.tensor(first, device=self.alpha.device, requires_grad=True)
        del self.w[middle(pool)]

    def weights(self, w0):
        weights = {}
        for name, w in w0.items():
            block, new = block_of(name), ham.dense(self.adapter[name])
            if block in self.w:
                updates = [ham.dense(x[name]) for x in self.pool[block]] + [new]
                new = sum(s * x for s, x in zip(self.w[block].softmax(0)[1:], updates))
            weights[name] = w + new
        return weights

    def begin(self, features, labels, classes, config, steps):
        optimiser, _ = super().begin(features, labels, classes, config, steps)
        optimiser.add_param_group({"params": list(self.w.values()), "lr": SEARCH})
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def decided(self):
        """Each block's candidate of greatest weight: "empty", its number in the pool, or "new"."""
        decided = dict.fromkeys(self.pool, "new")
        for block, w in self.w.items():
            decided[block] = ["empty", *range(len(self.pool[block])), "new"][int(w.argmax())]
        return decided


class Tuned(ham.Trainable):
    """The tuning stage: chosen new adapters are trained, reused ones are not."""

    def __init__(self, w0, config, adapter, reused):
        super().__init__(w0, [], config, adapter)
        self.reused = reused  # layer: (b, a)

    def weights(self, w0):
        updates = self.reused | self.adapter
        return {n: w + ham.dense(updates[n]) if n in updates else w for n, w in w0.items()}


class SAFM(ham.HAM):
    """Adapters of every block, and which of them each task uses."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.pool = {block_of(name): [] for name in w0}  # per block: adapters, layer: (b, a)
        self.choices = []  # per task: block: number in the pool, or "empty"
        self.passed = {}  # block: what entered and what left it, (n, tokens, D), in the last pass
        self.stage = None  # what is trained now

    def watch(self, vit):
        """Let each block leave what passes in `passed`."""
        for block in self.pool:

            def save(_, x, out, block=block):
                self.passed[block] = x[0].float(), out.float()

            vit.get_submodule(block).register_forward_hook(save)

    def start(self):
        return self.stage

    def search(self, adapter):
        return Search(self.w0, self.config, adapter, self.pool)

    def tuned(self, adapter, decided):
        chosen = {n: decided[block_of(n)] for n in self.w0}
        new = {n: ba for n, ba in adapter.items() if chosen[n] == "new"}
        old = {n: self.pool[block_of(n)][k][n] for n, k in chosen.items() if isinstance(k, int)}
        return Tuned(self.w0, self.config, new, old)

    def penalty(self, trained, loss):
        """λ Σ_l cos(h_l, h_l-1), mean over images and tokens; 0 where block l has no adapter."""
        blocks = {block_of(name) for name in trained.reused | trained.adapter}
        cosines = [F.cosine_similarity(*self.passed[x], dim=-1).mean() for x in sorted(blocks)]
        return self.config.penalty * sum(cosines)

    def keep(self, trained, decided):
        """After a task: its new adapters join the pool."""
        self.choices.append(dict(decided))
        for block in (block for block, k in decided.items() if k == "new"):
            self.choices[-1][block] = len(self.pool[block])
            new = {n: ba for n, ba in trained.detached().items() if block_of(n) == block}
            self.pool[block].append(new)

    def weights_of(self, task):
        """W0 + ΔW of a task's adapters. -> dict layer: (d, k)"""
        weights = dict(self.w0)
        for name, w in self.w0.items():
            k = self.choices[task][block_of(name)]
            if k != "empty":
                weights[name] = w + ham.dense(self.pool[block_of(name)][k][name])
        return weights

    def state(self):
        return {"pool": self.pool, "choices": self.choices}

    def restore(self, state):
        self.pool, self.choices = state["pool"], state["choices"]


def train_safm(vit, method, data, task):
    """Warm-up, search, tuning: together as many epochs as others take, at least 3. -> Tuned, record

    Each stage starts optimiser, schedule and head anew.
    """
    config, tuning = method.config, max(1, method.config.epochs - 2)

    def train(stage, epochs, *loss):
        method.stage, method.config = stage, dataclasses.replace(config, epochs=epochs)
        return ham.train_task(vit, method, data, task, *loss)

    warm, _ = train(ham.Trainable(method.w0, [], config), 1)
    search, _ = train(method.search(warm.detached()), 1)
    decided = search.decided()
    tuned, loss = train(method.tuned(search.detached(), decided), tuning, loss_of(method))
    method.config = config
    method.keep(tuned, decided)
    weights = {block: w.softmax(0).tolist() for block, w in search.w.items()}
    return tuned, {"loss": loss, "adapters": decided, "search": weights}


def learn_safm(vit, method, data):
    """ham.learn's loop, with three stages per task and weights per task; no model is saved."""
    config, (folder, state), tested = method.config, ham.open_run(vit, method, data), {}
    results, class_rows = state["results"], state["class_rows"]
    method.watch(vit)
    for task in range(len(results["tasks"]), config.tasks):
        start, classes = time.perf_counter(), data.tasks[task]
        tuned, record = train_safm(vit, method, data, task)
        middle, weights = time.perf_counter(), method.weights_of(task)
        means = ham.class_means(*ham.extract(vit, weights, data, "train", classes, config), classes)
        class_rows["class-mean"][list(classes)] = means
        class_rows["head"][list(classes)] = tuned.head.detach()
        under, seen = features_safm(vit, method, data, tested), data.tasks[: task + 1]
        labels, logits = torch.cat([y for _, y in under[0]]), {}
        for name, rows in class_rows.items():
            logits[name] = logits_safm(under, rows, seen)
        row = ham.accuracies(logits[config.read_out], labels, seen)
        results["accuracy_matrix"].append(row)
        results |= ham.measures(results["accuracy_matrix"], data.sizes("test"))
        results |= by_head_and_task(logits, labels, seen, config.read_out)
        record |= {"accuracy": results["final_accuracy"], "forgetting": results["forgetting"]}
        record["seconds"] = {"train": middle - start, "evaluate": time.perf_counter() - middle}
        results["tasks"].append(record)
        kept = state | {"method": method.state()}
        ham.write(folder / "state.pt", functools.partial(torch.save, kept))
        line = "task {:2}/{}  accuracy {accuracy:4.1f}  forgetting {forgetting:4.1f}"
        print(line.format(task + 1, config.tasks, **record), flush=True)
    if not (folder / "results.json").is_file():
        adapters = [one for every in method.pool.values() for one in every]
        kept = [x for one in adapters for x in factors(one)] + [class_rows["head"]]
        results["parameters_stored"] = sum(x.numel() for x in kept)
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        ham.write(folder / "results.json", lambda f: f.write(text.encode()))
    told = f"final accuracy {results['final_accuracy']:.1f} %, written: {folder}"
    print(f"{told}, without a model: there is no single set of weights")
    return results


def task_known(logits, labels, tasks):
    """Per cent right where the task is known. logits (N, C), labels (N,), tasks: ranges"""
    right = 0
    for t in tasks:
        own = (labels >= t[0]) & (labels <= t[-1])
        right += (logits[own, t[0] : t[-1] + 1].argmax(1) + t[0] == labels[own]).sum().item()
    return 100 * right / len(labels)


def by_head_and_task(logits, labels, tasks, read_out):
    """logits: dict read-out: (N, C), of all classes so far. -> two entries of results.json"""
    by_head = 100 * (logits["head"].argmax(1) == labels).cpu().double().mean().item()
    known = task_known(logits[read_out], labels, tasks)
    return {"head_accuracy": by_head, "task_known_accuracy": known}


def features_safm(vit, method, data, tested):
    """All test images so far under every task's weights: an image costs T passes.

    tested: (task, j) -> features, labels of task j's images under a task's weights; what lacks is
    added. No two tasks choose alike, as one block is always new. -> per task a list of (n, D), (n,)
    """
    seen = range(len(method.choices))
    for task in seen:
        weights = method.weights_of(task)
        for j in (j for j in seen if (task, j) not in tested):
            given = weights, data, "test", data.tasks[j], method.config
            tested[task, j] = ham.extract(vit, *given)
    return [[tested[task, j] for j in seen] for task in seen]


def logits_safm(under, rows, tasks):
    """The logit of a class is its cosine under the weights of the task that taught it.

    under: as of `features_safm`; rows (C, D); tasks: ranges of classes -> (N, C). No task is
    guessed: cosines of all tasks are compared (ours: the paper does not say how it knows the task).
    """
    features = (torch.cat([x for x, _ in tested]) for tested in under)
    own = (rows[t[0] : t[-1] + 1] for t in tasks)
    return torch.cat([ham.cosine_logits(*pair) for pair in zip(features, own)], dim=1)


# --------------------------------------------------------------------------- Settings, command line

METHODS = {"treelora": TreeLoRA, "safm": SAFM, "sd_lora": SDLoRA, "o_lora": OLoRA, "ewc": EWC}
METHODS |= {"ewc_lora": EWCLoRA, "first": First, "onward": Onward}
# λ, the best of those tried on held-out images; safm's from its paper's range.
PENALTY = {"treelora": 0.003, "safm": 0.1, "o_lora": 0.5, "ewc": 1e4, "ewc_lora": 1e3}
# From what was tried on held-out images (results/all.md), too.
ham.LEARNING_RATE |= dict.fromkeys(METHODS, 1e-3) | {"ewc": 3e-3}


@dataclass(frozen=True)
class Config(ham.Config):
    """ham.py's settings, other methods, and what only experiments need."""

    method: Literal[(*METHODS, *ham.METHODS)] = "ham"  # a method of this file or of ham.py
    penalty: float = None  # weight of the method's penalty, where it has one; default: chosen
    grouping: Literal[GROUPINGS] = "cosine"  # ham: the group to join; random also onward, treelora
    gain: float = None  # ham: a newcomer's 1 / (n + 1) becomes min(n + 1, gain) / (n + 1)
    share: float = None  # ham: a newcomer's 1 / (n + 1) becomes this
    superclasses: bool = False  # cifar100, 20 tasks: its superclasses, in an order by seed


# Which methods have a setting that not all have; any other one is refused it.
HAVE = {k: {"ham"} for k in ("tau", "rho", "group_rank", "merge", "gain", "share")}
HAVE |= {"g_max": {"ham", "onward"}, "grouping": {"ham", "onward", "treelora"}}
# (`frozen` has no scalar either: it is resolved as ham.py resolves it.)
HAVE |= {k: {"ham", "sd_lora", "onward", "frozen"} for k in ("train_alpha", "lr_alpha")}
HAVE |= {"penalty": set(PENALTY), "read_out": {*METHODS, *ham.METHODS} - {"first", "frozen"}}


def resolve(config):
    """As ham.resolve; refuses what does not go together."""
    method, default = config.method, Config()
    fixed = {"penalty": PENALTY.get(method)}
    if method == "first":
        fixed["read_out"] = "class-mean"  # only task 1 has a head
    if method not in HAVE["train_alpha"]:
        fixed["train_alpha"] = False
    changes = {k: x for k, x in fixed.items() if getattr(config, k) == getattr(default, k)}
    fixed |= ham.METHODS.get(method, (None, {}))[1]
    for name, methods in HAVE.items():
        value, usual = getattr(config, name), getattr(default, name)
        if method not in methods and value not in (usual, fixed.get(name, usual)):
            flag = f"--{name.replace('_', '-')} {value}"
            raise ham.InputError(f"{flag}: {method} has no such setting")
    if config.grouping in GROUPINGS[2:] and method != "ham":
        raise ham.InputError(f"--grouping {config.grouping}: {method} has cosine and random only")
    if config.gain and config.share:
        raise ham.InputError(f"--gain {config.gain}: not with --share")
    if (config.gain or config.share) and config.merge != "solution":
        raise ham.InputError(f"--merge {config.merge}: --gain and --share go with solution only")
    if config.superclasses:
        changes["class_order"] = "natural"  # `superclasses` orders it anew
        if (config.dataset, config.tasks) != ("cifar100", 20):
            raise ham.InputError("--superclasses: with --dataset cifar100 --tasks 20")
    return ham.resolve(dataclasses.replace(config, **changes))


def superclasses(data, seed):
    """CIFAR-100 in label order -> its tasks are the superclasses, in an order drawn by the seed."""
    file = Path(__file__).with_name("cifar100_superclasses.txt")
    blocks = file.read_text("utf-8").strip().split("\n\n")
    blocks = [blocks[i].split("\n") for i in np.random.RandomState(seed).permutation(len(blocks))]
    names, pixels, labels = [x for block in blocks for x in block], {}, {}
    for part in ("train", "test"):
        own = [data.images(part, [data.names.index(name)])[0] for name in names]
        pixels[part], sizes = torch.cat(own), torch.tensor([len(x) for x in own])
        labels[part] = torch.arange(len(names)).repeat_interleave(sizes)
    return dataclasses.replace(data, pixels=pixels, labels=labels, names=names)


def loss_of(method):
    """The cross-entropy with the method's penalty added to its gradient, not to its value.

    What is recorded as loss can then be compared between methods.
    """
    if not hasattr(method, "penalty"):
        return ham.task_loss

    def loss(trained, features, labels):
        entropy = ham.task_loss(trained, features, labels)
        penalty = method.penalty(trained, entropy)
        return entropy + (penalty - penalty.detach())

    return loss


def prepare(config):
    """-> what ham.learn takes: vit, method, data, loss"""
    config = resolve(config)
    vit = ham.build_vit(config)
    data = ham.load_data(config, vit)
    if config.superclasses:
        data = superclasses(data, config.seed)
    if config.lr is None and config.method != "frozen":
        n = config.epochs * sum(data.sizes("train")) / config.tasks
        config = dataclasses.replace(config, lr=ham.learning_rate(config.method, n))
    w0 = {} if config.method == "frozen" else ham.lora_layers(vit, config.layers)
    kind = METHODS.get(config.method) or ham.METHODS[config.method][0]
    varied = config.gain or config.share or config.grouping != "cosine"
    kind = Variant if varied and config.method == "ham" else kind
    method = kind(w0, config)
    if config.method == "onward" or config.grouping == "features":
        every = [ham.extract(vit, {}, data, "train", task, config)[0] for task in data.tasks]
        method.features = torch.stack([F.normalize(x, dim=1).mean(0) for x in every])
    return vit, method, data, loss_of(method)


def run(config):
    """As ham.run. -> dict, what results.json holds"""
    vit, method, data, loss = prepare(config)
    if config.method == "safm":
        return learn_safm(vit, method, data)
    return ham.learn(vit, method, data, loss)


if __name__ == "__main__":
    ham.main(None, run, Config)
