"""Tests of ham.py: `python -m pytest -q`. No network, no data; what needs real images is skipped.

Each equation is checked against brute force, each control against an independent few-line version,
each data set's layout on small archives, the command line as a user calls it. Real CIFAR-100 and
CUB-200 are looked for in ./data. No assertion rests on which way training falls on one machine.
"""

import ast
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared, as a CPU gives them

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn.utils import parametrize

import ham
from extras import demo

ROOT = Path(__file__).parent
DATA = ROOT / "data"
CLASSES, TRAIN, TEST = 6, 10, 4


@pytest.fixture(scope="session", autouse=True)
def source_read_once():
    """The command line reads its help out of the source: a fifth of a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


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
    """ViT, method and data of a configuration, untrained."""
    out = tmp_path / str(len(list(tmp_path.iterdir())))  # one each: they are not to be compared
    out.mkdir()
    c = ham.resolve(config(folder, out, **({"lr": 1e-3} | settings)))
    vit = ham.build_vit(c)
    return vit, ham.METHODS[c.method][0](ham.lora_layers(vit, c.layers), c), ham.load_data(c, vit)


def trained(folder, tmp_path, **settings):
    """The same after all its tasks, and what results.json holds."""
    vit, method, data = untrained(folder, tmp_path, **settings)
    return vit, method, data, ham.learn(vit, method, data)


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """A finished run of HAM, for tests that only look at it: vit, method, data, results."""
    return trained(folder, tmp_path_factory.mktemp("finished"))


def features(vit, weights, data, part="test"):
    with torch.no_grad():
        return functional_call(vit, weights, data.prepare(data.pixels[part]))


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
                [f"--{'' if value else 'no-'}{flag}"] if f.type is bool else [f"--{flag}", value]
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


def test_training_moves_the_factors_and_every_scalar_and_nothing_else(finished):
    vit, method, data, _ = finished
    before, seen = copy.deepcopy([g.delta_w for g in method.groups]), []
    before = before, copy.deepcopy(vit.state_dict())

    def recorded(*given):
        seen.append(ham.task_loss(*given))
        return seen[-1]

    start, (moved, loss) = method.start(), ham.train_task(vit, method, data, 1, recorded)
    assert len(seen) == 2 * 3  # two epochs of 20 images in batches of 8; the mean of the last one
    assert loss == pytest.approx(torch.stack(seen[3:]).mean().item())
    assert moved.alpha != 1 and len(moved.alpha_groups) == len(method.groups) > 1
    assert (moved.alpha_groups != start.alpha_groups).all() and 0 < loss < 10
    for name, (b, a) in moved.adapter.items():
        assert (b != 0).any() and (a != start.adapter[name][1]).any()
    for old, new in zip(before[0], method.groups):
        for name, update in old.items():
            assert torch.equal(ham.dense(update), ham.dense(new.delta_w[name]))
    assert all(torch.equal(x, before[1][n]) for n, x in vit.state_dict().items())


def test_what_is_trained_how_by_hand():
    """A's bound and seed, B = 0; rates, no weight decay, a cosine to 0; head rows: class means."""
    w0 = {"x": torch.zeros(3, 4, dtype=torch.float64), "y": torch.zeros(5, 100).double()}
    c = ham.Config(rank=50, lr=0.1, lr_head=0.2, lr_alpha=0.3, seed=1)
    trained = ham.HAM(w0, c).start()
    for name, (b, a) in trained.adapter.items():
        bound = 1 / math.sqrt(w0[name].shape[1])
        assert not b.any() and a.dtype == torch.float64
        assert -bound <= a.min() < -0.9 * bound and 0.9 * bound < a.max() <= bound
        again, other = (ham.new_adapter(w0, 50, seed)[name][1] for seed in (1, 2))
        assert torch.equal(a, again) and not torch.equal(a, other)
    f, labels = torch.arange(8.0).view(4, 2), torch.tensor([7, 3, 3, 7])
    optimiser, schedule = trained.begin(f, labels, [3, 7], c, steps=4)
    assert torch.equal(trained.head, torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    groups = optimiser.param_groups
    assert [len(g["params"]) for g in groups] == [4, 1, 2]
    assert [g["weight_decay"] for g in groups] == [0, 0, 0]
    for step in range(5):
        share = (1 + math.cos(math.pi * step / 4)) / 2
        assert [g["lr"] for g in groups] == pytest.approx([0.1 * share, 0.2 * share, 0.3 * share])
        optimiser.step()
        schedule.step()


def test_loss_takes_the_labels_of_the_data():
    rows, f = torch.randn(3, 5), torch.randn(4, 5)
    trained = types.SimpleNamespace(head=rows, classes=torch.tensor([40, 7, 12]))
    got = ham.task_loss(trained, f, torch.tensor([7, 12, 40, 7]))
    cosines = torch.stack([torch.cosine_similarity(f, row[None]) for row in rows], 1)
    torch.testing.assert_close(got, F.cross_entropy(16 * cosines, torch.tensor([1, 2, 0, 1])))
    with pytest.raises(IndexError):  # 5 is of another task
        ham.task_loss(trained, f, torch.tensor([7, 12, 40, 5]))


def test_lifted_into_another_loop_nothing_is_shared(finished):
    """`state` and `restore` copy; loading folded weights into the model leaves W0 as it is."""
    vit, method, _, _ = finished
    w0 = {name: w.clone() for name, w in method.w0.items()}
    state, again = method.state(), ham.HAM(method.w0, method.config)
    again.restore(state)
    for group in state["groups"]:
        group["delta_w"].clear()
        group["members"].append(99)
    assert [g.members for g in again.groups] == [g.members for g in method.groups]
    assert [g.alpha for g in again.groups] == [g.alpha for g in method.groups]
    assert all(torch.equal(w, method.folded()[name]) for name, w in again.folded().items())
    again.groups[0].members.append(5)
    assert 5 not in method.groups[0].members
    model = copy.deepcopy(vit)
    live = ham.HAM({k: x for k, x in model.named_parameters() if k in w0}, method.config)
    model.load_state_dict(method.folded(), strict=False)
    assert all(
        torch.equal(live.w0[name], w) and not live.w0[name].requires_grad for name, w in w0.items()
    )
    c = ham.Config(method="ham", rank=2)  # no rate: the law's, for this task's images
    optimiser, _ = ham.HAM(w0, c).start().begin(torch.randn(750, 4), torch.zeros(750), [0], c, 9)
    assert optimiser.param_groups[0]["lr"] == ham.learning_rate("ham", 5 * 750) == 5e-4


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


def updates(n, d, k, r=2):
    torch.manual_seed(n)
    return [(torch.randn(d, r), torch.randn(r, k)) for _ in range(n)]


def test_merge_concatenates_along_the_rank_until_dense_is_smaller():
    d, k, r = 12, 20, 2  # factors are smaller while r n < d k / (d + k) = 7.5
    group = None
    for n, new in enumerate(updates(5, d, k, r)):
        group = ham.merge([new, group][: n + 1], ham.shares(n, "sum")[: n + 1])
        assert isinstance(group, tuple) == (r * (n + 1) < 7.5)
        if isinstance(group, tuple):
            assert group[0].shape == (d, r * (n + 1)) and group[1].shape == (r * (n + 1), k)


@pytest.mark.parametrize("d, n, k", [(12, 6, 20), (10, 8, 3), (3, 8, 10), (5, 1, 4)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncate_is_the_nearest_matrix_of_its_rank(rank, d, n, k):
    """Against the SVD of the dense matrix; what is lost is the singular values dropped."""
    b, a = (x.double() for x in updates(1, d, k, n)[0])
    u, sigma, v = torch.linalg.svd(b @ a, full_matrices=False)
    want = u[:, :rank] * sigma[:rank] @ v[:rank]
    b_cut, a_cut = ham.truncate(b, a, rank)
    assert b_cut.shape == (d, len(a_cut)) and len(a_cut) == min(rank, d, n, k)
    torch.testing.assert_close(b_cut @ a_cut, want)
    torch.testing.assert_close((b @ a - b_cut @ a_cut).norm(), sigma[rank:].norm())


def test_a_group_keeps_its_rank_also_where_a_matrix_is_smaller():
    """Rank 15 of 16 x 16: the factors are larger than ΔW_G, and stay factors."""
    group = ham.merge(updates(2, 16, 16), [1.0, 1.0], 15)
    for member in updates(7, 16, 16):
        group = ham.merge([member, group], [1.0, 1.0], 15)
        assert isinstance(group, tuple) and torch.linalg.matrix_rank(ham.dense(group)) <= 15
    assert group[0].numel() + group[1].numel() > 16 * 16


def test_groups_of_a_fixed_rank_do_not_grow_with_the_tasks():
    """Six tasks in two groups of rank 3, each merge brute-forced by the SVD of the dense group."""
    random, w0 = torch.Generator().manual_seed(0), {"x": torch.zeros(30, 20).double()}
    config = ham.Config(g_max=2, rho=0.5, rank=2, group_rank=3, train_alpha=False)
    method, want = ham.HAM(w0, config), [torch.zeros(30, 20).double() for _ in range(2)]
    for task in range(6):
        j, n = task % 2, task // 2
        b, a = (torch.randn(x, generator=random).double() for x in ((30, 2), (2, 20)))
        if n == 0:
            method.groups.append(ham.Group({}))
        method.join(method.groups[j], task, {"x": (b, a)}, 0.8)
        added = want[j] + 0.8 / (n + 1) * ham.prune(b, 0.5) @ ham.prune(a, 0.5)
        u, sigma, v = torch.linalg.svd(added)
        want[j] = u[:, :3] * sigma[:3] @ v[:3]
        torch.testing.assert_close(ham.dense(method.groups[j].delta_w["x"]), want[j])
    assert {x.numel() for g in method.groups for x in g.delta_w["x"]} == {90, 60}


def test_merge_equals_peft_cat():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    members, scalars = updates(3, 6, 8, 1), [0.5, 1.5, -0.7]
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


def test_a_new_adapter_changes_nothing(finished):
    vit, method, data, _ = finished
    with torch.no_grad():
        weights = method.start().weights(method.w0)
    torch.testing.assert_close(features(vit, weights, data), features(vit, method.folded(), data))
    bare = ham.HAM(method.w0, method.config)
    weights = bare.start().weights(method.w0)
    assert torch.equal(features(vit, weights, data), features(vit, {}, data))


def test_a_run_leaves_the_frozen_model_as_it_was(finished):
    vit, method, _, _ = finished
    fresh = ham.build_vit(method.config).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in vit.state_dict().items())
    assert all(torch.equal(w, fresh[name]) for name, w in method.w0.items())
    assert not any(torch.equal(w, fresh[name]) for name, w in method.folded().items())


@pytest.mark.parametrize(("merge", "tau"), [("mean", 1.0), ("sum", 1.0), ("sum", -1.0)])
def test_opening_a_group_and_joining_under_sum_change_nothing(folder, tmp_path, merge, tau):
    vit, method, data = untrained(folder, tmp_path, merge=merge, tau=tau, rho=1.0)
    for task in range(3):
        trained_to, _ = ham.train_task(vit, method, data, task)
        with torch.no_grad():
            before = features(vit, trained_to.weights(method.w0), data)
        method.finish(task, trained_to)
        assert len(method.groups) == (task + 1 if tau == 1 else 1)
        after = features(vit, method.folded(), data)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert (before - features(vit, {}, data)).abs().max() > 1e-2  # there was something to lose


@pytest.mark.parametrize("how", ["solution", "mean", "sum"])
def test_groups_are_sums_of_pruned_members(how):
    """At scalars of 1: c = 1 / place of entry, 1 / size, 1; whatever was trained."""
    w0 = {"x": torch.zeros(30, 20), "y": torch.zeros(8, 12)}
    random = torch.Generator().manual_seed(0)
    c = ham.Config(g_max=2, tau=0.0, rho=0.5, merge=how, train_alpha=False, lr=1.0, rank=2)
    method, alone, groups = ham.HAM(w0, c), [], []
    for task in range(6):
        trained_to = method.start()
        for b, _ in trained_to.adapter.values():
            b.data.normal_(generator=random)
        items = trained_to.adapter.items()
        alone.append({n: ham.prune(b, 0.5) @ ham.prune(a, 0.5) for n, (b, a) in items})
        groups.append(method.finish(task, trained_to)["group"])
    assert len(method.groups) <= 2
    for j, group in enumerate(method.groups):
        members = [task for task in range(6) if groups[task] == j]
        assert members == group.members and group.alpha == 1
        n = len(members)
        places = [1 / (i + 1) for i in range(n)]
        weight = {"solution": places, "mean": [1 / n] * n, "sum": [1.0] * n}[how]
        for name, update in group.delta_w.items():
            want = sum(x * alone[task][name] for x, task in zip(weight, members))
            assert want.abs().max() > 0.01
            torch.testing.assert_close(ham.dense(update), want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("g_max", [1, 2])
@pytest.mark.parametrize("how", ["solution", "mean", "sum"])
def test_a_run_by_brute_force_from_its_adapters_and_trained_scalars(folder, tmp_path, how, g_max):
    """(2) to (4) with dense matrices, one task after the other: its similarities and its groups."""
    settings = {"tau": 1.0, "g_max": g_max, "rho": 0.7, "merge": how}
    vit, method, data = untrained(folder, tmp_path, **settings)
    adapters, finish = [], method.finish
    method.finish = lambda task, to: adapters.append(to.detached()) or finish(task, to)
    records, groups, sizes = ham.learn(vit, method, data)["tasks"], [], []
    for adapter, record in zip(adapters, records, strict=True):
        vector, j = ham.flat(adapter), record["group"]
        others = [torch.cat([x.flatten() for x in group.values()]) for group in groups]
        want = [(vector @ x / vector.norm() / x.norm()).item() for x in others]
        assert record["similarities"] == pytest.approx(want, abs=1e-4)
        if j == len(groups):
            groups.append({name: torch.zeros_like(w) for name, w in method.w0.items()})
            sizes.append(0)
        n, alpha, alpha_g = sizes[j], record["alpha"], [*record["alpha_groups"], 1.0][j]
        for name, (b, a) in adapter.items():
            new, old = alpha * ham.prune(b, 0.7) @ ham.prune(a, 0.7), alpha_g * groups[j][name]
            share = {"solution": new / (n + 1) + old, "mean": (new + n * old) / (n + 1)}
            groups[j][name] = share.get(how, new + old)
        sizes[j] += 1
    assert sizes == records[-1]["group_sizes"] and all(r["alpha"] != 1 for r in records)
    for group, want in zip(method.groups, groups, strict=True):
        for name, update in group.delta_w.items():
            torch.testing.assert_close(ham.dense(update), want[name], rtol=1e-4, atol=1e-6)


def test_fixed_importance_stays_at_1(folder, tmp_path):
    for record in trained(folder, tmp_path, train_alpha=False)[3]["tasks"]:
        assert record["alpha"] == 1 and set(record["alpha_groups"]) <= {1.0}


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
    pixels, y = data.images("train", classes)
    y = y - classes[0]
    with torch.no_grad():
        f = vit(data.prepare(pixels))
    head = torch.nn.Parameter(torch.stack([f[y == i].mean(0) for i in range(len(classes))]))
    factors = torch.optim.AdamW([p for m in loras.values() for p in m.parameters()], weight_decay=0)
    last = torch.optim.AdamW([head], weight_decay=0)
    step, steps = 0, c.epochs * math.ceil(len(pixels) / c.batch_size)
    for _ in range(c.epochs):
        for batch in torch.randperm(len(pixels), generator=shuffle).split(c.batch_size):
            mirror = torch.rand(len(batch), generator=shuffle) < 0.5
            x = data.prepare(pixels[batch])
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
    vit, method, data, _ = trained(folder, tmp_path, method=method, tasks=2)
    c, w0 = method.config, method.w0
    start, parts = ham.new_adapter(w0, c.rank, c.seed), []
    for task, classes in enumerate(data.tasks):
        shuffle = torch.Generator().manual_seed(1000 * c.seed + task)
        trained_to = plain_training(vit, data, classes, start, c, shuffle)
        start = start if c.method == "average" else trained_to
        parts.append({name: b @ a for name, (b, a) in trained_to.items()})
    assert len(parts) == (1 if c.method == "joint" else 2)
    for name, w in method.folded().items():
        mean = (parts[0][name] + parts[-1][name]) / 2
        want = mean if c.method == "average" else parts[-1][name]
        torch.testing.assert_close(w - w0[name], want, rtol=1e-2, atol=2e-6)
        assert want.abs().max() > 1e-4


def test_frozen_is_nearest_class_mean_of_the_bare_model(folder, tmp_path):
    results = ham.run(config(folder, tmp_path, method="frozen"))
    c = ham.resolve(config(folder, tmp_path, method="frozen"))
    vit = ham.build_vit(c)
    data = ham.load_data(c, vit)
    f, g = (F.normalize(features(vit, {}, data, part), dim=1) for part in ("train", "test"))
    means = torch.stack([f[data.labels["train"] == k].mean(0) for k in range(CLASSES)])
    right = ((g @ F.normalize(means, dim=1).T).argmax(1) == data.labels["test"]).double().mean()
    assert results["final_accuracy"] == pytest.approx(100 * right.item())
    assert results["config"]["lr"] is None and results["parameters_stored"] == CLASSES * 64


# ------------------------------------------------------------------------------ Data and read-out


def loaded(folder, tmp_path, **settings):
    c = ham.resolve(config(folder, tmp_path, **settings))
    return ham.load_data(c, ham.build_vit(c))


def test_class_order_is_the_public_one(folder, tmp_path):
    assert np.random.RandomState(1993).permutation(100)[:6].tolist() == [68, 56, 78, 8, 23, 84]
    order = np.random.RandomState(7).permutation(CLASSES)
    assert loaded(folder, tmp_path, seed=7).names == [f"class{x}" for x in order]
    natural = loaded(folder, tmp_path, seed=7, class_order="natural").names
    assert natural == [f"class{x}" for x in range(CLASSES)]


def test_tasks_share_out_the_classes_and_need_two_each(folder, tmp_path):
    assert [*map(len, loaded(folder, tmp_path, tasks=1).tasks)] == [6]
    assert loaded(folder, tmp_path, tasks=3).tasks == [range(2), range(2, 4), range(4, 6)]
    with pytest.raises(ham.InputError, match="--tasks 4: each needs 2 of the 6 classes"):
        loaded(folder, tmp_path, tasks=4)


def test_uneven_tasks_and_a_tenth_held_out(folder, tmp_path, monkeypatch):
    images, names = np.zeros((280, 8, 8, 3), np.uint8), [*"abcdefg"] * 40
    monkeypatch.setattr(ham, "read", lambda *_: (images, names, [False] * 280))
    data = loaded(folder, tmp_path, validate=True)
    assert data.tasks == [range(3), range(3, 5), range(5, 7)] and data.sizes("test") == [12, 8, 8]


@pytest.mark.parametrize("validate", [False, True])
def test_no_test_image_is_trained_on(folder, tmp_path, validate):
    """Caps count in file order; --validate sets aside the last 3 of 10 training images."""
    caps = {"images_per_class": 5, "test_images_per_class": 3}
    whole = loaded(folder, tmp_path)
    part = loaded(folder, tmp_path, validate=validate, **caps)
    assert whole.names == part.names
    for c in range(CLASSES):
        train, test = (whole.images(side, [c])[0] for side in ("train", "test"))
        assert torch.equal(part.images("train", [c])[0], train[:5])
        assert torch.equal(part.images("test", [c])[0], train[-3:] if validate else test[:3])
    images, labels = whole.images("train", whole.tasks[1])
    assert labels.tolist() == [2] * TRAIN + [3] * TRAIN
    assert torch.equal(images, whole.pixels["train"][2 * TRAIN : 4 * TRAIN])
    every = torch.cat([*whole.pixels.values()]).flatten(1)
    assert len(every.unique(dim=0)) == CLASSES * (TRAIN + TEST)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_decoding_is_timms_transform(folder, crop_mode):
    cfg = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic", "crop_mode": crop_mode}
    cfg |= {"input_size": (3, 32, 32), "crop_pct": 0.9}
    file = folder / "train" / "class2" / "3.png"
    want = (255 * timm.data.create_transform(**cfg)(Image.open(file))).round()
    assert torch.equal(ham.decode([file], cfg)[0].float(), want)


@pytest.mark.parametrize("size", [160, 224, 24])
def test_batched_resizing_matches_timms_transform(size):
    """Greatest and mean difference in grey levels; both round after each axis."""
    pixels = demo.draw(np.random.default_rng(0), "red striped star", 8)
    cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}
    cfg["input_size"] = (3, size, size)
    transform = timm.data.create_transform(crop_pct=1.0, **cfg)
    want = torch.stack([transform(Image.fromarray(x)) for x in pixels])
    small = ham.decode([*pixels], cfg)
    got = ham.Data({}, {}, [], [], cfg, "cpu").prepare(small)
    difference = 255 * (got - want).abs()
    print(f"{size} px: greatest {difference.max():.2f}, mean {difference.mean():.3f} grey levels")
    assert difference.max() < 1.01 and difference.mean() < 0.01
    plain = F.interpolate(small.float(), size=size, mode="bicubic") / 255
    if size > 32:  # the other cubic kernel would be far off
        assert 255 * (plain - want).abs().max() > 10


def test_small_images_are_not_cropped(folder, tmp_path):
    for dataset, want in (("cifar100", 1.0), ("tiny_imagenet", 1.0), (str(folder), 0.95)):
        vit = ham.build_vit(ham.resolve(config(folder, tmp_path, dataset=dataset)))
        assert timm.data.resolve_model_data_config(vit)["crop_pct"] == want


def test_flip_and_normalise():
    cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 1.0, 2.0), "input_size": (3, 4, 4)}
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    got = ham.Data({}, {}, [], [], cfg, "cpu").prepare(pixels, torch.tensor([True, False]))
    x = torch.stack([pixels[0].flip(-1), pixels[1]]) / 255
    want = [(x[:, i] - cfg["mean"][i]) / cfg["std"][i] for i in range(3)]
    torch.testing.assert_close(got, torch.stack(want, 1))


