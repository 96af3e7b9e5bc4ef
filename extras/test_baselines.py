"""Tests of extras/baselines.py and of what stands on it, on drawn images: nothing to download."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import random
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ham
from extras import baselines, demo, finished, run_all, screen

CLASSES, D = 9, 64
QKV = 8 * 6 * (D + 3 * D)  # parameters of an adapter of the model: rank, blocks, k + d
SMALL = {"tasks": 3, "epochs": 1, "batch_size": 8, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few drawings of nine classes, and weights of a small ViT beside them."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [" ".join(x) for x in itertools.product(demo.COLOURS[:3], ["plain"], demo.NEW[:3])]
    for name, part in itertools.product(names, ("train", "test")):
        (root / "demo" / part / name).mkdir(parents=True)
        for i, image in enumerate(demo.draw(draw, name, 4)):
            Image.fromarray(image).save(root / "demo" / part / name / f"{i}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "vit.safetensors")
    return root


@pytest.fixture
def config(folder):
    """-> function: settings -> baselines.Config"""
    model = {"model": "test_vit", "weights": str(folder / "vit.safetensors"), "img_size": 32}
    data = {"dataset": str(folder / "demo")}
    return lambda **settings: baselines.Config(**(SMALL | model | data | settings))


def factors(d=3, r=2, k=4, **how):
    return torch.randn(d, r, **how), torch.randn(r, k, **how)


def trainable(b, a):
    return ham.Trainable({"x": b @ a}, [], ham.Config(train_alpha=False), {"x": (b, a)})


def plain(**settings):
    return baselines.Config(lr=1e-3, **settings)


@pytest.fixture(autouse=True)
def one_thread():
    """More would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(c):
    """A configuration as a command line."""
    default = baselines.Config()
    for f in dataclasses.fields(c):
        value, flag = getattr(c, f.name), f"--{f.name.replace('_', '-')}"
        if value != getattr(default, f.name):
            yield from [flag] if value is True else [flag, str(value)]


@pytest.mark.parametrize("method", [*baselines.METHODS, "ham"])
def test_each_method_from_the_command_line_to_its_results(method, config, tmp_path):
    c = config(method=method, out=str(tmp_path), gain=2.0 if method == "ham" else None)
    ham.main([*command(c)], baselines.run, baselines.Config)
    run = tmp_path / f"demo-T3-{method}-s1993"
    results = json.loads((run / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert results["config"]["lr"] == ham.learning_rate(method, 4 * CLASSES / 3)
    assert results["config"]["gain"] == c.gain
    trained = results["tasks"][: 1 if method == "first" else 3]
    assert all(0 < record["loss"] < math.inf for record in trained)
    stored = {"treelora": 3 * QKV, "ewc": 2 * QKV, "sd_lora": 3 * QKV, "o_lora": 3 * QKV}
    stored |= {"ewc_lora": 3 * QKV + 6 * 3 * D * D}  # three adapters' factors, F of W
    stored |= {"first": QKV, "onward": 3 * QKV + 3 * D}
    if method in stored:
        assert results["parameters_stored"] == CLASSES * D + stored[method]
    assert (run / "model.safetensors").is_file() == (method != "safm")


@pytest.mark.parametrize("method", ["ham", "first", "frozen"])
def test_finished_runs_get_what_tables_need(method, config, tmp_path, monkeypatch):
    """The matrix's last row again, from the state; oracle means of `frozen` are its own."""
    c = config(method=method, out=str(tmp_path))
    before = baselines.run(c)
    (file,) = tmp_path.rglob("results.json")
    monkeypatch.setattr(sys, "argv", ["", str(file.parent), "--weights", c.weights])
    finished.main()
    after = json.loads(file.read_text())
    assert {k: after[k] for k in before} == before
    assert 0 <= after["final_accuracy"] <= after["task_known_accuracy"] <= 100
    assert (after["head_accuracy"] is None) == (method != "ham")
    if method == "frozen":
        assert after["class_mean_oracle"] == pytest.approx(after["final_accuracy"])
    assert 0 <= after["class_mean_oracle"] <= 100


def test_task_known_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 5, 2], [0, 9, 1, 2], [0, 0, 7, 1]])
    labels = torch.tensor([0, 1, 3, 3])  # tasks {0, 1}, {2, 3}; only the last is wrong
    assert baselines.task_known(logits, labels, [range(2), range(2, 4)]) == 75.0


