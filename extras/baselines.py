"""Other methods on HAM's loop: data, backbone, training, read-out and measures are ham.py's.

    python -m extras.baselines --method treelora --dataset cifar100 --tasks 20

treelora  TreeLoRA (arXiv 2506.10355): one LoRA, its gradient drawn to that of a similar earlier task
safm      Sparse Adapter Fusion (arXiv 2602.02502): each block reuses, adds or leaves out an adapter
sd_lora   after SD-LoRA (ICLR 2025): one fixed direction per task, all magnitudes learnt
o_lora    after O-LoRA (EMNLP 2023): a new subspace per task, orthogonal to the earlier ones
ewc       elastic weight consolidation (PNAS 2017, one penalty for all tasks) on one LoRA's factors

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
from ham import factors

# ------------------------------------------------------------------------------------------- Config

# λ; of safm, ewc: our choice; treelora's is the paper's, of a distance that we rescale.
PENALTY = {"treelora": 0.1, "safm": 1.0, "sd_lora": None, "o_lora": 0.5, "ewc": 1e4}
# The best of those tried on held-out images (results/README.md): CIFAR-100, T = 20, few images per
# class, then many; CUB-200, T = 10. Not searched for: TreeLoRA and SAFM with many, the demo.
ham.LEARNING_RATE |= dict.fromkeys(PENALTY, 1e-3) | {"ewc": 3e-3}
for large in ham.LARGE:
    ham.LEARNING_RATE |= {(m, large): 3e-4 for m in ("sd_lora", "o_lora", "ewc")}
    ham.LEARNING_RATE["treelora", large] = ham.LEARNING_RATE["sequential", large]
for method, rate in {"treelora": 1e-4, "safm": 3e-4, "o_lora": 3e-4, "ewc": 1e-3}.items():
    ham.LEARNING_RATE[method, "cub200"] = rate
for method in ("treelora", "ewc"):
    ham.LEARNING_RATE[method, "demo"] = ham.LEARNING_RATE["sequential", "demo"]


@dataclass(frozen=True)
class Config(ham.Config):
    """ham.py's settings, other methods, and the weight of their penalty."""

    method: str = ham.option(None, "treelora, ..., or one of ham.py's", (*PENALTY, *ham.METHODS))
    penalty: float = ham.option(None, "λ; treelora 0.1, safm 1, o_lora 0.5, ewc 1e4", low=0)


def prepare(config):
    """-> the configuration, None where a setting does not apply; subclasses of HAM and Learner"""
    ham.check_ranges(config)
    if not isinstance(config, Config):
        return config, ham.HAM, ham.Learner
    penalty = config.penalty if config.penalty is not None else PENALTY.get(config.method)
    changes = {"penalty": None if PENALTY.get(config.method) is None else penalty}
    if config.method in PENALTY:
        changes |= dict.fromkeys(ham.GROUPING) | {"train_alpha": False}
    if config.method == "sd_lora":
        changes |= {"train_alpha": True, "lr_alpha": config.lr_alpha}
    method, loop = METHODS.get(config.method, (ham.HAM, ham.Learner))
    return dataclasses.replace(config, **changes), method, loop


def run(config):
    """As ham.run. -> dict, what results.json holds"""
    return ham.run(*prepare(config))


def copy(adapter, train=False):
    """The same numbers in tensors of their own."""
    new = {n: tuple(x.detach().clone() for x in ba) for n, ba in adapter.items()}
    return {n: tuple(x.requires_grad_(train) for x in ba) for n, ba in new.items()}


# ----------------------------------------------------------------------------------------- TreeLoRA
# loss + λ |g - ĝ_k|₁,  k the earlier task with the smallest  LCB_k = μ̂_k - 2 sqrt(log t / n_k)
# g: gradient of a batch's loss by A and B; ĝ_k: its mean over task k's steps (the paper: over an
# epoch); μ̂_k: mean L1 distance of this task's mean so far to ĝ_k, over the n_k steps of t that took k.
# The last adapter is used. (The public code takes A itself for g and subtracts an inner product that
# is scaled to the loss and to training progress.) The paper's sparse updates are left out.


def leaves(tasks, signatures, depth=0, deepest=5):
    """K-D tree over tasks: level l halves them at the median distance from their mean, layer l.

    signatures: per task, per adapted layer (P,) -> lists of tasks, the leaves
    """
    if len(tasks) == 1 or depth == min(deepest, len(signatures[0])):
        return [tasks]
    layer = torch.stack([signatures[k][depth] for k in tasks])
    order = (layer - layer.mean(0)).abs().sum(1).argsort(stable=True).tolist()
    half = (len(tasks) + 1) // 2
    parts = [[tasks[i] for i in sorted(part)] for part in (order[:half], order[half:])]
    return [leaf for part in parts for leaf in leaves(part, signatures, depth + 1, deepest)]