def test_class_means():
    f = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    means = ham.class_means(f, torch.tensor([7, 7, 8]), [7, 8])
    want = torch.tensor([[0.3, 0.9], [1.0, 0.0]])  # mean of (.6, .8) and (0, 1), then normalised
    torch.testing.assert_close(means, F.normalize(want, dim=1))
    plain = ham.class_means(f, torch.tensor([7, 7, 8]), [7, 8], unit=False)
    torch.testing.assert_close(plain, torch.tensor([[1.5, 3.0], [5.0, 0.0]]))


def test_means_refuse_a_class_without_images_and_what_is_not_finite():
    features, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 0])
    assert ham.class_means(features, labels, [0, 1]).shape == (2, 4)
    for classes, factor in (([0, 1, 2], 1.0), ([0, 1], torch.nan)):
        given, task = factor * features, ham.Trainable({"x": torch.ones(2, 2)}, [], ham.Config())
        with pytest.raises(ham.InputError, match=r"has no image, or .*lower --lr"):
            ham.class_means(given, labels, classes)
        with pytest.raises(ham.InputError, match=r"has no image, or .*lower --lr"):
            task.begin(given, labels, classes, ham.Config(), 1)


def test_class_means_are_taken_after_the_merge(folder, tmp_path):
    """The saved model's head: the last task's rows are class means under the folded weights."""
    vit, method, data, results = trained(folder, tmp_path, tau=-1.0, epochs=4)
    own = data.labels["train"] >= data.tasks[-1][0]
    f = features(vit, method.folded(), data, "train")[own]
    want = ham.class_means(f, data.labels["train"][own], data.tasks[-1])
    (file,) = Path(results["config"]["out"]).rglob("model.safetensors")
    got = load_file(file)["head.weight"][list(data.tasks[-1])]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- Official layouts, archives
