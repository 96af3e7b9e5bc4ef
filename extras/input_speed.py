"""Input pipeline alone: ham.py's batches against a DataLoader with PIL transforms and two workers.

    python -m extras.input_speed --dataset cub200 --img-size 160 --model deit_tiny_patch16_224.fb_in1k

Takes ham.py's flags. All training images in the same order, with the same crop, flips, size and
dtype on both sides; outputs are compared. Then the share of a training step that a batch takes.
"""

import statistics
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import ham
from extras import datasets


class Files(Dataset):
    """What a data set of image files is elsewhere: opened, decoded and transformed each time."""

    def __init__(self, paths, flips, transform):
        self.paths, self.flips, self.transform = paths, flips, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        x = self.transform(Image.open(self.paths[i]).convert("RGB"))
        return x.flip(2) if self.flips[i] else x


def images_per_second(batches, n, epochs=4):
    """Median over epochs after the first. One number of each batch is used, so that it is made."""
    speeds = []
    for _ in range(epochs):
        start = time.perf_counter()
        sum(x[0, 0, 0, 0].item() for x in batches())
        speeds.append(n / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


def main():
    c = ham.resolve(ham.parse())
    start = time.perf_counter()
    data = ham.load_data(c)
    print(f"data ready in {time.perf_counter() - start:.2f} s")
    source = datasets.SOURCES[c.dataset]
    paths = source.read(Path(c.data_dir) / source.folder, c)[0]
    rows = torch.cat(data.train)[torch.randperm(sum(map(len, data.train)))]
    flips, n, size = torch.rand(len(rows)) < 0.5, len(rows), c.batch_size
    transform = timm.data.create_transform(
        c.img_size,
        crop_pct=c.crop_pct,
        **{k: data.transform[k] for k in ("interpolation", "mean", "std")},
    )
    files = Files([paths[i] for i in rows], flips, transform)
    loader = DataLoader(files, size, num_workers=2)

    def ours():
        for batch, flip in zip(rows.split(size), flips.split(size)):
            yield data.batch(batch, c.device, flip)

    difference = max((a - b).abs().max().item() for a, b in zip(ours(), loader))
    print(f"{n} images at {c.img_size} px; greatest difference between the two: {difference:.2g}")
    speeds = {"DataLoader": images_per_second(lambda: loader, n)}
    speeds["ham.py"] = images_per_second(ours, n)
    for name, speed in speeds.items():
        print(f"{name:12}{speed:10,.0f} images/s")
    print(f"{'ratio':12}{speeds['ham.py'] / speeds['DataLoader']:10.1f}")

    vit = ham.build_vit(c)
    h = ham.HAM(ham.lora_layers(vit, c.layers), c)
    p, x, y = h.start(), next(ours()), torch.arange(size) % 10
    p.head = torch.randn(10, vit.num_features, device=c.device, requires_grad=True)
    optimiser = torch.optim.AdamW([p.head, *(x for ba in p.adapter.values() for x in ba)])
    for _ in range(10):
        start = time.perf_counter()
        ham.train_step(vit, h, p, x, y.to(c.device), optimiser).item()
        step = time.perf_counter() - start
    share = size / speeds["ham.py"] / step
    print(
        f"a training step of {size}: {1000 * step:.0f} ms; its batch: {100 * share:.1f} % of that"
    )


if __name__ == "__main__":
    main()
