"""Choose the demo's rates on two draws, then run ten others; results/demo.json has both.

    python -m extras.measure_demo    # about 15 minutes of two CPU threads

A rate is chosen for each method alike, out of one grid of factors of two; all else is as
`python ham.py` has it. The draws it is chosen on are none of the ten.
"""

import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import ham
from extras import demo

FILE = Path(__file__).parent.parent / "results" / "demo.json"
GRID = [7.5e-4 * 2**k for k in range(7)]
METHODS = ["ham", "sequential", "average", "joint"]
DRAWS, SEEDS = (100, 101), range(10)


def measure(job):
    """(method, rate, seed) -> final accuracy, forgetting, learning accuracy; seconds of training"""
    method, lr, seed = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        c = ham.Config(method=method, lr=lr, seed=seed, out=folder, data_dir=folder)
        r = ham.run(demo.made(c))
    seconds = sum(task["seconds"]["train"] for task in r["tasks"])
    return r["final_accuracy"], r["forgetting"], r["learning_accuracy"], seconds, r["hardware"]


def main():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [(method, lr, seed) for method in METHODS for lr in GRID for seed in DRAWS]
        tried = {}
        for (method, lr, _), (final, *_) in zip(jobs, pool.map(measure, jobs)):
            tried.setdefault(method, {}).setdefault(f"{lr:g}", []).append(final)
        best = {m: max(x, key=lambda lr: sum(x[lr])) for m, x in tried.items()}
        print("best", best, flush=True)
        jobs = [(m, float(best[m]), seed) for m in METHODS for seed in SEEDS]
        jobs += [("frozen", None, seed) for seed in SEEDS]
        keys = ("final_accuracy", "forgetting", "learning_accuracy", "seconds", "hardware")
        runs = []
        for (method, lr, seed), found in zip(jobs, pool.map(measure, jobs)):
            runs.append({"method": method, "lr": lr, "seed": seed} | dict(zip(keys, found)))
    result = {"draws": DRAWS, "tried": tried, "runs": runs}
    FILE.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
