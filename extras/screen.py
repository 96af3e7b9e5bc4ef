"""Try settings on held-out training images, evaluated only half-way and at the end.

    python -m extras.screen --dataset cifar100 --tasks 50 --images-per-class 20 --rho 1 --name rho1

Takes the flags of extras/baselines.py, never touches a test image, and appends a line to
--out/screening.jsonl. Defaults are chosen by it (results/README.md).
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

import ham
from extras import baselines
from extras.run_all import commit


def screen(given):
    """-> settings given, all resolved ones; accuracies (%) half-way and at the end, the oracle"""
    vit, method, data, loss = baselines.prepare(dataclasses.replace(given, validate=True))
    config = method.config
    if config.method == "safm":
        half, end, record, seconds = screen_safm(vit, method, data)
    else:
        half, end, record, seconds = learn(vit, method, data, loss)
    result = {"name": config.name, "tasks_learnt": config.tasks, "oracle": end["oracle_accuracy"]}
    for name in ("class-mean", "head"):
        key = f"{name.replace('-', '_')}_accuracy"
        if key in end:
            result[name] = [half[key], end[key]]
    result |= {k: record.get(k) for k in ("loss", "alpha", "alpha_groups", "group_sizes")}
    default, hidden = dataclasses.asdict(type(given)()), ("out", "data_dir", "weights", "name")
    given = {k: v for k, v in dataclasses.asdict(given).items() if v != default[k]}
    result["settings"] = {k: v for k, v in given.items() if k not in (*hidden, "validate")}
    result |= {"config": dataclasses.asdict(config), "seconds": {"train": seconds}}
    return result | {"commit": commit()}


def screen_safm(vit, method, data):
    """Its own loop: as it keeps features, testing after every task costs nothing more."""
    with tempfile.TemporaryDirectory() as folder:
        results = baselines.learn_safm(vit, method, data, Path(folder))
    records = results["tasks"]
    half, end = records[(len(records) // 2 or 1) - 1], records[-1] | {"oracle_accuracy": None}
    return half, end, records[-1], results["seconds"]["train"]


def learn(vit, method, data, loss):
    """ham.learn's loop, tested twice. -> ham.evaluate's half-way and at the end, record, seconds"""
    config, seconds, record = method.config, 0.0, {}
    zeros = torch.zeros(len(data.names), vit.num_features, device=config.device)
    class_rows = {"class-mean": zeros} | ({"head": zeros.clone()} if method.w0 else {})
    for task, classes in enumerate(data.tasks):
        if method.w0:
            start = time.perf_counter()
            trained, log = ham.train_task(vit, method, data, task, loss)
            seconds += time.perf_counter() - start
            record = method.finish(task, trained)
            losses = [value for value, _ in log[-(len(log) // config.epochs) :]]  # last epoch
            record["loss"] = sum(losses) / len(losses)
            class_rows["head"][list(classes)] = trained.head.detach()
        weights = method.folded()
        means = ham.class_means(*ham.extract(vit, weights, data, "train", classes, config), classes)
        class_rows["class-mean"][list(classes)] = means
        if not means.isfinite().all():
            raise ham.InputError(f"task {task + 1}: not finite any more; lower --lr {config.lr}")
        if task + 1 == (config.tasks // 2 or 1):
            half = measure(vit, weights, data, class_rows, data.tasks[: task + 1], config)
    every = range(len(data.names))
    oracle = ham.class_means(*ham.extract(vit, weights, data, "train", every, config), every)
    end = measure(vit, weights, data, class_rows | {"oracle": oracle}, data.tasks, config)
    return half, end, record, seconds


def measure(vit, weights, data, class_rows, seen, config):
    """As ham.evaluate, on the test images of the tasks seen."""
    tested = ham.extract(vit, weights, data, "test", range(seen[-1][-1] + 1), config)
    matrix = {name: [] for name in class_rows}
    return ham.evaluate(*tested, class_rows, matrix, data, config.read_out)


def main():
    config = ham.parse(kind=baselines.Config, manual=__doc__)
    try:
        result = screen(config)
    except ham.InputError as error:
        ham.fail(error)
    file = Path(config.out) / "screening.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