def test_mistakes_are_one_line(capsys):
    mistakes = ["--method nothing", "--gain 5 --merge sum", "--penalty -1 --method ewc"]
    mistakes += ["--share 0.5 --merge mean", "--penalty 1", "--gain 5 --method ewc"]
    mistakes += ["--tau 0.2 --method onward", "--superclasses", "--grouping other"]
    mistakes += ["--tau 0.5 --method treelora", "--lr-alpha 1 --method ewc"]
    mistakes += ["--gain 5 --share 0.5", "--read-out head --method first"]
    mistakes += ["--no-train-alpha --method average --g-max 2"]
    for mistake in mistakes:
        with pytest.raises(SystemExit, match="2"):
            given = ["--dataset", "x", *mistake.split()]
            ham.main(given, baselines.run, baselines.Config)
        assert capsys.readouterr().err.count("\n") == 1
    assert ham.learning_rate("ewc", 3750) == pytest.approx(1.5e-3)
    c = baselines.resolve(plain(method="first"))
    assert c.read_out == "class-mean" and not c.train_alpha and baselines.resolve(c) == c


def test_groupings_open_like_cosine_and_then_choose_otherwise():
    joined, w0, features = {}, {"x": torch.zeros(9, 8)}, torch.randn(8, 5)
    cases = [("cosine", 1), ("random", 1), ("random", 2), ("least", 1), ("features", 1)]
    for grouping, seed in cases:
        method = baselines.Variant(w0, plain(g_max=3, tau=1.0, grouping=grouping, seed=seed))
        draw, method.features = torch.Generator().manual_seed(0), features
        for task in range(8):
            trained, groups = method.start(), [list(g.members) for g in method.groups]
            trained.adapter["x"][0].data.normal_(generator=draw)
            record = method.finish(task, trained)
            joined.setdefault((grouping, seed), []).append(record["group"])
            if grouping == "least" and task > 2:
                assert record["similarities"][record["group"]] == min(record["similarities"])
            if grouping == "features" and task > 2:
                means = [sum(features[k] for k in members) / len(members) for members in groups]
                near = [torch.cosine_similarity(features[task], x, 0) for x in means]
                assert near[record["group"]] == max(near)
    assert all(groups[:3] == [0, 1, 2] for groups in joined.values())
    want = [np.random.RandomState((1, task)).randint(3) for task in range(3, 8)]
    assert joined["random", 1][3:] == want and joined["random", 1] != joined["random", 2]


def test_superclasses_are_20_blocks_of_5():
    file = Path(baselines.__file__).with_name("cifar100_superclasses.txt")
    blocks = [block.split("\n") for block in file.read_text("utf-8").strip().split("\n\n")]
    assert [len(block) for block in blocks] == [5] * 20
    names = sorted(name for block in blocks for name in block)
    assert len({*names}) == 100 and ["beaver", "dolphin", "otter", "seal", "whale"] in blocks
    pixels = {part: torch.arange(200).view(200, 1, 1, 1) for part in ("train", "test")}
    labels = {part: torch.arange(100).repeat_interleave(2) for part in pixels}
    data = ham.Data(pixels, labels, names, [range(5 * t, 5 * t + 5) for t in range(20)], {}, "cpu")
    for seed in (1, 2):
        ordered = baselines.superclasses(data, seed)
        order = np.random.RandomState(seed).permutation(20)
        assert ordered.names == [name for i in order for name in blocks[i]]
        for c in (0, 37, 99):
            at = names.index(ordered.names[c])
            assert ordered.images("test", [c])[0].flatten().tolist() == [2 * at, 2 * at + 1]


