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
import warnings
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

VERSION = 1  # of what is decoded and how; another one makes new caches
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
    file, every = split_file(c), ImageFolder(root)
    listed = set(file.read_text("utf-8-sig").split("\n")) - {""}
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
        raise OSError("has no folders train/CLASS and test/CLASS")
    train, test = map(ImageFolder, parts)
    if other := sorted(set(train.classes) ^ set(test.classes)):
        raise OSError(f"{len(other)} classes in train or test only: {some(other)}")
    paths = [path for path, _ in train.samples + test.samples]
    return paths, train.targets, test.targets, train.classes


def say(text):
    print(text, flush=True)


def some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------ Download, verify, unpack


class Source(NamedTuple):
    """Where a data set comes from, and how it is read."""

    url: str
    bytes: int
    md5: str
    folder: str  # in the archive, and below --data-dir
    images: tuple  # training, test
    read: Callable


SOURCES = {
    "cifar100": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        bytes=169_001_437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        images=(50_000, 10_000),
        read=read_cifar100,
    ),
    "imagenet_r": Source(
        url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        bytes=2_191_079_936,
        md5="a61312130a589d0ca1a8fca1f2bd3337",
        folder="imagenet-r",
        images=(24_000, 6_000),
        read=read_listed,
    ),
    "cub200": Source(
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        bytes=1_150_585_339,
        md5="97eceeb196236b17998738112f37df78",
        folder="CUB_200_2011",
        images=(5_994, 5_794),
        read=read_cub200,
    ),
    "tiny_imagenet": Source(
        url="https://cs231n.stanford.edu/tiny-imagenet-200.zip",
        bytes=248_100_043,
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        folder="tiny-imagenet-200",
        images=(100_000, 10_000),
        read=read_tiny_imagenet,
    ),
}


def fetch(source, archive, root):
    """Make the data set's folder from its archive, which is downloaded where it is not there."""
    if root.is_dir():
        return
    if os.path.lexists(root):
        raise OSError(f"{root} is not a folder")
    if not hasattr(tarfile, "data_filter"):
        raise OSError("safe unpacking needs Python 3.10.12, 3.11.4, 3.12 or later")
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):  # two runs may start at the same time
        if not root.is_dir():
            if not archive.is_file():
                download(source, archive)
            elif wrong := differs(source, archive):
                raise OSError(f"{archive} {wrong}")
            unpack(archive, root)


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
    say(f"downloading {source.url}, {source.bytes:,} bytes, to {part}")
    try:
        receive(source, part)
    except (OSError, HTTPException, ValueError) as error:
        if getattr(error, "code", None) == 416:  # the part is longer than what is there
            part.unlink()
        raise OSError(f"download: {str(error) or type(error).__name__}; run again") from None
    if part.stat().st_size < source.bytes:
        got = f"{part.stat().st_size:,} of {source.bytes:,} bytes"
        raise OSError(f"download: broken off after {got}; run again to go on")
    if wrong := differs(source, part):
        part.unlink()
        raise OSError(f"download: what came {wrong}; run again")
    part.rename(archive)