# Small archives in the layouts of the four data sets; images have the colour of their class.

WNIDS = ["n01443537", "n01484850", "n02007558", "n07697537"]  # classes of every layout below
PER_CLASS = {"train": 5, "test": 2}


def picture(label, i=0, size=(40, 32), mode="RGB", kind="JPEG", **save):
    """One image file of a class's colour."""
    colour = (128 + 100 * np.cos(label + np.array([0, 2, 4]))).astype(np.uint8)
    pixels = np.random.RandomState(i).randint(0, 20, (size[1], size[0], 3)) + colour
    file, image = io.BytesIO(), Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.convert(mode, palette=Image.Palette.ADAPTIVE).save(file, kind, **save)
    return file.getvalue()


def cub200():
    files = [(label, i) for label in range(4) for i in range(7)]
    names = [f"00{k + 1}.{WNIDS[k]}/bird_{i}.jpg" for k, i in files]
    tables = {"images": names, "image_class_labels": [k + 1 for k, _ in files]}
    tables["train_test_split"] = [int(i % 3 != 0 or i > 5) for _, i in files]  # tests: 0 and 3
    tables["classes"] = [f"00{k + 1}.{wnid}" for k, wnid in enumerate(WNIDS)]
    members = {"attributes.txt": b"1 has_bill_shape\n"}
    for name, column in tables.items():
        lines = "".join(f"{n} {x}\n" for n, x in enumerate(column, 1))
        members[f"CUB_200_2011/{name}.txt"] = lines.encode()
    for name, (label, i) in zip(names, files):
        members[f"CUB_200_2011/images/{name}"] = picture(label, i)
    return "CUB_200_2011.tgz", members


def imagenet_r():
    members = {"imagenet-r/README.txt": b"ImageNet-R\n", f"imagenet-r/{WNIDS[0]}/Thumbs.db": b"?"}
    for label, i in itertools.product(range(4), range(7)):
        members[f"imagenet-r/{WNIDS[label]}/art_{i}.jpg"] = picture(label, i)
    return "imagenet-r.tar", members


def tiny_imagenet():
    root, annotations = "tiny-imagenet-200", ""
    members = {f"{root}/test/images/test_0.JPEG": picture(9, size=(64, 64))}
    for label, i in itertools.product(range(4), range(5)):
        name = f"{root}/train/{WNIDS[label]}/images/{WNIDS[label]}_{i}.JPEG"
        members[name] = picture(label, i, size=(64, 64))
    for i in range(8):  # one class after the other
        members[f"{root}/val/images/val_{i}.JPEG"] = picture(i % 4, 9 + i, size=(64, 64))
        annotations += f"val_{i}.JPEG\t{WNIDS[i % 4]}\t0\t0\t63\t63\n"
    members[f"{root}/val/val_annotations.txt"] = annotations.encode()
    return "tiny-imagenet-200.zip", members


def cifar100():
    members, random = {}, np.random.RandomState(0)
    for part, n in PER_CLASS.items():
        data = random.randint(0, 256, (4 * n, 3 * 32 * 32), dtype=np.uint8)
        labels = [i % 4 for i in range(4 * n)]
        members[f"cifar-100-python/{part}"] = pickle.dumps({"data": data, "fine_labels": labels})
    members["cifar-100-python/meta"] = pickle.dumps({"fine_label_names": WNIDS})
    return "cifar-100-python.tar.gz", members


LAYOUTS = [cifar100, cub200, imagenet_r, tiny_imagenet]


def pack(archive, members):
    """A dict of path: bytes as a zip or tar file."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
        return
    with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def md5(data):
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Write a data set's archive, and its facts into ham.py. -> function: the archive"""

    def put(layout, folder, change=lambda members: members):
        (name, members), own = layout(), layout.__name__
        archive, members = folder / name, change(members)
        archive.parent.mkdir(exist_ok=True)
        pack(archive, members)
        monkeypatch.setitem(ham.FACTS, own, (md5(archive.read_bytes()), 20, 8))
        monkeypatch.setitem(ham.ARCHIVES, own, f"http://127.0.0.1:9/{name}")  # nobody there
        if layout is cifar100:
            sums = {k.split("/")[1]: md5(x) for k, x in members.items()}
            monkeypatch.setattr(ham.CIFAR100, "train_list", [["train", sums.get("train")]])
            monkeypatch.setattr(ham.CIFAR100, "test_list", [["test", sums.get("test")]])
            monkeypatch.setattr(ham.CIFAR100, "meta", ham.CIFAR100.meta | {"md5": sums.get("meta")})
        return archive

    listed = tmp_path / "imagenet_r_test.txt"  # beside ham.py, as far as that knows
    listed.write_text("".join(f"{wnid}/art_{i}.jpg\n" for wnid in WNIDS for i in (0, 3)))
    monkeypatch.setattr(ham, "__file__", str(tmp_path / "ham.py"))
    return put


