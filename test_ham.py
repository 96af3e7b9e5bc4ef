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
import statistics
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
from extras import baselines, demo, run_all, screen, tables

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


def test_readme_tables_are_made_from_results():
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"<!-- table (\S+) -->", text), file
        assert tables.fill(text) == text, file


def test_claims_and_paired_differences_by_hand(tmp_path):
    finals = {"ham": (70.0, 74.0), "sequential": (69.0, 71.0), "frozen": (50.0,), "joint": (76.0,)}
    rows = tables.methods("cub200", 10) | {"other": "other"}
    for method, values in (finals | {"other": (60.0, 64.0)}).items():
        for seed, value in zip((1993, 1994), values):
            folder = tmp_path / f"{rows[method]}-s{seed}"
            folder.mkdir()
            r = {"config": {"seed": seed}, "final_accuracy": value, "forgetting": 80 - value}
            (folder / "results.json").write_text(json.dumps(r))
    runs = {m: tables.load(rows[m], tmp_path) for m in finals}
    assert tables.paired(runs["ham"], runs["sequential"]) == (2.0, 1.0)  # 1 and 3
    assert tables.paired(runs["ham"], runs["frozen"]) == (20.0, None)
    apart = "above other; not told apart from sequential"
    alone = "undecided (one seed): frozen +20.0, joint -6.0"
    assert tables.sides(rows, tmp_path) == f"{apart}; {alone}"
    line = tables.claims(tmp_path).splitlines()[-1]
    finals, rest = "72.0 ± 2.8 | 70.0 ± 1.4 | – | 50.0 | 76.0", "14 % | -20.0 / -19.0 | 2 |"
    assert f"{finals} | +2.0 ± 1.0 | – | {rest}" in line


def test_parts_and_related_superclasses_by_hand(tmp_path):
    listed = (ROOT / "extras" / "cifar100_superclasses.txt").read_text("utf-8").split()
    kinds = ["apt".index(kind) for kind in tables.KINDS]
    made = {"super": (60.0, kinds), "super-random": (59.0, [0] * 20), "random": (69.5, kinds)}
    for part, (final, groups) in (made | {"": (70.0, kinds)}).items():
        folder = tmp_path / f"{tables.PART}-{part}-s1993".replace("--", "-")
        folder.mkdir()
        r = {"config": {"seed": 1993}, "final_accuracy": final, "class_mean_oracle": 71.0}
        r |= {"forgetting": 9.0, "learning_accuracy": 80.0, "classes": listed}
        r["tasks"] = [{"group": group} for group in groups]
        (folder / "results.json").write_text(json.dumps(r))
    lines = tables.parts(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["HAM", "70.0", ""],
        ["random group", "69.5", "+0.5"],
        ["HAM", "60.0", ""],
        ["random group", "59.0", "+1.0"],
    ]
    assert lines[1].endswith("| 9.0 | 80.0 | 1.5 | 1 |")
    # pairs of one kind: 10 animals 45, 4 plants and landscapes 6, 6 things 15, of 190 in all
    text = tables.related(tmp_path)
    assert "HAM 100 % of 66 pairs, random group 35 % of 190 pairs; of any two tasks 35 %" in text