def test_each_committed_run_has_the_configuration_that_its_flags_resolve_to(monkeypatch):
    monkeypatch.chdir(run_all.ROOT)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    for name, flags in run_all.RUNS.items():
        if not Path("results", name, "results.json").is_file():
            continue
        old = json.loads(Path("results", name, "results.json").read_text())["config"]
        ours, got = "extras.baselines" in run_all.program(flags), []
        ham.main(flags.split(), got.append, baselines.Config if ours else ham.Config)
        c = (baselines if ours else ham).resolve(dataclasses.replace(got[0], device="cpu"))
        if c.lr is None and c.method != "frozen":
            classes, images = (200, 5994) if c.dataset == "cub200" else (100, 50_000)
            n = (classes * c.images_per_class if c.images_per_class else images) / c.tasks
            rate = ham.learning_rate(c.method, c.epochs * n)
            c = dataclasses.replace(c, lr=rate)
        machine = ("data_dir", "weights", "device", "precision", "out", "class_order")
        new = {k: v for k, v in dataclasses.asdict(c).items() if k in old and k not in machine}
        if new.pop("lr"):
            assert c.lr == pytest.approx(old["lr"]), name  # 8e-4 * 0.375: not quite 3e-4
        if c.method == "frozen":
            new.pop("train_alpha")
        # null: earlier files' word for what a method does not look at
        new = {k: v for k, v in new.items() if old[k] is not None and (k, v) != ("gain", None)}
        assert new == {k: old[k] for k in new}, name


SUM = {"g_max": 1, "tau": -1, "rho": 1, "merge": "sum", "train_alpha": False}
PLAIN = {"treelora": {"method": "sequential"}, "ewc": {"method": "sequential"}}
PLAIN |= {"ewc_lora": {"method": "ham"} | SUM}


@pytest.mark.parametrize("method", PLAIN)
def test_without_its_penalty_it_is_a_plain_method_and_with_it_not(method, config, tmp_path):
    runs = []
    for kind, name in ((PLAIN[method], None), ({}, "without"), ({}, "with")):
        c = config(**{"method": method} | kind, name=name, lr=1e-3, out=str(tmp_path))
        vit, m, data, loss = baselines.prepare(c)
        if name == "without":
            m.config = dataclasses.replace(m.config, penalty=0.0)
        results = ham.learn(vit, m, data, loss)
        runs.append([results["accuracy_matrix"], *(r["loss"] for r in results["tasks"])])
    assert runs[0] == runs[1]
    assert runs[2][1] == runs[0][1] and runs[2][2:] != runs[0][2:]  # from the second task on


@pytest.mark.parametrize("grouping", ["cosine", "random"])
def test_onward_by_brute_force(grouping):
    """Tasks 0 and 1 open the groups; by features task 2 is of the second's kind, task 3 the first's."""
    w0, c = {"x": torch.zeros(9, 8)}, plain(g_max=2, rank=2, grouping=grouping, method="onward")
    method, groups, alphas = baselines.Onward(w0, c), {}, {}
    method.features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]])
    joined = [0, 1, 1, 0]
    if grouping == "random":
        joined[2:] = [np.random.RandomState((c.seed, task)).randint(2) for task in (2, 3)]
    for task, j in enumerate(joined):
        trained = method.start()
        start = trained.weights(w0)["x"].detach()
        whole = sum(alphas[k] * groups[k][0] for k in groups)  # a new task changes nothing
        torch.testing.assert_close(start, whole + torch.zeros(9, 8))
        with torch.no_grad():
            b, a = trained.adapter["x"]
            b += torch.randn(9, c.rank)
            trained.alpha *= 0.8
            trained.alpha_groups *= 1.1
        record = method.finish(task, trained)
        assert record["group"] == j
        alphas = {k: 1.1 * alpha for k, alpha in alphas.items() if k != j} | {j: alphas.get(j, 1.0)}
        old, n = groups.get(j, (torch.zeros(9, 8), 0))
        mean = (n * alphas[j] * old + 0.8 * (b @ a).detach()) / (n + 1)
        u, sigma, v = torch.linalg.svd(mean, full_matrices=False)
        groups[j] = u[:, : c.rank] * sigma[: c.rank] @ v[: c.rank], n + 1
        alphas[j] = 1.0
        torch.testing.assert_close(ham.dense(method.groups[j].delta_w["x"]), groups[j][0])
        assert method.groups[j].alpha == 1 and method.groups[j].delta_w["x"][0].shape == (9, c.rank)


