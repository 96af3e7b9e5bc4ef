"""Tests of extras/datasets.py: small archives in the official layouts, from a server on this machine."""

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR100

import ham
from extras import datasets

CURE = r"comes from http://127\..* bytes, md5 [0-9a-f]{32}\): move away .* by hand"
MODEL = ["--model", "test_vit", "--img-size", "32", "--device", "cpu", "--precision", "fp32"]


class Handler(BaseHTTPRequestHandler):
    """GET with ranges; a server may break off after so many bytes, or know no ranges."""

    def do_GET(self):
        s = self.server
        body, first = s.files[self.path], self.headers["Range"]
        first = int(first.removeprefix("bytes=").rstrip("-")) if first and s.ranges else 0
        s.requests.append(first)
        self.send_response(206 if s.ranges else 200)
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("Content-Type", "text/html" if body[:1] == b"<" else "application/x-tar")
        self.end_headers()
        self.wfile.write(body[first:][: s.break_off])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.requests, s.ranges, s.break_off = {}, [], True, None
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return ["--weights", str(file)]


def picture(label, i=0, size=(40, 32), mode="RGB", kind="JPEG", **save):
    """One image file of a class's colour."""
    colour = (128 + 100 * np.cos(label + np.array([0, 2, 4]))).astype(np.uint8)
    pixels = np.random.RandomState(i).randint(0, 20, (size[1], size[0], 3)) + colour
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(
        mode, palette=Image.Palette.ADAPTIVE
    ).save(file, kind, **save)
    return file.getvalue()


