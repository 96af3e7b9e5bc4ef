"""The demo: drawings of its own and a small ViT that lies beside this file. Nothing to download.

A class is a shape, a texture and a colour; place, size, angle, shade, background and noise vary from
image to image. The ViT was pre-trained to name shape and texture, never colour, on drawings of other
shapes. The tasks' shapes are new, drawn at dusk, and colour counts: something is left to learn, as
from ImageNet to other images. To ham.py all this is a folder of images and a timm model.

    python -m extras.demo    # how extras/demo_vit/ was made: some minutes of one CPU thread
"""

import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

MODEL = Path(__file__).with_name("demo_vit")
OLD = ["disc", "ring", "triangle", "square", "hexagon", "trefoil", "star", "gear"]
OLD += ["lens", "bar", "bow", "frame"]  # shapes of the pre-training
NEW = ["cross", "pentagon", "clover", "crescent", "heart", "half"]  # shapes of the tasks
TEXTURES = ["plain", "striped", "checked", "ringed", "dotted"]
TEXTURES += ["wavy", "spoked", "halved", "shaded", "netted"]
COLOURS = ["red", "yellow", "green", "cyan", "blue", "magenta"]
CLASSES, TRAIN, TEST = 100, 25, 10  # of the tasks: classes, images per class
DUSK = 0.5  # what is left of the light in the tasks' images
# Of A and B: the best of a grid, on other draws (extras/measure_demo.py, results/README.md).
RATES = {"ham": 1.2e-2, "sequential": 1.5e-3, "average": 2.4e-2, "joint": 2.4e-2}


def outline(shape, x, y):
    """A function of the plane that is above 0 inside the shape."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    corners = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
    waves = {"trefoil": 3, "clover": 4, "star": 5, "gear": 8}
    if shape in corners:
        wedge = np.pi / corners[shape]
        return np.cos(wedge) / np.cos(angle % (2 * wedge) - wedge) - r
    if shape in waves:
        return 0.65 + 0.35 * np.cos(waves[shape] * angle) - r
    return {
        "disc": 0.85 - r,
        "ring": 0.27 - abs(r - 0.63),
        "lens": 0.95 - np.hypot(x, 2.2 * y),
        "bar": np.minimum(0.35 - abs(x), 0.95 - abs(y)),
        "bow": np.minimum(0.9 - abs(x), 0.8 * abs(x) + 0.08 - abs(y)),
        "frame": 0.22 - abs(far - 0.6),
        "cross": np.minimum(0.32 - near, 0.9 - far),
        "crescent": np.minimum(0.9 - r, np.hypot(x - 0.5, y) - 0.6),
        "heart": 0.6 - 0.4 * np.sin(angle) - r,
        "half": np.minimum(0.95 - r, y + 0.15),
    }[shape]


def pattern(texture, x, y):
    """A function of the plane around 0: where it is positive the texture is bright."""
    return {
        "plain": np.ones_like(x),
        "striped": np.sin(9 * x),
        "checked": 3 * np.sin(7 * x) * np.sin(7 * y),
        "ringed": np.sin(13 * np.hypot(x, y)),
        "dotted": np.cos(8 * x) + np.cos(8 * y) - 0.6,
        "wavy": np.sin(9 * x + 2 * np.sin(5 * y)),
        "spoked": 2 * np.sin(6 * np.arctan2(y, x)),
        "halved": 4 * x,
        "shaded": 0.8 * x,
        "netted": 0.9 - 2 * np.maximum(np.cos(8 * x), np.cos(8 * y)),
    }[texture]


def draw(random, name, n):
    """n images of the class "colour texture shape". -> (n, 32, 32, 3) uint8"""
    colour, texture, shape = name.split()

    def vary(low, high, *channels):
        return random.uniform(low, high, (n, 1, 1, *channels))

    size, turn = vary(0.55, 0.85), vary(-0.3, 0.3)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    x, y = (x - vary(-0.2, 0.2)) / size, (y - vary(-0.2, 0.2)) / size
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    mask = np.clip(outline(shape, x, y) * size * 8 + 0.5, 0, 1)[..., None]
    shade = 0.25 + 0.75 * np.clip(pattern(texture, x, y) + 0.5, 0, 1)[..., None]
    hue = 6 * (COLOURS.index(colour) / 6 + vary(-0.06, 0.06, 1))
    rgb = np.clip(abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * vary(0.6, 1, 1)
    slope = vary(-0.3, 0.3, 3) * np.linspace(-1, 1, 32)[:, None]
    image = mask * shade * rgb + (1 - mask) * (vary(0.1, 0.9, 3) + slope)
    image = np.clip(image + random.normal(0, 0.07, image.shape), 0, 1)
    return (image * 255).astype(np.uint8)


def drawings(folder, seed):
    """Draw the tasks' classes, 100 of 360, into a folder {train,test}/CLASS/*.png."""
    part, random = folder.with_suffix(f".{os.getpid()}"), np.random.default_rng(seed)
    names = [" ".join(x) for x in itertools.product(COLOURS, TEXTURES, NEW)]
    for name in tqdm(random.permutation(names)[:CLASSES], "drawing", leave=False, disable=None):
        for i, image in enumerate((DUSK * draw(random, name, TRAIN + TEST)).astype(np.uint8)):
            file = part / ("train" if i < TRAIN else "test") / name / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    with contextlib.suppress(OSError):  # another process was faster
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)


