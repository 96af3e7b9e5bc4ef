"""Tests of extras/baselines.py, on the demo's drawn images: nothing to download."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ham
from extras import baselines

ROOT = Path(__file__).parent.parent


def config(out, **settings):
    """A configuration that runs in a second, after the demo's pre-training."""
    values = {"out": str(out), "tasks": 3, "epochs": 1, "images_per_class": 8, "device": "cpu"}
    values |= {"test_images_per_class": 4, "batch_size": 8, "precision": "fp32", "lr": 1e-3}
    return baselines.Config(**(values | settings))


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_each_method_from_the_command_line_to_its_results(method, tmp_path):
    c = config(tmp_path, method=method)
    default = baselines.Config()
    flags = [
        x
        for f in dataclasses.fields(c)
        if (value := getattr(c, f.name)) != getattr(default, f.name) or f.name == "method"
        for x in (f"--{f.name.replace('_', '-')}", str(value))
    ]
    baselines.main(flags)
    results = json.loads((tmp_path / f"demo-T3-{method}-s1993" / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert results["config"]["method"] == method and results["config"]["tau"] is None
    assert (results["config"]["lr_alpha"] is None) == (method != "sd_lora")
    assert 0 < results["final_accuracy"] <= results["task_known_accuracy"] <= 100
    assert all(math.isfinite(record["loss"]) for record in results["tasks"])
    w0 = ham.lora_layers(ham.build_vit(ham.resolve(c)), "qkv")
    one, rows = 8 * sum(sum(w.shape) for w in w0.values()), 30 * 96
    stored = {"treelora": 4 * one, "ewc": 2 * one, "sd_lora": 3 * one, "o_lora": 3 * one}
    if method != "safm":
        assert results["parameters_stored"] == rows + stored[method]
    assert results["config"]["penalty"] == baselines.PENALTY[method]


def test_a_mistake_gives_one_line_from_the_shell():
    command = [sys.executable, "-m", "extras.baselines", "--method", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "must be one of treelora, safm" in done.stderr and not done.stdout


@pytest.mark.parametrize("method", ["treelora", "ewc"])
def test_without_its_penalty_it_is_sequential_and_with_it_not(method, tmp_path):
    names = {f.name for f in dataclasses.fields(ham.Config)}
    plain = {k: v for k, v in dataclasses.asdict(config(tmp_path)).items() if k in names}
    want = ham.run(ham.Config(**(plain | {"method": "sequential"})))
    got = baselines.run(config(tmp_path, method=method, penalty=0.0))
    assert got["accuracy_matrix"] == want["accuracy_matrix"]
    losses = [[record["loss"] for record in r["tasks"]] for r in (got, want)]
    assert losses[0] == losses[1]
    drawn = baselines.run(config(tmp_path, method=method, name="with"))
    losses.append([record["loss"] for record in drawn["tasks"]])
    assert losses[2][0] == losses[0][0] and losses[2][1:] != losses[0][1:]


# ------------------------------------------------------------------------------------------ TreeLoRA


def test_bound_and_distance_by_hand():
    node = baselines.Node([0], [[torch.zeros(1)]])
    assert node.bound(5) == -math.inf
    node.n, node.total = 4, 2.0
    assert node.bound(9) == pytest.approx(0.5 - 2 * math.sqrt(math.log(9) / 4))
    x, y = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])], [torch.tensor([0.0, 2.0])] * 2
    assert baselines.distance(x, [y[0], torch.tensor([-1.0])]) == pytest.approx(9 / 9)
    assert baselines.distance(x, x) == 0


