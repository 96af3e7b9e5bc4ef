"""Other methods on HAM's loop: data, backbone, training, read-out and measures are ham.py's.

    python -m extras.baselines --method treelora --dataset cifar100 --tasks 20

treelora  TreeLoRA (arXiv 2506.10355): one LoRA, its gradient drawn to that of a similar earlier task
safm      Sparse Adapter Fusion (arXiv 2602.02502): each block reuses, adds or leaves out an adapter
sd_lora   after SD-LoRA (ICLR 2025): one fixed direction per task, all magnitudes learnt
o_lora    after O-LoRA (EMNLP 2023): a new subspace per task, orthogonal to the earlier ones
ewc       elastic weight consolidation (PNAS 2017) on the factors of one LoRA

What differs from ham.HAM is here: what is trained (`start`), added to the loss (`penalty`), kept
(`finish`). Values are the papers' as public summaries give them, or marked as our choice.
"""

from __future__ import annotations  # ham.parse reads the fields' types as text

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ham

# ------------------------------------------------------------------------------------------- Config

# λ; of safm, ewc: our choice. Nothing is added to sd_lora's loss.
PENALTY = {"treelora": 0.1, "safm": 1.0, "sd_lora": None, "o_lora": 0.5, "ewc": 1e4}
ham.LEARNING_RATE |= dict.fromkeys(("treelora", "ewc"), 3e-4)  # as sequential; untried
ham.LEARNING_RATE |= dict.fromkeys(("safm", "sd_lora", "o_lora"), 1e-3)  # as ham; untried


@dataclass(frozen=True)
class Config(ham.Config):
    """ham.py's settings, other methods, and the weight of their penalty."""

    method: str = ham.option(None, "treelora, ..., or one of ham.py's", (*PENALTY, *ham.METHODS))
    penalty: float = ham.option(None, "λ; treelora 0.1, safm 1, o_lora 0.5, ewc 1e4", low=0)


def prepare(config):
    """-> the configuration, None where a setting does not apply; subclasses of HAM and Learner"""
    ham.check_ranges(config)
    if config.method not in METHODS:
        return config, ham.HAM, ham.Learner
    changes = dict.fromkeys(ham.GROUPING) | {"train_alpha": False}
    if config.method == "sd_lora":
        changes |= {"train_alpha": True, "lr_alpha": config.lr_alpha}
    if config.penalty is None:
        changes["penalty"] = PENALTY[config.method]
    loop = SAFMLearner if config.method == "safm" else ham.Learner
    return dataclasses.replace(config, **changes), METHODS[config.method], loop


def run(config):
    """As ham.run. -> dict, what results.json holds"""
    return ham.run(*prepare(config))


def factors(adapter):
    """The tensors of an adapter, layer by layer: [b, a, b, a, ...]"""
    return [x for ba in adapter.values() for x in ba]


def copy(adapter, train=False):
    """The same numbers in tensors of their own."""
    new = {n: tuple(x.detach().clone() for x in ba) for n, ba in adapter.items()}
    return {n: tuple(x.requires_grad_(train) for x in ba) for n, ba in new.items()}


# ----------------------------------------------------------------------------------------- TreeLoRA
# loss + λ d(g, ĝ_k),  k the earlier task with the smallest  LCB_k = μ̂_k - 2 sqrt(log t / n_k)
# g: gradient of the loss by A and B; ĝ_k: its mean while task k was trained; μ̂_k: the mean distance
# seen in the n_k steps that k was taken in, of t. (The public code takes A itself for g, in the mean
# over an epoch, and subtracts an inner product scaled to the loss.) The last adapter is used.


def distance(g, other):
    """L1 distance as a share of its greatest value, so that λ and the bound need no unit: ours.

    g, other: lists of (P,), one per layer -> () in [0, 1]
    """
    g, other = torch.cat(g), torch.cat(other)
    return (g - other).abs().sum() / (g.abs().sum() + other.abs().sum()).clamp(min=1e-12)


