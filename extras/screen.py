"""Try settings on held-out training images: ham.py's run, evaluated twice instead of after each task.

    python -m extras.screen --dataset cifar100 --tasks 50 --images-per-class 20 --rho 1 --name rho1

Takes ham.py's flags, never touches a test image, and appends one line to --out/screening.jsonl: the
settings given and all resolved ones, accuracy half-way and at the end by class means and by
the head, the oracle. Choices of defaults come from here (results/README.md); tables do not.
"""

import dataclasses
import json
import math
from pathlib import Path

import ham
from extras import baselines, provenance


class Seldom:
    """The loop's state, with rows of NaN where nothing was evaluated."""

    def evaluate(self, task):
        if task + 1 in (self.c.tasks // 2, self.c.tasks):
            super().evaluate(task)
            return
        for matrix in self.matrix.values():
            matrix.append([math.nan] * (task + 1))


def screen(config):
    """-> dict of plain numbers, per cent"""
    c, method, loop = baselines.prepare(dataclasses.replace(config, validate=True))
    c = ham.resolve(c)
    data, vit = ham.load_data(c), ham.build_vit(c)
    layers = {} if c.method == "frozen" else ham.lora_layers(vit, c.layers)
    learner = type("Screen", (Seldom, loop), {})(vit, method(layers, c), data)
    for task in range(c.tasks):
        learner.learn(task)
    at, last = (c.tasks // 2 or 1, c.tasks), learner.records[-1]
    result = {"name": c.name, "tasks_learnt": c.tasks, "oracle": learner.oracle()}
    for name, matrix in learner.matrix.items():
        result[name] = [ham.accuracy_so_far(matrix[t - 1], learner.sizes) for t in at]
    result |= {k: last[k] for k in ("loss", "alpha", "alpha_groups", "group_sizes")}
    given, default = dataclasses.asdict(config), dataclasses.asdict(type(config)())
    paths = ("out", "data_dir", "weights", "name", "validate")
    result["settings"] = {k: v for k, v in given.items() if v != default[k] and k not in paths}
    result |= {"config": dataclasses.asdict(c), "seconds": learner.seconds}
    return result | {"commit": provenance.SOURCE["commit"]}


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