@pytest.mark.parametrize("settings", [{"gain": 3.0}, {"share": 0.3}])
def test_gain_and_a_constant_share_by_hand(settings):
    method, group = baselines.Variant({}, plain(rho=1.0, **settings)), ham.Group({})
    want = 0.0
    for i in range(6):
        (b, a), group.alpha = factors(), 1.5
        method.join(group, i, {"x": (b, a)}, alpha=0.7)
        want = 0.7 * settings.get("share", min(i + 1, 3) / (i + 1)) * (b @ a) + 1.5 * want
        torch.testing.assert_close(ham.dense(group.delta_w["x"]), want)


def test_ewc_ewc_lora_and_o_lora_penalties_by_hand():
    p, method = trainable(*factors()), baselines.EWC({}, plain(penalty=3.0))
    b, a = p.adapter["x"]
    method.before, method.squares, method.steps = baselines.vector((b, a)).detach(), 0.0, 0
    assert method.penalty(p, (b @ a).sum()) == 0
    first = [x**2 for x in torch.autograd.grad((b @ a).sum(), (b, a))]
    method.finish(0, p)
    torch.testing.assert_close(method.fisher, baselines.vector(first))
    method.fisher = torch.tensor([2.0] * 6 + [5.0] * 8)
    with torch.no_grad():
        b += 0.5
        a -= 0.1
    got = method.penalty(p, (b @ a).sum()).item()
    assert got == pytest.approx(1.5 * (2 * 6 * 0.25 + 5 * 8 * 0.01), rel=1e-4)

    w0, settings = {"x": torch.randn(3, 4)}, plain(penalty=3.0, train_alpha=False)
    method, by = baselines.EWCLoRA(w0, settings), torch.randn(3, 4)
    for i in range(2):  # of the product, summed over tasks
        q = method.start()
        with torch.no_grad():
            q.adapter["x"][0].fill_(0.1)
        product = ham.dense(q.adapter["x"]).detach()
        loss = (q.weights(w0)["x"] * by).sum()
        penalty = method.penalty(q, loss)
        (loss + penalty).backward()
        want = 1.5 * i * (by * product).square().sum().item()
        assert penalty.item() == pytest.approx(want, rel=1e-4)
        method.finish(i, q)
        torch.testing.assert_close(method.fisher["x"], (i + 1) * by.square())
        torch.testing.assert_close(method.folded()["x"], w0["x"] + (i + 1) * product)

    method, old = baselines.OLoRA({}, plain(penalty=0.5)), torch.randn(6, 4)
    method.groups = [ham.Group({"x": (None, part)}) for part in (old[:2], old[2:])]
    want = sum((old[i] * a[j]).sum() ** 2 for i in range(6) for j in range(2))
    assert method.penalty(p, torch.ones(())).item() == pytest.approx(0.5 * want.item(), rel=1e-5)


def test_first_moves_nothing_after_the_first_task(config, tmp_path):
    vit, method, data, loss = baselines.prepare(config(method="first", out=str(tmp_path)))
    w0 = dict(method.w0)
    results = ham.learn(vit, method, data, loss)
    assert ["loss" not in record for record in results["tasks"]] == [False, True, True]
    again = baselines.First(w0, method.config)
    for _ in "ab":  # as the processes behind the first do
        again.restore(method.state())
    for name, w in method.folded().items():
        want = w0[name] + ham.dense(method.groups[0].delta_w[name])
        assert torch.equal(w, want) and torch.equal(again.folded()[name], want)
        assert not torch.equal(w, w0[name]) and not again.w0


@pytest.mark.parametrize("method", ["treelora", "ewc", "ewc_lora", "safm", "first"])
def test_a_stopped_run_goes_on_to_the_same_figures(method, config, tmp_path, monkeypatch, capsys):
    def figures(name):
        r = baselines.run(config(method=method, name=name, epochs=3, out=str(tmp_path)))
        measured = [{k: x for k, x in t.items() if "second" not in k} for t in r["tasks"]]
        return r["accuracy_matrix"], measured, r["parameters_stored"]

    whole, real, rows = figures("whole"), ham.accuracies, itertools.count()

    def stop(*arguments):
        if next(rows) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ham, "accuracies", stop)
        figures("parts")
    assert figures("parts") == whole
    assert "2 of 3 tasks learnt" in capsys.readouterr().out
    assert figures("parts") == whole  # is complete: not run again


# ---------------------------------------------------------------------------------------- TreeLoRA


