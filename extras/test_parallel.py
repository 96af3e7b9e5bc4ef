"""Tests of extras/parallel.py: two processes end as one, and each does half."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ham
from extras import baselines, demo, parallel

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available(),
    reason="no gloo",
)
FLAGS = "--tasks 3 --tau 1 --epochs 1 --images-per-class 5 --test-images-per-class 2 --lr 1e-2"
FLAGS += f" --device cpu --precision fp32 --model local-dir:{demo.MODEL}"
COUNTED = """
import os, pathlib, runpy, sys
from extras import baselines

prepare, seen = baselines.prepare, pathlib.Path(__file__).with_name("seen" + os.environ["RANK"])

def counting(config):
    vit, *rest = prepare(config)
    seen.write_text(f"{os.getpid()}\\n")
    def count(module, inputs):
        with seen.open("a") as file:
            file.write(f"{len(inputs[0])}\\n")
    vit.patch_embed.register_forward_pre_hook(count)
    return vit, *rest

baselines.prepare = counting
runpy.run_module("extras.parallel", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    demo.drawings(folder / "demo", seed=0)
    (folder / "counted.py").write_text(COUNTED)
    return folder


def start(program, folder, out, *more):
    command = [sys.executable, *program, *FLAGS.split(), "--dataset", folder / "demo", "--out", out]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, command), *more], cwd=ROOT, env=env, **how)


def results(run, out):
    text = run.communicate(timeout=300)[0]
    assert run.returncode == 0, text
    (file,) = out.rglob("results.json")
    return json.loads(file.read_text()), file.with_name("model.safetensors").read_bytes(), text


@pytest.fixture(scope="module")
def two(folder):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*torchrun, folder / "counted.py"]


@pytest.fixture(scope="module")
def in_peace(folder, two):
    return results(start(two, folder, folder / "two"), folder / "two")


def test_two_processes_end_as_one_and_each_passes_half_of_the_images(folder, in_peace):
    r, _, text = in_peace
    seen = [[int(x) for x in (folder / f"seen{k}").read_text().split()[1:]] for k in range(2)]
    one, *_ = results(start(["ham.py"], folder, folder / "one"), folder / "one")
    assert text.count("final accuracy") == 1 and r["processes"] == 2
    for a, b in zip(r["tasks"], one["tasks"], strict=True):  # the same but for the order of sums
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["alpha"] == pytest.approx(b["alpha"], rel=1e-3)
        assert a["group"] == b["group"]  # at τ = 1 each opens its own: no near tie decides
    assert r["final_accuracy"] == pytest.approx(one["final_accuracy"], abs=3)
    train, test = 5 * 100, 2 * (34 + (34 + 33) + (34 + 33 + 33))
    assert sum(map(sum, seen)) == 3 * train + test  # head, one epoch, class means; test images
    assert abs(sum(seen[0]) - sum(seen[1])) < 0.03 * sum(seen[0])


def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(folder, two, in_peace):
    run = start(two, folder, folder / "killed")
    while not run.stdout.readline().startswith("task"):
        assert run.poll() is None
    os.kill(int((folder / "seen1").read_text().split()[0]), signal.SIGKILL)
    began = time.perf_counter()
    run.communicate(timeout=60)
    assert run.returncode != 0 and time.perf_counter() - began < 60
    r, model, text = results(start(two, folder, folder / "killed"), folder / "killed")
    assert "0 of 3 tasks learnt" not in text
    assert r["accuracy_matrix"] == in_peace[0]["accuracy_matrix"] and model == in_peace[1]


def test_shares_and_their_sum_are_the_whole_batch(tmp_path):
    """In one process of two that are not there: rows, weights, and gradients of small batches."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    try:
        x = torch.randn(5, 3, requires_grad=True)
        (parallel.Gathered.apply(x, 5) ** 2).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())
    finally:
        dist.destroy_process_group()
    for rank, count, n, want in ((0, 2, 5, (0, 2)), (1, 2, 5, (2, 5)), (2, 3, 2, (0, 2))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            patch.setattr(dist, "get_world_size", lambda count=count: count)
            rows = range(n)[parallel.own(n)]
            assert (rows[0], rows[-1] + 1) == want
            if n < count:  # all pass all: a third each of the gradient
                gradient = torch.ones(n, 3)
                ctx = types.SimpleNamespace()
                torch.testing.assert_close(parallel.Gathered.forward(ctx, gradient, n), gradient)
                got, *_ = parallel.Gathered.backward(ctx, gradient)
                torch.testing.assert_close(got, gradient / count)


def test_a_penalty_is_refused(monkeypatch):
    method = types.SimpleNamespace(config=baselines.Config(method="ewc"))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(baselines, "prepare", lambda _: (None, method, None, lambda *_: 0))
    with pytest.raises(ham.InputError, match="--method ewc: its loss needs the batch"):
        parallel.run(method.config)


def test_without_torchrun_it_says_so():
    command, how = [sys.executable, "-m", "extras.parallel"], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, check=False, **how)
    assert done.returncode == 1 and "torchrun --nproc-per-node" in done.stderr
