"""Tests of ham.py: `python -m pytest -q`. No network, no data; what needs real images is skipped.

Each equation is checked against brute force, each control against an independent few-line version,
the command line as a user calls it. Real CIFAR-100 and CUB-200 are looked for in ./data.
"""

import ast
import copy
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call
from torch.nn.utils import parametrize

import ham
from extras import demo, screen

ROOT = Path(__file__).parent
DATA = ROOT / "data"
CLASSES, TRAIN, TEST = 6, 10, 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A FOLDER data set of six noisy colours, and weights of a small ViT beside it."""
    root, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for part, n in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            (root / part / f"class{label}").mkdir(parents=True)
            for i in range(n):
                colour = 128 + 90 * np.cos(label + np.array([0, 2, 4])) + random.normal(0, 50, 3)
                pixels = colour + random.normal(0, 30, (40, 48, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / part / f"class{label}" / f"{i}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "vit.safetensors")
    return root


def config(folder, out, **settings):
    """A configuration that runs in a second."""
    values = {"dataset": str(folder), "data_dir": str(folder), "out": str(out), "tasks": 3}
    values |= {"model": "test_vit", "weights": str(folder / "vit.safetensors"), "img_size": 32}
    values |= {"epochs": 2, "batch_size": 8, "precision": "fp32", "device": "cpu", "rank": 2}
    return ham.Config(**(values | settings))


def untrained(folder, tmp_path, **settings):
    """ViT, HAM and data of a configuration, untrained."""
    c = ham.resolve(config(folder, tmp_path, **settings))
    vit, data = ham.build_vit(c), ham.load_data(c)
    return vit, ham.HAM(ham.lora_layers(vit, c.layers), c), data


def trained(folder, tmp_path, **settings):
    """The same after all its tasks, as a Learner."""
    learner = ham.Learner(*untrained(folder, tmp_path, **settings))
    for task in range(learner.c.tasks):
        learner.learn(task)
    return learner


def features(vit, weights, data):
    rows = torch.cat(data.test)
    with torch.no_grad():
        return functional_call(vit, weights, data.batch(rows, "cpu"))


def cli(*arguments, **kwargs):
    """ham.py as a user calls it."""
    command = [sys.executable, str(ROOT / "ham.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def flags(c):
    """A Config as a command line."""
    for f in dataclasses.fields(c):
        value, flag = getattr(c, f.name), f.name.replace("_", "-")
        if value is not None and value != f.default:
            yield from (
                [f"--{'' if value else 'no-'}{flag}"] if f.type == "bool" else [f"--{flag}", value]
            )


# ------------------------------------------------------------------------------ (1) to (4), by hand


def test_effective_weight_is_equation_1():
    torch.manual_seed(0)
    w0, groups, b, a = torch.randn(4, 5), torch.randn(3, 4, 5), torch.randn(4, 2), torch.randn(2, 5)
    alphas, alpha = [0.5, -1.0, 2.0], 0.7
    want = w0.clone()
    for row, column in itertools.product(range(4), range(5)):
        for j in range(3):
            want[row, column] += alphas[j] * groups[j, row, column]
        want[row, column] += alpha * sum(b[row, r] * a[r, column] for r in range(2))
    got = ham.effective_weight(w0, groups, torch.tensor(alphas), b, a, torch.tensor(alpha))
    torch.testing.assert_close(got, want)
    x = torch.randn(5)  # h = W0 x + Σ α_G ΔW_G x + α_i ΔW_i x
    h = w0 @ x + sum(s * g @ x for s, g in zip(alphas, groups)) + alpha * (b @ (a @ x))
    torch.testing.assert_close(got @ x, h)


def test_training_moves_the_factors_and_every_scalar_and_nothing_else(folder, tmp_path):
    learner = trained(folder, tmp_path, g_max=2, tau=1.0, tasks=2)
    vit, h, data = learner.vit, learner.ham, learner.data
    h.groups.append(ham.Group(copy.deepcopy(h.groups[0].delta_w), 1.0, [9]))
    before = copy.deepcopy([g.delta_w for g in h.groups]), copy.deepcopy(vit.state_dict())
    start, (p, log) = h.start(), ham.train_task(vit, h, data, 1)
    assert p.alpha != 1 and (p.alpha_groups != start.alpha_groups).all()
    assert all(
        (b != 0).any() and (a != start.adapter[n][1]).any() for n, (b, a) in p.adapter.items()
    )
    for old, new in zip(before[0], h.groups):
        for name, update in old.items():
            assert torch.equal(ham.dense(update), ham.dense(new.delta_w[name]))
    assert all(torch.equal(x, before[1][n]) for n, x in vit.state_dict().items())
    assert len(log) == c_steps(h.config, 3 * TRAIN)


def c_steps(c, images):
    return c.epochs * math.ceil(images / c.batch_size)


def test_training_lowers_the_loss(folder, tmp_path):
    _, log = ham.train_task(*untrained(folder, tmp_path, epochs=10), 0)
    assert sum(x for x, _ in log[-5:]) < 0.7 * sum(x for x, _ in log[:5])


def test_cosine_similarity():
    torch.manual_seed(0)
    delta, groups = torch.randn(30), torch.randn(4, 30)
    want = [(delta @ g / (delta.norm() * g.norm())).item() for g in groups]
    assert ham.cosine_similarity(delta, groups) == pytest.approx(want, abs=1e-6)
    assert ham.cosine_similarity(delta, []) == []
    assert ham.cosine_similarity(delta, [3 * delta, -delta]) == pytest.approx([1, -1])


@pytest.mark.parametrize(
    ("similarities", "tau", "g_max", "want"),
    [
        ([], 0.1, 5, 0),  # the first task opens the first group
        ([0.5, 0.9, 0.2], 0.1, 5, 1),  # the most similar one
        ([0.05, -0.9, 0.02], 0.1, 5, 3),  # none above τ: open
        ([0.1], 0.1, 5, 1),  # join only if s > τ
        ([0.05, -0.9, 0.02], 0.1, 3, 0),  # none above τ, but full
        ([0.99, 0.98], 1.0, 5, 2),  # τ = 1 opens groups first
        ([-0.99], -1.0, 5, 0),  # τ = -1 never opens a second
        ([0.3, 0.3], 0.1, 5, 0),
    ],
)
def test_assign_group(similarities, tau, g_max, want):
    assert ham.assign_group(similarities, tau, g_max) == want


@pytest.mark.parametrize("rho", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_prune_keeps_the_largest(rho):
    torch.manual_seed(0)
    x = torch.randn(13, 7)
    order = sorted(range(91), key=lambda i: -abs(x.flatten()[i]))
    want = torch.zeros(91)
    for i in order[: max(1, round(rho * 91))]:
        want[i] = x.flatten()[i]
    assert torch.equal(ham.prune(x, rho), want.view(13, 7))


def test_prune_of_a_matrix_that_torch_quantile_refuses():
    x = torch.linspace(-1, 1, 22_000_000)
    kept = ham.prune(x, 0.25)
    assert (kept != 0).sum() == 5_500_000
    assert x[kept != 0].abs().min() >= x[kept == 0].abs().max()


def updates(n, kind, d=6, k=8, r=2):
    torch.manual_seed(n)
    pairs = [(torch.randn(d, r), torch.randn(r, k)) for _ in range(n)]
    return pairs if kind == "factors" else [b @ a for b, a in pairs]


@pytest.mark.parametrize("how", ["mean", "sum", "solution"])
@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_groups_are_what_their_members_say(how, kind):
    """Step by step with changing scalars, against the formula written out over all members."""
    members = updates(4, kind)
    alphas, alpha_groups = [0.9, 1.1, 0.7, 1.3], [1.0, 1.2, 0.8, 0.6]
    group, want = None, torch.zeros(6, 8)
    for n, (new, alpha, alpha_g) in enumerate(zip(members, alphas, alpha_groups)):
        weights = ham.shares(n, alpha_g, alpha, how)
        group = ham.merge([new, group] if n else [new], weights[: n + 1] if n == 0 else weights)
        delta = alpha * ham.dense(new)
        want = {
            "mean": (n * alpha_g * want + delta) / (n + 1),
            "sum": alpha_g * want + delta,
            "solution": alpha_g * want + delta / (n + 1),
        }[how]
    torch.testing.assert_close(ham.dense(group), want)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_at_fixed_scalars_a_group_is_its_members_mean_or_sum_in_any_order(how):
    members = updates(4, "factors")
    want = sum(b @ a for b, a in members) / (4 if how == "mean" else 1)
    for order in itertools.permutations(members):
        group = ham.merge(order[:1], [1.0])
        for n, new in enumerate(order[1:], 1):
            group = ham.merge([new, group], ham.shares(n, 1.0, 1.0, how))
        torch.testing.assert_close(ham.dense(group), want)


@pytest.mark.parametrize("how", ["mean", "solution"])
@pytest.mark.parametrize("gain", [1.0, 2.0, 2.5, 5.0, 100.0])
def test_gain_is_a_factor_of_a_members_share_up_to_the_sum(how, gain):
    members = [b @ a for b, a in updates(5, "factors")]
    group = members[0]
    for n, new in enumerate(members[1:], 1):
        group = ham.merge([new, group], ham.shares(n, 1.0, 1.0, how, gain))
        share = [min(m, gain) / m for m in range(1, n + 2)]
        share = share[-1:] * (n + 1) if how == "mean" else share
        want = sum(s * member for s, member in zip(share, members))
        torch.testing.assert_close(group, want)


def test_merge_concatenates_along_the_rank_until_dense_is_smaller():
    d, k, r = 12, 20, 2  # factors are smaller while r n < d k / (d + k) = 7.5
    group = None
    for n, new in enumerate(updates(5, "factors", d, k, r)):
        group = ham.merge([new, group] if n else [new], ham.shares(n, 1.0, 1.0, "sum")[: n + 1])
        assert isinstance(group, tuple) == (r * (n + 1) < 7.5)
        if isinstance(group, tuple):
            assert group[0].shape == (d, r * (n + 1)) and group[1].shape == (r * (n + 1), k)


def test_merge_equals_peft_cat():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    members, scalars = updates(3, "factors", 6, 8, 1), [0.5, 1.5, -0.7]
    base = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    lora = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    model = peft.get_peft_model(base, lora, adapter_name="m0")
    for i, (b, a) in enumerate(members):
        if i:
            model.add_adapter(f"m{i}", lora)
        layer = model.base_model.model[0]
        layer.lora_A[f"m{i}"].weight.data, layer.lora_B[f"m{i}"].weight.data = a, b
    model.add_weighted_adapter(["m0", "m1", "m2"], scalars, "cat", combination_type="cat")
    with torch.no_grad():
        want = layer.get_delta_weight("cat")
    torch.testing.assert_close(ham.dense(ham.merge(members, scalars)), want)


# ------------------------------------------------------------------------------------- Invariants


def test_a_new_adapter_changes_nothing(folder, tmp_path):
    learner = trained(folder, tmp_path)
    vit, h, data = learner.vit, learner.ham, learner.data
    with torch.no_grad():
        weights = h.start().weights(h.w0)
    torch.testing.assert_close(features(vit, weights, data), features(vit, h.folded(), data))
    bare = ham.HAM(h.w0, h.config)
    assert torch.equal(features(vit, bare.start().weights(h.w0), data), features(vit, {}, data))


@pytest.mark.parametrize(("merge", "tau"), [("mean", 1.0), ("sum", 1.0), ("sum", -1.0)])
def test_opening_a_group_and_joining_under_sum_change_nothing(folder, tmp_path, merge, tau):
    vit, h, data = untrained(folder, tmp_path, merge=merge, tau=tau, rho=1.0)
    for task in range(3):
        p, _ = ham.train_task(vit, h, data, task)
        with torch.no_grad():
            before = features(vit, p.weights(h.w0), data)
        h.finish(task, p)
        assert len(h.groups) == (task + 1 if tau == 1 else 1)
        torch.testing.assert_close(features(vit, h.folded(), data), before, rtol=1e-4, atol=1e-4)
    assert (before - features(vit, {}, data)).abs().max() > 1e-2  # there was something to lose


def test_joining_under_mean_changes_something(folder, tmp_path):
    learner = trained(folder, tmp_path, tasks=2, tau=-1.0)
    assert [g.members for g in learner.ham.groups] == [[0, 1]]
    both = trained(folder, tmp_path, tasks=2, tau=-1.0, merge="sum")
    name = next(iter(learner.ham.w0))
    ours, theirs = (ham.dense(x.ham.groups[0].delta_w[name]).norm() for x in (learner, both))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("method", ["ham", "sequential", "average", "joint"])
def test_w0_is_bit_identical_and_folding_equals_the_groups(folder, tmp_path, method):
    learner = trained(folder, tmp_path, method=method, prune="product", rho=0.3)
    fresh = ham.build_vit(learner.c)
    for (name, now), then in zip(learner.vit.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(now, then), name
    for name, w in learner.ham.folded().items():
        want = learner.ham.w0[name].double()
        for group in learner.ham.groups:
            update = group.delta_w[name]
            matrix = (
                update[0].double() @ update[1].double() if isinstance(update, tuple) else update
            )
            want = want + group.alpha * matrix
        torch.testing.assert_close(w.double(), want, rtol=1e-5, atol=1e-6)
        assert not torch.equal(w, learner.ham.w0[name])


@pytest.mark.parametrize(("g_max", "tau"), [(1, 1.0), (2, 1.0), (2, 0.0), (6, 1.0)])
def test_never_more_than_g_max_groups(folder, tmp_path, g_max, tau):
    learner = trained(folder, tmp_path, tasks=6, g_max=g_max, tau=tau, epochs=1)
    assert all(len(r["group_sizes"]) <= g_max for r in learner.records)
    assert sorted(t for g in learner.ham.groups for t in g.members) == list(range(6))
    if tau == 1:
        assert len(learner.ham.groups) == g_max


def test_random_grouping_opens_like_cosine_and_then_draws(folder, tmp_path):
    settings = {"tasks": 6, "g_max": 3, "tau": 1.0, "epochs": 1}
    joined = {}
    for grouping, seed in (("cosine", 1), ("random", 1), ("random", 2), ("random", 3)):
        learner = trained(folder, tmp_path, grouping=grouping, seed=seed, **settings)
        joined[grouping, seed] = [r["group"] for r in learner.records]
        assert joined[grouping, seed][:3] == [0, 1, 2]
    assert len({tuple(groups) for (how, _), groups in joined.items() if how == "random"}) > 1


def test_fixed_importance_stays_at_1(folder, tmp_path):
    for record in trained(folder, tmp_path, train_alpha=False).records:
        assert record["alpha"] == 1 and set(record["alpha_groups"]) <= {1.0}


def test_pruned_adapter_is_what_is_merged(folder, tmp_path):
    vit, h, data = untrained(folder, tmp_path, rho=0.25, prune="factors")
    p, _ = ham.train_task(vit, h, data, 0)
    h.finish(0, p)
    for name, (b, a) in h.groups[0].delta_w.items():
        pruned = ham.prune(p.adapter[name][0], 0.25), ham.prune(p.adapter[name][1], 0.25)
        torch.testing.assert_close(b @ a, p.alpha * (pruned[0] @ pruned[1]))
        assert (a != 0).sum() == round(0.25 * a.numel())


# ------------------------------------------------------- Controls, against independent few lines


class PlainLoRA(torch.nn.Module):
    """W0 + B A through torch's parametrizations: another way than ham's functional_call."""

    def __init__(self, b, a):
        super().__init__()
        self.b, self.a = torch.nn.Parameter(b.clone()), torch.nn.Parameter(a.clone())

    def forward(self, w0):
        return w0 + self.b @ self.a


def plain_training(vit, data, classes, start, c, shuffle):
    """Train one LoRA on some classes; the same draws as ham, all else written anew. -> {name: BA}"""
    vit, loras = copy.deepcopy(vit), {}
    for name, (b, a) in start.items():
        loras[name] = PlainLoRA(b, a)
        parametrize.register_parametrization(
            vit.get_submodule(name.removesuffix(".weight")), "weight", loras[name]
        )
    rows = torch.cat([data.train[k] for k in classes])
    y = torch.tensor([i for i, k in enumerate(classes) for _ in data.train[k]])
    with torch.no_grad():
        f = vit(data.batch(rows, "cpu"))
    head = torch.nn.Parameter(torch.stack([f[y == i].mean(0) for i in range(len(classes))]))
    factors = torch.optim.AdamW([p for m in loras.values() for p in m.parameters()], weight_decay=0)
    last = torch.optim.AdamW([head], weight_decay=0)
    step, steps = 0, c.epochs * math.ceil(len(rows) / c.batch_size)
    for _ in range(c.epochs):
        for batch in torch.randperm(len(rows), generator=shuffle).split(c.batch_size):
            mirror = torch.rand(len(batch), generator=shuffle) < 0.5
            x = data.batch(rows[batch], "cpu")
            x[mirror] = x[mirror].flip(-1)
            cosine = F.cosine_similarity(vit(x)[:, None], head[None], dim=2)
            for optimiser, rate in ((factors, c.lr), (last, c.lr_head)):
                for group in optimiser.param_groups:
                    group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
                optimiser.zero_grad()
            F.cross_entropy(16 * cosine, y[batch]).backward()
            factors.step()
            last.step()
            step += 1
    return {name: (m.b.detach(), m.a.detach()) for name, m in loras.items()}


@pytest.mark.parametrize("method", ["sequential", "joint", "average"])
def test_controls_equal_an_independent_version(folder, tmp_path, method):
    learner = trained(folder, tmp_path, method=method, tasks=2)
    c, data, w0 = learner.c, learner.data, learner.ham.w0
    start, parts = ham.new_adapter(w0, c.rank, c.seed), []
    for task, classes in enumerate(data.tasks):
        shuffle = torch.Generator().manual_seed(1000 * c.seed + task)
        trained_to = plain_training(learner.vit, data, classes, start, c, shuffle)
        start = start if method == "average" else trained_to
        parts.append({name: b @ a for name, (b, a) in trained_to.items()})
    assert len(parts) == (1 if method == "joint" else 2)
    for name, w in learner.ham.folded().items():
        mean = (parts[0][name] + parts[-1][name]) / 2
        want = mean if method == "average" else parts[-1][name]
        torch.testing.assert_close(w - w0[name], want, rtol=1e-2, atol=2e-6)
        assert want.abs().max() > 1e-4


def test_frozen_is_nearest_class_mean_of_the_bare_model(folder, tmp_path):
    results = ham.run(config(folder, tmp_path, method="frozen"))
    c = ham.resolve(config(folder, tmp_path, method="frozen"))
    vit, data = ham.build_vit(c), ham.load_data(c)
    with torch.no_grad():
        f = [F.normalize(vit(data.batch(rows, "cpu")), dim=1) for rows in data.train]
        g = [F.normalize(vit(data.batch(rows, "cpu")), dim=1) for rows in data.test]
    means = F.normalize(torch.stack([x.mean(0) for x in f]), dim=1)
    right = sum(((x @ means.T).argmax(1) == k).sum().item() for k, x in enumerate(g))
    assert results["final_accuracy"] == pytest.approx(100 * right / (CLASSES * TEST))
    assert results["head_accuracy"] is None and results["config"]["lr"] is None
    assert results["final_accuracy"] == pytest.approx(results["class_mean_oracle"])


# ------------------------------------------------------------------------------ Data and read-out


def test_class_order_is_the_public_one():
    assert ham.class_order(range(100), "random", 1993)[:6] == [68, 56, 78, 8, 23, 84]
    assert ham.class_order("edcba", "natural", 1993) == [0, 1, 2, 3, 4]
    want = np.random.RandomState(7).permutation(200).tolist()
    assert ham.class_order(range(200), "random", 7) == want


def test_class_order_from_a_file(tmp_path):
    names, file = ["ant", "bee", "cat", "dog"], tmp_path / "order.txt"
    file.write_text("dog\nant\nbee\ncat\n")
    assert ham.class_order(names, str(file), 1) == [3, 0, 1, 2]
    file.write_text("cat\ndog\n\nbee\nant\n")  # blocks: whole, in an order drawn from the seed
    orders = {tuple(ham.class_order(names, str(file), seed)) for seed in range(20)}
    assert orders == {(2, 3, 1, 0), (1, 0, 2, 3)}
    for text, named in (("ant\nbee\ncat", "dog"), ("ant\nbee\ncat\ndog\ndog", "dog")):
        file.write_text(text)
        with pytest.raises(ham.InputError, match=named):
            ham.class_order(names, str(file), 1)


def test_superclasses_are_20_blocks_of_5():
    text = (ROOT / "extras/cifar100_superclasses.txt").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    assert [len(block) for block in blocks] == [5] * 20
    assert len({name for block in blocks for name in block}) == 100
    assert ["beaver", "dolphin", "otter", "seal", "whale"] in blocks


def test_tasks_share_out_the_classes():
    assert [len(t) for t in ham.split_tasks(100, 7)] == [15, 15, 14, 14, 14, 14, 14]
    assert [list(t) for t in ham.split_tasks(5, 3)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ham.InputError, match="only 5 classes"):
        ham.split_tasks(5, 6)


@pytest.mark.parametrize("validate", [False, True])
def test_no_test_image_is_trained_on(folder, tmp_path, validate):
    c = ham.resolve(config(folder, tmp_path, validate=validate, images_per_class=5))
    data = ham.load_data(c)
    for position, (train, test) in enumerate(zip(data.train, data.test)):
        label = data.order[position]
        first = label * TRAIN
        assert data.names[position] == f"class{label}"
        assert train.tolist() == list(range(first, first + 5))
        behind = CLASSES * TRAIN + label * TEST
        held_out = list(range(first + TRAIN - 3, first + TRAIN))
        assert test.tolist() == (held_out if validate else list(range(behind, behind + TEST)))


def test_decoding_is_timms_transform_and_is_cached(folder, tmp_path):
    c = ham.resolve(config(folder, tmp_path))
    data = ham.load_data(c)
    cfg = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic"}
    transform = timm.data.create_transform(32, crop_pct=c.crop_pct, **cfg)
    image = Image.open(folder / "train" / "class2" / "3.png")
    want = (255 * transform(image)).round()
    assert torch.equal(data.pixels[2 * TRAIN + 3].float(), want)
    files = list((folder / "cache").iterdir())
    ham.load_data(c)
    assert list((folder / "cache").iterdir()) == files and not list(folder.rglob("*.part"))


@pytest.mark.parametrize(("size", "crop_pct"), [(160, 1.0), (160, 0.9), (224, 1.0), (24, 0.9)])
def test_batched_resizing_matches_timms_transform(size, crop_pct, record_property):
    """Greatest and mean difference in grey levels, PIL rounding twice and we once."""
    pixels = demo.draw(np.random.RandomState(0), "red striped star", 8)
    norm = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}
    transform = timm.data.create_transform(size, crop_pct=crop_pct, **norm)
    want = torch.stack([transform(Image.fromarray(x.transpose(1, 2, 0))) for x in pixels])
    got = ham.prepare(torch.from_numpy(pixels), size, crop_pct, **norm)
    difference = 255 * (got - want).abs()
    print(f"{size} px: greatest {difference.max():.2f}, mean {difference.mean():.3f} grey levels")
    assert difference.max() < 2.01 and difference.mean() < 0.2
    plain = F.interpolate(torch.from_numpy(pixels).float(), size=size, mode="bicubic") / 255
    if size > 32 and crop_pct == 1:  # the other cubic kernel would be far off
        assert 255 * (plain - want).abs().max() > 10


def test_norm_unit_leaves_pixels_in_0_1(folder, tmp_path):
    data = ham.load_data(ham.resolve(config(folder, tmp_path, norm="unit")))
    x = data.batch(torch.tensor([0, 1]), "cpu", flip=torch.tensor([True, False]))
    want = data.pixels[:2] / 255
    torch.testing.assert_close(x, torch.stack([want[0].flip(-1), want[1]]))


def test_class_means():
    f = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    means = ham.class_means(f, torch.tensor([7, 7, 8]), [7, 8])
    want = torch.tensor([[0.3, 0.9], [1.0, 0.0]])  # mean of (.6, .8) and (0, 1), then normalised
    torch.testing.assert_close(means, F.normalize(want, dim=1))


def test_class_means_are_taken_after_the_merge(folder, tmp_path):
    learner = trained(folder, tmp_path, tau=-1.0, tasks=2, epochs=4)
    rows, labels = learner.data.rows("train", learner.data.tasks[1])
    f = features_of(learner, learner.ham.folded(), rows)
    want = ham.class_means(f, labels, learner.data.tasks[1])
    got = learner.rows["class-mean"][list(learner.data.tasks[1])]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def features_of(learner, weights, rows):
    with torch.no_grad():
        return functional_call(learner.vit, weights, learner.data.batch(rows, "cpu"))


# --------------------------------------------------------------------------------------- Measures

MATRIX = [[90.0], [80.0, 70.0], [60.0, 75.0, 50.0]]
SIZES = [10, 30, 60]


def test_measures_on_a_matrix_by_hand():
    got = ham.measures(MATRIX, SIZES)
    second, third = (800 + 2100) / 40, (600 + 2250 + 3000) / 100
    assert got["final_accuracy"] == pytest.approx(third) == pytest.approx(58.5)
    assert got["average_incremental_accuracy"] == pytest.approx((90 + second + third) / 3)
    assert got["forgetting"] == pytest.approx(((90 - 60) + (70 - 75)) / 2)
    assert got["backward_transfer"] == pytest.approx(((60 - 90) + (75 - 70)) / 2)
    assert got["learning_accuracy"] == pytest.approx((90 + 70 + 50) / 3)
    assert MATRIX == [[90.0], [80.0, 70.0], [60.0, 75.0, 50.0]]  # the input is not touched


def test_measures_of_one_task():
    got = ham.measures([[42.0]], [7])
    assert got["forgetting"] == got["backward_transfer"] == 0
    assert got["final_accuracy"] == got["learning_accuracy"] == 42


def test_accuracies_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 5, 2], [0, 9, 1, 2], [0, 0, 7, 1]])
    labels = torch.tensor([0, 1, 3, 3])  # tasks {0, 1}, {2, 3}
    per_task, known = ham.accuracies(logits, labels, [range(2), range(2, 4)])
    assert per_task == [50.0, 0.0]  # right; 2 instead of 1; 1 instead of 3; 2 instead of 3
    assert known == 75.0  # with the task known, only the last is wrong


# ------------------------------------------------------------------------------------- Whole runs

KEYS = """config class_order tasks accuracy_matrix final_accuracy average_incremental_accuracy
forgetting backward_transfer learning_accuracy task_known_accuracy head_accuracy class_mean_accuracy
class_mean_oracle parameters_trained parameters_stored seconds images_per_second versions hardware
peak_memory_bytes commit ham_sha256"""


def test_run_writes_what_the_contract_says_and_load_gives_the_model(folder, tmp_path):
    c = config(folder, tmp_path)
    results = ham.run(c)
    run_folder = tmp_path / f"{folder.name}-T3-ham-s1993"
    assert json.loads((run_folder / "results.json").read_text()) == results
    assert set(KEYS.split()) <= set(results)
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    for record in results["tasks"]:
        assert {"accuracy", "forgetting", "alpha", "alpha_groups", "group", "similarities"} <= set(
            record
        )
    want = ham.accuracy_so_far(results["accuracy_matrix"][-1], [2 * TEST] * 3)
    assert results["final_accuracy"] == results["class_mean_accuracy"] == pytest.approx(want)
    model = ham.load(run_folder)
    files = sorted((folder / "test").rglob("*.png"))
    names = model.predict([Image.open(file) for file in files])
    right = sum(file.parent.name == name for file, name in zip(files, names))
    assert 100 * right / len(files) == pytest.approx(results["final_accuracy"])
    fresh = ham.build_vit(ham.resolve(c)).state_dict()
    changed = {n for n, x in model.vit.state_dict().items() if not torch.equal(x, fresh[n])}
    assert changed == {n for n in fresh if n.endswith("qkv.weight")}


def test_read_out_head_uses_the_trained_rows(folder, tmp_path):
    results = ham.run(config(folder, tmp_path, read_out="head"))
    assert results["final_accuracy"] == results["head_accuracy"]


def test_bf16_and_fp32_agree(folder, tmp_path):
    """bf16 inside the model only: accuracies over 24 test images differ by two images at most."""
    got = [trained(folder, tmp_path, precision=p).records[-1]["accuracy"] for p in ("bf16", "fp32")]
    assert abs(got[0] - got[1]) <= 100 * 2 / (CLASSES * TEST)


def test_weights_stay_fp32_under_bf16(folder, tmp_path):
    """A share of 1/20 of a small update is below bf16's step at W0's size: it must not be lost."""
    learner = trained(folder, tmp_path, precision="bf16")
    tensors = [x for g in learner.ham.groups for u in g.delta_w.values() for x in u]
    tensors += [*learner.weights.values(), *learner.rows.values()]
    assert {x.dtype for x in tensors} == {torch.float32}


def test_the_same_command_twice_gives_the_same_figures(folder, tmp_path):
    got = []
    for out in ("first", "second"):
        done = cli(*flags(config(folder, tmp_path / out)))
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr + done.stdout  # not on a terminal: lines, no bar
        file = tmp_path / out / f"{folder.name}-T3-ham-s1993" / "results.json"
        got.append(json.loads(file.read_text()))
    for key in ("accuracy_matrix", "class_order", "class_mean_oracle", "head_accuracy"):
        assert got[0][key] == got[1][key]
    losses = [[t["loss"] for t in r["tasks"]] for r in got]
    assert losses[0] == losses[1]
    assert (
        len(re.findall(r"^task .*accuracy.*forgetting.*α.*group", done.stdout, re.MULTILINE)) == 3
    )


def test_a_run_with_other_settings_is_never_overwritten(folder, tmp_path):
    ham.run(config(folder, tmp_path, method="frozen"))
    file = tmp_path / f"{folder.name}-T3-frozen-s1993" / "results.json"
    before = file.read_bytes()
    done = cli(*flags(config(folder, tmp_path, method="frozen", images_per_class=4)))
    assert done.returncode == 2 and "images_per_class" in done.stderr and "--name" in done.stderr
    assert file.read_bytes() == before
    assert cli(*flags(config(folder, tmp_path, method="frozen"))).returncode == 0  # the same may
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ham.InputError, match="other weights"):
        ham.run(
            config(folder, tmp_path, method="frozen", weights=str(tmp_path / "other.safetensors"))
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rho", "0"], "--rho 0.0: must be from"),
        (["--tau", "2"], "--tau 2.0: must be from -1 to 1"),
        (["--rank", "0"], "--rank 0: must be >= 1"),
        (["--method", "hma"], "must be one of ham, sequential"),
        (["--tsks", "3"], "--tsks"),
        (["--dataset", "nowhere"], "{train,test}/CLASS"),
        (["--class-order", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--dataset", "cifar100", "--model", "vit_huge"], "unknown to timm"),
        (["--dataset", "cifar100", "--model", "vit_base_patch16_224.nope"], "nope"),
        (["--weights", "nowhere.pth", "--dataset", "cifar100"], "no such file"),
        (["--layers", "qkv,foo"], "qkv,proj,fc1,fc2"),
        (["--img-size", "64"], "--img-size 64"),
        (["--device", "meta"], "auto, cpu, cuda"),
        (["--name", "a/b"], "--name a/b"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--tasks", "31", "--method", "frozen"], "only 30 classes"),
    ],
)
def test_a_bad_flag_gives_one_line_and_status_2(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        ham.main([*arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


@pytest.mark.parametrize("method", ["ham", "sequential", "average", "joint", "frozen"])
def test_a_resolved_configuration_resolves_to_itself(folder, tmp_path, method):
    for settings in ({}, {"read_out": "head"}):
        c = ham.resolve(config(folder, tmp_path, method=method, **settings))
        assert ham.resolve(c) == c
    c = ham.resolve(ham.Config(method=method, out=str(tmp_path)))
    assert ham.resolve(c) == c


def test_wrong_weights_and_unreadable_images_are_named(folder, tmp_path):
    with pytest.raises(ham.InputError, match="is it this model's file"):
        ham.run(config(folder, tmp_path, model="vit_tiny_patch16_224"))
    (tmp_path / "bad.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ham.InputError, match=r"bad\.safetensors"):
        ham.run(config(folder, tmp_path, weights=str(tmp_path / "bad.safetensors")))
    bad = tmp_path / "bad"
    for part in ("train", "test"):
        (bad / part / "a").mkdir(parents=True)
        (bad / part / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(ham.InputError, match=r"x\.png is not a readable image"):
        ham.run(config(folder, tmp_path, dataset=str(bad), data_dir=str(tmp_path), tasks=1))
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.part"))


def test_demo_as_a_user_runs_it(tmp_path):
    """`python ham.py`: HAM forgets less than sequential, nothing is trivially right."""
    done = cli("--seed", "0", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    runs = {
        m: json.loads((tmp_path / f"demo-T10-{m}-s0/results.json").read_text())
        for m in ("ham", "sequential", "frozen")
    }
    for r in runs.values():  # nothing is trivially right, nor by chance (3.3 %)
        assert 15 < r["final_accuracy"] < 60
    assert runs["ham"]["forgetting"] < runs["sequential"]["forgetting"]
    assert done.stdout.count("\ntask") == 30 and "sequential" in done.stdout.splitlines()[-4]


# -------------------------------------------------------------------- The files and what they say


def test_budgets():
    source = (ROOT / "ham.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= 1000 and max(map(len, lines)) <= 100
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 40
    assert all(
        ast.get_docstring(n) for n in functions if not n.name.startswith("_") and n.col_offset == 0
    )
    assert (ROOT / "reproduce.ipynb").stat().st_size < 1_500_000


def test_ruff_has_nothing_to_do():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (["check"], ["format", "--check", "--line-length", "100"]):
        files = ["ham.py", "test_ham.py", "extras"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_inline_metadata_is_the_run_time_part_of_the_requirements():
    block = re.search(r"# /// script\n(.*?)# ///", (ROOT / "ham.py").read_text(), re.DOTALL)[1]
    inline = re.findall(r'"([a-z]+>=[\d.]+)"', block.split("dependencies")[1])
    requirements = (ROOT / "requirements.txt").read_text().split("# tests and notebook")[0]
    assert inline == re.findall(r"^[a-z]+>=[\d.]+", requirements, re.MULTILINE) and len(inline) >= 6


def test_default_rates_fall_with_many_images_of_a_large_data_set_only():
    def lr(data, n=None, method="ham"):
        return ham.resolve(ham.Config(dataset=data, images_per_class=n, method=method)).lr

    assert lr("cifar100") == lr("cifar100", 101) == 3e-4 and lr("cifar100", 100) == 1e-3
    assert lr("cub200", 5, "sequential") == lr("cub200", None, "sequential") == 1e-4
    assert ham.resolve(ham.Config(dataset="cifar100", lr=0.5)).lr == 0.5


def test_committed_results_are_whole():
    files = sorted((ROOT / "results").rglob("results.json"))
    assert files
    for file in files:
        r = json.loads(file.read_text())
        assert set(KEYS.split()) <= set(r), file
        assert file.parent.name.endswith(f"-s{r['config']['seed']}")
        assert r["final_accuracy"] == pytest.approx(
            ham.measures(r["accuracy_matrix"], r["test_images_per_task"])["final_accuracy"]
        )


def test_screening_ends_where_the_run_ends(folder, tmp_path):
    """extras/screen.py is ham.py on held-out images, less the evaluations between."""
    c = config(folder, tmp_path, validate=True, tasks=4)
    whole, short = ham.run(c), screen.screen(c)
    assert short["class-mean"][1] == pytest.approx(whole["class_mean_accuracy"])
    assert short["head"][1] == pytest.approx(whole["head_accuracy"])
    assert short["oracle"] == pytest.approx(whole["class_mean_oracle"])
    assert short["class-mean"][0] == pytest.approx(whole["tasks"][1]["accuracy"])
    assert short["settings"]["tasks"] == 4 and "seed" not in short["settings"]


def test_readme_snippets_run(folder, tmp_path, monkeypatch):
    """The python blocks of README.md, as they stand, where a run's folder and an image are at hand."""
    monkeypatch.chdir(tmp_path)
    ham.run(config(folder, "runs"))
    (tmp_path / "runs" / f"{folder.name}-T3-ham-s1993").rename(
        tmp_path / "runs" / "cub200-T10-ham-s1993"
    )
    Image.open(folder / "test" / "class0" / "0.png").save("bird.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102


def test_notebook_runs_in_quick_mode():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    notebook = nbformat.read(ROOT / "reproduce.ipynb", as_version=4)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)
    nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(ROOT)}}
    ).execute()


