"""Other methods in ham.py's loop: data, backbone, training, read-out and measures are ham.py's.

    python -m extras.baselines --method treelora --dataset cifar100 --tasks 20

ham       with --gain 5: one group that can move as far as five do, an experiment on HAM
sd_lora   after SD-LoRA (ICLR 2025): one fixed direction per task, all magnitudes learnt
o_lora    after O-LoRA (EMNLP 2023): a new subspace per task, orthogonal to the earlier ones
ewc       elastic weight consolidation (PNAS 2017, one penalty for all tasks) on one LoRA's factors
treelora  TreeLoRA (arXiv 2506.10355): one LoRA, its gradient drawn to a similar earlier task's
safm      Sparse Adapter Fusion (arXiv 2602.02502): each block reuses, adds or leaves out an adapter

What differs from ham.HAM is here: what is trained (`start`), added to the loss (`penalty`), kept
(`finish`). Values are the papers' as public summaries give them, or marked as our choice.
"""

from __future__ import annotations  # ham.parse reads the fields' types as text

import dataclasses
import itertools
import json
import math
import time
from dataclasses import dataclass

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


class Gain(ham.HAM):
    """A new member's share 1 / (n + 1) becomes min(n + 1, gain) / (n + 1); --merge solution."""

    def join(self, group, task, adapter, alpha):
        step = min(len(group.members) + 1, self.config.gain)
        super().join(group, task, adapter, alpha * step)


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
    """loss + λ Σ_k |A_k A_iᵀ|²; ΔW = Σ_k ΔW_k, every α_k = 1. (The public code adds |entries|.)"""

    def start(self):
        """HAM starts every task from the same A, this one each in a place of its own."""
        seed = 1000 * self.config.seed + len(self.groups)
        return self.trainable(ham.new_adapter(self.w0, self.config.rank, seed), self.groups)

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

    F: mean squared gradient of the batches' mean losses while a task was trained (our choice).
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

    def stored(self):
        return [*super().stored(), self.fisher]


# ----------------------------------------------------------------------------------------- TreeLoRA
# loss + λ |g - ĝ_k|₁,  k the earlier task with the smallest  LCB_k = μ̂_k - 2 sqrt(log t / n_k)
# g: gradient of a batch's loss by A and B; ĝ_k: its mean over task k's steps (the paper: over an
# epoch); μ̂_k: mean L1 distance of this task's mean so far to ĝ_k, over the n_k steps of t that
# took k. The last adapter is used. (The public code takes A itself for g and subtracts an inner
# product that is scaled to the loss and to training progress.) The paper's sparse updates are left
# out.


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