def made(config):
    """A configuration of the demo -> that of a folder of drawings and of the model beside this."""
    folder = Path(config.data_dir) / f"seed{config.seed}" / "demo"
    if not folder.is_dir():
        drawings(folder, config.seed)
    lr = config.lr or RATES.get(config.method)
    changes = {"dataset": str(folder), "model": f"local-dir:{MODEL}", "weights": None, "lr": lr}
    return dataclasses.replace(config, **changes)


def main(run, config):
    """HAM beside one LoRA trained on and on and no training at all, or another method. run: ham.run"""
    torch.set_num_threads(1)  # as fast for so small a model; more crawl where others run, too
    three = config.method == "ham" and not hasattr(config, "gain")  # extras run what they are given
    methods = ["frozen", "sequential", "ham"] if three else [config.method]
    results = {m: run(made(dataclasses.replace(config, method=m))) for m in methods}
    columns = "final_accuracy", "forgetting", "learning_accuracy"
    print(f"{'per cent':12}" + "".join(f"{c.split('_')[0]:>12}" for c in columns))
    for method, r in results.items():
        print(f"{method:12}" + "".join(f"{r[c]:12.1f}" for c in columns))
    if len(results) > 1:
        ham, other = results["ham"], results["sequential"]
        print(f"{'chance':12}{100 / len(ham['classes']):12.1f}\n")
        blocks = "▁▂▃▄▅▆▇█" if "utf" in (sys.stdout.encoding or "").lower() else ".:-=+*#@"
        for name, r in (("ham", ham), ("sequential", other)):
            bars = "".join(blocks[min(7, int(t["accuracy"] / 12.5))] for t in r["tasks"])
            print(f"accuracy after each task  {name:12} {bars}")
        gap, lost = (ham[c] - other[c] for c in columns[:2])
        print(f"HAM - sequential: final accuracy {gap:+.1f} points, forgetting {lost:+.1f}.")


def pretrain(per_class=80, epochs=6, batch_size=64):
    """Make extras/demo_vit/: AdamW, one cycle, flips; a linear head for shapes, one for textures."""
    random, pixels, labels = np.random.default_rng(1), [], []
    for shape, texture, colour in itertools.product(OLD, TEXTURES, COLOURS):
        pixels.append(draw(random, f"{colour} {texture} {shape}", per_class))
        labels += [(OLD.index(shape), TEXTURES.index(texture))] * per_class
    pixels = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2)
    labels, sizes = torch.tensor(labels), (len(OLD), len(TEXTURES))
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=sum(sizes), **shape)
    for block in vit.blocks:
        block.attn.fused_attn = False  # faster for 17 tokens
    optimiser = torch.optim.AdamW(vit.parameters(), weight_decay=0.05)
    steps = epochs * math.ceil(len(pixels) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    for epoch in range(epochs):
        order = torch.randperm(len(pixels)).split(batch_size)
        for rows in tqdm(order, f"epoch {epoch + 1}/{epochs}"):
            x = (pixels[rows] / 255 - 0.5) / 0.25
            logits = vit(x.flip(3) if torch.rand(()) < 0.5 else x).split(sizes, 1)
            loss = sum(F.cross_entropy(z, y) for z, y in zip(logits, labels[rows].T))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    how = {"tag": "demo", "input_size": (3, 32, 32), "crop_pct": 1.0}
    vit.pretrained_cfg = vit.pretrained_cfg | how | {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    timm.models.save_for_hf(vit.half(), MODEL, {}, shape, safe_serialization=True)  # 16 bits


if __name__ == "__main__":
    pretrain()
