"""Repeat every run behind the tables of README.md and results/README.md.

    python -m extras.run_all --data-dir data --weights data/deit_tiny_patch16_224.safetensors
    python -m extras.run_all --only cub200 --jobs 2       # two at a time: of the threads, a GPU each
    python -m extras.run_all --shard 3/8                  # the third of eight machines or array jobs
    python -m extras.run_all --list                       # every run's command

Where there are fewer GPUs than jobs they are shared: a small model's run leaves most of one idle.
Sixteen on one, as in results/, want NVIDIA's MPS daemon started first.

Runs are in the order of their worth. One whose results.json is there is skipped, so this can be
stopped and started. It commits nothing.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import ham

ROOT = Path(__file__).parent.parent
SEEDS = (1993, 1994, 1995)
MORE = (1996, 1997)  # of what is claimed first

RUNS = {}  # name (the folder below results/): flags
MODEL = "--model deit_tiny_patch16_224.fb_in1k"


def add(data, tasks, methods, flags="", name="", seeds=SEEDS, px=160, lr=None):
    """Add a run per seed and method. name: ham.py's --name; lr: rates that are not the default's"""
    for seed, method in ((seed, method) for seed in seeds for method in methods.split()):
        t = 1 if method == "joint" else tasks
        run = "-".join(filter(None, [data, f"T{t}", method, name, f"s{seed}"]))
        RUNS[run] = f"{MODEL} --img-size {px} --dataset {data} --tasks {t} --method {method} "
        RUNS[run] += f"--seed {seed} --out results {flags}" + (f" --name {name}" if name else "")
        if lr and lr.get(method):
            RUNS[run] += f" --lr {lr[method]:g}"


ONE, FIVE = SEEDS[:1], (*SEEDS, *MORE)  # where a method has one seed it is 1993
FIXED = "frozen joint"
OTHERS = "treelora safm sd_lora o_lora ewc ewc_lora first onward"
TEST = "--test-images-per-class 50"
I50, I250 = f"--images-per-class 50 {TEST}", f"--images-per-class 250 {TEST}"

# 1. CIFAR-100, all images, by the law of learning rates
for seeds in (SEEDS, MORE):
    add("cifar100", 20, "ham sequential average", "", "all", seeds)
add("cifar100", 20, FIXED, "", "all", ONE)
add("cifar100", 20, "ham", "--group-rank 8", "all-R8")
for tasks in (50, 10):
    add("cifar100", tasks, "ham sequential average", "", "all")
add("cifar100", 20, "o_lora ewc ewc_lora treelora safm", "", "all", ONE)
add("cifar100", 20, "ham sequential", "", "224px", ONE, px=224)
add("cifar100", 20, "ham", "", "160px", ONE)  # as `all`, on another machine

# 2. CIFAR-100, 50 training images per class, by the law, on one GPU
for tasks in (20, 50, 10):
    add("cifar100", tasks, "ham sequential average", I50, "i50-gpu", FIVE)
    add("cifar100", tasks, "ham", f"{I50} --group-rank 8", "i50-gpu-R8", FIVE)
    add("cifar100", tasks, "ham", f"{I50} --group-rank 16", "i50-gpu-R16", FIVE)
    add("cifar100", tasks, "onward", I50, "i50-gpu", FIVE)
GROUPINGS = {
    "random": "--grouping random",
    "R8-random": "--group-rank 8 --grouping random",
    "R8-features": "--group-rank 8 --grouping features",
    "R8-least": "--group-rank 8 --grouping least",
    "share0.3": "--g-max 1 --no-train-alpha --share 0.3",
    "share0.5": "--g-max 1 --no-train-alpha --share 0.5",
    "share0.7": "--g-max 1 --no-train-alpha --share 0.7",
}
for part, flags in GROUPINGS.items():
    add("cifar100", 20, "ham", f"{I50} {flags}", f"i50-gpu-{part}", FIVE)
add("cifar100", 20, "onward", f"{I50} --grouping random", "i50-gpu-random", FIVE)
add("cifar100", 20, "treelora", I50, "i50-gpu")
add("cifar100", 20, "treelora", f"{I50} --grouping random", "i50-gpu-random")
add("cifar100", 20, "ewc_lora o_lora ewc sd_lora safm first", I50, "i50-gpu")
add("cifar100", 20, "ham", f"{I50} --precision fp32", "i50-gpu-fp32", ONE)

# 3. CIFAR-100, 50 per class, and many; CUB-200, all images: on CPUs. Learning rates from before
# there was a law: CIFAR-100 with few and with many images per class, and CUB-200. None: by the law.
FEW = {"ham": 1e-3, "sequential": 3e-4, "average": 1e-2}
FEW |= {"sd_lora": 1e-3, "o_lora": 1e-3, "ewc": 3e-3}
MANY = {"ham": 3e-4, "sequential": 1e-4, "average": 3e-3}
MANY |= {"sd_lora": 3e-4, "o_lora": 3e-4, "ewc": 3e-4}
CUB = {"ham": 1e-3, "sequential": 3e-5, "average": 1e-3}
CUB |= {"sd_lora": 1e-3, "o_lora": 1e-3, "ewc": 3e-3, "treelora": 1e-3}
# the best of one held-out seed; CUB's are of two
BEFORE = CUB | {"sequential": 1e-4, "average": 3e-3, "o_lora": 3e-4, "ewc": 1e-3}
for tasks in (20, 50, 10, 5):
    rates = FEW if tasks > 10 else FEW | {"ham": None, "sequential": None}  # there by the law
    add("cifar100", tasks, "ham sequential average", I50, "i50", lr=rates)
    add("cifar100", tasks, FIXED, I50, "i50", ONE)
add("cifar100", 20, "ham sequential average", I50, "i50", MORE, lr=FEW)
add("cifar100", 50, "ham sequential", I50, "i50", MORE, lr=FEW)
add("cifar100", 20, "sequential", I50, "i50-law")
add("cifar100", 20, "safm sd_lora o_lora ewc first", I50, "i50")
add("cifar100", 50, "o_lora ewc", I50, "i50")
add("cifar100", 50, "safm sd_lora", I50, "i50", ONE)
add("cub200", 10, "ham sequential average treelora safm o_lora ewc first", lr=CUB)
add("cub200", 10, "ham sequential", seeds=MORE, lr=CUB)
add("cub200", 10, f"{FIXED} sd_lora", seeds=ONE, lr=CUB)
add("cub200", 10, "sequential average", name="before", lr=BEFORE)
add("cub200", 10, "o_lora ewc", name="before", seeds=ONE, lr=BEFORE)
add("cub200", 20, "ham sequential average frozen", seeds=ONE, lr=BEFORE)
add("cub200", 100, "ham", seeds=ONE)
add("cub200", 100, "ham", "--group-rank 8", "R8", ONE)
add("cifar100", 20, "ham sequential o_lora ewc", I250, "i250", lr=MANY)
add("cifar100", 20, f"average {FIXED} sd_lora", I250, "i250", ONE, lr=MANY)
add("cifar100", 50, "ham sequential", I250, "i250", ONE, lr=MANY)

# 4. The parts, each switched off by itself; and tasks that are CIFAR-100's superclasses
PARTS = {
    "one-group": "--g-max 1",
    "one-group-gain5": "--g-max 1 --gain 5",
    "random": "--grouping random",
    "each-its-own": "--tau 1 --g-max 20",
    "sum": "--merge sum",
    "mean": "--merge mean",
    "rho1": "--rho 1",
    "rho0.5": "--rho 0.5",
    "rho0.3": "--rho 0.3",
    "no-alpha": "--no-train-alpha",
    "gmax2": "--g-max 2",
    "gmax10": "--g-max 10",
}
for part, flags in PARTS.items():
    add("cifar100", 20, "ham", f"{I50} {flags}", f"i50-{part}")
SUPER = f"{I50} --superclasses"
add("cifar100", 20, "ham", SUPER, "i50-super")
add("cifar100", 20, "ham", f"{SUPER} --grouping random", "i50-super-random")

# 5. How far rounding moves a run: again, in fp32, with two threads (--jobs 1 on two processors)
for again, flags in {"again": "", "fp32": "--precision fp32", "2threads": ""}.items():
    add("cifar100", 20, "ham", f"{I50} {flags}", f"i50-{again}", ONE)


def program(flags):
    """ham.py, or extras/baselines.py for what is only there. flags: one string"""
    words = flags.split()
    ours = {"--gain", "--share", "--grouping", "--superclasses", *OTHERS.split()}.intersection(
        words
    )
    return ["-m", "extras.baselines"] if ours else ["ham.py"]


def command(name):
    """As one types it; of a run that is there with the threads and the precision that it had."""
    file, threads, precision = ROOT / "results" / name / "results.json", "", ""
    if file.is_file():
        run = json.loads(file.read_text("utf-8"))
        threads = f"OMP_NUM_THREADS={run['hardware'].split()[-2]} "
        precision = f" --precision {run['config']['precision']}"
        precision = "" if "--precision" in RUNS[name] else precision
    flags = RUNS[name].replace(" --out results", "").replace("  ", " ").strip()
    return f"{threads}python {' '.join(program(RUNS[name]))} {flags}{precision}"


def commit():
    """HEAD of the project's repository, -dirty where files differ from it; None without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def shard(text):
    """I/N -> which runs."""
    first, step = map(int, text.split("/"))
    return slice(first - 1, None, step)