class TreeLoRA(ham.Sequential):
    """One LoRA trained on and on, and the mean gradient of every earlier task."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.signatures = []

    def start(self):
        self.sum, self.steps, self.bandit = None, 0, None
        if self.signatures:
            tree = leaves(list(range(len(self.signatures))), self.signatures)
            every = [torch.cat(signature) for signature in self.signatures]
            self.near = [torch.stack([every[k] for k in leaf]).mean(0) for leaf in tree]
            self.bandit = Bandit(len(tree))
        return super().start()

    def penalty(self, trained, loss):
        """Its value is of no use, its gradient is that of λ |g - ĝ_k|₁ by A and B.

        Not by the head, and the distance is a share of |g|₁ + |ĝ_k|₁: λ needs no unit (ours).
        """
        x, pull = factors(trained.adapter), self.bandit is not None
        g = torch.autograd.grad(loss, x, retain_graph=True, create_graph=pull)
        layers = [vector(ba) for ba in zip(g[::2], g[1::2])]
        sums = self.sum or [0.0] * len(layers)
        self.sum, self.steps = [s + y.detach() for s, y in zip(sums, layers)], self.steps + 1
        if not pull:
            return torch.zeros_like(loss)
        k, g = self.bandit.choose(), torch.cat(layers)
        so_far, near = torch.cat(self.sum) / self.steps, self.near[k]
        self.bandit.saw(k, (so_far - near).abs().sum().item())
        share = (g - near).abs().sum() / (g.abs().sum() + near.abs().sum()).clamp(min=1e-12)
        second = torch.autograd.grad(self.config.penalty * share, x, retain_graph=True)
        return sum((y * z.detach()).sum() for y, z in zip(x, second))

    def finish(self, task, trained):
        self.signatures.append([s / self.steps for s in self.sum])
        taken = {"leaves_taken": self.bandit.n if self.bandit else None}
        return super().finish(task, trained) | taken

    def stored(self):
        return super().stored() + [g for signature in self.signatures for g in signature]


# --------------------------------------------------------------------------------------------- SAFM
# Decision: warm up a new adapter in every block, then  ΔW = Σ_k λ_k ΔW_k  over {empty, every
# earlier one of the block, the new one}, λ = softmax(w); the greatest λ of a block decides. Tuning:
# the new adapters that were chosen, by the loss + Σ_l cos(h_l, h_l-1), h_l the output of block l's
# adapter. Its pseudo-replay needs a language model and is left out: earlier adapters stay as they
# are. An adapter is LoRA on the block's --layers, the last of them gives h_l (of qkv, blocks have
# no common basis). The task of a test image is that of the nearest frozen class mean. (All: ours.)

FIRST = {"empty": 0.11, "old": 0.08, "new": -0.08}  # the weights w that a search starts from
SEARCH = 0.1  # their learning rate: a few steps of Adam can turn the order round (our choice)


def block_of(name):
    return ".".join(name.split(".")[:2])  # blocks.3.attn.qkv.weight -> blocks.3


@dataclass
class Search(ham.Trainable):
    """The decision stage: the new adapters and the weights of all candidates are trained."""

    pool: dict = None  # block: earlier adapters, dict layer: (b, a)
    w: dict = None  # block: (earlier + 2,)

    def __post_init__(self):
        self.w = {}
        for block, old in self.pool.items():
            first = [FIRST["empty"], *[FIRST["old"]] * len(old), FIRST["new"]]
            self.w[block] = torch.tensor(first, device=self.alpha.device, requires_grad=True)

    def weights(self, w0):
        weights = {}
        for name, w in w0.items():
            old, share = self.pool[block_of(name)], self.w[block_of(name)].softmax(0)
            updates = [ham.dense(x[name]) for x in old] + [ham.dense(self.adapter[name])]
            weights[name] = w + sum(s * update for s, update in zip(share[1:], updates))
        return weights

    def parameters(self, config):
        return super().parameters(config) + [{"params": list(self.w.values()), "lr": SEARCH}]

    def decided(self):
        """Each block's candidate of greatest weight: "empty", its number in the pool, or "new"."""
        candidates = {block: ["empty", *range(len(old)), "new"] for block, old in self.pool.items()}
        return {block: candidates[block][int(w.argmax())] for block, w in self.w.items()}


@dataclass
class Tuned(ham.Trainable):
    """The tuning stage: chosen new adapters are trained, reused ones are not."""

    reused: dict = None  # layer: (b, a)

    def weights(self, w0):
        updates = self.reused | self.adapter
        return {n: w + ham.dense(updates[n]) if n in updates else w for n, w in w0.items()}


class SAFM(ham.HAM):
    """Adapters of every block, and which of them each task uses."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.pool = {block_of(name): [] for name in w0}  # per block: adapters, layer: (b, a)
        self.choices = []  # per task: block: number in the pool, or "empty"
        self.frozen = []  # per task: class means of frozen features, for the guess of the task
        self.inputs = {}  # layer: what it was given, (n, tokens, k), in the last pass
        self.stage = None  # what is trained now

    def watch(self, vit):
        """Let each layer leave its input in `inputs`."""
        for name in self.w0:

            def save(_, x, name=name):
                self.inputs[name] = x[0]

            vit.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(save)

    def start(self):
        return self.stage

    def search(self, adapter):
        return Search(**vars(self.trainable(adapter, [])), pool=self.pool)

    def tuned(self, adapter, decided):
        chosen = {n: decided[block_of(n)] for n in self.w0}
        new = {n: ba for n, ba in adapter.items() if chosen[n] == "new"}
        old = {n: self.pool[block_of(n)][k][n] for n, k in chosen.items() if isinstance(k, int)}
        return Tuned(**vars(self.trainable(new, [])), reused=old)

    def penalty(self, trained, loss):
        """λ Σ_l cos(h_l, h_l-1), mean over images and tokens; 0 where one is empty."""
        h = {}
        for name, (b, a) in (trained.reused | trained.adapter).items():
            h[block_of(name)] = self.inputs[name].float() @ a.T @ b.T
        pairs = [(h[k], h[l]) for k, l in itertools.pairwise(self.pool) if k in h and l in h]
        cosines = [F.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        return self.config.penalty * sum(cosines, torch.zeros_like(loss))

    def keep(self, trained, decided):
        """After a task: its new adapters join the pool."""
        self.choices.append(dict(decided))
        for block in (block for block, k in decided.items() if k == "new"):
            self.choices[-1][block] = len(self.pool[block])
            new = {n: ba for n, ba in trained.detached().items() if block_of(n) == block}
            self.pool[block].append(new)

    def weights_of(self, task):
        """W0 + ΔW of a task's adapters; W0 for -1. -> dict layer: (d, k)"""
        weights = dict(self.w0)
        for name, w in self.w0.items() if task >= 0 else ():
            k = self.choices[task][block_of(name)]
            if k != "empty":
                weights[name] = w + ham.dense(self.pool[block_of(name)][k][name])
        return weights

    def stored(self):
        every = [x for adapters in self.pool.values() for one in adapters for x in factors(one)]
        return [*every, *self.frozen]


