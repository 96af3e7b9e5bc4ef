"""Find a learning rate, or try anything else, on held-out training images.

    python -m extras.screen --rates 3e-4,1e-3,3e-3,1e-2 --first-tasks 5 \
        --dataset cifar100 --tasks 20 --images-per-class 50 --model vit_small_patch16_224.augreg_in21k

Takes the flags of extras/baselines.py, never touches a test image, appends a line per run to
--out/screening.jsonl, and ends with a table and the command to run. Whoever changes backbone, size,
epochs or data starts here: the default rates were found on DeiT-Tiny at 160 px. Defaults are chosen
by it, too (results/all.md). A rate at the edge of those tried is no answer: try on beyond it.

--fair spends as much on one method as on another: the law's rate, a third and three times of it, one
more beyond an edge, a second seed for what lies within a point of the best; then λ in the same way.
"""

import dataclasses
import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ham
from extras import baselines, demo
from extras.run_all import commit


@dataclass(frozen=True)
class Config(baselines.Config):
    """Settings of one search."""

    rates: str = ""  # learning rates to try, with commas between; default the one that is used
    first_tasks: int = None  # learn only the first n of the tasks
    fair: bool = False  # search rate and weight of the penalty as for every other method


class Sparse(ham.Data):
    """All test images half-way and at the end, one of a class in between, where nobody looks.

    ham.learn evaluates after every task: at T = 20 that is half of the time of a run.
    """

    def images(self, part, classes):
        pixels, labels = super().images(part, classes)
        whole = {self.tasks[t][-1] for t in (0, self.half(), -1)}  # the last class of such a task
        if part == "test" and classes[0] == 0 and classes[-1] not in whole:
            first = labels.diff(prepend=labels.new_tensor([-1])) != 0
            pixels, labels = pixels[first], labels[first]
        return pixels, labels

    def half(self):
        return (len(self.tasks) // 2 or 1) - 1


def screen(config):
    """One run on held-out images. -> what a line of screening.jsonl holds"""
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(config, validate=True, out=folder)
        vit, method, data, loss = baselines.prepare(run)
        data = Sparse(**vars(data))
        if config.first_tasks:
            data.tasks = data.tasks[: config.first_tasks]
            method.config = dataclasses.replace(method.config, tasks=len(data.tasks))
        if config.method == "safm":
            results = baselines.learn_safm(vit, method, data)
        else:
            results = ham.learn(vit, method, data, loss)
    used = results["config"] | {"tasks": config.tasks}
    tasks = results["tasks"]
    hidden = ("out", "data_dir", "weights", "name", "rates", "fair", "validate")
    default = dataclasses.asdict(Config())
    given = {k: x for k, x in dataclasses.asdict(config).items() if x != default[k]}
    curve = [task["accuracy"] for task in tasks]
    return {
        "name": config.name,
        "settings": {k: x for k, x in given.items() if k not in hidden},
        "config": {k: x for k, x in used.items() if k not in hidden[:3]},
        "tasks_learnt": len(tasks),
        "class-mean": [curve[data.half()], curve[-1]],
        "loss": tasks[-1].get("loss"),
        "group_sizes": tasks[-1].get("group_sizes"),
        "seconds": {"train": sum(task["seconds"]["train"] for task in tasks)},
        "hardware": results["hardware"],
        "ham_sha256": results["ham_sha256"],
        "commit": commit(),
    }


def recorded(config):
    """`screen`, its line appended to --out/screening.jsonl; a rate that diverges ends at 0 %."""
    file = Path(config.out) / "screening.jsonl"
    try:
        line = screen(config)
    except KeyboardInterrupt:
        raise ham.InputError(f"stopped; complete runs are in {file}, this one is lost") from None
    except ham.InputError as error:
        if "not finite" not in str(error) or not config.lr:
            raise
        print(f"--lr {config.lr:g}: {error}", flush=True)
        return {"config": vars(config), "class-mean": [0.0, 0.0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    return line


def fair(config):
    """The same search for every method: see above. -> config with the rate and λ it ends with"""
    ends = {}  # (rate, λ, seed): accuracy

    def end(config):
        key = config.lr, config.penalty, config.seed
        if key not in ends:
            line = recorded(config)
            key = line["config"]["lr"], line["config"]["penalty"], config.seed
            ends[key] = line["class-mean"][1]
        return key

    lr, penalty, _ = end(config)
    config = dataclasses.replace(config, lr=lr, penalty=penalty)
    for name in ("lr", "penalty"):
        middle, found = getattr(config, name), {}  # value: accuracy of each seed

        def see(value, seed, config=config, name=name, found=found):
            run = dataclasses.replace(config, **{name: value, "seed": seed})
            found.setdefault(value, []).append(ends[end(run)])

        for value in (middle, middle / 3, 3 * middle) if middle else ():  # some have no penalty
            see(value, config.seed)
        best = max(found, key=found.get, default=middle)
        if best != middle:
            see(best * best / middle, config.seed)
        near = [x for x in found if max(found.values())[0] - found[x][0] < 1]
        for value in near if len(near) > 1 else ():
            see(value, config.seed + 1)
        best = max(near, key=lambda value: sum(found[value]), default=middle)
        config = dataclasses.replace(config, **{name: best})
        for value, x in sorted(found.items()):
            print(f"{name} {value:.2g}: {', '.join(f'{y:.1f}' for y in x)}", flush=True)
    print(f"{config.method}: --lr {config.lr} --penalty {config.penalty}")
    return config


def search(config):
    """A run for each rate, then the table and the command."""
    if str(demo.MODEL) in config.model:
        raise ham.InputError("the demo has rates of its own: give --dataset")
    if config.method == "frozen" or (config.fair and config.rates):
        raise ham.InputError("--method frozen has no rate, --fair searches --rates of its own")
    if config.fair:
        return fair(config)
    found = {}
    try:
        rates = [float(x) for x in config.rates.split(",") if x]
    except ValueError as error:
        raise ham.InputError(f"--rates {config.rates}: numbers with commas between") from error
    for lr in rates or [config.lr]:
        line = recorded(dataclasses.replace(config, lr=lr))
        found[line["config"]["lr"]] = line
    print(f"{'rate':>9}  half-way    end  (held-out images, %)")
    for lr, line in found.items():
        half, end = line["class-mean"]
        print(f"{lr:9.2g}  {half:8.1f}  {end:5.1f}")
    best = max(found, key=lambda lr: found[lr]["class-mean"][1])
    print(f"appended to {config.out}/screening.jsonl")
    if len(found) > 1 and best in (min(found), max(found)):
        side = "lower" if best == min(found) else "higher"
        print(f"{best:g} is at the edge of those tried: try {side} ones, too")
    print(command(config, best))


def command(config, lr):
    """The command line of a run with these settings and this rate, on test images."""
    left_out, flags = ("rates", "first_tasks", "fair", "validate", "out", "name", "lr"), []
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    given = {k: x for k, x in settings.items() if x != getattr(Config, k) and k not in left_out}
    for name, value in given.items():
        flag = name.replace("_", "-")
        yes_no = [f"--{flag}" if value else f"--no-{flag}"]
        flags += yes_no if isinstance(value, bool) else [f"--{flag}", str(value)]
    ours = config.method in baselines.METHODS or not given.keys() <= vars(ham.Config()).keys()
    program = "-m extras.baselines" if ours else "ham.py"
    return f"python {program} {shlex.join(flags)} --lr {lr:g} --name lr{lr:g}"


if __name__ == "__main__":
    ham.main(None, search, Config)