class Node:
    """K-D tree over tasks: depth l halves them at the median distance from their mean in layer l.

    Each node counts the steps that went through it and the distances they met.
    """

    def __init__(self, tasks, signatures, depth=0, deepest=5):
        self.tasks, self.n, self.total, self.children = tasks, 0, 0.0, []
        if len(tasks) > 1 and depth < min(deepest, len(signatures[0])):
            layer = torch.stack([signatures[k][depth] for k in tasks])  # (tasks, P)
            order = (layer - layer.mean(0)).abs().sum(1).argsort(stable=True).tolist()
            half = (len(tasks) + 1) // 2
            for part in (order[:half], order[half:]):
                part = [tasks[i] for i in sorted(part)]
                self.children.append(Node(part, signatures, depth + 1, deepest))
        elif len(tasks) > 1:  # a leaf of several tasks: told apart by their own bounds (our choice)
            self.children = [Node([k], signatures, deepest, deepest) for k in tasks]

    def bound(self, t):
        """LCB; a node that no step went through comes first."""
        spread = math.log(max(t, 2)) / self.n if self.n else math.inf
        return self.total / max(self.n, 1) - 2 * math.sqrt(spread)

    def search(self):
        """From the root to a task, always to the smaller bound. -> nodes, the last with one task"""
        path = [self]
        while path[-1].children:
            path.append(min(path[-1].children, key=lambda child: child.bound(self.n)))
        return path


class TreeLoRA(ham.HAM):
    """One LoRA trained on and on, and the mean gradient of every earlier task."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.one_adapter, self.signatures, self.tree = True, [], None
        torch.backends.cuda.enable_flash_sdp(False)  # fused attention has no second derivative
        torch.backends.cuda.enable_mem_efficient_sdp(False)

    def start(self):
        if self.signatures:  # bounds are of this task's steps
            self.tree = Node(list(range(len(self.signatures))), self.signatures)
        return NearGradient(**vars(super().start()), method=self)

    def finish(self, task, p):
        self.signatures.append([g / p.steps for g in p.sum])
        return super().finish(task, p)

    def kept(self):
        return super().kept() + [g for signature in self.signatures for g in signature]


@dataclass
class NearGradient(ham.Trainable):
    """TreeLoRA's part of a task."""

    method: TreeLoRA = None
    sum: list = None  # of gradients, per layer (P,)
    steps: int = 0

    def penalty(self, loss):
        """λ d(g, ĝ_k). Its gradient takes a second backward pass through the first."""
        near = self.method.tree is not None and self.method.config.penalty > 0
        g = torch.autograd.grad(loss, factors(self.adapter), retain_graph=True, create_graph=near)
        g = [torch.cat([b.flatten(), a.flatten()]) for b, a in zip(g[::2], g[1::2])]
        sums = self.sum or [0.0] * len(g)
        self.sum, self.steps = [s + x.detach() for s, x in zip(sums, g)], self.steps + 1
        if not near:
            return 0.0
        path = self.method.tree.search()
        d = distance(g, self.method.signatures[path[-1].tasks[0]])
        for node in path:
            node.n, node.total = node.n + 1, node.total + d.item()
        return self.method.config.penalty * d


# --------------------------------------------------------------------------------------------- SAFM
# Decision: warm up a new adapter in every block, then  ΔW = Σ_k λ_k ΔW_k  over {empty, every earlier
# one of the block, the new one}, λ = softmax(w); the greatest λ of a block decides. Tuning: the new
# adapters that were chosen, by the loss + Σ_l cos(h_l, h_l-1), h_l the output of block l's adapter.
# Its pseudo-replay needs a language model and is left out: earlier adapters stay as they are. An
# adapter is LoRA on the block's --layers. The task is that of the nearest frozen class mean. (Ours.)

FIRST = {"empty": 0.11, "old": 0.08, "new": -0.08}  # the weights w that a search starts from
SEARCH = 0.1  # their learning rate: a few steps of Adam can turn the order round (our choice)


def block_of(name):
    return ".".join(name.split(".")[:2])  # blocks.3.attn.qkv.weight -> blocks.3


class SAFM(ham.HAM):
    """Adapters of every block, and which of them each task uses."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.pool = {block_of(name): [] for name in w0}  # per block: adapters, name: (b, a)
        self.choices = []  # per task: block: number in the pool, or "empty"
        self.stage, self.decided, self.adapter = "tuning", None, None
        self.inputs = {}  # name: what the layer was given, (n, tokens, k), in the last pass

    def start(self):
        p = super().start()
        if self.stage == "warm-up":
            return p
        p.adapter = copy(self.adapter, train=True)
        if self.stage == "search":
            return Search(**vars(p), pool=self.pool)
        chosen = {n: self.decided[block_of(n)] for n in self.w0}
        p.adapter = {n: ba for n, ba in p.adapter.items() if chosen[n] == "new"}
        old = {n: self.pool[block_of(n)][k][n] for n, k in chosen.items() if isinstance(k, int)}
        return Tuned(**vars(p), reused=old, method=self)

    def decide(self, p):
        """After the search: the greatest weight of each block, "empty", a number or "new"."""
        self.decided = {}
        for block, weights in p.logits.items():
            candidates = ["empty", *range(len(self.pool[block])), "new"]
            self.decided[block] = candidates[int(weights.argmax())]

    def finish(self, task, p):
        self.choices.append(dict(self.decided))
        for block in (block for block, k in self.decided.items() if k == "new"):
            new = {n: ba for n, ba in p.adapter.items() if block_of(n) == block}
            self.choices[-1][block] = len(self.pool[block])
            self.pool[block].append(copy(new))
        return {"adapters": self.decided}

    def weights_of(self, task):
        """W0 + ΔW of the task's adapters. -> dict name: (d, k)"""
        weights = {}
        for name, w in self.w0.items():
            k = self.choices[task][block_of(name)]
            weights[name] = w if k == "empty" else w + ham.dense(self.pool[block_of(name)][k][name])
        return weights

    def folded(self):
        return self.weights_of(-1)

    def kept(self):
        return [x for adapters in self.pool.values() for one in adapters for x in factors(one)]


