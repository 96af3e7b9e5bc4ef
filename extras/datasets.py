"""Data sets that are image files: where they lie, and one uint8 array of all their images.

Each reader returns (pixels (N, 3, S, S) uint8, training images first; training labels; test labels;
class names) and raises OSError with the cure where something is missing.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from tqdm import tqdm


def read_cub200(c, cfg):
    """CUB-200-2011 as its authors pack it, with their split (train_test_split.txt)."""
    root = Path(c.data_dir) / "CUB_200_2011"
    if not (root / "train_test_split.txt").is_file():
        address = "https://data.caltech.edu/records/65de6-vp158"
        raise OSError(f"no {root}; unpack CUB_200_2011.tgz from {address} in {c.data_dir}")

    def column(file):
        return np.array([line.split()[1] for line in (root / file).read_text().splitlines()])

    labels = column("image_class_labels.txt").astype(int) - 1
    train = column("train_test_split.txt") == "1"
    paths = column("images.txt")
    paths = [root / "images" / path for path in [*paths[train], *paths[~train]]]
    return decode(paths, c, cfg), labels[train], labels[~train], column("classes.txt").tolist()


def read_folder(c, cfg):
    """FOLDER/{train,test}/CLASS/*, classes in sorted order."""
    parts = [Path(c.dataset) / part for part in ("train", "test")]
    if not all(part.is_dir() for part in parts):
        raise OSError("give demo, cifar100, cub200 or a folder with train/CLASS/* and test/CLASS/*")
    train, test = (ImageFolder(part) for part in parts)
    other = set(train.classes) ^ set(test.classes)
    if other:
        raise OSError(f"classes in train or test only: {', '.join(sorted(other))}")
    paths = [Path(path) for path, _ in train.samples + test.samples]
    return decode(paths, c, cfg), train.targets, test.targets, train.classes


def decode(paths, c, cfg):
    """Image files -> (N, 3, S, S) uint8, resized and cropped by timm's own transform for size S.

    Written once to --data-dir/cache and memory-mapped; the name is a hash of all that went into it.
    """
    size, how = (3, c.img_size, c.img_size), {"crop_pct": c.crop_pct}
    how |= {"input_size": size, "interpolation": cfg["interpolation"]}
    resize, crop = timm.data.create_transform(**how).transforms[:2]
    source = json.dumps([how, [(str(path), path.stat().st_size) for path in paths]])
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    cache = Path(c.data_dir) / "cache" / f"{Path(c.dataset).name}-{c.img_size}px-{key}.npy"
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(paths), *size))

        def decode_one(i):
            try:
                image = ImageOps.exif_transpose(Image.open(paths[i])).convert("RGB")
            except OSError as error:
                raise OSError(f"{paths[i]} is not a readable image ({error})") from None
            pixels[i] = np.asarray(crop(resize(image))).transpose(2, 0, 1)

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                work = pool.map(decode_one, range(len(paths)))
                for _ in tqdm(work, "decoding images", len(paths), disable=None):
                    pass
            pixels.flush()
            part.rename(cache)
        finally:
            part.unlink(missing_ok=True)
    return torch.from_numpy(np.load(cache, mmap_mode="c"))