@pytest.mark.parametrize("tasks", [1, 2, 7, 40])
def test_tree_halves_the_tasks_and_every_leaf_is_one(tasks):
    torch.manual_seed(tasks)
    signatures = [[torch.randn(3) for _ in range(12)] for _ in range(tasks)]

    def check(node, depth):
        if not node.children:
            assert len(node.tasks) == 1
            return depth
        assert sorted(k for child in node.children for k in child.tasks) == node.tasks
        if depth < 5:
            sizes = [len(child.tasks) for child in node.children]
            assert len(sizes) == 2 and sizes[0] - sizes[1] in (0, 1)
        return max(check(child, depth + 1) for child in node.children)

    assert check(baselines.Node(list(range(tasks)), signatures), 0) <= 6


@pytest.mark.parametrize("seed", range(5))
def test_search_finds_the_nearest_task_of_brute_force(seed):
    """Noisy gradients around one task's: after many steps, most went to the nearest task."""
    random = torch.Generator().manual_seed(seed)
    signatures = [[torch.randn(20, generator=random) for _ in range(6)] for _ in range(9)]
    tree = baselines.Node(list(range(9)), signatures)
    like, visits, distances = seed, [0] * 9, torch.zeros(9)
    for _ in range(3000):
        noisy = [x + 0.3 * torch.randn(20, generator=random) for x in signatures[like]]
        every = [float(baselines.distance(noisy, other)) for other in signatures]
        distances += torch.tensor(every)
        path = tree.search()
        k = path[-1].tasks[0]
        visits[k] += 1
        for node in path:
            node.n, node.total = node.n + 1, node.total + every[k]
    assert int(distances.argmin()) == like == visits.index(max(visits))
    assert sum(visits) == tree.n == 3000 and min(visits) > 0


