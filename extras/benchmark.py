"""How fast a training step and a test image are, beside what limits them: results/benchmark-*.md.

    python -m extras.benchmark                # DeiT-Tiny at 160 px; ten minutes of a CPU
    python -m extras.benchmark --model vit_base_patch16_224 --img-size 224 --device cuda

*bare* is the frozen ViT: forward and the gradient by its input, through all blocks. Nothing that
trains LoRA in all blocks can be faster. PEFT's LoRA trains the same factors; rows with PEFT need
`peft`. Weights and images are random: neither changes the time. Every round times all variants once,
one after the other, so that a machine that slows down slows all; medians over the rounds.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_leaves

import ham

RESULTS = Path(__file__).parent.parent / "results"


class Bench:
    """A model, images and labels; each method makes what is timed, a function without arguments."""

    def __init__(self, args):
        model = {"model": args.model, "img_size": args.img_size, "device": args.device}
        self.config = ham.resolve(ham.Config(**model, precision=args.precision, lr=1e-3))
        self.x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
        self.x = self.x.to(self.config.device)
        self.classes = min(10, args.batch_size)
        self.y = torch.arange(args.batch_size, device=self.config.device) % self.classes

    def vit(self, fused=False):
        """As ham.build_vit, with random weights. fused: timm's default on a CPU"""
        vit = timm.create_model(self.config.model, img_size=self.config.img_size, num_classes=0)
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn &= fused or "cuda" in self.config.device
        vit.pretrained_cfg = vit.pretrained_cfg | {"input_size": self.x.shape[1:]}
        return vit.requires_grad_(False).eval().to(self.config.device)

    def autocast(self):
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=bf16)

    def bare(self):
        vit, x = self.vit(), self.x.clone().requires_grad_()

        def step():
            ham.forward(vit, {}, x, self.config).sum().backward()

        return step

    def method(self, vit, groups, rank=8):
        """HAM with so many groups of random adapters."""
        method = ham.HAM(ham.lora_layers(vit, "qkv"), dataclasses.replace(self.config, rank=rank))
        for task in range(groups):
            adapter = ham.new_adapter(method.w0, rank, seed=task)
            adapter = {n: (torch.randn_like(b) / 100, a) for n, (b, a) in adapter.items()}
            method.groups.append(ham.Group(adapter, members=[task]))
        return method

    def ours(self, groups):
        vit = self.vit()
        method = self.method(vit, groups)
        return self.step_of(vit, method)

    def step_of(self, vit, method):
        """What ham.train_task does in a step."""
        trained, features = method.start(), torch.randn(len(self.x), vit.num_features)
        features = features.to(self.x.device)
        optimiser, _ = trained.begin(features, self.y, range(self.classes), self.config, 10**6)

        def step():
            features = ham.forward(vit, trained.weights(method.w0), self.x, self.config)
            optimiser.zero_grad()
            ham.task_loss(trained, features, self.y).backward()
            optimiser.step()

        return step

    def peft_model(self, adapters, fused):
        """PEFT's LoRA on qkv; all adapters are active, the last one is trained."""
        import peft

        lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
        model = peft.get_peft_model(self.vit(fused), lora, adapter_name="0")
        for k in range(1, adapters):
            model.add_adapter(str(k), lora)
        model.base_model.set_adapter([str(k) for k in range(adapters)])
        last = str(adapters - 1)
        for name, x in model.named_parameters():
            x.requires_grad_("lora_" in name and name.endswith(f".{last}.weight"))
        return model

    def peft(self, adapters=1, fused=False, bf16=True):
        model = self.peft_model(adapters, fused)
        head = torch.randn(self.classes, model.base_model.model.num_features, device=self.x.device)
        moved = [x for x in model.parameters() if x.requires_grad] + [head.requires_grad_()]
        optimiser = torch.optim.AdamW(moved, lr=1e-3, weight_decay=0.0)
        precision = self.autocast if bf16 else torch.enable_grad

        def step():
            with precision():
                features = model(self.x).float()
            optimiser.zero_grad()
            F.cross_entropy(16 * ham.cosine_logits(features, head), self.y).backward()
            optimiser.step()

        return step

    def test_ours(self, groups):
        vit = self.vit()
        weights = self.method(vit, groups).folded()
        return torch.no_grad()(lambda: ham.forward(vit, weights, self.x, self.config))

    def test_peft(self, adapters):
        model = self.peft_model(adapters, fused=False)

        @torch.no_grad()
        def forward():
            with self.autocast():
                return model(self.x)

        return forward


def medians(variants, rounds):
    """Seconds of each variant. dict name: function -> dict name: float"""
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):  # the first is not counted
        for name, run in variants.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(x[1:]) for name, x in seconds.items()}


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def per_second(variants, args):
    """-> table: images/s of each variant, and in per cent of the first"""
    seconds = medians(variants, args.rounds)
    first = next(iter(seconds.values()))
    rows = [(k, args.batch_size / s, f"{100 * first / s:.0f} %") for k, s in seconds.items()]
    return pd.DataFrame(rows, columns=["", "images/s", "of the first"])


def steps(bench, args):
    variants = {"bare": bench.bare()}
    variants |= {f"HAM, {m} groups": bench.ours(m) for m in (0, 1, 5, 10)}
    if args.peft:
        variants["PEFT, timm's defaults (fp32)"] = bench.peft(fused=True, bf16=False)
        variants[f"PEFT, {bench.config.precision}, unfused"] = bench.peft()
    return per_second(variants, args)


