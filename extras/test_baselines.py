"""Tests of extras/baselines.py, on the demo's drawn images: nothing to download."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import timm
import torch

import ham
from extras import baselines, demo, run_all

QKV = 8 * 4 * (96 + 3 * 96)  # parameters of an adapter of the demo's model: rank, blocks, k + d
SMALL = {"tasks": 3, "epochs": 1, "batch_size": 8, "device": "cpu", "precision": "fp32"}


def config(**settings):
    return baselines.Config(**(SMALL | settings))


def factors(d=3, r=2, k=4, **how):
    return torch.randn(d, r, **how), torch.randn(r, k, **how)


def trainable(b, a):
    adapter = {"x": (b.clone().requires_grad_(), a.clone().requires_grad_())}
    return ham.Trainable(adapter, {}, torch.ones(()), torch.ones(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The demo's model before any training, and few images; threads would only wait."""

    def untrained(seed, *_):
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **demo.VIT)

    monkeypatch.setattr(demo, "pretrained", untrained)
    monkeypatch.setattr(demo, "TRAIN", 4)
    monkeypatch.setattr(demo, "TEST", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", [*baselines.METHODS, "ham"])
def test_each_method_from_the_command_line_to_its_results(method, tmp_path):
    given = SMALL | {"method": method, "out": tmp_path} | ({"gain": 2} if method == "ham" else {})
    baselines.main([x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))])
    folder = tmp_path / f"demo-T3-{method}-s1993"
    results = json.loads((folder / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert results["config"]["lr"] == baselines.learning_rate(method, 4 * 30 / 3)
    assert results["config"]["gain"] == given.get("gain")
    assert 0 <= results["final_accuracy"] <= results["task_known_accuracy"] <= 100
    assert all(0 < record["loss"] < math.inf for record in results["tasks"])
    stored = {"treelora": 4 * QKV, "ewc": 2 * QKV, "sd_lora": 3 * QKV, "o_lora": 3 * QKV}
    if method in stored:
        assert results["parameters_stored"] == 30 * 96 + stored[method]
    assert (folder / "model.safetensors").is_file() == (method != "safm")


def test_settings_that_do_not_apply_are_none_and_mistakes_one_line(capsys):
    for method in (*baselines.METHODS, "sequential"):
        c = baselines.resolve(config(method=method, penalty=5.0, gain=5.0))
        assert c.penalty == (5.0 if method in baselines.PENALTY else None)
        assert c.tau is None and c.gain is None and c.train_alpha == (method == "sd_lora")
    for mistake in ("--method nothing", "--gain 5 --merge sum", "--penalty -1 --method ewc"):
        with pytest.raises(SystemExit, match="2"):
            baselines.main(mistake.split())
        assert capsys.readouterr().err.count("\n") == 1
    assert baselines.learning_rate("ewc", 750) == pytest.approx(1.5e-3)


def test_each_committed_run_has_the_configuration_that_its_flags_resolve_to(monkeypatch):
    monkeypatch.chdir(run_all.ROOT)
    for name, flags in run_all.RUNS.items():
        if not Path("results", name, "results.json").is_file():
            continue
        old = json.loads(Path("results", name, "results.json").read_text())["config"]
        of = baselines if "extras.baselines" in run_all.program(flags) else ham
        c = of.resolve(dataclasses.replace(ham.parse(flags.split(), of.Config), device="cpu"))
        if c.lr is None and c.method != "frozen":
            classes, images = (200, 5994) if c.dataset == "cub200" else (100, 50_000)
            n = (classes * c.images_per_class if c.images_per_class else images) / c.tasks
            c = dataclasses.replace(c, lr=of.learning_rate(c.method, n))
        machine = ("data_dir", "weights", "device", "precision", "out")
        new = {k: v for k, v in dataclasses.asdict(c).items() if k in old and k not in machine}
        assert new == {k: old[k] for k in new}, name


@pytest.mark.parametrize("method", ["treelora", "ewc"])
def test_without_its_penalty_it_is_sequential_and_with_it_not(method, tmp_path):
    runs = []
    for kind, name in (("sequential", None), (method, "without"), (method, "with")):
        c = config(method=kind, name=name, lr=1e-3, out=str(tmp_path))
        vit, m, data, loss = baselines.prepare(c)
        if name == "without":
            m.config = dataclasses.replace(m.config, penalty=0.0)
        results = ham.learn(vit, m, data, loss, resume=False)
        runs.append([results["accuracy_matrix"], *(r["loss"] for r in results["tasks"])])
    assert runs[0] == runs[1]
    assert runs[2][1] == runs[0][1] and runs[2][2:] != runs[0][2:]  # from the second task on


def test_gain_by_hand():
    method, group, want = baselines.Gain({}, config(rho=1.0, gain=3.0)), ham.Group({}), 0.0
    for i in range(6):
        (b, a), group.alpha = factors(), 1.5
        method.join(group, i, {"x": (b, a)}, alpha=0.7)
        want = 0.7 * min(i + 1, 3) / (i + 1) * (b @ a) + 1.5 * want
        torch.testing.assert_close(ham.dense(group.delta_w["x"]), want)


def test_ewc_and_o_lora_penalties_by_hand():
    p, method = trainable(*factors()), baselines.EWC({}, config(penalty=3.0))
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

    method, old = baselines.OLoRA({}, config(penalty=0.5)), torch.randn(6, 4)
    method.groups = [ham.Group({"x": (None, part)}) for part in (old[:2], old[2:])]
    want = sum((old[i] * a[j]).sum() ** 2 for i in range(6) for j in range(2))
    assert method.penalty(p, torch.ones(())).item() == pytest.approx(0.5 * want.item(), rel=1e-5)


@pytest.mark.parametrize("tasks", [1, 2, 7, 40])
def test_tree_halves_the_tasks(tasks):
    signatures = [list(torch.randn(12, 3)) for _ in range(tasks)]
    leaves = baselines.leaves(list(range(tasks)), signatures)
    assert sorted(k for leaf in leaves for k in leaf) == list(range(tasks))
    sizes = {len(leaf) for leaf in leaves}
    assert len(leaves) == min(tasks, 32) and max(sizes) - min(sizes) <= 1


def test_bandit_by_hand():
    bandit = baselines.Bandit(3)
    for arm, distance in ((0, 5.0), (1, 1.0), (2, 4.0), (1, 3.0)):
        assert bandit.choose() == arm or all(bandit.n)
        bandit.saw(arm, distance)
    assert bandit.n == [1, 2, 1] and bandit.mean == [5.0, 2.0, 4.0]
    assert bandit.choose() == 1  # 5 - 2.4, 2 - 1.7, 4 - 2.4


def test_treelora_penalty_has_the_gradient_of_the_distance():
    """By A and B, against finite differences, where the gradient depends on the parameters."""
    torch.manual_seed(0)
    start, method = factors(dtype=torch.double), baselines.TreeLoRA({}, config(penalty=0.1))
    near = torch.randn(14, dtype=torch.double)
    method.signatures = [[near]]
    method.start()

    def share(theta):
        p = trainable(theta[:6].view(3, 2), theta[6:].view(2, 4)).adapter["x"]
        g = baselines.vector(torch.autograd.grad(((p[0] @ p[1]) ** 3).sum(), p))
        return 0.1 * (g - near).abs().sum() / (g.abs().sum() + near.abs().sum())

    p, theta = trainable(*start), baselines.vector(start)
    b, a = p.adapter["x"]
    method.penalty(p, ((b @ a) ** 3).sum()).backward()
    steps = 1e-6 * torch.eye(14, dtype=torch.double)
    slopes = torch.stack([(share(theta + x) - share(theta - x)) / 2e-6 for x in steps])
    torch.testing.assert_close(baselines.vector((b.grad, a.grad)), slopes, rtol=1e-4, atol=1e-7)


def test_search_decides_for_what_the_loss_wants():
    """The loss is the distance to what one candidate of each block gives, or to W0."""
    torch.manual_seed(0)
    names, wanted = [f"blocks.{i}.qkv.weight" for i in range(4)], ["empty", 0, 1, "new"]
    method = baselines.SAFM({n: torch.zeros(6, 4) for n in names}, config(method="safm"))
    old, new = [{n: factors(6) for n in names} for _ in range(2)], {n: factors(6) for n in names}
    for name in names:
        method.pool[baselines.block_of(name)] = [{name: x[name]} for x in old]
    decided = dict(zip(method.pool, wanted))
    target = {n: w.detach() for n, w in method.tuned(new, decided).weights(method.w0).items()}
    search = method.search(new)
    optimiser = torch.optim.Adam(list(search.w.values()), lr=baselines.SEARCH)
    for _ in range(20):
        optimiser.zero_grad()
        weights = search.weights(method.w0)
        sum((weights[n] - target[n]).square().sum() for n in names).backward()
        optimiser.step()
    assert search.decided() == decided
    method.keep(method.tuned(new, decided), decided)  # what was new is the pool's third
    assert all(torch.equal(w, target[n]) for n, w in method.weights_of(0).items())
    assert method.choices == [decided | {"blocks.3": 2}]