def run_one(name, flags, source, args, gpus):
    """One run in a process of its own, on a free GPU; its lines go to a log beside its results."""
    folder = ROOT / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    data = ["--data-dir", args.data_dir, "--weights", args.weights]
    runs = [[*program(flags), *flags.split()], ["-m", "extras.finished", str(folder)]]
    threads, gpu, start = str(max(1, os.cpu_count() // args.jobs)), gpus.get(), time.time()
    how = {"env": os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu}}
    with open(folder / "log.txt", "w") as log:
        how |= {"cwd": ROOT, "stdout": log, "stderr": log}
        for run in runs:  # the second adds what only the tables need
            done = subprocess.run([sys.executable, *run, *data], check=False, **how)
            if done.returncode:
                break
    if done.returncode == 0:
        file = folder / "results.json"
        text = json.dumps(json.loads(file.read_text("utf-8")) | {"commit": source}, indent=1) + "\n"
        ham.write(file, lambda f: f.write(text.encode()))  # says: all is there
    gpus.put(gpu)
    print(f"{name}: exit {done.returncode}, {(time.time() - start) / 60:.1f} min", flush=True)
    return done.returncode


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--weights", default="data/deit_tiny_patch16_224.safetensors")
    parser.add_argument("--only", default="", help="runs whose name contains any of these, a,b,c")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the machine")
    parser.add_argument(
        "--shard", type=shard, default="1/1", help="I/N: every N-th run, from the I-th on"
    )
    parser.add_argument(
        "--list", action="store_true", help="print every run's command, run nothing"
    )
    args, source = parser.parse_args(), commit()  # what is committed later is not what ran
    wanted = [x for x in RUNS if any(part in x for part in args.only.split(","))][args.shard]
    files = {name: ROOT / "results" / name / "results.json" for name in wanted}
    done = [
        x for x, file in files.items() if file.is_file() and '"commit"' in file.read_text("utf-8")
    ]
    if args.list:
        if hasattr(signal, "SIGPIPE"):  # quiet where `| head` has enough
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for name in wanted:
            print("done   " if name in done else "missing", command(name))
        return
    wanted = [name for name in wanted if name not in done]
    every, gpus = ",".join(map(str, range(torch.cuda.device_count()))), queue.SimpleQueue()
    every = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    for job in range(args.jobs):
        gpus.put(every[job % len(every)])
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda name: run_one(name, RUNS[name], source, args, gpus), wanted))
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