@dataclass
class Search(ham.Trainable):
    """The decision stage: the new adapters and the weights of all candidates are trained."""

    pool: dict = None
    logits: dict = None  # block: (earlier + 2,)

    def __post_init__(self):
        self.logits = {}
        for block, old in self.pool.items():
            first = [FIRST["empty"], *[FIRST["old"]] * len(old), FIRST["new"]]
            self.logits[block] = torch.tensor(first, device=self.alpha.device, requires_grad=True)

    def weights(self, w0):
        weights = {}
        for name, w in w0.items():
            old = self.pool[block_of(name)]
            share = self.logits[block_of(name)].softmax(0)
            updates = [ham.dense(x[name]) for x in old] + [ham.dense(self.adapter[name])]
            weights[name] = w + sum(s * update for s, update in zip(share[1:], updates))
        return weights

    def parameters(self, c):
        return super().parameters(c) + [{"params": list(self.logits.values()), "lr": SEARCH}]


@dataclass
class Tuned(ham.Trainable):
    """The tuning stage: chosen new adapters are trained, reused ones are not."""

    reused: dict = None  # name: (b, a)
    method: SAFM = None

    def weights(self, w0):
        updates = self.reused | self.adapter
        return {n: w + ham.dense(updates[n]) if n in updates else w for n, w in w0.items()}

    def penalty(self, loss):
        """Σ_l cos(h_l, h_l-1), in the mean over images and tokens; 0 where an adapter is empty."""
        updates, h = self.reused | self.adapter, {}
        for name, (b, a) in updates.items():  # the first of a block's layers speaks for it
            if block_of(name) not in h:
                h[block_of(name)] = self.method.inputs[name].float() @ a.T @ b.T
        blocks = list(self.method.pool)
        pairs = [(h[k], h[l]) for k, l in itertools.pairwise(blocks) if k in h and l in h]
        total = sum(F.cosine_similarity(x, y, dim=-1).mean() for x, y in pairs)
        return self.method.config.penalty * total


class SAFMLearner(ham.Learner):
    """Two stages per task, weights per task, and the task predicted on frozen features."""

    def __init__(self, vit, method, data):
        super().__init__(vit, method, data)
        self.frozen = torch.zeros_like(self.rows["class-mean"])  # class means, for the task
        self.test_rows, self.labels = data.rows("test", range(len(data.names)))
        self.store = {}  # per task: features of the test images under its weights, (N, D) or NaN
        sizes = torch.tensor([len(t) for t in data.tasks])
        self.owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.c.device)
        for name in method.w0:
            layer = vit.get_submodule(name.removesuffix(".weight"))
            save = functools.partial(method.inputs.__setitem__, name)
            layer.register_forward_pre_hook(lambda _, x, save=save: save(x[0]))

    def learn(self, task):
        self.timed("train", self.decide, task)
        super().learn(task)

    def decide(self, task):
        """Warm-up and search, an epoch each (our choice)."""
        method, c = self.ham, self.c
        for method.stage in ("warm-up", "search"):
            method.config = dataclasses.replace(c, epochs=1)
            p, _ = ham.train_task(self.vit, method, self.data, task)
            method.adapter = copy(p.adapter)
        method.decide(p)
        method.stage, method.config = "tuning", c

    def take_class_means(self, task):
        super().take_class_means(task)
        classes, own = list(self.data.tasks[task]), self.weights
        self.weights = self.ham.w0
        self.frozen[classes] = ham.class_means(*self.features("train", task), classes)
        self.weights = own

    def under(self, task, wanted):
        """Features under a task's weights, -1: under W0; each image once. (n,) bool -> (m, D)"""
        if task not in self.store:
            size = len(self.labels), self.vit.num_features
            self.store[task] = torch.full(size, math.nan, device=self.c.device)
        stored = self.store[task][: len(wanted)]
        new = wanted & stored[:, 0].isnan()
        if new.any():
            weights = self.ham.w0 if task < 0 else self.ham.weights_of(task)
            rows = self.test_rows[: len(wanted)][new.cpu()]
            stored[new] = ham.extract(self.vit, weights, self.data, rows, self.c)
        return stored[wanted]

    def evaluate(self, task):
        """As ham.Learner's: the task of an image is that of its nearest frozen class mean."""
        seen, labels = self.data.tasks[: task + 1], self.labels[: self.seen[task]].to(self.c.device)
        bare = self.under(-1, torch.ones_like(labels, dtype=torch.bool))
        guess = self.owner[ham.cosine_logits(bare, self.frozen[: seen[-1][-1] + 1]).argmax(1)]
        size = len(labels), seen[-1][-1] + 1
        for name, rows in self.rows.items():
            by_guess, known = (torch.full(size, -math.inf, device=self.c.device) for _ in range(2))
            for k, t in enumerate(seen):
                own = slice(t[0], t[-1] + 1)
                for logits, which in ((by_guess, guess == k), (known, self.owner[labels] == k)):
                    logits[which, own] = ham.cosine_logits(self.under(k, which), rows[own])
            self.matrix[name].append(ham.accuracies(by_guess, labels, seen)[0])
            self.known[name] = ham.accuracies(known, labels, seen)[1]

    def oracle(self):
        """Features of different tasks lie in different spaces: None."""


