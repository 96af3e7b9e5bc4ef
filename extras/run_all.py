"""Repeat every run behind the tables of README.md and results/README.md.

    python -m extras.run_all --data-dir data --weights data/deit_tiny_patch16_224.safetensors
    python -m extras.run_all --only validate --jobs 2     # two runs at a time, one thread each

A run whose results.json is there is skipped, so this can be stopped and started. It commits nothing.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = "--model deit_tiny_patch16_224.fb_in1k --img-size 160 "
CIFAR = (
    SMALL
    + "--dataset cifar100 --tasks 20 --images-per-class 50 --test-images-per-class 50 --name i50 "
)
CUB = SMALL + "--dataset cub200 --tasks 10 "
HELD_OUT = "--out results/validate --validate --test-images-per-class 20 "

# name (the folder below results/): flags. Choices are made on held-out training images, seed 1993.
RUNS = {}
CIFAR_HELD_OUT = CIFAR.replace("--test-images-per-class 50 --name i50 ", "") + HELD_OUT
for name, flags in {
    "ham-rho1": "--method ham --rho 1",
    "ham-rho0.7": "--method ham --rho 0.7",
    "ham-rho0.5": "--method ham --rho 0.5",
    "sequential-lr3e-4": "--method sequential --lr 3e-4",
    "sequential-lr1e-3": "--method sequential --lr 1e-3",
    "sequential-lr1e-4": "--method sequential --lr 1e-4",
}.items():
    method, tag = name.split("-", 1)
    RUNS[f"validate/cifar100-T20-{method}-{tag}-s1993"] = f"{CIFAR_HELD_OUT}{flags} --name {tag}"
for tag in ("1e-4", "3e-4", "3e-5"):
    flags = f"--method sequential --lr {tag} --name lr{tag}"
    RUNS[f"validate/cub200-T10-sequential-lr{tag}-s1993"] = f"{CUB}{HELD_OUT}{flags}"

# the tables: test images
for seed in (1993, 1994, 1995):
    for method in ("ham", "sequential", "average", "frozen"):
        if seed == 1993 or method in ("ham", "sequential"):
            flags = f"--out results --method {method} --seed {seed}"
            RUNS[f"cifar100-T20-{method}-i50-s{seed}"] = f"{CIFAR}{flags}"
            RUNS[f"cub200-T10-{method}-s{seed}"] = f"{CUB}{flags}"


def run_one(name, flags, args):
    """One run of ham.py in a process of its own; its lines go to a log beside its results."""
    folder = ROOT / "results" / name
    if (folder / "results.json").is_file():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "ham.py",
        *flags.split(),
        "--data-dir",
        args.data_dir,
        "--weights",
        args.weights,
    ]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
    start = time.time()
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads, check=False
        ).returncode
    print(f"{name}: exit {code}, {(time.time() - start) / 60:.1f} min", flush=True)
    return code


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--weights", default="data/deit_tiny_patch16_224.safetensors")
    parser.add_argument("--only", default="", help="runs whose name contains any of these, a,b,c")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; they share the processors"
    )
    args = parser.parse_args()
    wanted = [name for name in RUNS if any(part in name for part in args.only.split(","))]
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda name: run_one(name, RUNS[name], args), wanted))
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