@pytest.mark.parametrize("tasks", [1, 2, 7, 40])
def test_tree_halves_the_tasks_at_the_median_distance(tasks):
    thetas = [list(torch.randn(7, 3)) for _ in range(tasks)]
    root = baselines.grow(list(range(tasks)), thetas)
    leaves = [leaf.tasks for leaf in root.leaves()]
    assert sorted(k for leaf in leaves for k in leaf) == list(range(tasks))
    assert len(leaves) == min(tasks, 32) and max(map(len, leaves)) <= 2

    def check(node, levels):  # 5 levels over 7 layers
        for layer, theta in enumerate(node.theta):
            mean = torch.stack([thetas[k][layer] for k in node.tasks]).mean(0)
            far = {k: (thetas[k][layer] - mean).abs().sum().item() for k in node.tasks}
            torch.testing.assert_close(theta, mean)
            assert node.delta[layer] == pytest.approx(sorted(far.values())[(len(far) - 1) // 2])
            if node.children and layer == levels[0]:
                near, rest = (x.tasks for x in node.children)
                assert max(far[k] for k in near) <= min(far[k] for k in rest)
        for child in node.children:
            check(child, levels[1:])

    check(root, [0, 1, 2, 4, 5, None])


def test_similar_tasks_share_a_branch():
    """By the first layer the majority, then, among these, by the second the pair in the middle."""
    first = {0: 5.0, 2: 5.1, 3: 4.9, 6: 5.0, 1: -5.0, 4: -6.0, 5: -7.0}
    second = {0: 1.0, 6: 1.1, 2: 5.0, 3: -4.0, 1: 0.0, 4: 0.1, 5: 9.0}
    thetas = [[torch.full((4,), layer[k]) for layer in (first, second)] for k in range(7)]
    root = baselines.grow(list(range(7)), thetas)
    assert [node.tasks for node in root.children] == [[0, 2, 3, 6], [1, 4, 5]]
    assert [leaf.tasks for leaf in root.leaves()] == [[0, 6], [2, 3], [1, 4], [5]]


def spread(seen, leaves):
    """σ by brute force: pooled over leaves; of all distances while none was taken twice."""
    own = [[x for tasks, x in seen if tasks == leaf.tasks] for leaf in leaves]
    own = [x for x in own if x]
    if len(own) == len(seen):
        return statistics.stdev(x for _, x in seen) if len(seen) > 1 else 0.0
    squares = sum(statistics.pvariance(x) * len(x) for x in own)
    return math.sqrt(squares / (len(seen) - len(own)))


def test_bound_is_equation_2_by_brute_force():
    draw, thetas = random.Random(0), [[torch.randn(5), torch.randn(5)] for _ in range(12)]
    root = baselines.grow(list(range(12)), thetas)
    bandit, seen, decisive = baselines.Bandit(root, 1), [], set()

    def bound(node, sigma):
        own = [x for tasks, x in seen if set(tasks) <= set(node.tasks)]
        if not own:
            return -math.inf
        of_own = statistics.fmean(own) - 2 * sigma * math.sqrt(math.log(len(seen)) / len(own))
        if not node.children:
            return of_own
        terms = min(bound(child, sigma) for child in node.children), of_own - node.delta[1]
        decisive.add(terms.index(max(terms)))
        return max(terms)

    for _ in range(60):
        path, sigma = bandit.choose(), spread(seen, root.leaves())
        for node, child in itertools.pairwise(path):  # each time to the smallest bound
            bounds = [bound(x, sigma) for x in node.children]
            assert bound(child, sigma) == min(bounds)
            assert bandit.bound(child, sigma) == pytest.approx(min(bounds))
        assert bandit.sigma() == pytest.approx(sigma)
        seen.append((path[-1].tasks, draw.gauss(0, 1)))
        bandit.saw(path, seen[-1][1])
    assert decisive == {0, 1}  # both terms of an inner node's bound act


def test_exploring_pays():
    """An unlucky first sight of the nearest task is looked at again; no task is taken for good."""
    for seed in range(5):
        draw, fixed = random.Random(seed), torch.Generator().manual_seed(seed)
        thetas = [list(torch.randn(3, 4, generator=fixed)) for _ in range(8)]
        root = baselines.grow(list(range(8)), thetas)
        bandit, nearest, taken = baselines.Bandit(root, 0), root.leaves()[seed], []
        for _ in range(400):
            path = bandit.choose()
            near = path[-1] is nearest and bandit.n[nearest] > 0
            bandit.saw(path, draw.gauss(0 if near else 2, 1))
            taken.append(path[-1] is nearest)
        assert sum(taken[200:]) > sum(taken[:200]) > 50  # 25 each
        assert all(bandit.n[leaf] > 1 for leaf in root.leaves())


@pytest.mark.parametrize("grouping", ["cosine", "random"])
def test_each_layer_finds_its_own_task(grouping):
    """Adapters that keep moving around that of one earlier task; drawn leaves are taken alike."""
    w0 = {name: torch.zeros(3, 4) for name in "xyz"}
    draw = torch.Generator().manual_seed(0)
    method = baselines.TreeLoRA(w0, plain(grouping=grouping, penalty=1.0))
    method.thetas = [list(torch.randn(3, 14, generator=draw)) for _ in range(6)]
    trained, nearest = method.start(), [4, 1, 2]
    for _ in range(200):
        for (b, a), k, layer in zip(trained.adapter.values(), nearest, range(3)):
            theta = method.thetas[k][layer] + 0.5 * torch.randn(14, generator=draw)
            b.data, a.data = theta[:6].view(3, 2), theta[6:].view(2, 4)
        method.penalty(trained, torch.tensor(0.0))
    record = method.finish(6, trained)
    assert record["leaves"] == [leaf.tasks for leaf in method.bandits[0].root.leaves()]
    for k, taken in zip(nearest, record["taken"]):
        own = taken[record["leaves"].index([k])]
        assert sum(taken) == 200
        if grouping == "cosine":
            assert own == max(taken) and own > 100
        else:  # by halves: 1 / 4 or 1 / 8 each
            assert 10 < min(taken) and max(taken) < 80
    assert [x.tolist() for x in method.thetas[6]] == [
        baselines.vector(ba).tolist() for ba in trained.detached().values()
    ]


def test_treelora_penalty_by_hand():
    """Two layers, one earlier task: λ times the mean of the layers' L1 distances, and its slope."""
    w0 = {"x": torch.zeros(1, 1), "y": torch.zeros(1, 1)}
    method = baselines.TreeLoRA(w0, plain(penalty=0.1, rank=1))
    method.thetas = [[torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])]]
    trained = method.start()
    for b, a in trained.adapter.values():
        b.data, a.data = torch.tensor([[4.0]]), torch.tensor([[1.0]])
    penalty = method.penalty(trained, torch.tensor(0.0))
    penalty.backward()
    assert penalty.item() == pytest.approx(0.1 * (3 + 1 + 4 + 2) / 2)
    slopes = [x.grad.item() for ba in trained.adapter.values() for x in ba]
    assert slopes == pytest.approx([0.05, -0.05, 0.05, 0.05])