def train_safm(vit, method, data, task):
    """Warm-up and search, an epoch each (our choice), then the tuning. -> Tuned, record"""
    config = method.config
    first = ham.new_adapter(method.w0, config.rank, config.seed)
    method.config = dataclasses.replace(config, epochs=1)
    method.stage = method.trainable(first, [])
    warm, _ = ham.train_task(vit, method, data, task)
    method.stage = method.search(warm.detached())
    search, _ = ham.train_task(vit, method, data, task)
    decided, method.config = search.decided(), config
    method.stage = method.tuned(search.detached(), decided)
    tuned, log = ham.train_task(vit, method, data, task, loss_of(method))
    method.keep(tuned, decided)
    losses = [value for value, _ in log[-(len(log) // config.epochs) :]]  # last epoch
    record = {"loss": sum(losses) / len(losses), "adapters": decided}
    record["search"] = {block: w.softmax(0).tolist() for block, w in search.w.items()}
    return tuned, dict.fromkeys(ham.RECORD) | record


def learn_safm(vit, method, data, folder):
    """ham.learn's loop, with three stages per task, weights per task, and the task guessed."""
    state, tested = ham.begin(folder, vit, method, data, resume=False), {}
    config, class_rows, records = method.config, state["class_rows"], state["records"]
    method.watch(vit)
    for task, classes in enumerate(data.tasks):
        times = [time.perf_counter()]
        tuned, record = train_safm(vit, method, data, task)
        times += [time.perf_counter()] * 2  # nothing is merged
        means = [
            ham.class_means(*ham.extract(vit, weights, data, "train", classes, config), classes)
            for weights in (method.weights_of(task), method.w0)
        ]
        if not means[0].isfinite().all():
            raise ham.InputError(f"task {task + 1}: not finite any more; lower --lr {config.lr}")
        class_rows["class-mean"][list(classes)] = means[0]
        class_rows["head"][list(classes)] = tuned.head.detach()
        method.frozen.append(means[1])
        times.append(time.perf_counter())
        record |= evaluate_safm(vit, method, data, tested, class_rows, state["matrix"])
        times.append(time.perf_counter())
        record["seconds"] = dict(zip(ham.PARTS, np.diff(times).tolist()))
        records.append(record)
        ham.print_task(records, config)
    bare = [tested[-1, j] for j in range(len(data.tasks))]
    results = ham.summary(vit, method, data, state, bare)
    # Features of different tasks lie in different spaces; images are trained on in three stages.
    results["class_mean_oracle"] = None
    results["images_per_second"] = dict.fromkeys(("training", "inference"))
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (folder / "results.json").write_text(text, "utf-8")  # no model: no single set of weights
    return results


def evaluate_safm(vit, method, data, tested, class_rows, matrix):
    """As ham.evaluate: an image takes the weights of the task of its nearest frozen class mean.

    tested: (task, j) -> features and labels of task j's test images under a task's weights
    """
    config, seen, record = method.config, data.tasks[: len(method.choices)], {}
    for task in range(-1, len(seen)):  # -1: W0
        weights = method.weights_of(task)
        for j in (j for j in range(len(seen)) if (task, j) not in tested):
            tested[task, j] = ham.extract(vit, weights, data, "test", data.tasks[j], config)

    def under(task):
        return torch.cat([tested[task, j][0] for j in range(len(seen))])

    labels = torch.cat([tested[-1, j][1] for j in range(len(seen))])
    owner = torch.tensor([k for k, t in enumerate(seen) for _ in t], device=labels.device)  # (C,)
    guess = owner[ham.cosine_logits(under(-1), torch.cat(method.frozen)).argmax(1)]  # (N,)
    for name, rows in class_rows.items():
        logits = [ham.cosine_logits(under(k), rows[t[0] : t[-1] + 1]) for k, t in enumerate(seen)]
        logits = torch.cat(logits, dim=1)  # (N, C), the columns of a task under its weights
        guessed = logits.masked_fill(owner != guess[:, None], -math.inf)
        matrix[name].append(ham.accuracies(guessed, labels, seen)[0])
        accuracy = ham.accuracy_so_far(matrix[name][-1], data.sizes("test"))
        record[f"{name.replace('-', '_')}_accuracy"] = accuracy
        if name == config.read_out:
            known = ham.accuracies(logits, labels, seen)[1]
            record |= {"accuracy": accuracy, "task_known_accuracy": known}
    return record | {"forgetting": ham.forgetting(matrix[config.read_out])}


# --------------------------------------------------------------------------- Settings, command line

METHODS = {"treelora": TreeLoRA, "safm": SAFM, "sd_lora": SDLoRA, "o_lora": OLoRA, "ewc": EWC}
# λ; of safm, ewc: our choice; treelora's is the paper's, of a distance that we rescale.
PENALTY = {"treelora": 0.1, "safm": 1.0, "o_lora": 0.5, "ewc": 1e4}
# c of ham.learning_rate's law: the best of those tried on held-out images (results/README.md).
LEARNING_RATE = dict.fromkeys(METHODS, 1e-3) | {"ewc": 3e-3}


def learning_rate(method, n):
    """Of A and B, for n training images per task."""
    if method in LEARNING_RATE:
        return LEARNING_RATE[method] * min(1.0, 375 / n)
    return ham.learning_rate(method, n)


@dataclass(frozen=True)
class Config(ham.Config):
    """ham.py's settings, other methods, and the weight of their penalty."""

    method: str = ham.option(
        None, "a method of this file or of ham.py; default ham", (*METHODS, *ham.METHODS)
    )
    lr: float = ham.option(
        None,
        "learning rate of A and B (ours); default c min(1, 375 / n), n training images per task, "
        f"c {', '.join(f'{k} {c:g}' for k, c in LEARNING_RATE.items())}; of others as in ham.py",
    )
    penalty: float = ham.option(
        None, f"λ; default {', '.join(f'{k} {x:g}' for k, x in PENALTY.items())}"
    )
    gain: float = ham.option(
        None,
        "of ham, --merge solution: a new member's 1 / (n + 1) becomes min(n + 1, gain) / (n + 1)",
    )


def resolve(config):
    """As ham.resolve; None where a setting does not apply."""
    method = config.method or "ham"
    changes = {"gain": config.gain if method == "ham" else None}
    if method not in PENALTY or config.penalty is None:
        changes["penalty"] = PENALTY.get(method)
    if method in METHODS:
        changes |= dict.fromkeys(ham.GROUPED) | {"train_alpha": method == "sd_lora"}
    if method == "sd_lora":
        changes["lr_alpha"] = config.lr_alpha
    if changes["gain"] and config.merge != "solution":
        raise ham.InputError(f"--gain {config.gain}: goes with --merge solution only")
    return ham.resolve(dataclasses.replace(config, **changes))


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
    data, vit = ham.load_data(config), ham.build_vit(config)
    if config.lr is None and config.method != "frozen":
        n = sum(data.sizes("train")) / config.tasks
        config = dataclasses.replace(config, lr=learning_rate(config.method, n))
    if config.method == "treelora":
        for block in vit.blocks:  # fused attention has no second derivative
            block.attn.fused_attn = False
    w0 = {} if config.method == "frozen" else ham.lora_layers(vit, config.layers)
    kind = Gain if config.gain else (ham.METHODS | METHODS)[config.method]
    method = kind(w0, config)
    return vit, method, data, loss_of(method)


def run(config):
    """As ham.run. -> dict, what results.json holds"""
    vit, method, data, loss = prepare(config)
    if method.config.method == "safm":
        with ham.result_folder(method.config) as folder:
            return learn_safm(vit, method, data, folder)
    more = method.config.method in ("ewc", "treelora")  # carry more than groups: no resuming
    return ham.learn(vit, method, data, loss, resume=not more)


def main(argv=None):
    """The command line: ham.py's flags."""
    config = ham.parse(argv, Config, __doc__)
    try:
        run(config)
    except (ham.InputError, OSError) as error:
        ham.fail(error)


if __name__ == "__main__":
    main()
