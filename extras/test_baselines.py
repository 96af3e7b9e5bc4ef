"""Tests of extras/baselines.py, on the demo's drawn images: nothing to download."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ham
from extras import baselines

ROOT = Path(__file__).parent.parent
QKV = 8 * 4 * (96 + 3 * 96)  # parameters of an adapter of the demo's model: rank, blocks, k + d


def config(out, **settings):
    """A configuration that runs in a second, after the demo's pre-training."""
    values = {"out": str(out), "tasks": 3, "epochs": 1, "images_per_class": 8, "device": "cpu"}
    values |= {"test_images_per_class": 4, "batch_size": 8, "precision": "fp32"}
    return baselines.Config(**(values | settings))


def learner(tmp_path, method, **settings):
    """A method's loop before its first task."""
    c, kind, loop = baselines.prepare(config(tmp_path, method=method, **settings))
    c = ham.resolve(c)
    data, vit = ham.load_data(c), ham.build_vit(c)
    return loop(vit, kind(ham.lora_layers(vit, c.layers), c), data)


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_each_method_from_the_command_line_to_its_results(method, tmp_path):
    c, default = config(tmp_path, method=method), baselines.Config()
    given = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    given = {k: v for k, v in given.items() if v != getattr(default, k)}
    baselines.main([x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))])
    folder = tmp_path / f"demo-T3-{method}-s1993"
    results = json.loads((folder / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert results["config"]["method"] == method and results["config"]["tau"] is None
    assert (results["config"]["lr_alpha"] is None) == (method != "sd_lora")
    assert results["config"]["penalty"] == baselines.PENALTY[method]
    assert 0 < results["final_accuracy"] <= results["task_known_accuracy"] <= 100
    assert all(math.isfinite(record["loss"]) for record in results["tasks"])
    for what, seconds in results["seconds"].items():
        assert sum(r["seconds"][what] for r in results["tasks"]) == pytest.approx(seconds)
    stored = {"treelora": 4 * QKV, "ewc": 2 * QKV, "sd_lora": 3 * QKV, "o_lora": 3 * QKV}
    if method == "safm":
        new = [list(record["adapters"].values()).count("new") for record in results["tasks"]]
        stored["safm"] = 30 * 96 + sum(new) * QKV // 4
    assert results["parameters_stored"] == 30 * 96 + stored[method]
    assert (folder / "model.safetensors").is_file() == (method != "safm")


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_each_method_with_other_settings(method, tmp_path):
    settings = {"read_out": "head", "layers": "qkv,proj,fc1,fc2", "precision": "bf16", "tasks": 4}
    got = baselines.run(config(tmp_path, method=method, validate=True, **settings))
    assert got["test_images_per_task"] == [32, 32, 28, 28] and got["final_accuracy"] > 0
    got = baselines.run(config(tmp_path, method=method, tasks=1))
    assert len(got["accuracy_matrix"]) == 1 and got["forgetting"] == 0


def test_a_mistake_gives_one_line_from_the_shell():
    command = [sys.executable, "-m", "extras.baselines", "--method", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "must be one of treelora, safm" in done.stderr and not done.stdout


def test_settings_that_do_not_apply_are_none():
    for method in (*baselines.METHODS, "ham"):
        for given in (None, 5.0):
            c = baselines.prepare(baselines.Config(method=method, penalty=given))[0]
            default = baselines.PENALTY.get(method)
            assert c.penalty == (default and (given or default))


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


@pytest.mark.parametrize("tasks", [1, 2, 7, 40, 100])
def test_tree_halves_the_tasks(tasks):
    random = torch.Generator().manual_seed(tasks)
    signatures = [[torch.randn(3, generator=random) for _ in range(12)] for _ in range(tasks)]
    leaves = baselines.leaves(list(range(tasks)), signatures)
    assert sorted(k for leaf in leaves for k in leaf) == list(range(tasks))
    assert len(leaves) == min(tasks, 32)
    sizes = {len(leaf) for leaf in leaves}
    assert max(sizes) - min(sizes) <= 1
    if tasks == 7:  # the first level: the four nearest to the mean in layer 0
        layer = torch.stack([s[0] for s in signatures])
        near = (layer - layer.mean(0)).abs().sum(1).argsort()[:4].tolist()
        assert sorted(k for leaf in leaves[:4] for k in leaf) == sorted(near)


def test_bandit_by_hand():
    bandit = baselines.Bandit(3)
    for arm, distance in ((0, 5.0), (1, 1.0), (2, 4.0), (1, 3.0)):
        assert bandit.choose() == arm or all(bandit.n)
        bandit.saw(arm, distance)
    assert bandit.n == [1, 2, 1] and bandit.mean == [5.0, 2.0, 4.0]
    lcb = [5 - 2 * math.sqrt(math.log(4)), 2 - 2 * math.sqrt(math.log(4) / 2)]
    lcb.append(4 - 2 * math.sqrt(math.log(4)))
    assert bandit.choose() == lcb.index(min(lcb)) == 1
    bandit.mean = [3.0, 3.0, 3.0]  # as near: the one taken less often
    assert bandit.choose() == 0


def treelora(signatures, penalty=0.1):
    method = baselines.TreeLoRA({}, dataclasses.replace(baselines.Config(), penalty=penalty))
    method.signatures = signatures
    method.config = dataclasses.replace(method.config, device="cpu")
    method.start()
    return method


@pytest.mark.parametrize("like", range(5))
def test_search_finds_the_nearest_task_of_brute_force(like):
    """A batch's gradient is that of a task near task `like`, and noise; 60 steps, 9 tasks."""
    random = torch.Generator().manual_seed(like)

    def draw():
        return [torch.randn(14, generator=random) for _ in range(5)]  # five layers

    cluster = [[3 * x for x in draw()] for _ in range(3)]
    signatures = [[x + y for x, y in zip(cluster[k % 3], draw())] for k in range(9)]
    method, total = treelora(signatures), torch.zeros(5 * 14)
    shapes = {f"layer{i}": (torch.zeros(3, 2), torch.zeros(2, 4)) for i in range(5)}
    p = ham.Trainable(baselines.copy(shapes, train=True), {}, None, None)
    for _ in range(60):
        g = torch.cat([x + y for x, y in zip(signatures[like], draw())])
        total += g
        x = torch.cat([x.flatten() for x in ham.factors(p.adapter)])
        method.penalty(p, (x * g).sum() + 0 * (x**2).sum())
    nearest = [(total / 60 - torch.cat(s)).abs().sum().item() for s in signatures]
    taken = method.bandit.n.index(max(method.bandit.n))
    tree = baselines.leaves(list(range(9)), signatures)
    assert tree[taken] == [nearest.index(min(nearest))] and len(tree) == 9
    assert sum(method.bandit.n) == 60 and min(method.bandit.n) > 0
    torch.testing.assert_close(torch.cat(method.sum) / method.steps, total / 60)


def test_penalty_has_the_gradient_of_the_distance():
    """By A and B, against finite differences, where the gradient depends on the parameters."""
    torch.manual_seed(0)
    real = {"dtype": torch.float64}
    start = torch.randn(3, 2, **real), torch.randn(2, 4, **real)
    signatures = [[torch.randn(14, **real)], [torch.randn(14, **real)]]

    def leaf(x):
        return x.clone().requires_grad_()

    def share(b, a, near):
        b, a = leaf(b), leaf(a)
        g = torch.autograd.grad(((b @ a) ** 3).sum(), (b, a))
        g = torch.cat([x.flatten() for x in g])
        return (0.1 * (g - near).abs().sum() / (g.abs().sum() + near.abs().sum())).item()

    method = treelora(signatures)
    for first in range(2):  # each leaf is taken once before the bounds decide
        b, a = map(leaf, start)
        value = method.penalty(ham.Trainable({"x": (b, a)}, {}, None, None), ((b @ a) ** 3).sum())
        value.backward()
        near = signatures[baselines.leaves([0, 1], signatures)[first][0]][0]
        for x, index in ((b, (0, 0)), (b, (2, 1)), (a, (1, 3)), (a, (0, 2))):
            step = torch.zeros_like(x)
            step[index] = 1e-6
            moved = [
                (u + s * step if x is v else u) for s in (1, -1) for u, v in zip(start, (b, a))
            ]
            slope = (share(*moved[:2], near) - share(*moved[2:], near)) / 2e-6
            assert slope == pytest.approx(x.grad[index].item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- SAFM


def two_tasks(tmp_path, change=lambda data: None, **settings):
    """Learn a task with new adapters in every block, then decide on a second one."""
    settings = {"epochs": 8, "images_per_class": 40, "tasks": 2, "batch_size": 64} | settings
    loop = learner(tmp_path, "safm", **settings)
    change(loop.data)
    with pytest.MonkeyPatch.context() as patch:
        new = dict.fromkeys(loop.ham.pool, "new")
        shares = {"shares": {}}
        patch.setattr(loop.ham, "decide", lambda p: vars(loop.ham).update(decided=new, **shares))
        loop.learn(0)
    before = {n: w.clone() for n, w in loop.ham.weights_of(0).items()}
    loop.learn(1)
    assert all(torch.equal(w, before[n]) for n, w in loop.ham.weights_of(0).items())
    return list(loop.records[1]["adapters"].values()), loop


def test_search_reuses_adapters_for_the_same_task_and_adds_for_another(tmp_path):
    def same(data):
        for k, old in zip(data.tasks[1], data.tasks[0]):
            data.train[k] = data.train[old]

    def noise(data):
        rows, random = torch.cat([data.train[k] for k in data.tasks[1]]), torch.Generator()
        size = len(rows), 3, 32, 32
        data.pixels[rows] = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)

    chosen = [two_tasks(tmp_path, change)[0] for change in (same, noise)]
    assert chosen[0].count(0) > len(chosen[0]) / 2, chosen
    assert chosen[1].count("new") > len(chosen[1]) / 2, chosen


def test_weights_of_a_task_are_those_of_its_adapters(tmp_path):
    _, loop = two_tasks(tmp_path, epochs=1, images_per_class=8)
    method, blocks = loop.ham, list(loop.ham.pool)
    method.decided = {blocks[0]: "empty", blocks[1]: 0, blocks[2]: "new", blocks[3]: "empty"}
    p = method.start()
    assert [baselines.block_of(name) for name in p.adapter] == [blocks[2]]
    assert [baselines.block_of(name) for name in p.reused] == [blocks[1]]
    weights = p.weights(method.w0)
    method.finish(2, p)
    for (name, w), own in zip(weights.items(), method.weights_of(2).values()):
        assert torch.equal(w, own)
        assert torch.equal(w, method.w0[name]) == (baselines.block_of(name) in blocks[::3])


def test_layer_wise_loss_by_hand():
    """Five blocks, the fourth one empty: two pairs of neighbours remain."""
    names = [f"blocks.{i}.attn.qkv.weight" for i in range(5)]
    c = dataclasses.replace(baselines.Config(), penalty=3.0)
    method = baselines.SAFM({n: torch.zeros(6, 4) for n in names}, c)
    method.inputs = {n: torch.randn(2, 7, 4) for n in names}
    updates = {n: (torch.randn(6, 2), torch.randn(2, 4)) for n in names if "3" not in n}
    new, reused = dict(list(updates.items())[:2]), dict(list(updates.items())[2:])
    p = baselines.Tuned(new, {}, None, None, reused=reused)
    h = {n: method.inputs[n] @ (b @ a).T for n, (b, a) in updates.items()}
    want = 0.0
    for k, l in ((0, 1), (1, 2)):
        for image in range(2):
            for token in range(7):
                x, y = h[names[k]][image, token], h[names[l]][image, token]
                want += (x @ y / x.norm() / y.norm()).item() / 14
    assert method.penalty(p, None).item() == pytest.approx(3 * want, rel=1e-4)
    method.stage = "search"
    assert method.penalty(p, None) == 0


def test_evaluation_against_one_image_at_a_time(tmp_path):
    """Tasks of 8, 8, 7 and 7 classes, no cache, no batches."""
    loop = learner(tmp_path, "safm", tasks=4, images_per_class=4, test_images_per_class=2)
    for task in range(3):
        loop.learn(task)
    method, data, right = loop.ham, loop.data, [[] for _ in range(3)]
    known = []
    for task in range(3):
        for row, label in zip(*data.rows("test", data.tasks[task])):
            bare = ham.extract(loop.vit, method.w0, data, row[None], loop.c)[0]
            frozen = F.cosine_similarity(bare[None], method.frozen[:23], dim=1)
            guess = next(k for k, t in enumerate(data.tasks) if int(frozen.argmax()) in t)
            for k in {guess, task}:
                x = ham.extract(loop.vit, method.weights_of(k), data, row[None], loop.c)
                own = data.tasks[k]
                best = F.cosine_similarity(x, loop.rows["class-mean"][list(own)], dim=1).argmax()
                hit = own[int(best)] == int(label)
                if k == guess:
                    right[task].append(hit)
                if k == task:
                    known.append(hit)
    want = [100 * sum(x) / len(x) for x in right]
    assert loop.matrix["class-mean"][2] == pytest.approx(want)
    assert loop.known["class-mean"] == pytest.approx(100 * sum(known) / len(known))


# --------------------------------------------------------------------------------------------- others


def test_ewc_and_o_lora_penalties_by_hand():
    b, a = torch.randn(3, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    p = ham.Trainable({"x": (b, a)}, {}, None, None)
    method = baselines.EWC({}, dataclasses.replace(baselines.Config(), penalty=3.0))
    method.before, method.squares, method.steps = [x.detach().clone() for x in (b, a)], None, 0
    assert method.penalty(p, (b @ a).sum()) == 0
    first = [x**2 for x in torch.autograd.grad((b @ a).sum(), (b, a))]
    method.groups = [None]
    method.finish(0, ham.Trainable(p.adapter, {}, torch.ones(()), torch.ones(0)))
    assert all(map(torch.allclose, method.fisher, first))
    method.fisher = [torch.full((3, 2), 2.0), torch.full((2, 4), 5.0)]
    with torch.no_grad():
        b += 0.5
        a -= 0.1
    got = method.penalty(p, (b @ a).sum())
    assert got.item() == pytest.approx(1.5 * (2 * 6 * 0.25 + 5 * 8 * 0.01), rel=1e-4)

    method, old = baselines.OLoRA({}, dataclasses.replace(baselines.Config(), penalty=0.5)), []
    old = torch.randn(6, 4)
    method.groups = [ham.Group({"x": (None, part)}) for part in (old[:2], old[2:])]
    want = sum((old[i] * a[j]).sum() ** 2 for i in range(6) for j in range(2))
    assert method.penalty(p, None).item() == pytest.approx(0.5 * want.item(), rel=1e-5)


def test_ewc_holds_the_factors_back(tmp_path):
    moved = []
    for penalty in (0.0, 1e6):
        loop = learner(tmp_path, "ewc", penalty=penalty, tasks=2)
        loop.learn(0)
        before = [x.clone() for x in ham.factors(loop.ham.groups[0].delta_w)]
        loop.learn(1)
        after = ham.factors(loop.ham.groups[0].delta_w)
        moved.append(sum((x - y).square().sum().item() for x, y in zip(before, after)))
    assert moved[1] < 0.8 * moved[0]


def test_o_lora_adds_and_sd_lora_scales(tmp_path):
    for method in ("o_lora", "sd_lora"):
        loop, trained = learner(tmp_path, method), []
        m = loop.ham
        for task in range(3):
            p, _ = loop.train(task)
            trained.append({n: (b @ a).detach() for n, (b, a) in p.adapter.items()})
            scalars = [*p.alpha_groups.tolist(), p.alpha.item()]
            m.finish(task, p)
        factor = [1.0] * 3 if method == "o_lora" else scalars
        for name, w in m.folded().items():
            want = m.w0[name] + sum(f * x[name] for f, x in zip(factor, trained))
            torch.testing.assert_close(w, want, atol=1e-6, rtol=1e-5)
        assert method == "o_lora" or len({*scalars}) == 3
        starts = [
            x.start().adapter["blocks.0.attn.qkv.weight"][1] for x in (m, type(m)(m.w0, m.config))
        ]
        assert torch.equal(*starts) == (method == "sd_lora")  # o_lora: another place per task