def pack(kind, members):
    """A dict of path: bytes as an archive."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if kind != "tar" else "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


WNIDS = ["n01443537", "n01484850", "n02007558", "n07697537"]  # classes of every layout below
TRAIN, TEST = 5, 2  # images per class


def cub200():
    """Pictures are numbered through; some are grey, as in the original."""
    files = [(label, i) for label in range(4) for i in range(TRAIN + TEST)]
    names = [f"00{k + 1}.{wnid}/bird_{i}.jpg" for k, i in files for wnid in [WNIDS[k]]]
    tables = {
        "images.txt": names,
        "image_class_labels.txt": [k + 1 for k, _ in files],
        "train_test_split.txt": [int(i % 3 != 0 or i > 5) for _, i in files],  # tests: 0 and 3
        "classes.txt": [f"00{k + 1}.{wnid}" for k, wnid in enumerate(WNIDS)],
    }
    members = {"attributes.txt": b"1 has_bill_shape\n", "CUB_200_2011/README": b"...\n"}
    for name, column in tables.items():
        lines = "".join(f"{n} {x}\n" for n, x in enumerate(column, 1))
        members[f"CUB_200_2011/{name}"] = lines.encode()
    for name, (label, i) in zip(names, files):
        picture_ = picture(label, i, mode="L" if i == 4 else "RGB")
        members[f"CUB_200_2011/images/{name}"] = picture_
    return "tgz", members, len(files)


def imagenet_r():
    members = {"imagenet-r/README.txt": b"ImageNet-R\n", f"imagenet-r/{WNIDS[0]}/Thumbs.db": b"?"}
    for label, wnid in enumerate(WNIDS):
        for i in range(TRAIN + TEST):
            members[f"imagenet-r/{wnid}/art_{i}.jpg"] = picture(label, i)
    return "tar", members, 4 * (TRAIN + TEST)


def tiny_imagenet():
    root, annotations = "tiny-imagenet-200", []
    members = {f"{root}/wnids.txt": "\n".join(reversed(WNIDS)).encode(), f"{root}/words.txt": b""}
    members[f"{root}/test/images/test_0.JPEG"] = picture(9, size=(64, 64))
    for label, wnid in enumerate(WNIDS):
        members[f"{root}/train/{wnid}/{wnid}_boxes.txt"] = b"n_0.JPEG\t0\t0\t63\t63\n"
        for i in range(TRAIN):
            name = f"{root}/train/{wnid}/images/{wnid}_{i}.JPEG"
            members[name] = picture(label, i, size=(64, 64), mode="L" if i == 1 else "RGB")
    for i in range(4 * TEST):  # one class after the other
        name = f"val_{i}.JPEG"
        members[f"{root}/val/images/{name}"] = picture(i % 4, i, size=(64, 64))
        annotations.append(f"{name}\t{WNIDS[i % 4]}\t0\t0\t63\t63\n")
    members[f"{root}/val/val_annotations.txt"] = "".join(annotations).encode()
    return "zip", members, 4 * (TRAIN + TEST)


def cifar100(monkeypatch):
    members, random = {}, np.random.RandomState(0)
    for part, n in (("train", TRAIN), ("test", TEST)):
        labels = [i % 4 for i in range(4 * n)]
        data = random.randint(0, 256, (4 * n, 3 * 32 * 32), dtype=np.uint8)
        members[f"cifar-100-python/{part}"] = pickle.dumps({"data": data, "fine_labels": labels})
    members["cifar-100-python/meta"] = pickle.dumps({"fine_label_names": WNIDS})
    md5 = {name.split("/")[1]: hashlib.md5(data).hexdigest() for name, data in members.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    return "tar.gz", members, 4 * (TRAIN + TEST)


LAYOUTS = {"cub200": cub200, "imagenet_r": imagenet_r, "tiny_imagenet": tiny_imagenet}


@pytest.fixture
def publish(server, monkeypatch, tmp_path):
    """Put a data set's archive on the server and its facts into SOURCES. -> function: the bytes"""
    listed = tmp_path / "test_images.txt"
    lines = [f"{wnid}/art_{i}.jpg\n" for wnid in WNIDS for i in (0, 3)]
    listed.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(datasets, "IMAGENET_R_TEST", listed)

    def put(name, change=lambda members: members, body=None):
        layouts = LAYOUTS | {"cifar100": functools.partial(cifar100, monkeypatch)}
        kind, members, n = layouts[name]()
        data, path = pack(kind, change(members)), "/" + datasets.SOURCES[name].url.split("/")[-1]
        server.files[path] = data if body is None else body(data)
        facts = {"bytes": len(data), "md5": hashlib.md5(data).hexdigest()}
        facts["images"] = (n * TRAIN // (TRAIN + TEST), n * TEST // (TRAIN + TEST))
        facts["url"] = f"http://127.0.0.1:{server.server_port}{path}"
        monkeypatch.setitem(datasets.SOURCES, name, datasets.SOURCES[name]._replace(**facts))
        return data

    return put


def configuration(name, folder, **settings):
    settings = {"model": "test_vit", "img_size": 32, "device": "cpu"} | settings
    return ham.resolve(ham.Config(dataset=name, data_dir=str(folder), tasks=2, **settings))


def refused(name, folder, says, **settings):
    """One line that says what is wrong; nothing half-done lies about."""
    with pytest.raises(ham.InputError, match=says) as error:
        ham.load_data(configuration(name, folder, **settings))
    assert "\n" not in str(error.value)
    left = [p for p in folder.rglob("*") if p.is_dir() and p.name.endswith(".part")]
    assert not left and not list(folder.rglob("*.npy")), left


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("name", ["cifar100", *LAYOUTS])
def test_each_data_set_from_its_address_to_its_results(name, publish, server, weights, tmp_path):
    publish(name)
    command = ["--dataset", name, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path)]
    command += ["--tasks", "2", "--epochs", "1", "--batch-size", "8", *MODEL, *weights]
    ham.main([*command, "--method", "ham"])
    assert server.requests == [0]
    results = json.loads((tmp_path / f"{name}-T2-ham-s1993" / "results.json").read_text())
    assert results["test_images_per_task"] == [2 * TEST] * 2
    assert [x.split(".")[-1] for x in results["classes"]] == [
        WNIDS[k] for k in results["class_order"]
    ]
    listed = hashlib.sha256(datasets.IMAGENET_R_TEST.read_bytes()).hexdigest()
    assert results["split_sha256"] == (listed if name == "imagenet_r" else None)
    ham.main([*command, "--method", "frozen"])
    assert server.requests == [0] and not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.rglob("*.npy"))) == (name != "cifar100")