def test_readme_says_where_ham_is_best_and_where_it_forgets():
    """The table's lines that README names as misses are its misses, and the only ones."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "above `frozen` in every line and above `sequential` in every line but T = 5." in readme
    bird, *at = (
        [tables.load(tables.TABLES[name][m]) for m in ("ham", "average", "sequential")]
        for name in ("cub200", "cifar100-T5", "cifar100-T10", "cifar100", "cifar100-T50")
    )
    gaps = [tables.paired(*runs[:2])[0] for runs in (*at, bird)]
    rest = [
        [tables.load(tables.TABLES[name][m]) for m in ("ham", "average")]
        for name in ("cifar100-i250", "cub200-T20")
    ]
    gaps += [tables.paired(*runs)[0] for runs in rest]
    words = f"`average` by {min(gaps):.1f} to {max(gaps):.1f} in every line that has it (one seed)"
    assert words in readme
    assert {len(runs[1]) for runs in (*at, bird, *rest)} == {1}
    assert gaps[1] > gaps[2] > gaps[3] and "and that over `average` shrinks there." in readme
    assert 0.5 < min(gaps) and max(gaps) < 3.5 and "is 1 to 3 above the mean of adapters" in readme
    assert "forgets less than `sequential` from 10 tasks of CIFAR-100 on, and learns" in readme
    below, not_less, learnt = [], [], {}
    for name in tables.SETTINGS.values():
        runs = {m: tables.load(r) for m, r in tables.measured(tables.TABLES[name]).items()}
        if {"ham", "sequential"} <= set(runs):
            for m in {"sequential", "average", "frozen"} & set(runs):
                below += [(name, m)] * (tables.paired(runs["ham"], runs[m])[0] <= 0)
            pair = runs["ham"], runs["sequential"]
            less, error = tables.paired(*pair, "forgetting")
            not_less += [name] * (less > -(error or 0))
            learnt[name] = tables.paired(*pair, "learning_accuracy")[0]
    assert below == [("cifar100-T5", "sequential")]
    learns_more = [name for name in learnt if learnt[name] > 0]
    assert not_less == learns_more == ["cifar100-T5", "cub200", "cub200-T20"]
    most, least = (f"{-f(x for x in learnt.values() if x < 0):.1f}" for f in (min, max))
    assert f"and learns {least} to {most} points less." in readme
    ends = {False: [], True: []}  # several seeds
    for name in set(tables.SETTINGS.values()) - {"cifar100-T5"}:
        pair = tables.measured({m: tables.TABLES[name][m] for m in ("ham", "sequential")})
        if pair:
            pair = [tables.load(run) for run in pair.values()]
            ends[len(pair[0]) > 1].append(tables.paired(*pair)[0])
    for words, found in {
        "3 to 5 points above one": ends[True],
        "2 to 3 above it": ends[False],
    }.items():
        assert words == f"{min(found):.0f} to {max(found):.0f}{words[6:]}" and words in readme
    five = tables.load(tables.TABLES["cifar100-T5"]["ham"])
    assert {n for r in five for n in r["tasks"][-1]["group_sizes"]} == {1}  # "nothing is merged"
    for other in ("average", "safm", "o_lora"):
        pair = bird[0], tables.load(tables.TABLES["cub200"][other])
        assert tables.paired(*pair, "forgetting")[0] > 0, other
    words = (
        "forgets more than `average` (one seed), and with 10 tasks more than SAFM and O-LoRA (one"
    )
    assert words in readme
    less, error = tables.paired(bird[0], bird[2], "forgetting")
    birds = [tables.load(tables.TABLES["cub200-T20"][m]) for m in ("ham", "sequential", "average")]
    assert tables.paired(birds[0], birds[2], "forgetting")[0] > 0
    birds = birds[:2]
    more = tables.paired(*birds, "forgetting")[0]
    words = (
        f"(a difference of {less:.1f} ± {error:.1f} over three seeds; with 20 tasks {more:.1f}, one"
    )
    assert words in readme and len(birds[0]) == 1
    assert f"with 20 tasks {tables.ahead(*birds)[1:]} (one seed)" in readme
    some, every = (
        {m: tables.load(tables.TABLES[name][m])[0] for m in ("ham", "sequential")}
        for name in ("cifar100-i250", "cifar100-all")
    )
    keys = "learning_accuracy", "forgetting", "final_accuracy"
    figures = [x["ham"][k] for k in keys for x in (every, some)]
    words = "learns more ({:.1f} and {:.1f}), forgets more ({:.1f} and {:.1f}) and ends as high "
    words += "({:.1f} and {:.1f}), {:.1f} above `sequential` (seed 1993,"
    ahead = figures[-2] - every["sequential"]["final_accuracy"]
    assert words.format(*figures, ahead) in readme
    assert {x[m]["config"]["seed"] for x in (some, every) for m in x} == {1993}
    assert figures[0] > figures[1] and figures[2] > figures[3]
    assert abs(figures[4] - figures[5]) < 0.5  # "as high"
    minutes = sum(every["ham"]["seconds"].values()) / 60
    assert 70 < minutes < 75 and "takes over 70 minutes on one thread" in readme


def test_default_rates_fall_with_many_images_of_a_large_data_set_only():
    def lr(data, n=None, method="ham"):
        return ham.resolve(ham.Config(dataset=data, images_per_class=n, method=method)).lr

    assert lr("cifar100") == lr("cifar100", 101) == 3e-4 and lr("cifar100", 100) == 1e-3
    assert lr("cub200", 5, "sequential") == lr("cub200", None, "sequential") == 1e-4
    assert ham.resolve(ham.Config(dataset="cifar100", lr=0.5)).lr == 0.5


def test_readme_says_whether_the_advantage_grows():
    gaps = tables.advantage()
    first = [gaps[t][2][1993] for t in (5, 10, 20, 50)]
    assert first[0] < 0 < min(first[1:]) and first[3] <= max(first[1:3])
    assert abs(gaps[50][0] - gaps[20][0]) < 2 * math.hypot(gaps[50][1], gaps[20][1])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(gaps[10][2]) == 1 and "is there from 10 tasks on (T = 10: one seed); that" in readme
    assert "it grows from 10 to 50 is not shown**: on the seed that all have, it does not" in readme


def test_readme_says_how_other_methods_compare():
    """HAM is not above the best of them in any setting; the held-out figures are those found."""
    for line in tables.compared().splitlines():
        rest = line.split(";", 1)[1] if "above" in line else line
        assert "o_lora" in rest or "ewc" in rest, line
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "**In none of these is HAM clearly above the best of them**, O-LoRA or EWC" in readme

    found = tables.held_out()
    few, long, many = (found["cifar100", t, n] for t, n in ((20, 50), (50, 50), (20, 250)))
    gap = {
        "above O-LoRA and": tables.ahead(few["ham"][2], few["o_lora"][2]),
        "above EWC at T = 20": tables.ahead(few["ham"][2], few["ewc"][2]),
        "above EWC at T = 50": tables.ahead(long["ham"][2], long["ewc"][2]),
    }
    for words, points in gap.items():
        assert f"{points.removeprefix('+')} {words}" in readme, words
    assert [len(x["ham"][2]) for x in (few, long, many)] == [3, 3, 2]
    test = [tables.load(tables.TABLES["cifar100-i250"][m]) for m in ("ham", "sequential")]
    points = [tables.ahead(*test)[1:], tables.ahead(many["ham"][2], many["sequential"][2])[1:]]
    words = "it is {} above `sequential` (on held-out images, two seeds, {}), each"
    assert words.format(*points) in readme
    below = [tables.paired(long["ham"][2], long["o_lora"][2])[0]]
    below += [
        tables.paired(found["cub200", 10, None]["ham"][2], found["cub200", 10, None][m][2])[0]
        for m in ("o_lora", "ewc", "average")
    ]
    text = [f"{-x:.1f}" for x in below]
    more = [tables.paired(many["ham"][2], many[m][2])[0] for m in ("o_lora", "ewc")]
    words = f"with one seed {text[0]} below O-LoRA at T = 50, {more[0]:.1f} and {more[1]:.1f} above the "
    words += f"two with 250 images per class, and {text[1]} below both on CUB-200"
    assert words in readme
    pair = [tables.load(tables.TABLES["cub200"][m]) for m in ("ham", "sequential")]
    pair += [found["cub200", 10, None][m][2] for m in ("ham", "sequential")]
    words = (
        "On CUB-200 with 10 tasks it is {} above `sequential`, but {} on the 600 held-out images "
    )
    words += "(one seed, each at the best of its rates);"
    assert words.format(tables.ahead(*pair[:2])[1:], tables.ahead(*pair[2:])[1:]) in readme
    assert text[1] == text[2] and f"but {text[3]} below it on CUB-200's 600" in readme

    bird = found["cub200", 10, None]
    seconds = {m: statistics.mean(r["seconds"]["train"] for r in x[2]) for m, x in bird.items()}
    ratio = {m: f"{s / seconds['ham']:.1f} times" for m, s in seconds.items()}
    assert f"TreeLoRA trained for {ratio['treelora']}" in readme
    assert f"SAFM {ratio['safm']}, EWC {ratio['ewc']}, O-LoRA {ratio['o_lora']} (at" in readme
    mean = {
        m: statistics.mean(r["seconds"]["train"] for r in long[m][2]) for m in ("ham", "o_lora")
    }
    assert f"T = 50 {mean['o_lora'] / mean['ham']:.1f} times, before its" in readme


def test_readme_says_what_the_parts_do():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    gaps, draws = [], []
    for name in ("parts", "superclasses"):
        by_cosine, drawn = (tables.load(tables.TABLES[name][x]) for x in ("HAM", "random group"))
        gap, error = tables.paired(by_cosine, drawn)
        assert (
            abs(gap) < 2 * error < 0.5 and len(drawn) == 3
        )  # "no difference that three seeds show"
        gaps.append(tables.ahead(by_cosine, drawn))
        draws.append([[task["group"] for task in r["tasks"]] for r in drawn])
    words = "{} with random classes and {} with superclasses (the same three draws)"
    assert words.format(*gaps) in readme and draws[0] == draws[1]

    labels = "HAM", "one group", "one group per task", "sum (literal)", "one group (gain 5)"
    five, one, each, added, far = (tables.load(tables.TABLES["parts"][x]) for x in labels)
    points = [tables.ahead(five, x).removeprefix("+") for x in (one, each)]
    assert "five groups end {} above one and {} above a group per".format(*points) in readme
    words = (
        "Five groups end {} above a single one, which learns less, and {} above a group for each "
    )
    words += "task, where nothing is averaged and more is forgotten (three seeds each)."
    assert words.format(*points) in readme and {len(x) for x in (five, one, each)} == {3}
    for other in (one, each):  # what helps helps by more than two standard errors
        gap, error = tables.paired(five, other)
        assert gap > 2 * error
    assert tables.paired(five, one, "learning_accuracy")[0] > 0
    assert tables.paired(five, each, "forgetting")[0] < 0
    gap, error = tables.paired(five, far)
    words = (
        f"ends where five do, a difference of {abs(gap):.1f} ± {error:.1f} over three seeds, and"
    )
    assert words in readme and abs(gap) < 2 * error < 0.5 and len(far) == 3
    assert abs(tables.paired(added, each)[0]) < 0.5  # "sums end where one group per task does"
    fixed = tables.load(tables.TABLES["parts"]["α fixed at 1"])
    gap, error = tables.paired(five, fixed)
    words = f"with α fixed at 1 HAM ends as high ({tables.ahead(five, fixed)}, three seeds)."
    assert words in readme and abs(gap) < 2 * error < 0.5 and len(fixed) == 3


def test_readme_says_that_no_similarity_is_above_tau():
    """Every run of HAM under results/, whatever its own τ is."""
    files = sorted((ROOT / "results").glob("*-ham-*/results.json"))
    runs = [json.loads(file.read_text()) for file in files]
    for r in runs:
        found, most = [s for task in r["tasks"] for s in task["similarities"]], r["config"]["g_max"]
        assert max(found) < ham.Config.tau, r["config"]["name"]
        assert [task["group"] for task in r["tasks"]][:most] == list(range(most))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert runs and "in no run of HAM under Measured was one above τ" in readme


def test_figure_is_drawn_from_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tables.draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 300 and len(set(image.convert("L").tobytes())) > 50


def test_every_run_of_the_tables_can_be_repeated():
    """run_all's flags parse, and a committed run of a table is one of run_all's, same settings."""
    rows = {run for table in tables.TABLES.values() for run in table.values()}
    assert rows == {re.sub(r"-s\d+$", "", name) for name in run_all.RUNS}
    for name, flags in run_all.RUNS.items():
        kind = ham.Config if run_all.program(flags) == ["ham.py"] else baselines.Config
        c = ham.resolve(baselines.prepare(ham.parse(flags.split(), kind))[0])
        parts = [c.dataset, f"T{c.tasks}", c.method, c.name, f"s{c.seed}"]
        assert name == "-".join(filter(None, parts))
        file = ROOT / "results" / name / "results.json"
        if file.is_file():
            stored = json.loads(file.read_text())["config"]
            paths = ("out", "data_dir", "weights", "device", "precision")
            now = {k: v for k, v in dataclasses.asdict(c).items() if k not in paths}
            assert {k: stored.get(k) for k in now} == now, name


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