def load_layout(layout, data_dir):
    values = {"data_dir": str(data_dir), "tasks": 2, "class_order": "natural", "device": "cpu"}
    c = ham.resolve(ham.Config(dataset=layout.__name__, model="test_vit", img_size=32, **values))
    vit = timm.create_model("test_vit", img_size=32, num_classes=0)
    vit.pretrained_cfg = vit.pretrained_cfg | {"input_size": (3, 32, 32), "crop_pct": 1.0}
    return ham.load_data(c, vit)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_has_its_label_and_side(layout, publish, tmp_path):
    publish(layout, tmp_path)
    data = load_layout(layout, tmp_path)
    for part, n in PER_CLASS.items():
        assert [len(data.images(part, [c])[0]) for c in range(4)] == [n] * 4
    assert [name.split(".")[-1] for name in data.names] == WNIDS
    every = torch.cat([*data.pixels.values()])
    assert every.shape[1:] == (3, *[64 if layout is tiny_imagenet else 32] * 2)
    assert len(every.flatten(1).unique(dim=0)) == 28
    for label, part in itertools.product(range(4 * (layout is not cifar100)), PER_CLASS):
        want = 128 + 100 * np.cos(label + np.array([0, 2, 4])) + 9.5
        for image in data.images(part, [label])[0]:
            assert np.abs(image.float().mean((1, 2)).numpy() - want).max() < 8
    assert not list(tmp_path.rglob("*.part"))
    again = load_layout(layout, tmp_path)  # from the folder
    assert torch.equal(again.pixels["train"], data.pixels["train"])


@contextlib.contextmanager
def served(archive):
    """-> its address, of a server on this machine"""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{archive.name}"
        server.shutdown()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_is_downloaded_checked_and_unpacked(layout, publish, tmp_path, monkeypatch):
    archive, cure = publish(layout, tmp_path / "www"), "put http.*into .*move away"
    whole, root = archive.read_bytes(), tmp_path / "data" / archive.name.split(".")[0]
    with served(archive) as address:
        monkeypatch.setitem(ham.ARCHIVES, layout.__name__, address)
        for wrong in (whole[:-7], b"<html>", whole[:100] + bytes(10) + whole[110:]):
            archive.write_bytes(wrong)
            with pytest.raises(ham.InputError, match=f"(?i)corrupted.*{cure}"):
                load_layout(layout, tmp_path / "data")
            assert not root.exists()
        archive.write_bytes(whole)  # what is there and not whole is downloaded again
        assert len(load_layout(layout, tmp_path / "data").names) == 4
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(ham.InputError, match=cure):
        load_layout(layout, tmp_path / "data")


def lacks(part):
    return lambda members: {k: v for k, v in members.items() if part not in k}


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        (cub200, lacks("bird_3.jpg"), "bird_3.jpg"),
        (cub200, lacks("images.txt"), "images.txt"),
        (cub200, lambda m: m | {"CUB_200_2011/train_test_split.txt": b"1 1\n2 0\n"}, "instead of"),
        (imagenet_r, lacks(f"{WNIDS[1]}/"), r"\(15, 6\) training and test images instead of"),
        (imagenet_r, lacks("art_1.jpg"), r"\(16, 8\) training and test images instead of"),
        (tiny_imagenet, lacks(f"train/{WNIDS[1]}/"), r"\(15, 8\) training and test images"),
        (tiny_imagenet, lacks("_1.JPEG"), r"\(16, 8\) training and test images instead of"),
        (tiny_imagenet, lacks("val/"), "val_annotations.txt"),
        (cifar100, lacks("meta"), "not found or corrupted"),
    ],
)
def test_what_is_missing_is_named(layout, change, says, publish, tmp_path):
    publish(layout, tmp_path, change)
    with pytest.raises(ham.InputError, match=says):
        load_layout(layout, tmp_path)


def test_shipped_imagenet_r_split_is_the_public_one():
    file = ROOT / "extras" / "imagenet_r_test.txt"
    lines = file.read_text("utf-8").split()
    assert len(lines) == 6000 and lines == sorted(lines) and len({x[:9] for x in lines}) == 200
    want = "524a3ebf6dac30228a30387443c2c30a21c483b6d0d3c57768f74edd60cfecc3"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == want


def linked(root, names, image):
    """One image under many names; a file system has at most some 65,000 links to one file."""
    for folder in {Path(name).parent for name in names}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        if i % 30_000:
            os.link(root / names[i - i % 30_000], root / name)
        else:
            (root / name).write_bytes(image)


@pytest.mark.skipif(not hasattr(os, "link"), reason="no hard links")
def test_imagenet_r_whole_from_the_command_line(folder, tmp_path):
    """All 6,000 listed names and 24,000 others; one too few is refused."""
    tests = (ROOT / "extras" / "imagenet_r_test.txt").read_text("utf-8").split()
    wnids = sorted({name[:9] for name in tests})
    others = [f"{wnid}/other_{i}.jpg" for wnid in wnids for i in range(120)]
    linked(tmp_path / "imagenet-r", tests + others, picture(0))
    command = ["--dataset", "imagenet_r", "--tasks", 20, "--epochs", 1, "--images-per-class", 2]
    command += ["--test-images-per-class", 1, "--data-dir", tmp_path, "--out", tmp_path]
    command += ["--model", "test_vit", "--weights", folder / "vit.safetensors", "--img-size", 32]
    done = cli(*command, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "imagenet_r-T20-ham-s1993" / "results.json").read_text())
    order = np.random.RandomState(1993).permutation(200)
    assert results["classes"] == [wnids[x] for x in order]
    assert results["test_images_per_task"] == [10] * 20
    (tmp_path / "imagenet-r" / others[0]).unlink()
    c = ham.Config(dataset="imagenet_r", data_dir=str(tmp_path))
    with pytest.raises(ham.InputError, match=r"\(23999, 6000\) .* instead of \(24000, 6000\)"):
        ham.load_data(c, timm.create_model("test_vit"))


