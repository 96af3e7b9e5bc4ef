"""Data sets: where they come from, how they lie on disk, one uint8 array of all their images.

`read` is all that ham.py calls. A reader turns one official layout into (images, training labels,
test labels, class names), training images first; images are files, or pixels where they are small.
What the user can mend raises OSError with the cure.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import timm
import torch
from filelock import FileLock  # comes with torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

IMAGENET_R_TEST = Path(__file__).with_name("imagenet_r_test.txt")  # CODA-Prompt's, mammoth's


# --------------------------------------------------------------------------------- Official layouts


def read_cifar100(root, c):
    """train and test, pickles of 32 px images; torchvision checks them against their checksums."""
    try:
        parts = [CIFAR100(root.parent, train) for train in (True, False)]
    except RuntimeError:
        raise OSError("its files are missing or have other checksums") from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    return pixels.contiguous(), parts[0].targets, parts[1].targets, parts[0].classes


def read_cub200(root, c):
    """images/ and tables that give each image a number, a class and a side of the split."""

    def column(file):
        return dict(line.split()[:2] for line in (root / file).read_text().splitlines())

    path, label, names = map(column, ("images.txt", "image_class_labels.txt", "classes.txt"))
    train = column("train_test_split.txt")
    if not path.keys() == label.keys() == train.keys():
        raise OSError("images.txt, image_class_labels.txt and train_test_split.txt do not agree")
    number = {name: i for i, name in enumerate(names)}
    order = sorted(path, key=train.get, reverse=True)  # training images first, else as listed
    labels, n = [number[label[i]] for i in order], list(train.values()).count("1")
    paths = [root / "images" / path[i] for i in order]
    return paths, labels[:n], labels[n:], list(names.values())


def read_tiny_imagenet(root, c):
    """train/WNID/images/*; the validation images, which are the test images, lie in one folder."""
    train = ImageFolder(root / "train")
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    test = [line.split("\t")[:2] for line in lines]
    paths = [path for path, _ in train.samples]
    paths += [root / "val" / "images" / name for name, _ in test]
    return paths, train.targets, [train.class_to_idx[wnid] for _, wnid in test], train.classes


def read_listed(root, c):
    """CLASS/*, and a list of the test images; the others are training images."""
    file = split_file(c)
    listed, every = set(file.read_text("utf-8").split("\n")) - {""}, ImageFolder(root)
    relative = [Path(path).relative_to(root).as_posix() for path, _ in every.samples]
    if missing := sorted(listed - set(relative)):
        raise OSError(f"{len(missing):,} files of {file.name} are not there: {some(missing)}")
    # Sorting is stable: within each side, classes and files stay in order.
    order = sorted(range(len(relative)), key=lambda i: relative[i] in listed)
    paths, labels = zip(*(every.samples[i] for i in order))
    n = len(relative) - len(listed)
    return paths, labels[:n], labels[n:], every.classes


def split_file(c):
    """The list of test images in use; None where the data set says itself which they are."""
    file = c.split_file or (IMAGENET_R_TEST if c.dataset == "imagenet_r" else None)
    return file and Path(file)


def read_folder(root, c):
    """{train,test}/CLASS/*, classes in sorted order; with --split-file CLASS/*."""
    if c.split_file:
        return read_listed(root, c)
    parts = [root / part for part in ("train", "test")]
    if not all(part.is_dir() for part in parts):
        known = ", ".join(SOURCES)
        raise OSError(f"give demo, {known} or a folder with train/CLASS/* and test/CLASS/*")
    train, test = map(ImageFolder, parts)
    if other := sorted(set(train.classes) ^ set(test.classes)):
        raise OSError(f"{len(other)} classes in train or test only: {some(other)}")
    paths = [path for path, _ in train.samples + test.samples]
    return paths, train.targets, test.targets, train.classes


def some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------ Download, verify, unpack


class Source(NamedTuple):
    """Where a data set comes from, and how it is read."""

    url: str
    bytes: int
    md5: str
    folder: str  # in the archive, and below --data-dir
    images: int  # training and test images
    read: Callable


SOURCES = {
    "cifar100": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        bytes=169_001_437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        images=60_000,
        read=read_cifar100,
    ),
    "imagenet_r": Source(
        url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        bytes=2_191_079_936,
        md5="a61312130a589d0ca1a8fca1f2bd3337",
        folder="imagenet-r",
        images=30_000,
        read=read_listed,
    ),
    "cub200": Source(
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        bytes=1_150_585_339,
        md5="97eceeb196236b17998738112f37df78",
        folder="CUB_200_2011",
        images=11_788,
        read=read_cub200,
    ),
    "tiny_imagenet": Source(
        url="https://cs231n.stanford.edu/tiny-imagenet-200.zip",
        bytes=248_100_043,
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        folder="tiny-imagenet-200",
        images=110_000,
        read=read_tiny_imagenet,
    ),
}


def fetch(source, data_dir):
    """The data set's folder, unpacked from its archive, which is downloaded where it is not there."""
    root, archive = data_dir / source.folder, data_dir / source.url.split("/")[-1]
    if root.is_dir():
        return root
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{source.folder}.lock"):  # two runs may start at the same time
        if not root.is_dir():
            if not archive.is_file():
                download(source, archive)
            elif wrong := differs(source, archive):
                raise OSError(f"{archive} {wrong}; move it away, the right one is {facts(source)}")
            unpack(archive, root)
    return root


def facts(source):
    return f"{source.url} ({source.bytes:,} bytes, md5 {source.md5})"


def differs(source, file):
    """What is wrong with an archive; "" if nothing is."""
    size = file.stat().st_size
    if size != source.bytes:
        with file.open("rb") as start:
            page = start.read(1) == b"<"
        return f"has {size:,} bytes instead of {source.bytes:,}" + " (a web page?)" * page
    md5 = calculate_md5(file)
    return f"has md5 {md5} instead of {source.md5}" if md5 != source.md5 else ""


def download(source, archive):
    """To a .part file, which a second attempt goes on with; whole and verified, it gets its name."""
    part = archive.with_name(archive.name + ".part")
    cure = f"; or put it into {archive.parent} by hand: {facts(source)}"
    try:
        receive(source, part)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"download: {error or type(error).__name__}; run again{cure}") from None
    if part.stat().st_size < source.bytes:
        got = f"{part.stat().st_size:,} of {source.bytes:,} bytes"
        raise OSError(f"download: broken off after {got}; run again to go on{cure}")
    if wrong := differs(source, part):
        part.unlink()
        raise OSError(f"download: what came {wrong}; run again{cure}")
    part.rename(archive)


def receive(source, part):
    """Append to a file what it lacks. A server that cannot go on in the middle sends it all again."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= source.bytes:
        return
    request = Request(source.url, headers={"User-Agent": "ham", "Range": f"bytes={have}-"})
    with urlopen(request, timeout=60) as answer:
        have = have if answer.status == 206 else 0
        total = have + int(answer.headers["Content-Length"] or 0)
        if total != source.bytes:
            kind = answer.headers.get_content_type()
            raise OSError(f"the server has {total:,} bytes ({kind}) instead of {source.bytes:,}")
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(
                desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while block := answer.read(2**20):
                bar.update(file.write(block))


def unpack(archive, root):
    """To a temporary folder, renamed when whole; no member can leave it."""
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for name in tqdm(file.namelist(), f"unpacking {archive.name}", disable=None):
                    if not (part / name).resolve().is_relative_to(part.resolve()):
                        raise OSError(f"member {name} would leave the folder")
                    file.extract(name, part)
        else:
            with tarfile.open(archive) as file:
                members = tqdm(file, f"unpacking {archive.name}", disable=None)
                file.extractall(part, members, filter="data")
        (part / root.name).rename(root)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise OSError(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------- Read, decode


def read(c, cfg):
    """-> pixels (N, 3, S, S) uint8, training images first; their labels; test labels; class names.

    c: resolved Config; cfg: timm's of the model. S is 32 for CIFAR, 64 for Tiny-ImageNet, which
    ham.py resizes batch by batch; image files are decoded once, to the size that the model takes.
    """
    source, root = SOURCES.get(c.dataset), Path(c.dataset)
    if source:
        root = fetch(source, Path(c.data_dir))
    try:
        images, *labels = source.read(root, c) if source else read_folder(root, c)
        if source and len(images) != source.images:
            raise OSError(f"{len(images):,} images instead of {source.images:,}")
        if torch.is_tensor(images):
            return images, *labels
        if missing := [str(path) for path in images if not os.path.isfile(path)]:
            raise OSError(f"{len(missing):,} images are not there: {some(missing)}")
    except (OSError, ValueError, KeyError) as error:
        text = f"no class {error}" if isinstance(error, KeyError) else error
        cure = f"; move it away, and the next run unpacks {facts(source)}" if source else ""
        raise OSError(f"{root}: {text}{cure}") from None
    tiny = c.dataset == "tiny_imagenet"
    how = {"input_size": (3, *[64 if tiny else c.img_size] * 2), "crop_pct": c.crop_pct}
    how |= {"interpolation": cfg["interpolation"]} | ({"crop_pct": 1.0} if tiny else {})
    return decode(images, root, how, Path(c.data_dir) / "cache"), *labels


def decode(paths, root, how, folder):
    """Image files -> (N, 3, S, S) uint8, resized and cropped by timm's own test transform.

    how: the transform's arguments. Written once to folder and memory-mapped, so that it may exceed
    memory; the name is a hash of all that went into it.
    """
    source = [[str(path)[len(str(root)) :], os.path.getsize(path)] for path in paths]
    key = hashlib.sha256(json.dumps([how, source]).encode()).hexdigest()[:12]
    cache = folder / f"{root.name}-{how['input_size'][-1]}px-{key}.npy"
    if not cache.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{cache.name}.lock"):
            if not cache.is_file():
                write_cache(paths, how, cache)
    return torch.from_numpy(np.load(cache, mmap_mode="c"))


def write_cache(paths, how, cache):
    """Decode on all processors; the file gets its name when it is whole."""
    resize, crop = timm.data.create_transform(**how).transforms[:2]
    part = cache.with_suffix(".part")
    pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(paths), *how["input_size"]))

    def decode_one(i):
        try:
            image = ImageOps.exif_transpose(Image.open(paths[i])).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
            raise OSError(f"{paths[i]} is not a readable image ({error})") from None
        pixels[i] = np.asarray(crop(resize(image))).transpose(2, 0, 1)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            work = pool.map(decode_one, range(len(paths)))
            for _ in tqdm(work, f"decoding {cache.name}", len(paths), disable=None):
                pass
        pixels.flush()
        part.rename(cache)
    finally:
        part.unlink(missing_ok=True)