# ---------------------------------------------------------------------------------------- Real data


@pytest.mark.skipif(not (DATA / "cifar-100-python").is_dir(), reason="no data/cifar-100-python")
def test_real_cifar100():
    c = ham.resolve(ham.Config(dataset="cifar100", data_dir=str(DATA), model="test_vit"))
    data = ham.load_data(c)
    assert {len(rows) for rows in data.train} == {500} and {len(rows) for rows in data.test} == {
        100
    }
    assert len(data.pixels) == 60_000 and data.names[0] == "road"  # class 68
    assert len({row for rows in data.train + data.test for row in rows.tolist()}) == 60_000


@pytest.mark.skipif(not (DATA / "CUB_200_2011").is_dir(), reason="no data/CUB_200_2011")
def test_real_cub200():
    c = ham.Config(dataset="cub200", data_dir=str(DATA), model="test_vit", img_size=160)
    data = ham.load_data(ham.resolve(c))
    assert sum(map(len, data.train)) == 5994 and sum(map(len, data.test)) == 5794
    assert len(data.tasks) == 10 and data.names[data.order.index(0)] == "001.Black_footed_Albatross"


@pytest.mark.skipif(
    not (DATA / "deit_tiny_patch16_224.safetensors").is_file(),
    reason="no DeiT-Tiny weights in data/",
)
def test_real_weights_load_at_another_size():
    file = DATA / "deit_tiny_patch16_224.safetensors"
    model = "deit_tiny_patch16_224.fb_in1k"
    c = ham.Config(dataset="cifar100", model=model, weights=str(file), img_size=160, device="cpu")
    vit = ham.build_vit(ham.resolve(c))
    assert vit.pos_embed.shape == (1, 101, 192)
    assert [*ham.lora_layers(vit, "qkv")] == [f"blocks.{i}.attn.qkv.weight" for i in range(12)]