def test_odd_image_files(tmp_path):
    """Grey, palette, CMYK and rotated by EXIF: what a viewer would show, in RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    files = {"rgb.png": picture(1, kind="PNG"), "grey.jpg": picture(1, mode="L", quality=95)}
    files |= {"palette.png": picture(1, mode="P", kind="PNG"), "cmyk.jpg": picture(1, mode="CMYK")}
    files["turned.jpg"] = picture(1, exif=exif, quality=95)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    rgb, grey, palette, cmyk, turned = ham.decode([tmp_path / x for x in files], cfg).float()
    want = torch.from_numpy(np.array(Image.open(tmp_path / "rgb.png").convert("L")))
    assert (grey - want[None, :, 4:36]).abs().mean() < 2 and torch.equal(grey[0], grey[2])
    assert (palette - rgb).abs().mean() < 12 and (cmyk - rgb).abs().mean() < 8
    upright = np.asarray(Image.open(tmp_path / "turned.jpg").convert("RGB")).transpose(1, 0, 2)
    assert (turned - torch.from_numpy(upright[4:36, ::-1].copy()).permute(2, 0, 1)).abs().mean() < 1
    # Beside the orientation a number that is text: viewers show the image, PIL cannot write the tag.
    tags = struct.pack(">HHIHHHHI4s", 0x0112, 3, 1, 6, 0, 0x0103, 2, 4, b"abc\0")
    torn = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags[:12] + tags[12:] + bytes(4)
    (tmp_path / "torn.jpg").write_bytes(picture(1, exif=torn, quality=95))
    assert torch.equal(ham.decode([tmp_path / "torn.jpg"], cfg)[0].float(), turned)


def test_images_that_cannot_be_read_are_refused_up_to_three_by_name(tmp_path):
    Image.fromarray(np.full((40, 40), 300, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(tmp_path / "deep.tif")
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(
        ham.InputError, match=r"^5 images cannot be .*a\.png.*b\.png.*c\.png"
    ) as bad:
        ham.decode(files, {"input_size": (3, 32, 32)})
    assert "deep" not in str(bad.value)
    for file in files[3:]:
        with pytest.raises(ham.InputError, match=r"^1 images .*deep\.\w+ \(more than 8 bit"):
            ham.decode([file], {"input_size": (3, 32, 32)})


def test_which_files_of_a_folder_are_images(tmp_path, capsys):
    """By all endings of Pillow, in subfolders, too; hidden ones and links to folders are not."""
    names = (
        "a/1.jpg a/2.JFIF a/3.gif a/sub/4.webp a/6.pdf a/notes.txt a/5 a/.6.jpg a/._1.jpg b/1.png"
    )
    for name in [*names.split(), ".ipynb_checkpoints/x.jpg", "a/.cache/x.jpg", "list.txt"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.bmp").touch()
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")  # a class may lie elsewhere
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    files, classes = ham.image_folder(tmp_path / "set")
    found = [x.relative_to(tmp_path / "set").as_posix() for x in files]
    assert found == ["a/1.jpg", "a/2.JFIF", "a/3.gif", "a/sub/4.webp", "b/1.png", "c/1.bmp"]
    assert classes == [*"aaaabc"]
    out = capsys.readouterr().out
    assert "4 left out" in out and "['5', '6.pdf', 'loop']" in out  # and notes.txt
    shutil.rmtree(tmp_path / "set" / "a")
    assert len(ham.image_folder(tmp_path / "set")[0]) == 2 and not capsys.readouterr().out


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


def test_accuracies_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 5, 2], [0, 9, 1, 2], [0, 0, 7, 1], [0, 0, 0, 1]])
    labels = torch.tensor([0, 1, 2, 2, 3])  # right; 2 instead of 1; 1 instead of 2; right; right
    assert ham.accuracies(logits, labels, [range(3), range(3, 4)]) == [50.0, 100.0]
    assert ham.accuracies(logits, labels, [range(1), range(1, 4)]) == [100.0, 50.0]


def test_classes_not_seen_yet_are_never_predicted(folder, tmp_path, monkeypatch):
    """Their rows are 0: they would win where all cosines of seen classes are negative."""
    want = ham.run(config(folder, tmp_path / "a", method="frozen"))["accuracy_matrix"]
    real = ham.cosine_logits
    monkeypatch.setattr(
        ham, "cosine_logits", lambda f, rows: real(f, rows) - 5 * (rows != 0).any(1)
    )
    assert ham.run(config(folder, tmp_path / "b", method="frozen"))["accuracy_matrix"] == want


# ------------------------------------------------------------------------------------- Whole runs

KEYS = """config classes tasks accuracy_matrix final_accuracy average_incremental_accuracy
forgetting backward_transfer learning_accuracy parameters_stored versions hardware ham_sha256
test_images_per_task"""


def test_results_are_what_the_contract_says(finished):
    _, method, _, results = finished
    (file,) = Path(results["config"]["out"]).rglob("results.json")
    assert json.loads(file.read_text()) == results and set(KEYS.split()) <= set(results)
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    for record in results["tasks"]:
        assert {"accuracy", "forgetting", "alpha", "alpha_groups", "similarities"} <= set(record)
        assert all(0 < x < 100 for x in record["seconds"].values())
    assert results["final_accuracy"] == pytest.approx(np.mean(results["accuracy_matrix"][-1]))
    updates = [update for group in method.groups for update in group.delta_w.values()]
    assert all(isinstance(update, tuple) for update in updates)  # factors, of so few members
    stored = sum(x.numel() for update in updates for x in update)
    assert results["parameters_stored"] == stored + CLASSES * 64
    assert results["ham_sha256"] == hashlib.sha256((ROOT / "ham.py").read_bytes()).hexdigest()


def test_a_finished_run_is_a_timm_model(folder, finished):
    """Read in a fresh process that knows nothing of this project: its predictions are the run's."""
    results = finished[-1]
    (file,) = Path(results["config"]["out"]).rglob("results.json")
    code = f"""
import json, pathlib, sys, timm, torch
from PIL import Image
model = timm.create_model("local-dir:{file.parent.as_posix()}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = json.load(open("{file.parent.as_posix()}/config.json"))["label_names"]
right = []
for file in sorted(pathlib.Path("{folder.as_posix()}/test").rglob("*.png")):
    logits = model(transform(Image.open(file).convert("RGB"))[None])
    right.append(names[logits.argmax()] == file.parent.name)
assert not any("ham" == name or name.startswith("extras") for name in sys.modules)
print(100 * sum(right) / len(right))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(results["final_accuracy"])
    left = {f.name for f in file.parent.iterdir()}
    assert left == {"results.json", "config.json", "model.safetensors", "state.pt"}


def test_read_out_head_uses_the_trained_rows(folder, tmp_path):
    """Of each task its own; swapped, so that class means could be told apart."""
    vit, method, data = untrained(folder, tmp_path, read_out="head")
    rows, finish = [], method.finish

    def swapped(task, to):
        rows.append(to.head.data.copy_(to.head.detach().flip(0)).clone())
        return finish(task, to)

    method.finish = swapped
    results = ham.learn(vit, method, data)
    (file,) = Path(results["config"]["out"]).rglob("model.safetensors")
    torch.testing.assert_close(load_file(file)["head.weight"], F.normalize(torch.cat(rows), dim=1))
    logits = ham.cosine_logits(features(vit, method.folded(), data), torch.cat(rows))
    want = ham.accuracies(logits, data.labels["test"], data.tasks)
    assert results["accuracy_matrix"][-1] == pytest.approx(want)


def test_model_computes_in_bf16_where_asked(finished):
    """bf16 moves features, by its own precision, and by no more."""
    vit, method, data, _ = finished
    x = data.prepare(data.pixels["test"])
    exact, rounded = (
        ham.forward(vit, method.folded(), x, dataclasses.replace(method.config, precision=p))
        for p in ("fp32", "bf16")
    )
    assert exact.dtype == rounded.dtype == torch.float32
    off = (exact - rounded).norm() / exact.norm()
    assert 1e-4 < off < 0.1


def test_weights_and_features_stay_fp32(folder, tmp_path, monkeypatch):
    """A share of 1/20 of a small update is below bf16's step at W0's size: it must not be lost."""
    forward, weight, low = ham.forward, ham.effective_weight, []

    def watched(vit, weights, *given):
        low.extend(w.dtype != torch.float32 for w in weights.values())
        return forward(vit, weights, *given)

    def outside(*given):
        low.append(torch.is_autocast_enabled("cpu"))
        return weight(*given)

    monkeypatch.setattr(ham, "forward", watched)
    monkeypatch.setattr(ham, "effective_weight", outside)
    vit, method, data, _ = trained(folder, tmp_path, precision="bf16", epochs=1)
    assert low and not any(low)
    tensors = [x for g in method.groups for u in g.delta_w.values() for x in u]
    tensors += [*method.folded().values()]
    tensors += ham.extract(vit, method.folded(), data, "test", range(2), method.config)[:1]
    assert {x.dtype for x in tensors} == {torch.float32}


def test_the_command_gives_the_figures_of_the_function_and_few_lines(folder, finished, tmp_path):
    *_, results = finished
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONIOENCODING": "ascii"}
    command = flags(config(folder, tmp_path, lr=1e-3))
    done = cli(*command, env=os.environ | threads)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr + done.stdout  # not on a terminal: lines, no bar
    (file,) = tmp_path.rglob("results.json")
    again = json.loads(file.read_text())
    assert again["accuracy_matrix"] == results["accuracy_matrix"]
    assert [t["loss"] for t in again["tasks"]] == [t["loss"] for t in results["tasks"]]
    lines = done.stdout.splitlines()
    assert len([x for x in lines if re.match("task .*accuracy.*forgetting.*groups", x)]) == 3
    assert "mean (0.5, 0.5, 0.5)" in done.stdout and "test_vit.r160_in1k" in done.stdout
    assert max(len(x) for x in lines if "/tmp" not in x and str(tmp_path)[:9] not in x) <= 100


def contents(out):
    """What a run's folder holds, less what tells one run of the same settings from another."""
    (file,) = Path(out).rglob("results.json")
    r = json.loads(file.read_text())
    tasks = [{k: x for k, x in t.items() if k != "seconds"} for t in r["tasks"]]
    state = torch.load(file.with_name("state.pt"), weights_only=True)
    same = r["accuracy_matrix"], tasks, r["parameters_stored"], str(state["method"])
    return same, file.with_name("model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"g_max": 1, "tau": 1.0},
        {"method": "sequential"},
        {"method": "average", "read_out": "head"},
        {"method": "frozen"},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch, capsys, settings):
    """Stopped in each task, before it is written, and before the model is."""
    settings = settings | {"epochs": 1, "lr": 1e-3}
    ham.run(config(folder, tmp_path / "whole", **settings))
    parts = config(folder, tmp_path / "parts", **settings)
    for call, name in ((1, "accuracies"), (1, "accuracies"), (1, "save")):
        stop_in(call, parts, monkeypatch, name)
        assert not list((tmp_path / "parts").rglob("results.json"))
    ham.run(parts)
    assert "3 of 3 tasks learnt" in capsys.readouterr().out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_complete_run_is_not_run_again(folder, tmp_path, capsys):
    c = config(folder, tmp_path, method="frozen")
    first = ham.run(c)
    (file,) = tmp_path.rglob("results.json")
    before = file.stat().st_mtime_ns
    assert ham.run(c) == first and "3 of 3 tasks learnt" in capsys.readouterr().out
    file.with_name("state.pt").unlink()  # committed results have none
    assert ham.run(c) == first and file.stat().st_mtime_ns == before


def test_a_run_with_other_settings_is_never_overwritten(folder, tmp_path):
    c = config(folder, tmp_path, method="frozen")
    ham.run(c)
    (file,) = tmp_path.rglob("results.json")
    before = file.read_bytes()
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "other.safetensors")
    for change, named in (
        ({"images_per_class": 4}, "images_per_class"),
        ({"weights": str(tmp_path / "other.safetensors")}, "weights_sha256"),
    ):
        with pytest.raises(ham.InputError, match=f"other .*{named} .*: choose a --name"):
            ham.run(dataclasses.replace(c, **change))
    elsewhere = shutil.copy(folder / "vit.safetensors", tmp_path / "same.safetensors")
    ham.run(dataclasses.replace(c, weights=elsewhere))
    assert file.read_bytes() == before
    old = json.loads(before)
    for key, there in {"gain": 5, "rank": None}.items():  # another program's; one that is missing
        changed = {k: x for k, x in (old["config"] | {key: there}).items() if x is not None}
        file.write_text(json.dumps(old | {"config": changed}))
        with pytest.raises(ham.InputError, match=f"other {key}"):
            ham.run(c)
    moved = dict.fromkeys(("out", "data_dir", "device"), "elsewhere")
    file.write_text(json.dumps(old | {"config": old["config"] | moved}))
    ham.run(c)
    file.write_text(json.dumps(old | {"config": changed}))
    ham.run(dataclasses.replace(c, rank=8))  # a missing one counts as its default, not this run's 2
    file.unlink()  # what is left is the state of a stopped run
    says = r"other images_per_class \(None\), images_sha256 .*: choose"
    with pytest.raises(ham.InputError, match=says):
        ham.run(dataclasses.replace(c, images_per_class=4))