# -------------------------------------------------------------------------------------------- SAFM


def test_search_decides_for_what_the_loss_wants():
    """The loss is the distance to what one candidate of each block gives, or to W0."""
    torch.manual_seed(0)
    names = [f"blocks.{i}.qkv.weight" for i in range(5)]
    wanted = ["empty", 0, "new", 1, "new"]
    method = baselines.SAFM({n: torch.zeros(6, 4) for n in names}, plain(method="safm"))
    old, new = [{n: factors(6) for n in names} for _ in range(2)], {n: factors(6) for n in names}
    for name in names:
        method.pool[baselines.block_of(name)] = [{name: x[name]} for x in old]
    decided = dict(zip(method.pool, wanted))
    target = {n: w.detach() for n, w in method.tuned(new, decided).weights(method.w0).items()}
    search = method.search(new)
    assert list(search.w) == [f"blocks.{i}" for i in (0, 1, 3, 4)]  # the middle one: always new
    optimiser = torch.optim.Adam(list(search.w.values()), lr=baselines.SEARCH)
    for _ in range(20):
        optimiser.zero_grad()
        weights = search.weights(method.w0)
        sum((weights[n] - target[n]).square().sum() for n in names).backward()
        optimiser.step()
    assert search.decided() == decided
    method.keep(method.tuned(new, decided), decided)  # what was new is the pool's third
    assert all(torch.equal(w, target[n]) for n, w in method.weights_of(0).items())
    assert method.choices == [decided | {"blocks.2": 2, "blocks.4": 2}]