def task(bench, args):
    """ham.train_task and ham.extract as they are, on 32 px images, with five groups."""
    config, vit, n = dataclasses.replace(bench.config, epochs=1, tasks=1), bench.vit(), args.rounds
    pixels = torch.randint(256, (n * args.batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = (torch.arange(len(pixels)) * bench.classes) // len(pixels)
    both, cfg = ("train", "test"), timm.data.resolve_model_data_config(vit)
    own = [range(bench.classes)]
    data = ham.Data(
        dict.fromkeys(both, pixels), dict.fromkeys(both, labels), [], own, cfg, config.device
    )
    method = bench.method(vit, 5)
    method.config, weights = config, method.folded()
    if "cuda" in config.device:
        torch.cuda.reset_peak_memory_stats(config.device)
    train, test = (
        medians({"": run}, 1)[""]
        for run in (
            lambda: ham.train_task(vit, method, data, 0),
            lambda: ham.extract(vit, weights, data, "test", own[0], config),
        )
    )
    row = {"training images/s": len(pixels) / (train - test), "test images/s": len(pixels) / test}
    if "cuda" in config.device:
        row["peak MiB"] = torch.cuda.max_memory_allocated(config.device) / 2**20
    return pd.DataFrame([row])


def adapters(bench, args):
    """HAM's groups beside an adapter for each of T tasks, all active."""
    train, test = {"HAM, 5 groups": bench.ours(5)}, {"HAM, 5 groups": bench.test_ours(5)}
    for tasks in (1, 5, 10, 20, 50) if args.peft else ():
        train[f"PEFT, {tasks} adapters"] = bench.peft(tasks)
        test[f"PEFT, {tasks} adapters"] = bench.test_peft(tasks)
    both = per_second(train, args), per_second(test, args)
    return both[0].merge(both[1], on="", suffixes=(", training", ", test"))


def sequence(bench, args):
    """A hundred tasks; only the tasks of the table take steps, the others have random adapters."""
    rows, vit = [], bench.vit()
    method = bench.method(vit, 0)
    for task in range(100):
        shown = task + 1 in (2, 10, 50, 100)
        step = bench.step_of(vit, method) if shown else None
        seconds = medians({"": step}, args.rounds)[""] if shown else 0.0
        trained = method.start()
        for b, _ in trained.adapter.values():
            torch.nn.init.normal_(b, std=0.01)
        begin = clock()
        method.finish(task, trained)
        merge = clock() - begin
        if shown:
            stored = sum(x.numel() for x in tree_leaves(method.state()) if torch.is_tensor(x))
            one = sum(x.numel() for ba in trained.adapter.values() for x in ba)
            rows.append((task + 1, seconds, merge, f"{stored / 1e3:,.0f} k", stored / one))
    columns = ["task", "s per step", "s to group, prune, merge", "stored", "in adapters"]
    return pd.DataFrame(rows, columns=columns)


def loops(bench, args, folder):
    """One epoch on image files: the usual loop, and ham.py with its decoding."""
    side, random = bench.config.img_size, np.random.default_rng(0)
    for part, label in ((part, label) for part in ("train", "test") for label in range(4)):
        (folder / part / str(label)).mkdir(parents=True)
        for i in range(64 if part == "train" else 1):
            image = Image.fromarray(random.integers(0, 256, (side, side * 5 // 4, 3), np.uint8))
            image.save(folder / part / str(label) / f"{i}.jpg", quality=90)
    config = dataclasses.replace(bench.config, dataset=str(folder), tasks=1, epochs=args.epochs)
    vit = bench.vit()

    def ours():
        data = ham.load_data(config, vit)
        ham.train_task(vit, ham.HAM(ham.lora_layers(vit, "qkv"), config), data, 0)

    def usual():
        cfg = timm.data.resolve_model_data_config(vit)
        transform = timm.data.create_transform(**cfg, is_training=True)
        images = timm.data.create_dataset("", root=folder / "train", transform=transform)
        loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True)
        step, own = bench.peft(), (bench.x, bench.y)
        for _ in range(args.epochs):
            for batch in loader:
                bench.x, bench.y = (x.to(bench.config.device) for x in batch)
                step()
        bench.x, bench.y = own

    seconds = medians({"ham.py": ours} | ({"PEFT and DataLoader": usual} if args.peft else {}), 2)
    images = 256 * args.epochs
    rows = [(name, images / s) for name, s in seconds.items()]
    return pd.DataFrame(rows, columns=["", f"images/s, {args.epochs} epochs"])


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="deit_tiny_patch16_224.fb_in1k")
    parser.add_argument("--img-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5, help="of the loop over image files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--precision")
    args = parser.parse_args()
    args.peft = importlib.util.find_spec("peft") is not None
    return args


def main():
    args = arguments()
    bench = Bench(args)
    config, name = bench.config, f"benchmark-{args.model.split('.')[0]}-{args.img_size}px"
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "A training step": steps(bench, args),
            "A task of ham.py": task(bench, args),
            "Groups beside an adapter per task": adapters(bench, args),
            "A sequence of 100 tasks": sequence(bench, args),
            "Image files": loops(bench, args, Path(folder) / "images"),
        }
    data = ham.Data({}, {}, [], [], {"input_size": bench.x.shape[1:]}, config.device)
    about = ham.about(bench.vit(), config, data)
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    if args.peft:
        versions += f", peft {importlib.metadata.version('peft')}"
    told = f"{args.model}, {args.img_size} px, batch {args.batch_size}, {config.precision}; "
    told += f"{about['hardware']}; {versions}."
    text = f"# How fast\n\n`python -m extras.benchmark`: medians of {args.rounds} rounds. {told}\n"
    for title, table in tables.items():
        text += f"\n## {title}\n\n{table.to_markdown(index=False, floatfmt='.3g')}\n"
    file = RESULTS / f"{name}-{config.device.split(':')[0]}-{config.precision}.md"
    file.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