def stop_in(call, c, monkeypatch, name="accuracies"):
    """Run a configuration up to a call, counted from 0, of one of ham.py's functions."""
    real, ran = getattr(ham, name), itertools.count()

    def stop(*arguments):
        if next(ran) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ham, name, stop)
        ham.run(c)


def rename(root, **names):
    for part, (old, new) in itertools.product(("train", "test"), names.items()):
        (root / part / old).rename(root / part / f"{new}.")
    for part, new in itertools.product(("train", "test"), names.values()):
        (root / part / f"{new}.").rename(root / part / new)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: rename(root, class0="class9"),
        lambda root: rename(root, class0="class1", class1="class0"),
        lambda root: shutil.copy(root / "train/class0/0.png", root / "train/class0/99.png"),
        lambda root: shutil.copy(root / "test/class0/0.png", root / "test/class0/1.png"),
        lambda root: [shutil.copytree(root / x / "class1", root / x / "new") for x in PER_CLASS],
    ],
)
def test_a_stopped_run_refuses_other_images(change, folder, tmp_path, monkeypatch):
    """Wherever they lie; a class or an image more, less, or under another name."""
    shutil.copytree(folder, tmp_path / "a" / "set")
    c = config(folder, tmp_path, method="frozen", dataset=str(tmp_path / "a" / "set"))
    stop_in(1, c, monkeypatch)
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / "set", tmp_path / "b" / "set")
    monkeypatch.chdir(tmp_path / "b")
    moved = dataclasses.replace(c, dataset="./set/", device="cpu:0")
    stop_in(0, moved, monkeypatch)  # goes on
    change(tmp_path / "b" / "set")
    says = "holds a run with other images_sha256 .*: choose a --name"
    with pytest.raises(ham.InputError, match=says):
        ham.run(moved)


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch, capsys):
    """Each time that a file is written out: one line, and the same command goes on."""
    arguments = [*map(str, flags(config(folder, tmp_path / "full", epochs=1, lr=1e-3)))]
    ham.run(config(folder, tmp_path / "whole", epochs=1, lr=1e-3))
    capsys.readouterr()
    for turn in range(4):  # in the trial, in a task, in the model, in the results
        left = itertools.count()

        def full(_, turn=turn, left=left):
            if next(left) == [1, 4, 5, 2][turn]:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            patch.setattr(os, "fsync", full)
            ham.main(arguments)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "No space left" in captured.err
        assert captured.out.count("\ntask ") == [0, 1, 2, 0][turn]
    ham.main(arguments)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["state.pt", "results.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_broken_file_of_a_run_is_named(name, size, folder, tmp_path, monkeypatch):
    c = config(folder, tmp_path, method="frozen")
    if name == "results.json":
        ham.run(c)
    else:
        stop_in(1, c, monkeypatch)
    (file,) = tmp_path.rglob(name)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ham.InputError, match="has a broken file: .*; move the folder away"):
        ham.run(c)
    assert file.stat().st_size == size


def test_a_run_writes_for_others_and_in_its_folder(folder, tmp_path):
    results = ham.run(config(folder, tmp_path / "out", method="frozen", name="../../x\\y"))
    (run,) = tmp_path.iterdir()
    (run,) = run.iterdir()
    assert run.name.endswith("-T3-frozen-..-..-x-y-s1993") and results["config"]["name"]
    (tmp_path / "usual").touch()
    assert {x.stat().st_mode for x in run.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_two_threads_run_as_one(folder, tmp_path, finished):
    c = config(folder, tmp_path, lr=1e-3)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(ham.run, (dataclasses.replace(c, name=name) for name in "ab")))
    for results in both:
        assert results["accuracy_matrix"] == finished[-1]["accuracy_matrix"]
        assert [t["loss"] for t in results["tasks"]] == [t["loss"] for t in finished[-1]["tasks"]]


def test_names_that_a_terminal_would_obey_or_cannot_show(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "größe")
    c = config(folder, tmp_path, method="frozen", dataset=str(data), name="数")
    done = cli(*flags(c), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "gr\\xf6\\xdfe" in done.stdout, done.stderr
    with contextlib.redirect_stdout(io.StringIO()) as out:  # as a notebook's, without reconfigure
        ham.main([*map(str, flags(c))])
    assert "größe-T3-frozen-数-s1993" in out.getvalue()
    (data / "train" / "class0").rename(data / "train" / "\x1b[31mred\n")
    with pytest.raises(SystemExit, match="2"):
        ham.main([*map(str, flags(dataclasses.replace(c, name="b")))])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
def test_a_run_that_is_interrupted_says_how_to_go_on(folder, tmp_path):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("started behind an &: the signal is ignored")
    command = [str(x) for x in flags(config(folder, tmp_path, epochs=20))]
    command = [sys.executable, str(ROOT / "ham.py"), *command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while not run.stdout.readline().startswith("task"):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in error, error
    assert "the same command goes on" in error and list(tmp_path.rglob("state.pt"))


def test_settings_from_python(folder, tmp_path):
    c = config(folder, tmp_path, method="frozen", rho=np.float64(0.5), seed=np.int64(3))
    results = ham.run(dataclasses.replace(c, out=tmp_path, data_dir=folder, rank=np.int64(4)))
    assert results["config"]["seed"] == 3 and results["config"]["out"] == str(tmp_path)
    assert json.loads(next(tmp_path.rglob("results.json")).read_text()) == results


POSITIVE = "tasks images-per-class test-images-per-class img-size rank g-max epochs batch-size"
BAD = [
    (f"--{flag} {value}", f"--{flag} {value}: must be in (0, ")
    for flag in POSITIVE.split()
    for value in (0, -3)
]
BAD += [(f"--{flag} 1.5", "invalid int value: '1.5'") for flag in POSITIVE.split()]
RATES = "lr lr-alpha lr-head rho"
BAD += [
    (f"--{flag} {value}", f"--{flag} {value}: must be in (0, ")
    for flag in RATES.split()
    for value in (0.0, -0.1, "nan")
]
BAD += [(f"--{flag} much", "invalid float value: 'much'") for flag in [*RATES.split(), "tau"]]
CHOICES = ["class-order", "method", "merge", "read-out", "precision"]
BAD += [(f"--{flag} nothing", f"--{flag} nothing: must be ") for flag in CHOICES]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *BAD,
        ("--rho 1.1", r"--rho 1.1: must be in (0, 1]"),
        (f"--seed {2**32}", "must be in (-1, "),
        ("--seed -1", "--seed -1: must be in (-1, "),
        ("--tsks 3", "unrecognized arguments: --tsks 3"),
        ("--task 3", "unrecognized arguments: --task 3"),
        ("--tasks", "expected one argument"),
        ("--validate yes", "unrecognized arguments: yes"),
        ("--dataset nowhere", "known are cifar100, "),
        ("--dataset cifar100 --model vit_huge", "vit_huge"),
        ("--dataset cifar100 --model vit_base_patch16_224.nope", "nope"),
        ("--dataset cifar100 --model resnet18 --weights x", "check --model"),
        ("--weights nowhere", "nowhere"),
        ("--layers qkv,foo", "fc1,fc2,proj,qkv"),
        ("--layers ,", "fc1,fc2,proj,qkv"),
        ("--img-size 33", "33"),
        ("--device quantum", "quantum"),
        ("--device cuda:77", "cuda:77"),
        ("--tasks 4 --method frozen", "each needs 2 of the 6 classes"),
        ("--dataset demo --weights x", "the demo has drawings and a model of its own"),
        ("--dataset demo --model test_vit", "the demo has drawings and a model of its own"),
        (f"--dataset {ROOT / 'extras'}", "known are cifar100, "),
        (f"--name {'x' * 300}", "too long"),
        (f"--out {ROOT / 'ham.py'}", "ham.py"),
    ],
)
def test_a_bad_flag_gives_one_line_and_status_2(arguments, says, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"--dataset": folder, "--model": "test_vit", "--tasks": 3, "--device": "cpu"}
    given |= {"--weights": folder / "vit.safetensors", "--img-size": 32, "--out": folder / "bad"}
    given = [str(x) for k, v in given.items() if k not in arguments.split() for x in (k, v)]
    with pytest.raises(SystemExit) as stop:
        ham.main([*given, *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


@pytest.mark.parametrize("method", ham.METHODS)
def test_a_resolved_configuration_resolves_to_itself(folder, tmp_path, method):
    for settings in ({}, {"read_out": "head", "group_rank": 3, "train_alpha": True}):
        c = ham.resolve(config(folder, tmp_path, method=method, **settings))
        assert ham.resolve(c) == c and c.train_alpha == (method in ("ham", "frozen"))
    assert c.tasks == (1 if method == "joint" else 3)
    own = {"frozen": ("class-mean", 3), "average": ("head", None)}.get(method, ("head", 3))
    assert (c.read_out, c.group_rank) == own


@pytest.mark.parametrize("there", [True, False])
def test_default_device_and_precision(there, monkeypatch):
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: there)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    c = ham.resolve(ham.Config())
    assert (c.device, c.precision) == (("cuda", "bf16") if there else ("cpu", "fp32"))


def test_no_memory_is_one_line(folder, capsys):
    def do(_):
        raise torch.OutOfMemoryError

    with pytest.raises(SystemExit, match="2"):
        ham.main(["--dataset", str(folder)], do)
    assert capsys.readouterr().err.count("lower --batch-size or --img-size\n") == 1


@pytest.mark.parametrize("given", [{"train_alpha": "False"}, {"tasks": 2.7}])
def test_a_value_is_refused_rather_than_rounded(given):
    ((name, value),) = given.items()
    with pytest.raises(ham.InputError, match=f"--{name.replace('_', '-')} {value}: must be "):
        ham.resolve(ham.Config(**given))
    other = ham.Config(tasks=np.int64(3), rank="2", train_alpha=np.False_, rho=1, data_dir=ROOT)
    c = ham.resolve(other)
    assert json.loads(json.dumps(vars(c)))["data_dir"] == str(ROOT)
    assert (c.tasks, c.rank, c.train_alpha, c.rho) == (3, 2, False, 1.0)


def altered(folder, change):
    state = load_file(folder / "vit.safetensors")
    return {k: x.contiguous() for k, x in change(state).items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"backbone.{k}": x for k, x in s.items()},
        lambda s: {k: x for k, x in s.items() if ".1." not in k},
        lambda s: {k.replace("blocks", "layers"): x for k, x in s.items()},
        lambda s: s | {"blocks.9.norm1.weight": torch.ones(64)},
        lambda s: s | {"norm.weight": torch.ones(7)},
        lambda s: {"unknown": torch.ones(3)},
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, tmp_path, change):
    save_file(altered(folder, change), tmp_path / "other.safetensors")
    with pytest.raises(ham.InputError, match="Missing key|Unexpected key|size mismatch"):
        ham.run(config(folder, tmp_path, weights=str(tmp_path / "other.safetensors")))