def test_middle_block_is_the_sixth_of_twelve():
    assert [baselines.middle(range(n)) for n in (12, 4, 2, 1)] == [5, 1, 0, 0]


def test_safm_penalty_by_hand(config):
    """λ Σ cos(h_l, h_l-1) over blocks with an adapter, new or reused; no gradient to a reused one."""
    vit, method, data, _ = baselines.prepare(config(method="safm", penalty=0.5))
    method.watch(vit)
    names = list(method.w0)
    new, old = (
        {n: factors(*w.shape[:1], 2, *w.shape[1:]) for n, w in method.w0.items()} for _ in "ab"
    )
    for name in names:
        method.pool[baselines.block_of(name)] = [{name: old[name]}]
    decided = dict(zip(method.pool, ["new", "empty", 0, "empty", "empty", "empty"]))
    tuned = method.tuned(new, decided)
    x = data.prepare(data.images("train", range(3))[0])
    ham.functional_call(vit, tuned.weights(method.w0), x)
    passed = method.passed.values()
    cosines = [torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in passed]
    penalty = method.penalty(tuned, torch.zeros(()))
    assert penalty.item() == pytest.approx(0.5 * (cosines[0] + cosines[2]), rel=1e-5)
    assert all(torch.equal(a[1], b[0]) for a, b in itertools.pairwise(passed))  # h_l enters l + 1
    penalty.backward()
    assert list(tuned.adapter) == names[:1] and list(tuned.reused) == names[2:3]
    assert all(x.grad.abs().sum() > 0 for x in tuned.adapter[names[0]])