def receive(source, part):
    """Append to a file what it lacks. A server that cannot go on in the middle sends it all again."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= source.bytes:
        return
    request = Request(source.url, headers={"User-Agent": "ham", "Range": f"bytes={have}-"})
    with urlopen(request, timeout=60) as answer:
        have = have if answer.status == 206 else 0
        total = have + int(answer.headers["Content-Length"] or source.bytes - have)
        if total != source.bytes:
            kind = answer.headers.get_content_type()
            raise OSError(f"the server has {total:,} bytes ({kind}) instead of {source.bytes:,}")
        bar = {"total": total, "initial": have, "desc": part.stem, "disable": None}
        with (
            part.open("ab" if have else "wb") as file,
            tqdm.wrapattr(answer, "read", **bar) as body,
        ):
            shutil.copyfileobj(body, file, 2**20)


def unpack(archive, root):
    """To a temporary folder, renamed when whole; no member can leave it."""
    say(f"unpacking {archive}")
    folder = root.with_name(root.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for name in file.namelist():
                    if not (folder / name).resolve().is_relative_to(folder.resolve()):
                        raise OSError(f"member {name} would leave the folder")
                file.extractall(folder, tqdm(file.namelist(), archive.name, disable=None))
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, tqdm(file, archive.name, disable=None), filter="data")
        (folder / root.name).rename(root)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise OSError(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------- Read, decode


def read(c, cfg):
    """-> pixels (N, 3, S, S) uint8, training images first; their labels; test labels; class names.

    c: resolved Config; cfg: timm's of the model. S is 32 for CIFAR, 64 for Tiny-ImageNet, which
    ham.py resizes batch by batch; image files are decoded once, to the size that the model takes.
    """
    source, root, data_dir = SOURCES.get(c.dataset), Path(c.dataset), Path(c.data_dir)
    side, crop_pct = (64, 1.0) if c.dataset == "tiny_imagenet" else (c.img_size, c.crop_pct)
    how = {"input_size": (3, side, side), "crop_pct": crop_pct}
    how |= {"interpolation": cfg["interpolation"]}
    cure = ""
    if source:
        root, archive = data_dir / source.folder, data_dir / source.url.split("/")[-1]
        cure = f"; {root} comes from {source.url} ({source.bytes:,} bytes, md5 {source.md5}): move "
        cure += f"away what is wrong, or put {archive.name} into {data_dir} by hand"
    if c.split_file:
        cure = f"; check --split-file {c.split_file}"
    try:
        if source:
            fetch(source, archive, root)
        images, *labels = source.read(root, c) if source else read_folder(root, c)
        found = [len(labels[0]), len(labels[1])]
        wanted = [*source.images] if source else found
        if sum(found) != sum(wanted) or (found != wanted and not c.split_file):
            raise OSError(f"{found} training and test images instead of {wanted}")
        if not torch.is_tensor(images):
            images = decode(images, root, how, data_dir / "cache")
    except (OSError, ValueError, KeyError) as error:
        text = f"no class {error}" if isinstance(error, KeyError) else error
        raise OSError(f"{text}{cure}") from None
    return images, *labels


def decode(paths, root, how, folder):
    """Image files -> (N, 3, S, S) uint8, resized and cropped by timm's own test transform.

    how: the transform's arguments. Written once to folder and memory-mapped, so that it may exceed
    memory; the name is a hash of all that went into it.
    """
    try:
        files = [(str(path)[len(str(root)) :], os.stat(path)) for path in paths]
    except FileNotFoundError:
        missing = [str(path) for path in paths if not os.path.exists(path)]
        raise OSError(f"{len(missing):,} images are not there: {some(missing)}") from None
    files = [VERSION, how, [(path, s.st_size, s.st_mtime_ns) for path, s in files]]
    key = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    cache = folder / f"{root.name}-{how['input_size'][-1]}px-{key}.npy"
    if not cache.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{cache.name}.lock"):
            if not cache.is_file():
                write_cache(paths, how, cache)
    try:
        pixels = np.load(cache, mmap_mode="r")  # a writable map would count as memory
    except (ValueError, EOFError) as error:
        raise OSError(f"{cache} is broken ({error}): delete it") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it must not be written to
        return torch.from_numpy(pixels)


def write_cache(paths, how, cache):
    """Decode on all processors; the file gets its name when it is whole."""
    say(f"decoding {len(paths):,} images to {cache}")
    resize, crop = timm.data.create_transform(**how).transforms[:2]

    def pixels(path):
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except Exception as error:  # noqa: BLE001, PIL has many for broken files
            raise OSError(f"{path} is not a readable image ({error})") from None
        return np.asarray(crop(resize(image))).transpose(2, 0, 1).tobytes()

    part, header = cache.with_suffix(".part"), np.lib.format.write_array_header_1_0
    shape = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *how["input_size"])}
    try:
        with part.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            header(file, shape)
            for i in tqdm(range(0, len(paths), 1000), "thousands of images", disable=None):
                file.writelines(pool.map(pixels, paths[i : i + 1000]))
        part.rename(cache)
    finally:
        part.unlink(missing_ok=True)