def test_weights_without_or_with_another_head_are_the_same(folder, tmp_path):
    plain = ham.build_vit(ham.resolve(config(folder, tmp_path))).state_dict()
    for change in (
        lambda s: {k: x for k, x in s.items() if not k.startswith("head")},
        lambda s: s | {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)},
        lambda s: {f"module.{k}": x for k, x in s.items()},  # DataParallel's, which timm takes off
    ):
        save_file(altered(folder, change), tmp_path / "w.safetensors")
        c = ham.resolve(config(folder, tmp_path, weights=str(tmp_path / "w.safetensors")))
        assert all(torch.equal(x, plain[k]) for k, x in ham.build_vit(c).state_dict().items())


def test_without_network_the_cure_is_a_file_of_weights(folder, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    for weights, says in ((None, "a file, where there is no network"), ("x.pth", "its own")):
        with pytest.raises(ham.InputError, match=says):
            ham.run(config(folder, tmp_path, weights=weights))


def test_unreadable_images_are_named(folder, tmp_path):
    bad = tmp_path / "bad"
    for part, label in itertools.product(("train", "test"), "ab"):
        (bad / part / label).mkdir(parents=True)
        (bad / part / label / "x.png").write_bytes(b"no image")
    with pytest.raises(ham.InputError, match=r"2 images cannot be read: .*x\.png"):
        ham.run(config(folder, tmp_path, dataset=str(bad), tasks=1))
    (bad / "test" / "b").rename(bad / "test" / "c")
    with pytest.raises(ham.InputError, match=r"^[bc] needs images in both"):
        ham.run(config(folder, tmp_path, dataset=str(bad), tasks=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {"norm.bias": torch.full((64,), torch.nan)}, "not one finite vector"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer"),
        (b"<html>", "check --model .*--weights"),
        (b"", "check --model .*--weights"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors", "npz"])
def test_weights_that_are_none(change, says, ending, folder, tmp_path):
    file = tmp_path / f"weights.{ending}"
    if callable(change):
        if ending == "npz":
            pytest.skip("Google's own files")
        state = altered(folder, change)
        save_file(state, file) if ending == "safetensors" else torch.save(state, file)
    else:
        file.write_bytes(change)
    with pytest.raises(ham.InputError, match=says) as error:
        ham.run(config(folder, tmp_path, weights=str(file)))
    assert "weights_only=False" not in str(error.value) and "--lr" not in str(error.value)


def test_googles_npz_files_are_read(folder, tmp_path):
    """Weights laid out as Google's files hold them, read back as they were."""
    vit = timm.create_model("test_vit", num_classes=0)
    heads = vit.blocks[0].attn.num_heads
    arrays = {"embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0)}
    arrays |= {"embedding/bias": vit.patch_embed.proj.bias, "cls": vit.cls_token}
    arrays["Transformer/posembed_input/pos_embedding"] = vit.pos_embed
    arrays["Transformer/encoder_norm/scale"] = vit.norm.weight
    arrays["Transformer/encoder_norm/bias"] = vit.norm.bias
    for i, block in enumerate(vit.blocks):
        at = f"Transformer/encoderblock_{i}/"
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays |= {f"{at}{name}/scale": norm.weight, f"{at}{name}/bias": norm.bias}
        for name, layer in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            arrays |= {f"{at}MlpBlock_3/{name}/kernel": layer.weight.T}
            arrays |= {f"{at}MlpBlock_3/{name}/bias": layer.bias}
        attention = at + "MultiHeadDotProductAttention_1/"
        parts = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), *parts):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(64, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, 64)
        arrays[f"{attention}out/bias"] = block.attn.proj.bias
    np.savez(tmp_path / "vit.npz", **{k: x.detach().numpy() for k, x in arrays.items()})
    c = config(folder, tmp_path, weights=str(tmp_path / "vit.npz"), img_size=None)
    got = ham.build_vit(ham.resolve(c)).state_dict()
    for name, value in vit.state_dict().items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "resnet18"])
def test_a_model_that_cannot_be_saved_or_adapted_is_refused_untrained(
    model, folder, tmp_path, monkeypatch
):
    """Two heads; no attention."""
    monkeypatch.setattr(ham, "train_task", lambda *_: pytest.fail("trained"))
    vit = ham.timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *x, **how: vit(*x, **how | {"pretrained": False})
    )
    c = config(folder, tmp_path / "out", model=model, weights=None)
    c = dataclasses.replace(c, img_size=None if model == "resnet18" else 32)
    with pytest.raises(ham.InputError, match="one linear layer|this model's are"):
        ham.run(c)
    assert not list(tmp_path.rglob("state.pt"))


def test_lora_is_on_every_block():
    vit = timm.create_model("test_vit")
    for layers in ("qkv", "qkv,proj", "fc1,fc2"):
        inside = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
        want = [f"blocks.{i}.{inside[x]}.{x}.weight" for i in range(6) for x in layers.split(",")]
        w0 = ham.lora_layers(vit, layers)
        assert [*w0] == want
        assert all(torch.equal(w, vit.state_dict()[name]) for name, w in w0.items())


@pytest.mark.parametrize("model", ["xcit_nano_12_p8_224", "test_vit2"])
def test_other_vits_finish_and_are_saved_as_they_are(model, folder, tmp_path, monkeypatch):
    """Neither plain attention nor fused kernels are needed: the saved model's logits are the run's."""
    create = timm.create_model
    fresh = lambda *x, **how: create(*x, **how | {"pretrained": False})
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", fresh)
        c = config(folder, tmp_path, model=model, weights=None, epochs=1, lr=1e-3)
        vit = ham.build_vit(ham.resolve(c))
        data = ham.load_data(ham.resolve(c), vit)
        method = ham.HAM(ham.lora_layers(vit, "qkv"), ham.resolve(c))
        ham.learn(vit, method, data)
    (file,) = tmp_path.rglob("results.json")
    model = create(f"local-dir:{file.parent.as_posix()}", pretrained=True).eval()
    x = data.prepare(data.pixels["test"])
    with torch.no_grad():
        f = functional_call(vit, method.folded(), x)
        torch.testing.assert_close(
            model(x), f @ model.get_classifier().weight.T, rtol=1e-3, atol=1e-4
        )


def test_a_loss_that_explodes_is_named(folder, tmp_path):
    for settings in ({}, {"group_rank": 1}, {"method": "joint"}):
        with pytest.raises(ham.InputError, match="lower --lr"):
            ham.run(config(folder, tmp_path, lr=1e18, **settings))
    assert not list(tmp_path.rglob("results.json"))