class Bandit:
    """Which leaf next: the one with the smallest lower confidence bound. arms: number of leaves"""

    def __init__(self, arms):
        self.n, self.mean = [0] * arms, [0.0] * arms

    def choose(self):
        """A leaf that was never taken comes first. -> int"""
        t = max(sum(self.n), 1)
        bounds = zip(self.mean, self.n)
        lcb = [m - 2 * math.sqrt(math.log(t) / n) if n else -math.inf for m, n in bounds]
        return min(range(len(lcb)), key=lcb.__getitem__)

    def saw(self, arm, distance):
        self.n[arm] += 1
        self.mean[arm] += (distance - self.mean[arm]) / self.n[arm]


class TreeLoRA(ham.HAM):
    """One LoRA trained on and on, and the mean gradient of every earlier task."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.one_adapter, self.signatures = True, []

    def start(self):
        self.sum, self.steps, self.bandit = None, 0, None
        if self.signatures:
            tree = leaves(list(range(len(self.signatures))), self.signatures)
            every = [torch.cat(signature) for signature in self.signatures]
            self.near = [torch.stack([every[k] for k in leaf]).mean(0) for leaf in tree]
            self.bandit = Bandit(len(tree))
        return super().start()

    def penalty(self, p, loss):
        """Its value is of no use, its gradient is λ |g - ĝ_k|₁'s by A and B (not by the head): ours.

        The distance is taken as a share of |g|₁ + |ĝ_k|₁, so that λ needs no unit (ours).
        """
        x, weight = factors(p.adapter), self.config.penalty
        pull = self.bandit is not None and weight > 0
        g = torch.autograd.grad(loss, x, retain_graph=True, create_graph=pull)
        layers = [torch.cat([b.flatten(), a.flatten()]) for b, a in zip(g[::2], g[1::2])]
        sums = self.sum or [0.0] * len(layers)
        self.sum, self.steps = [s + y.detach() for s, y in zip(sums, layers)], self.steps + 1
        if not pull:
            return 0.0
        k, g = self.bandit.choose(), torch.cat(layers)
        so_far, near = torch.cat(self.sum) / self.steps, self.near[k]
        self.bandit.saw(k, (so_far - near).abs().sum().item())
        share = (g - near).abs().sum() / (g.abs().sum() + near.abs().sum()).clamp(min=1e-12)
        second = torch.autograd.grad(weight * share, x, retain_graph=True)
        return sum((y * z.detach()).sum() for y, z in zip(x, second))

    def finish(self, task, p):
        self.signatures.append([s / self.steps for s in self.sum])
        taken = {"leaves_taken": self.bandit.n if self.bandit else None}
        return super().finish(task, p) | taken

    def kept(self):
        return super().kept() + [g for signature in self.signatures for g in signature]


class Unfused(ham.Learner):
    """Fused attention has no second derivative."""

    def __init__(self, vit, method, data):
        super().__init__(vit, method, data)
        for block in vit.blocks if method.config.penalty else []:
            block.attn.fused_attn = False


# --------------------------------------------------------------------------------------------- SAFM
# Decision: warm up a new adapter in every block, then  ΔW = Σ_k λ_k ΔW_k  over {empty, every earlier
# one of the block, the new one}, λ = softmax(w); the greatest λ of a block decides. Tuning: the new
# adapters that were chosen, by the loss + Σ_l cos(h_l, h_l-1), h_l the output of block l's adapter.
# Its pseudo-replay needs a language model and is left out: earlier adapters stay as they are. An
# adapter is LoRA on the block's --layers, the last of them gives h_l (of qkv, blocks have no common
# basis). The task of a test image is that of the nearest frozen class mean. (All of this: ours.)

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
        self.stage, self.decided, self.adapter, self.frozen = "tuning", None, None, None
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
        return Tuned(**vars(p), reused=old)

    def decide(self, p):
        """After the search: the greatest weight of each block, "empty", a number or "new"."""
        self.decided, self.shares = {}, {}
        for block, weights in p.logits.items():
            candidates = ["empty", *range(len(self.pool[block])), "new"]
            self.decided[block] = candidates[int(weights.argmax())]
            self.shares[block] = weights.softmax(0).tolist()

    def penalty(self, p, loss):
        """Tuning: λ Σ_l cos(h_l, h_l-1), mean over images and tokens; 0 where one is empty."""
        if self.stage != "tuning":
            return 0.0
        h = {}
        for name, (b, a) in (p.reused | p.adapter).items():
            h[block_of(name)] = self.inputs[name].float() @ a.T @ b.T
        pairs = [(h[k], h[l]) for k, l in itertools.pairwise(self.pool) if k in h and l in h]
        return self.config.penalty * sum(F.cosine_similarity(*x, dim=-1).mean() for x in pairs)

    def finish(self, task, p):
        self.choices.append(dict(self.decided))
        for block in (block for block, k in self.decided.items() if k == "new"):
            new = {n: ba for n, ba in p.adapter.items() if block_of(n) == block}
            self.choices[-1][block] = len(self.pool[block])
            self.pool[block].append(copy(new))
        return {"adapters": self.decided, "search": self.shares}

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
        every = [x for adapters in self.pool.values() for one in adapters for x in factors(one)]
        return [*every, self.frozen]


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
            old, share = self.pool[block_of(name)], self.logits[block_of(name)].softmax(0)
            updates = [ham.dense(x[name]) for x in old] + [ham.dense(self.adapter[name])]
            weights[name] = w + sum(s * update for s, update in zip(share[1:], updates))
        return weights

    def parameters(self, c):
        return super().parameters(c) + [{"params": list(self.logits.values()), "lr": SEARCH}]


@dataclass
class Tuned(ham.Trainable):
    """The tuning stage: chosen new adapters are trained, reused ones are not."""

    reused: dict = None  # name: (b, a)

    def weights(self, w0):
        updates = self.reused | self.adapter
        return {n: w + ham.dense(updates[n]) if n in updates else w for n, w in w0.items()}


class SAFMLearner(ham.Learner):
    """Two stages per task, weights per task, and the task predicted on frozen features."""

    def __init__(self, vit, method, data):
        super().__init__(vit, method, data)
        method.frozen = torch.zeros_like(self.rows["class-mean"])  # class means, for the task
        self.test_rows, self.labels = data.rows("test", range(len(data.names)))
        self.store = {}  # per task: features of the test images under its weights, (N, D) or NaN
        sizes = torch.tensor([len(t) for t in data.tasks])
        self.owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.c.device)
        for name in method.w0:
            layer = vit.get_submodule(name.removesuffix(".weight"))
            save = functools.partial(method.inputs.__setitem__, name)
            layer.register_forward_pre_hook(lambda _, x, save=save: save(x[0]))

    def train(self, task):
        """Warm-up and search, an epoch each (our choice), then the tuning."""
        method, c = self.ham, self.c
        for stage in ("warm-up", "search"):
            method.stage, method.config = stage, dataclasses.replace(c, epochs=1)
            p, log = super().train(task)
            if not math.isfinite(log[-1][0]):
                raise ham.InputError(
                    f"task {task + 1}, {stage}: the loss is not finite; lower --lr"
                )
            method.adapter = copy(p.adapter)
        method.decide(p)
        method.stage, method.config = "tuning", c
        return super().train(task)

    def take_class_means(self, task):
        super().take_class_means(task)
        classes, own = list(self.data.tasks[task]), self.weights
        self.weights = self.ham.w0
        self.ham.frozen[classes] = ham.class_means(*self.features("train", task), classes)
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
        size = len(labels), seen[-1][-1] + 1
        guess = self.owner[ham.cosine_logits(bare, self.ham.frozen[: size[1]]).argmax(1)]
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

    def results(self):
        """Images are counted once, but trained on in three stages and evaluated once: no rates."""
        self.weights = None
        return super().results() | {"images_per_second": {"training": None, "inference": None}}


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
        return p

    def penalty(self, p, loss):
        if not self.groups:
            return 0.0
        taken = {n: torch.cat([g.delta_w[n][1] for g in self.groups]) for n in p.adapter}  # all A_k
        overlap = sum((taken[n] @ a.T).square().sum() for n, (_, a) in p.adapter.items())
        return self.config.penalty * overlap


class EWC(ham.HAM):
    """loss + λ/2 Σ F (θ - θ*)²; θ* the factors after the last task, F summed over all earlier ones.

    F: mean squared gradient of the batches' mean losses while a task was trained (our choice).
    """

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.one_adapter, self.fisher = True, None

    def start(self):
        p, self.squares, self.steps = super().start(), None, 0
        self.before = factors(copy(p.adapter))
        return p

    def penalty(self, p, loss):
        x = factors(p.adapter)
        g = torch.autograd.grad(loss, x, retain_graph=True)
        squares = self.squares or [0.0] * len(g)
        self.squares, self.steps = [s + y**2 for s, y in zip(squares, g)], self.steps + 1
        moved = zip(self.fisher or [], x, self.before)
        return self.config.penalty / 2 * sum((f * (y - old) ** 2).sum() for f, y, old in moved)

    def finish(self, task, p):
        new = [s / self.steps for s in self.squares]
        self.fisher = [f + y for f, y in zip(self.fisher, new)] if self.fisher else new
        return super().finish(task, p)

    def kept(self):
        return super().kept() + self.fisher


METHODS = {"treelora": (TreeLoRA, Unfused), "safm": (SAFM, SAFMLearner)}
METHODS |= {"sd_lora": (SDLoRA, ham.Learner), "o_lora": (OLoRA, ham.Learner)}
METHODS |= {"ewc": (EWC, ham.Learner)}


def main(argv=None):
    """The command line: ham.py's flags."""
    config = ham.parse(argv, Config, __doc__)
    try:
        run(config)
    except ham.InputError as error:
        ham.fail(error)


if __name__ == "__main__":
    main()