# ------------------------------------------------------------------------------------ The short ones


class SDLoRA(ham.HAM):
    """ΔW = Σ_k α_k ΔW_k: every task adds a direction, which stays; all α_k are learnt on.

    One α per task and none per layer, directions not normalised (HAM's parametrisation): ours.
    """

    def finish(self, task, p):
        record = {"alpha": p.alpha.item(), "alpha_groups": p.alpha_groups.tolist()}
        for group, value in zip(self.groups, record["alpha_groups"]):
            group.alpha = value
        self.groups.append(ham.Group(copy(p.adapter), record["alpha"], [task]))
        return record


class OLoRA(SDLoRA):
    """loss + λ Σ_k |A_k A_iᵀ|²; ΔW = Σ_k ΔW_k, every α_k = 1. (The public code adds |entries|.)"""

    def start(self):
        p, random = super().start(), 1000 * self.config.seed + len(self.groups)
        # HAM starts every task from the same A, this one each in a place of its own.
        p.adapter = copy(ham.new_adapter(self.w0, self.config.rank, random), train=True)
        return Orthogonal(**vars(p), method=self)


@dataclass
class Orthogonal(ham.Trainable):
    """O-LoRA's part of a task."""

    method: OLoRA = None

    def penalty(self, loss):
        pairs = [
            (g.delta_w[n][1], ba[1]) for g in self.method.groups for n, ba in self.adapter.items()
        ]
        return self.method.config.penalty * sum((old @ a.T).square().sum() for old, a in pairs)


class EWC(ham.HAM):
    """loss + λ/2 Σ F (θ - θ*)²; θ* the factors after the last task, F summed over all earlier ones.

    F: mean squared gradient of the batches' losses while a task was trained (our choice).
    """

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.one_adapter, self.fisher = True, None

    def start(self):
        return Elastic(**vars(super().start()), method=self)

    def finish(self, task, p):
        new = [s / p.steps for s in p.squares]
        self.fisher = [f + x for f, x in zip(self.fisher, new)] if self.fisher else new
        return super().finish(task, p)

    def kept(self):
        return super().kept() + self.fisher


@dataclass
class Elastic(ham.Trainable):
    """EWC's part of a task."""

    method: EWC = None
    squares: list = None
    steps: int = 0
    before: list = None

    def __post_init__(self):
        self.before = factors(copy(self.adapter))

    def penalty(self, loss):
        g = torch.autograd.grad(loss, factors(self.adapter), retain_graph=True)
        squares = self.squares or [0.0] * len(g)
        self.squares, self.steps = [s + x**2 for s, x in zip(squares, g)], self.steps + 1
        if not self.method.fisher:
            return 0.0
        moved = zip(self.method.fisher, factors(self.adapter), self.before)
        pull = sum((f * (x - old) ** 2).sum() for f, x, old in moved)
        return self.method.config.penalty / 2 * pull


METHODS = {"treelora": TreeLoRA, "safm": SAFM, "sd_lora": SDLoRA, "o_lora": OLoRA, "ewc": EWC}


def main(argv=None):
    """The command line: ham.py's flags."""
    config = ham.parse(argv, Config, __doc__)
    try:
        run(config)
    except ham.InputError as error:
        ham.fail(error)


if __name__ == "__main__":
    main()