def test_ham_py_stands_alone(folder, tmp_path):
    """Copied alone into an empty folder: it imports, prints its help, runs; the demo says why not.

    Importing it starts no process and draws nothing.
    """
    shutil.copy(ROOT / "ham.py", tmp_path)
    code = f"""
import random, subprocess, sys, numpy, torch, timm, torchvision
subprocess.Popen = None
before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
import ham
from ham import effective_weight, merge, prune
assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
assert (before[1] == numpy.random.get_state()[1]).all() and "extras" not in sys.modules
ham.main({[*map(str, flags(config(folder, tmp_path / "out", epochs=1)))]})
for arguments in (["--help"], []):
    try:
        ham.main(arguments)
    except SystemExit as stop:
        print(stop.code)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and list((tmp_path / "out").rglob("results.json")), done.stderr
    assert "--rho" in done.stdout and done.stdout.endswith("0\n2\n")
    assert done.stderr.count("\n") == 1 and "a model of its own, in extras/" in done.stderr


def test_demo_as_a_user_runs_it(tmp_path):
    command = ["--tasks", 2, "--epochs", 1, "--images-per-class", 5, "--test-images-per-class", 2]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = cli(*command, "--data-dir", tmp_path, "--out", tmp_path, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(x.startswith("task") for x in lines) == 6
    for method in ("ham", "sequential", "frozen"):
        r = json.loads((tmp_path / f"demo-T2-{method}-s1993/results.json").read_text())
        assert 10 < r["final_accuracy"] < 90  # above chance (1 %), not trivial
        assert any(x.startswith(method) and f"{r['final_accuracy']:.1f}" in x for x in lines)
    model = timm.create_model(f"local-dir:{tmp_path}/demo-T2-ham-s1993", pretrained=True)
    assert model.num_classes == 100


# -------------------------------------------------------------------- The files and what they say


def test_order_of_the_file():
    source = (ROOT / "ham.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert [x for x in imported if x.split(".")[0] == "extras"] == ["extras"]  # lazily
    at = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert at["effective_weight"].lineno < 80 and at["HAM"].end_lineno < 290
    assert max(map(len, lines)) <= 100 and len(lines) <= 850 and "fmt:" not in source
    assert all(ast.get_docstring(n) for n in at.values())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 40
    assert (ROOT / "reproduce.ipynb").stat().st_size < 600_000


def test_defaults_in_the_glossary_and_six_requirements():
    c = ham.Config()
    rows = [f"(r = {c.rank})", f"be ({c.g_max})", f"a group ({c.tau})", f"keeps ({c.rho})"]
    assert all(row in ham.__doc__ for row in [*rows, f"number of tasks ({c.tasks})"])
    names = re.findall("^[a-z]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(names) == ["numpy", "pytest", "timm", "torch", "torchvision", "tqdm"]
    head = re.search(r"(?ms)^# /// script$(.*?)^# ///$", (ROOT / "ham.py").read_text("utf-8"))[1]
    for line in (ROOT / "requirements.txt").read_text().split():  # `uv run ham.py` takes these
        assert f'"{line}"' in head or line.startswith("pytest")
    tree = ast.parse((ROOT / "ham.py").read_text("utf-8"))
    used = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    used |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    used = {name.split(".")[0] for name in used} - set(sys.stdlib_module_names)
    assert used == {"torch", "torchvision", "timm", "numpy", "tqdm", "PIL"}  # PIL: torchvision's


def test_ruff_has_nothing_to_do():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (["check"], ["format", "--check", "--line-length", "100"]):
        ruff = [sys.executable, "-m", "ruff", *command, "ham.py", "test_ham.py", "extras"]
        done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_learning_rate_falls_with_the_images_seen(folder, tmp_path, monkeypatch):
    for n, share in ((500, 1.0), (1250, 1.0), (1875, 1.0), (6250, 0.3), (12_500, 0.15)):
        assert ham.learning_rate("ham", n) == pytest.approx(1e-3 * share)
        assert ham.learning_rate("sequential", n) == pytest.approx(8e-4 * share)
        assert ham.learning_rate("joint", n) == 1e-3
    monkeypatch.setattr(ham, "learn", lambda vit, method, data: method.config.lr)
    for epochs, images in ((1, 2 * CLASSES / 3), (1000, 2000 * CLASSES / 3)):  # seen per task
        c = config(folder, tmp_path, images_per_class=2, epochs=epochs)
        assert ham.run(c) == pytest.approx(1e-3 * min(1, 1875 / images))


def test_committed_results_are_whole():
    files = sorted((ROOT / "results").rglob("results.json"))
    assert files
    for file in files:
        r = json.loads(file.read_text())
        assert set(KEYS.split()) <= set(r), file
        assert file.parent.name.endswith(f"-s{r['config']['seed']}")
        want = ham.measures(r["accuracy_matrix"], r["test_images_per_task"])["final_accuracy"]
        assert r["final_accuracy"] == pytest.approx(want)


def test_published_figures_have_backbone_and_source():
    with (ROOT / "extras" / "published_results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines
    needed = ("method", "backbone", "pretraining", "source", "read_in")
    for line in lines:  # without these a figure is none
        assert all(line[k] for k in needed), line
        assert 0 < float(line["final_accuracy"]) < 100 and int(line["tasks"]) > 0


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "results/all.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, link


def snippet(contains):
    """The python block of README.md that contains something."""
    text = (ROOT / "README.md").read_text("utf-8")
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if contains in x]
    assert len(found.splitlines()) <= 45
    return compile(found, "README.md", "exec")


def test_readme_loop_has_the_matrix_of_ham_py(folder, tmp_path, monkeypatch):
    """The same batches, through loaders of one's own: the same accuracies to the bit."""
    vit, method, data, results = trained(folder, tmp_path, epochs=5, lr=None, batch_size=32)

    class Augmented:  # flips and order as ham.train_task draws them
        def __init__(self, task):
            self.task, self.random = task, torch.Generator().manual_seed(1000 * 1993 + task)

        def __len__(self):
            return 1

        def __iter__(self):
            pixels, labels = data.images("train", data.tasks[self.task])
            rows = torch.randperm(len(pixels), generator=self.random)
            flip = torch.rand(len(rows), generator=self.random) < 0.5
            yield data.prepare(pixels[rows], flip), labels[rows]

    def plain(part, classes):
        pixels, labels = data.images(part, classes)
        return [(data.prepare(pixels), labels)]

    tasks = [
        (list(t), Augmented(i), plain("train", t), plain("test", t))
        for i, t in enumerate(data.tasks)
    ]
    monkeypatch.setitem(sys.modules, "yours", types.SimpleNamespace(tasks=tasks))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: copy.deepcopy(vit))
    asked = functools.partial(ham.Config, rank=2, precision="fp32")
    monkeypatch.setattr(ham, "Config", asked)
    given = {}
    exec(snippet("from yours import tasks"), given)  # noqa: S102
    assert given["matrix"] == results["accuracy_matrix"]
    for one, other in zip(given["method"].groups, method.groups, strict=True):
        assert one.members == other.members and one.alpha == other.alpha


def test_groups_of_peft_adapters(folder, monkeypatch):
    """The adapter loaded back is W0 + Σ ΔW_G; each with B that is not 0."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    vit = timm.create_model("test_vit", num_classes=0).eval()
    w0, made, adapters = ham.lora_layers(vit, "qkv"), peft.get_peft_model, []

    def trained_by_chance(model, lora):
        model = made(model, lora)
        for name, x in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(x, std=0.1)
        adapters.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: vit)
    monkeypatch.setattr(peft, "get_peft_model", trained_by_chance)
    given = runpy.run_path(str(ROOT / "extras" / "lift" / "peft_adapters.py"))
    x, groups = torch.randn(2, 3, 160, 160), given["method"].groups
    assert [g.members for g in groups] in ([[0, 2], [1]], [[0], [1, 2]])
    with torch.no_grad():
        got = given["model"](x)
        bare = given["model"].unload()
        layers = {n.split("model.")[-1] + ".weight": n for n in given["names"]}
        folded = {
            k: w0[k] + sum(ham.dense(g.delta_w[n]) for g in groups) for k, n in layers.items()
        }
        torch.testing.assert_close(got, functional_call(bare, folded, x), rtol=1e-3, atol=1e-3)
        assert (got - functional_call(bare, w0, x)).abs().max() > 1e-2


def test_readme_reads_a_finished_run(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (file,) = Path(finished[-1]["config"]["out"]).rglob("results.json")
    shutil.copytree(file.parent, tmp_path / "runs" / "cub200-T10-ham-small-s1993")
    Image.new("RGB", (50, 40)).save("bird.jpg")
    exec(snippet("bird.jpg"), {})  # noqa: S102
    assert capsys.readouterr().out.strip() in finished[-1]["classes"]


def test_notebook_has_the_sections_of_the_file_and_runs_in_quick_mode():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    notebook = nbformat.read(ROOT / "reproduce.ipynb", as_version=4)
    method = itertools.takewhile(lambda c: "# What was measured" not in c.source, notebook.cells)
    texts = "\n".join(cell.source for cell in method if cell.cell_type == "markdown")
    banners = re.findall("^# -+ (.*)", (ROOT / "ham.py").read_text("utf-8"), re.MULTILINE)
    assert re.findall("^## (.*)", texts, re.MULTILINE) == banners
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source)
    shown = "".join(x.get("data", {}).get("text/markdown", "") for c in code for x in c.outputs)
    equations = [ham.effective_weight, ham.cosine_similarity, ham.assign_group]
    for f in [*equations, ham.prune, ham.shares, ham.merge, ham.train_task, ham.learn]:
        assert inspect.getsource(f).strip() in shown, f"{f.__name__} has changed: run the notebook"
    assert tempfile.gettempdir() not in str(notebook) and str(ROOT) not in str(notebook)
    assert "site-packages" not in str(notebook)  # a warning's path, of whichever machine
    if not os.environ.get("CI"):
        pytest.skip("its cells are executed where CI is set: a minute")
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=280, resources=where).execute()


# ---------------------------------------------------------------------------------------- Real data


@pytest.mark.skipif(not (DATA / "cifar-100-python").is_dir(), reason="no data/cifar-100-python")
def test_real_cifar100():
    c = ham.resolve(ham.Config(dataset="cifar100", data_dir=str(DATA)))
    data = ham.load_data(c, timm.create_model("test_vit"))
    assert data.sizes("train") == [5000] * 10 and data.sizes("test") == [1000] * 10
    assert data.names[0] == "road"  # class 68
    assert data.pixels["train"].shape == (50_000, 3, 32, 32)


@pytest.mark.skipif(not (DATA / "CUB_200_2011").is_dir(), reason="no data/CUB_200_2011")
def test_real_cub200():
    c = ham.resolve(ham.Config(dataset="cub200", data_dir=str(DATA), class_order="natural"))
    data = ham.load_data(c, timm.create_model("test_vit"))
    assert sum(data.sizes("train")) == 5994 and sum(data.sizes("test")) == 5794
    assert len(data.tasks) == 10 and data.names[0] == "001.Black_footed_Albatross"


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