def test_penalty_is_differentiated_through_the_gradient():
    """Against finite differences, for a loss whose gradient depends on the parameters."""
    torch.manual_seed(0)
    b, a = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    signature = [torch.randn(14, dtype=torch.float64)]
    method = baselines.TreeLoRA({}, ham.Config(method="treelora"))
    method.config = dataclasses.replace(baselines.Config(), penalty=0.1)

    def value(b, a, grad):
        method.tree, method.signatures = baselines.Node([0], [signature]), [signature]
        b, a = b.clone().requires_grad_(), a.clone().requires_grad_()
        one = torch.ones(())
        p = baselines.NearGradient({"x": (b, a)}, {}, one, one, method=method)
        penalty = p.penalty(((b @ a) ** 3).sum())
        return torch.autograd.grad(penalty, (b, a)) if grad else penalty.item()

    grads = value(b, a, True)
    for index in ((0, 0), (2, 1)):
        step = torch.zeros_like(b)
        step[index] = 1e-6
        slope = (value(b + step, a, False) - value(b - step, a, False)) / 2e-6
        assert slope == pytest.approx(grads[0][index].item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- SAFM


def decided(tmp_path, rows, **settings):
    """Learn a task with new adapters in every block, then decide on one with images of `rows`."""
    settings = {"epochs": 8, "images_per_class": 40, "tasks": 2} | settings
    c = ham.resolve(config(tmp_path, method="safm", penalty=1.0, **settings))
    data, vit = ham.load_data(c), ham.build_vit(c)
    for k, row in zip(data.tasks[1], rows(data)):
        data.train[k] = row
    method = baselines.SAFM(ham.lora_layers(vit, c.layers), c)
    learner = baselines.SAFMLearner(vit, method, data)
    learner.decide(0)
    method.decided = dict.fromkeys(method.pool, "new")
    p, _ = ham.train_task(vit, method, data, 0)
    method.finish(0, p)
    learner.decide(1)
    return list(method.decided.values()), method


def test_search_reuses_adapters_for_the_same_task_and_adds_for_another(tmp_path):
    same, _ = decided(tmp_path, lambda data: [data.train[k] for k in data.tasks[0]])
    assert same.count(0) > len(same) / 2, same

    def noise(data):
        data.pixels[torch.cat([data.train[k] for k in data.tasks[1]])] = torch.randint(
            0, 256, (40 * len(data.tasks[1]), 3, 32, 32), dtype=torch.uint8
        )
        return [data.train[k] for k in data.tasks[1]]

    other, _ = decided(tmp_path, noise)
    assert other.count("new") > len(other) / 2, other


def test_weights_of_a_task_are_those_of_its_adapters(tmp_path):
    _, method = decided(tmp_path, lambda data: [data.train[k] for k in data.tasks[1]], epochs=1)
    blocks = list(method.pool)
    method.decided = {blocks[0]: "empty", blocks[1]: 0, blocks[2]: "new", blocks[3]: "empty"}
    method.stage = "tuning"
    p = method.start()
    assert [baselines.block_of(name) for name in p.adapter] == [blocks[2]]
    assert [baselines.block_of(name) for name in p.reused] == [blocks[1]]
    weights = p.weights(method.w0)
    method.finish(1, p)
    for (name, w), own in zip(weights.items(), method.weights_of(1).values()):
        assert torch.equal(w, own)
        assert torch.equal(w, method.w0[name]) == (baselines.block_of(name) in blocks[::3])
    before = [x.clone() for x in method.kept()]
    assert len(before) == 2 * (4 + 1)  # four blocks of the first task, one of the second


# --------------------------------------------------------------------------------------------- others


def test_ewc_and_o_lora_penalties_by_hand():
    b, a = torch.randn(3, 2), torch.randn(2, 4)
    one = torch.ones(())
    method = baselines.EWC({}, dataclasses.replace(baselines.Config(method="ewc"), penalty=3.0))
    p = baselines.Elastic({"x": (b.requires_grad_(), a.requires_grad_())}, {}, one, one)
    p.method, method.fisher = method, [torch.full((3, 2), 2.0), torch.full((2, 4), 5.0)]
    with torch.no_grad():
        b += 0.5
        a -= 0.1
    got = p.penalty((b @ a).sum())
    assert got.item() == pytest.approx(1.5 * (2 * 6 * 0.25 + 5 * 8 * 0.01), rel=1e-5)
    assert torch.allclose(p.squares[0], torch.autograd.grad((b @ a).sum(), b)[0] ** 2)

    c = dataclasses.replace(baselines.Config(method="o_lora"), penalty=0.5)
    method, old = baselines.OLoRA({}, c), torch.randn(6, 4)
    method.groups = [ham.Group({"x": (None, part)}) for part in (old[:2], old[2:])]
    p = baselines.Orthogonal({"x": (b, a)}, {}, one, one, method=method)
    want = sum((old[i] * a[j]).sum() ** 2 for i in range(6) for j in range(2))
    assert p.penalty(None).item() == pytest.approx(0.5 * want.item(), rel=1e-5)


def test_o_lora_adds_and_sd_lora_scales(tmp_path):
    for method, kind in (("o_lora", baselines.OLoRA), ("sd_lora", baselines.SDLoRA)):
        c = config(tmp_path, method=method, tau=None, penalty=0.5, train_alpha=method == "sd_lora")
        c = ham.resolve(c)
        data, vit = ham.load_data(c), ham.build_vit(c)
        m = kind(ham.lora_layers(vit, c.layers), c)
        trained = []
        for task in range(3):
            p, _ = ham.train_task(vit, m, data, task)
            trained.append({n: (b @ a).detach() for n, (b, a) in p.adapter.items()})
            scalars = [*p.alpha_groups.tolist(), p.alpha.item()]
            m.finish(task, p)
        for name, w in m.folded().items():
            factor = [1.0] * 3 if method == "o_lora" else scalars
            want = m.w0[name] + sum(f * x[name] for f, x in zip(factor, trained))
            torch.testing.assert_close(w, want, atol=1e-6, rtol=1e-5)
        assert method == "o_lora" or len({*scalars}) == 3
        starts = [m.start().adapter["blocks.0.attn.qkv.weight"][1] for m in (m, kind(m.w0, c))]
        assert torch.equal(*starts) == (method == "sd_lora")  # o_lora: another place for each task
