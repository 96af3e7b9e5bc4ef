"""The demo's images and its model: nothing to download, nothing to believe.

A class is a shape, a texture and a colour; place, size, angle, shade, background and noise vary from
image to image. A small timm ViT is pre-trained on some of the classes, in nearly grey, the tasks are
made of others, in colour: there is something left to learn, as from ImageNet to other images.
"""

import dataclasses
import functools
import math

import numpy as np
import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PRETRAINED_CFG = timm.models.PretrainedCfg(
    input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", mean=MEAN, std=STD
)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
SHAPES = ["disc", "ring", "cross", "triangle", "square", "hexagon", "trefoil", "star"]
TEXTURES = ["plain", "striped", "checked", "ringed", "dotted"]
COLOURS = ["red", "yellow", "green", "cyan", "blue", "magenta"]
PRETRAIN, CLASSES = 40, 30  # classes to pre-train on, classes of the tasks
TRAIN, TEST = 100, 40  # images per class of the tasks
COLOUR = 0.1  # what is left of it in the images to pre-train on


def class_names(seed):
    """Names of the classes to pre-train on and of those of the tasks, disjoint."""
    names = [f"{c} {t} {s}" for s in SHAPES for t in TEXTURES for c in COLOURS]
    names = np.random.RandomState(seed).permutation(names).tolist()
    return names[:PRETRAIN], names[PRETRAIN : PRETRAIN + CLASSES]


def draw(random, name, n):
    """n images of the class "colour texture shape". -> (n, 3, 32, 32) uint8"""
    colour, texture, shape = name.split()

    def vary(low, high, channels=None):
        return random.uniform(low, high, (n, 1, 1, channels) if channels else (n, 1, 1))

    size, turn = vary(0.4, 0.75), vary(0, 2 * np.pi)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    x, y = (x - vary(-0.3, 0.3)) / size, (y - vary(-0.3, 0.3)) / size
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    mask = np.clip(outline(shape, x, y) * size * 8 + 0.5, 0, 1)[..., None]
    shade = 0.25 + 0.75 * np.clip(pattern(texture, x, y) + 0.5, 0, 1)[..., None]
    hue = 6 * (COLOURS.index(colour) / 6 + vary(-0.06, 0.06, 1))
    rgb = np.clip(abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * vary(0.6, 1, 1)
    slope = vary(-0.3, 0.3, 3) * np.linspace(-1, 1, 32)[:, None]
    image = mask * shade * rgb + (1 - mask) * (vary(0.1, 0.9, 3) + slope)
    image = np.clip(image + random.normal(0, 0.12, image.shape), 0, 1)
    return (image * 255).astype(np.uint8).transpose(0, 3, 1, 2)


def outline(shape, x, y):
    """A function of the plane that is above 0 inside the shape."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    corners = {"triangle": 3, "square": 4, "hexagon": 6}
    if shape in corners:
        wedge = np.pi / corners[shape]
        return np.cos(wedge) / np.cos(angle % (2 * wedge) - wedge) - r
    if shape == "cross":
        near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return np.minimum(0.32 - near, 0.9 - far)
    if shape == "ring":
        return 0.3 - abs(r - 0.65)
    waves = {"disc": 0, "trefoil": 3, "star": 5}[shape]
    return 0.65 + 0.35 * np.cos(waves * angle) - r - (0.15 if waves == 0 else 0)


def pattern(texture, x, y):
    """A function of the plane around 0: where it is positive the texture is bright."""
    if texture == "striped":
        return np.sin(9 * x)
    if texture == "checked":
        return 3 * np.sin(7 * x) * np.sin(7 * y)
    if texture == "ringed":
        return np.sin(13 * np.hypot(x, y))
    if texture == "dotted":
        return np.cos(8 * x) + np.cos(8 * y) - 0.6
    return np.ones_like(x)


def read(seed):
    """Images of the tasks' classes -> pixels (N, 3, 32, 32), labels, is it a test image, names."""
    names, random = class_names(seed)[1], np.random.RandomState(seed)
    pixels = np.concatenate([draw(random, name, TRAIN + TEST) for name in names])
    labels, tests = np.divmod(np.arange(len(pixels)), TRAIN + TEST)
    return torch.from_numpy(pixels), labels, tests >= TRAIN, names


@functools.lru_cache(1)
def pretrained(seed, device, precision, per_class=100, epochs=6, batch_size=64):
    """A ViT of 470,000 parameters, trained on its own classes with AdamW and one cycle.

    images (N, 3, 32, 32) -> features (N, 96)
    """
    names, random = class_names(seed)[0], np.random.RandomState([seed, 1])
    pixels = np.concatenate([draw(random, name, per_class) for name in names])
    pixels = COLOUR * pixels + (1 - COLOUR) * pixels.mean(1, keepdims=True)
    pixels = torch.from_numpy(pixels.astype(np.uint8))
    labels = torch.arange(len(names)).repeat_interleave(per_class).to(device)
    torch.manual_seed(seed)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).to(device)
    for block in vit.blocks:
        block.attn.fused_attn = False  # faster for 17 tokens
    head = torch.nn.Linear(vit.num_features, len(names)).to(device)
    order = torch.cat([torch.randperm(len(pixels)) for _ in range(epochs)])
    batches = order.chunk(epochs * math.ceil(len(pixels) / batch_size))
    optimiser = torch.optim.AdamW([*vit.parameters(), *head.parameters()], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, len(batches))
    kind = torch.device(device).type
    for rows in tqdm(
        batches, f"pre-training on {len(names)} other classes", None, False, disable=None
    ):
        x = (pixels[rows].to(device) / 255 - MEAN[0]) / STD[0]
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            logits = head(vit(x))
        loss = F.cross_entropy(logits.float(), labels[rows.to(device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    vit.made_with = VIT  # for ham.save
    return vit


def compare(run, config):
    """HAM beside one LoRA trained task after task, and no training at all: three calls of ham.run."""
    methods = ("ham", "sequential", "frozen")
    results = [run(dataclasses.replace(config, method=method)) for method in methods]
    columns = ("final_accuracy", "average_incremental_accuracy", "forgetting", "learning_accuracy")
    names = [c.removesuffix("_accuracy").replace("_", " ") for c in columns]
    print(" " * 12 + "".join(f"{name:>21}" for name in names))
    for method, r in zip(methods, results):
        print(f"{method:12}" + "".join(f"{r[c]:21.1f}" for c in columns))
    print("What to see: training on the tasks beats frozen features by far, though nothing is as")
    print("stable as these. HAM and sequential are close here; how far apart real images put them,")
    print("and what each forgets, is in README.md.")