@pytest.mark.parametrize("name", ["cifar100", *LAYOUTS])
def test_every_image_has_its_label_and_side(name, publish, tmp_path):
    """Pictures have the colour of their class, and no file is both trained and tested on."""
    publish(name)
    c = configuration(name, tmp_path, class_order="natural")
    data = ham.load_data(c)
    assert [len(rows) for rows in data.train + data.test] == [TRAIN] * 4 + [TEST] * 4
    assert sorted(torch.cat(data.train + data.test).tolist()) == list(range(4 * (TRAIN + TEST)))
    assert data.pixels.shape[1:] == (3, *[64 if name == "tiny_imagenet" else 32] * 2)
    if name == "cifar100":
        return
    for label in range(4):
        want = 128 + 100 * np.cos(label + np.array([0, 2, 4])) + 9.5
        for row in torch.cat([data.train[label], data.test[label]]):
            got = data.pixels[row].float().mean((1, 2)).numpy()
            grey = (want * [0.299, 0.587, 0.114]).sum()
            assert min(np.abs(got - want).max(), np.abs(got - grey).max()) < 8


def test_shipped_imagenet_r_split_divides_the_real_names(publish, server, tmp_path, monkeypatch):
    """The 6,000 listed names and 24,000 made up: tiny pictures in the official layout."""
    monkeypatch.undo()  # of the short list
    listed = datasets.IMAGENET_R_TEST.read_text(encoding="utf-8").split()
    per_class = Counter(name.split("/")[0] for name in listed)
    names = [f"{wnid}/made_up_{i}.jpg" for wnid in per_class for i in range(120)]
    image = picture(0, size=(8, 8))
    archive = pack("tar", {f"imagenet-r/{name}": image for name in names + listed})
    (tmp_path / "imagenet-r.tar").write_bytes(archive)
    facts = {"bytes": len(archive), "md5": hashlib.md5(archive).hexdigest()}
    real = datasets.SOURCES["imagenet_r"]
    monkeypatch.setitem(datasets.SOURCES, "imagenet_r", real._replace(**facts))
    data = ham.load_data(configuration("imagenet_r", tmp_path))
    assert (sum(map(len, data.train)), sum(map(len, data.test))) == (24_000, 6_000)
    assert {name: len(rows) for name, rows in zip(data.names, data.test)} == per_class
    root = tmp_path / "imagenet-r"
    paths = datasets.read_listed(root, configuration("imagenet_r", tmp_path))[0]
    tested = {str(path)[len(str(root)) + 1 :] for path in paths[24_000:]}
    assert tested == set(listed) and len(set(paths)) == 30_000


def test_another_split_file_and_its_mistakes(publish, tmp_path):
    publish("imagenet_r")
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(f"{wnid}/art_6.jpg" for wnid in WNIDS), encoding="utf-8")
    data = ham.load_data(configuration("imagenet_r", tmp_path, split_file=str(mine)))
    assert [len(rows) for rows in data.train + data.test] == [6] * 4 + [1] * 4
    folder = str(tmp_path / "imagenet-r")  # the same, as a FOLDER of the user's own
    same = ham.load_data(configuration(folder, tmp_path, split_file=str(mine)))
    assert torch.equal(same.pixels, data.pixels) and same.names == data.names
    mine.write_text(f"{WNIDS[0]}/art_0.jpg\n{WNIDS[0]}/art_77.jpg\nn0/x.jpg\n", encoding="utf-8")
    says = (
        rf"2 files of mine.txt are not there: n0/x.jpg, {WNIDS[0]}/art_77.jpg; check --split-file"
    )
    with pytest.raises(ham.InputError, match=says):
        ham.load_data(configuration("imagenet_r", tmp_path, split_file=str(mine)))
    with pytest.raises(ham.InputError, match="no such file"):
        configuration("imagenet_r", tmp_path, split_file="nowhere.txt")
    with pytest.raises(ham.InputError, match="have their own"):
        configuration("cub200", tmp_path, split_file=str(mine))