def test_safm_needs_no_task():
    """A class's logit is taken under the weights of its task; all classes are compared."""
    tasks, rows = [range(2), range(2, 4), range(4, 6)], torch.randn(6, 5)
    labels = torch.arange(6).repeat(9)
    features = torch.randn(3, 54, 5) + 1.5 * rows[labels]  # (task, N, D)
    under = [[(x[labels // 2 == j], labels[labels // 2 == j]) for j in range(3)] for x in features]
    right, known = [0, 0, 0], 0
    for n, label in enumerate(labels.tolist()):
        cosines = [torch.cosine_similarity(features[c // 2, n], rows[c], 0) for c in range(6)]
        right[label // 2] += max(range(6), key=cosines.__getitem__) == label
        known += max(tasks[label // 2], key=cosines.__getitem__) == label
    logits = {"head": baselines.logits_safm(under, rows, tasks)}
    labels = torch.cat([y for _, y in under[0]])
    assert ham.accuracies(logits["head"], labels, tasks) == pytest.approx(
        [100 * x / 18 for x in right]
    )
    measured = baselines.by_head_and_task(logits, labels, tasks, "head")
    assert measured["head_accuracy"] == pytest.approx(100 * sum(right) / 54)
    assert measured["task_known_accuracy"] == pytest.approx(100 * known / 54)


def test_a_search_evaluates_on_all_images_half_way_and_at_the_end(config, tmp_path):
    c = config(out=str(tmp_path), tasks=4)
    line = screen.screen(screen.Config(**dataclasses.asdict(c)))
    vit, method, data, loss = baselines.prepare(dataclasses.replace(c, validate=True))
    curve = [task["accuracy"] for task in ham.learn(vit, method, data, loss)["tasks"]]
    assert line["class-mean"] == [curve[1], curve[3]]
    seen = [screen.Sparse(**vars(data)).images("test", range(t[-1] + 1))[1] for t in data.tasks]
    per_task = data.sizes("test")
    want = [per_task[0], sum(per_task[:2]), data.tasks[2][-1] + 1, sum(per_task)]
    assert [len(labels) for labels in seen] == want


@pytest.mark.parametrize("method", ["safm", "ham"])
def test_a_search_of_rates_ends_with_the_command(method, config, tmp_path, capsys):
    c = config(method=method, out=str(tmp_path), tasks=4, images_per_class=2)
    given = [*command(c), "--rates", "1e-3,1e-2", "--first-tasks", "2"]
    ham.main(given, screen.search, screen.Config)
    lines = [json.loads(x) for x in (tmp_path / "screening.jsonl").read_text().splitlines()]
    assert [x["config"]["lr"] for x in lines] == [1e-3, 1e-2] and len(list(tmp_path.iterdir())) == 1
    for line in lines:
        assert all(0 <= x <= 100 for x in line["class-mean"]) and line["tasks_learnt"] == 2
        assert line["settings"]["method" if method == "safm" else "tasks"] in ("safm", 4)
    table = capsys.readouterr().out.splitlines()[-4:]
    best = max(lines, key=lambda x: x["class-mean"][1])
    assert f"{best['class-mean'][1]:.1f}" in "".join(table) and "at the edge" in table[-2]
    kind, program = (
        (baselines.Config, "-m extras.baselines") if method == "safm" else (ham.Config, "ham.py")
    )
    lr, pasted = best["config"]["lr"], []
    assert table[-1].startswith(f"python {program} --")
    ham.main(shlex.split(table[-1].split(program)[1]), pasted.append, kind)
    (run,) = pasted  # what would run if it was pasted
    changed = {"out": "runs", "lr": lr, "name": f"lr{lr:g}"}
    for name, value in dataclasses.asdict(run).items():
        assert value == changed.get(name, getattr(c, name)), name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--rates 1e-3,much --dataset x", "numbers with commas"),
        ("--rates 1e-3", "give --dataset"),
        ("--method frozen --dataset x", "no rate"),
        ("--fair --rates 1e-3 --dataset x", "of its own"),
    ],
)
def test_a_search_refuses_in_one_line(given, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the demo draws into ./data
    with pytest.raises(SystemExit) as stop:
        ham.main(given.split(), screen.search, screen.Config)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


def test_a_search_that_is_stopped_says_what_is_kept(config, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(screen, "screen", interrupted)
    with pytest.raises(ham.InputError, match=r"complete runs are in .*screening\.jsonl"):
        screen.search(screen.Config(**dataclasses.asdict(config())))


def test_a_rate_that_diverges_does_not_end_a_search(config, tmp_path, capsys):
    c = config(out=str(tmp_path), tasks=4, images_per_class=2, epochs=1)
    screen.search(screen.Config(**dataclasses.asdict(c), rates="1e30,1e-3"))
    lines = (tmp_path / "screening.jsonl").read_text().splitlines()
    assert [json.loads(line)["config"]["lr"] for line in lines] == [1e-3]
    out = capsys.readouterr().out
    assert "--lr 1e+30: [" in out and "not finite" in out
    assert "    1e+30       0.0    0.0\n" in out and "--lr 0.001 --name" in out.splitlines()[-1]


def test_a_fair_search_by_its_rule(config, monkeypatch, capsys):
    """The best rate is an edge, two lie within a point, the second seed decides; then λ."""
    curve = {1e-3: 60.0, 1e-3 / 3: 50.0, 3e-3: 62.0, 9e-3: 61.5}  # of the first seed
    runs = []

    def recorded(c):
        lr, penalty = c.lr or 1e-3, c.penalty or 0.5
        runs.append((round(lr, 6), round(penalty, 6), c.seed))
        x = min(curve.items(), key=lambda item: abs(item[0] - lr))[1]
        x += 3 * (c.seed == 1994) * (lr > 5e-3) - 2 * abs(math.log(penalty / 0.5))
        return {"config": {"lr": lr, "penalty": penalty}, "class-mean": [0.0, x]}

    monkeypatch.setattr(screen, "recorded", recorded)
    c = screen.fair(screen.Config(**dataclasses.asdict(config(method="o_lora", lr=None))))
    assert (round(c.lr, 6), c.penalty, c.seed) == (9e-3, 0.5, 1993)
    rates = [(1e-3, 1993), (1e-3 / 3, 1993), (3e-3, 1993), (9e-3, 1993), (3e-3, 1994), (9e-3, 1994)]
    assert runs[:6] == [(round(lr, 6), 0.5, seed) for lr, seed in rates]
    assert runs[6:] == [(9e-3, round(x, 6), 1993) for x in (0.5 / 3, 1.5)]  # 0.5 is there
    assert "--penalty 0.5" in capsys.readouterr().out