def test_odd_image_files(tmp_path):
    """Grey, palette, CMYK and rotated by EXIF: what a viewer would show, in RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    files = {"rgb.png": picture(1, kind="PNG"), "grey.jpg": picture(1, mode="L", quality=95)}
    files |= {"palette.png": picture(1, mode="P", kind="PNG"), "cmyk.jpg": picture(1, mode="CMYK")}
    files["turned.jpg"] = picture(1, exif=exif, quality=95)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    how = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    pixels = datasets.decode([tmp_path / name for name in files], tmp_path, how, tmp_path / "c")
    rgb, grey, palette, cmyk, turned = pixels.float()
    want = torch.from_numpy(np.array(Image.open(tmp_path / "rgb.png").convert("L")))
    assert (grey - want[None, :, 4:36]).abs().mean() < 2 and torch.equal(grey[0], grey[2])
    assert (palette - rgb).abs().mean() < 12 and (cmyk - rgb).abs().mean() < 8
    upright = np.asarray(Image.open(tmp_path / "turned.jpg").convert("RGB")).transpose(1, 0, 2)
    assert np.asarray(Image.open(tmp_path / "turned.jpg")).shape == (32, 40, 3)
    assert (turned - torch.from_numpy(upright[4:36, ::-1].copy()).permute(2, 0, 1)).abs().mean() < 1


# ---------------------------------------------------------------------------- download and unpacking


def test_an_archive_put_there_by_hand_is_used(publish, server, tmp_path):
    (tmp_path / "imagenet-r.tar").write_bytes(publish("imagenet_r"))
    ham.load_data(configuration("imagenet_r", tmp_path))
    assert server.requests == []


@pytest.mark.parametrize("name", ["cifar100", *LAYOUTS])
def test_a_wrong_archive_is_named_and_neither_unpacked_nor_touched(name, publish, server, tmp_path):
    good = publish(name)
    archive = tmp_path / datasets.SOURCES[name].url.split("/")[-1]
    for wrong, says in (
        (good[:-7], "bytes instead of"),
        (b"<html>" + good[6:-1], "a web page"),
        (good[:100] + bytes(10) + good[110:], "has md5 .* instead of"),
    ):
        archive.write_bytes(wrong)
        refused(
            name,
            tmp_path,
            f"{archive.name} .*{says}.*{CURE}",
        )
        assert archive.read_bytes() == wrong and server.requests == []
        assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {
            archive.name,
            "test_images.txt",
        }


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on(ranges, publish, server, tmp_path):
    good = publish("tiny_imagenet")
    half, server.ranges = len(good) // 2, ranges
    server.break_off = half
    refused("tiny_imagenet", tmp_path, f"broken off after {half:,} of {len(good):,}.*run again")
    assert (tmp_path / "tiny-imagenet-200.zip.part").read_bytes() == good[:half]
    server.break_off = None
    ham.load_data(configuration("tiny_imagenet", tmp_path))
    assert server.requests == [0, half if ranges else 0]
    assert (tmp_path / "tiny-imagenet-200.zip").read_bytes() == good
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("ranges", [True, False])
def test_parts_of_killed_downloads(ranges, publish, server, tmp_path):
    """Whole, too long, and of something else: none is taken for right, none stands in the way."""
    good, part = publish("imagenet_r"), tmp_path / "imagenet-r.tar.part"
    server.ranges = ranges
    part.write_bytes(good)
    ham.load_data(configuration("imagenet_r", tmp_path))
    assert server.requests == [] and not part.exists()
    for wrong in (good + b"more", b"x" * len(good), b"x" * 100):
        (tmp_path / "imagenet-r.tar").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "imagenet-r", ignore_errors=True)
        part.write_bytes(wrong)
        if ranges or len(wrong) >= len(good):
            with pytest.raises(ham.InputError, match="what came has.*run again.*" + CURE):
                ham.load_data(configuration("imagenet_r", tmp_path))
        ham.load_data(configuration("imagenet_r", tmp_path))
        assert not part.exists()


def test_what_is_no_archive_is_not_kept(publish, server, tmp_path):
    publish("cub200", body=lambda data: b"<html>this page has moved</html>")
    says = r"the server has 32 bytes \(text/html\) instead of 4,370; run again.*" + CURE
    refused("cub200", tmp_path, says)
    publish("cub200", body=lambda data: data[:50] + bytes(len(data) - 50))
    refused("cub200", tmp_path, "what came has md5 .*" + CURE)
    server.server_close()
    server.shutdown()
    refused("cub200", tmp_path, "download: .*refused.*" + CURE)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".txt", ".lock"}


@pytest.mark.parametrize(
    ("name", "evil"),
    [("cub200", "../evil.txt"), ("tiny_imagenet", "../evil.txt"), ("tiny_imagenet", "/evil.txt")],
)
def test_no_member_leaves_the_folder(name, evil, publish, tmp_path):
    publish(name, change=lambda members: members | {evil: b"evil"})
    refused(name, tmp_path / "data", "cannot be unpacked.*" + CURE)
    assert not list(tmp_path.rglob("*evil*")) and not list((tmp_path / "data").glob("*/"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_no_link_leads_out_of_the_folder(kind, tmp_path):
    (tmp_path / "outside.txt").write_text("mine")
    link, file = tarfile.TarInfo("imagenet-r/link"), tmp_path / "imagenet-r.tar"
    link.type, link.linkname = (
        kind,
        "../../outside.txt" if kind == tarfile.SYMTYPE else "/etc/hosts",
    )
    with tarfile.open(file, "w") as archive:
        archive.addfile(link)
    with pytest.raises(OSError, match="cannot be unpacked"):
        datasets.unpack(file, tmp_path / "imagenet-r")
    assert {path.name for path in tmp_path.iterdir()} == {"outside.txt", "imagenet-r.tar"}


@pytest.mark.parametrize("name", ["cifar100", *LAYOUTS])
def test_a_truncated_archive_is_not_unpacked_in_part(name, publish, tmp_path):
    """As if the checksum agreed: the disk was full, or broke."""
    good, source = publish(name), datasets.SOURCES[name]
    file = tmp_path / source.url.split("/")[-1]
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(OSError, match=f"{file.name} cannot be unpacked"):
        datasets.unpack(file, tmp_path / source.folder)
    assert not (tmp_path / source.folder).exists() and not list(tmp_path.rglob("*.part"))


def test_a_killed_unpacking_is_not_taken_for_whole(publish, tmp_path):
    publish("cub200")
    (tmp_path / "CUB_200_2011.part" / "CUB_200_2011" / "old").mkdir(parents=True)
    ham.load_data(configuration("cub200", tmp_path))
    assert not (tmp_path / "CUB_200_2011" / "old").exists() and not list(tmp_path.rglob("*.part"))


def test_two_runs_at_once_download_and_decode_once(publish, server, tmp_path, monkeypatch):
    publish("cub200")
    written, results = [], []
    monkeypatch.setattr(
        datasets,
        "write_cache",
        lambda *a, f=datasets.write_cache: (written.append(1), f(*a)),
    )
    c = configuration("cub200", tmp_path)
    both = [threading.Thread(target=lambda: results.append(ham.load_data(c))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(results) == 2 and torch.equal(results[0].pixels, results[1].pixels)
    assert server.requests == [0] and written == [1]


# --------------------------------------------------------------------------------- incomplete folders


@pytest.mark.parametrize("name", ["cifar100", *LAYOUTS])
def test_an_empty_folder_says_what_to_do(name, publish, server, tmp_path):
    publish(name)
    (tmp_path / datasets.SOURCES[name].folder).mkdir()
    refused(name, tmp_path, CURE)
    assert server.requests == []


def lacks(*parts):
    return lambda members: {k: v for k, v in members.items() if not any(p in k for p in parts)}


@pytest.mark.parametrize(
    ("name", "without", "says"),
    [
        ("cub200", ["bird_3.jpg"], "4 images are not there: .*bird_3.jpg.*, \\.\\.\\."),
        ("cub200", ["classes.txt"], "classes.txt"),
        ("imagenet_r", [f"{WNIDS[1]}/"], "2 files of test_images.txt are not there"),
        ("imagenet_r", ["art_1.jpg"], r"\[16, 8\] training and test images instead of \[20, 8\]"),
        ("tiny_imagenet", [f"train/{WNIDS[1]}/"], f"no class '{WNIDS[1]}'"),
        ("tiny_imagenet", ["_1.JPEG"], r"\[16, 8\] training and test images instead of \[20, 8\]"),
        ("tiny_imagenet", ["val/"], "val_annotations.txt"),
        ("cifar100", ["meta"], "missing or have other checksums"),
        ("cifar100", ["train"], "missing or have other checksums"),
    ],
)
def test_what_is_missing_is_named(name, without, says, publish, tmp_path):
    publish(name, change=lacks(*without))
    refused(name, tmp_path, f"{says}.*{CURE}")


def test_cub_tables_that_do_not_agree(publish, tmp_path):
    publish("cub200", change=lambda m: m | {"CUB_200_2011/train_test_split.txt": b"1 1\n2 0\n"})
    refused("cub200", tmp_path, "do not agree")
    shutil.rmtree(tmp_path / "CUB_200_2011")  # as the message says
    (tmp_path / "CUB_200_2011.tgz").unlink()
    table = "CUB_200_2011/train_test_split.txt"
    publish("cub200", change=lambda m: m | {table: m[table].replace(b"1 0\n", b"1 1\n", 1)})
    refused("cub200", tmp_path, r"\[21, 7\] training and test images instead of \[20, 8\]")


def test_an_unreadable_image_is_named_and_no_cache_is_left(publish, tmp_path):
    broken = "tiny-imagenet-200/val/images/val_3.JPEG"
    publish("tiny_imagenet", change=lambda m: m | {broken: m[broken][:200]})
    refused("tiny_imagenet", tmp_path, "val_3.JPEG is not a readable image")


def test_the_cache_knows_what_went_into_it(publish, tmp_path):
    publish("cub200")

    def caches(folder=tmp_path, **settings):
        ham.load_data(configuration("cub200", folder, **settings))
        return len(list(tmp_path.rglob("*.npy")))

    for settings in ({}, {"norm": "unit"}, {"seed": 1}):
        assert caches(**settings) == 1
    assert caches(img_size=48) == 2 and caches(crop_pct=0.8) == 3
    # Other pictures of the same size and name are other data; the same elsewhere are not.
    images = sorted((tmp_path / "CUB_200_2011" / "images").rglob("*.jpg"))
    one, other = images[0].read_bytes(), images[1].read_bytes()
    size = max(len(one), len(other))
    images[0].write_bytes(one.ljust(size, b"\0"))
    assert caches() == 4
    images[0].write_bytes(other.ljust(size, b"\0"))
    os.utime(images[0], (1, 1))
    assert caches() == 5
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("CUB_200_2011", "cache"):
        (tmp_path / name).rename(moved / name)
    assert caches(moved) == 5
    images = sorted((moved / "CUB_200_2011" / "images").rglob("*.jpg"))
    images[0].rename(images[0].with_name("bird_9.jpg"))
    table = moved / "CUB_200_2011" / "images.txt"
    table.write_text(table.read_text().replace("bird_0.jpg", "bird_9.jpg", 1))
    assert caches(moved) == 6
    cfg = {"interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    pixels = datasets.read(configuration("cub200", moved), cfg)[0]
    assert len(list(tmp_path.rglob("*.npy"))) == 7
    if sys.platform == "linux":  # mapped and not writable, so that it counts as no memory
        maps = [x for x in Path("/proc/self/maps").read_text().splitlines() if ".npy" in x]
        assert len(maps) == 1 and " r--s " in maps[0] and len(pixels)


def test_a_broken_cache_is_named_and_an_interrupted_one_not_kept(publish, tmp_path, monkeypatch):
    publish("cub200")
    c = configuration("cub200", tmp_path)

    def interrupt(image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.ImageOps, "exif_transpose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ham.load_data(c)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".npy", ".part")]
    ham.load_data(c)
    cache = next(tmp_path.rglob("*.npy"))
    for broken in (cache.read_bytes()[:5000], b""):
        cache.write_bytes(broken)
        with pytest.raises(ham.InputError, match=rf"{cache.name} is broken .* delete it"):
            ham.load_data(c)


def test_tiny_imagenet_keeps_its_pixels_and_is_cropped_by_the_batch(publish, tmp_path):
    publish("tiny_imagenet")
    c = configuration("tiny_imagenet", tmp_path, crop_pct=0.8, class_order="natural")
    data = ham.load_data(c)
    file = tmp_path / "tiny-imagenet-200" / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    want = np.asarray(Image.open(file)).transpose(2, 0, 1)
    assert np.array_equal(data.pixels[0], want) and data.transform["crop_pct"] == 0.8
    assert data.batch(torch.tensor([0]), "cpu").shape == (1, 3, 32, 32)


def test_what_stands_in_the_folders_place(publish, server, tmp_path):
    publish("cub200")
    (tmp_path / "CUB_200_2011").symlink_to(tmp_path / "nowhere")
    refused("cub200", tmp_path, "CUB_200_2011 is not a folder.*" + CURE)
    assert server.requests == []
