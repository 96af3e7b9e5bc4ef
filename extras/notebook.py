"""What reproduce.ipynb has out of sight: its settings, how it watches a run, how it shows things."""

import contextlib
import dataclasses
import inspect
import io
import re
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown
from PIL import Image

import ham
from extras import demo

CIFAR = ham.Config(
    dataset="cifar100",
    tasks=20,
    images_per_class=50,
    test_images_per_class=50,
    model="deit_tiny_patch16_224.fb_in1k",
    img_size=160,
)


FOLDER = tempfile.TemporaryDirectory()  # drawings and results of the notebook; gone when it ends


def configured(method, quick):
    """What `python ham.py --method METHOD` runs, or that on CIFAR-100. -> Config, resolved"""
    where = {"method": method, "out": FOLDER.name}
    if quick:
        return ham.resolve(demo.made(ham.Config(**where, data_dir=FOLDER.name)))
    where["lr"] = ham.LEARNING_RATE.get(method)  # so few images are below the law's bend
    weights = Path("data") / "deit_tiny_patch16_224.safetensors"
    where["weights"] = str(weights) if weights.is_file() else None  # timm downloads them
    return ham.resolve(dataclasses.replace(CIFAR, **where))


class Watched(ham.HAM):
    """HAM as it is; it only keeps every task's adapter, and the path of loss and scalars."""

    def __init__(self, w0, config):
        super().__init__(w0, config)
        self.adapters, self.path = [], []

    def finish(self, task, trained):
        self.adapters.append(trained.detached())
        return super().finish(task, trained)

    def loss(self, trained, features, labels):
        value = ham.task_loss(trained, features, labels)
        self.path.append([value.item(), trained.alpha.item(), *trained.alpha_groups.tolist()])
        return value


def quietly(f, *arguments):
    """-> f(*arguments), the lines that it printed"""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = f(*arguments)
    return result, printed.getvalue().splitlines()


def show(*objects):
    """Their source, as code."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(x)).strip() for x in objects)
    return Markdown(f"```python\n{source}\n```")


def picture(figure):
    """A figure as PNG of 128 colours, a third of the bytes."""
    file = io.BytesIO()
    figure.savefig(file)
    plt.close("all")  # the others of `tables.pictures()`, too: they would be shown
    return Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)


def table(frame):
    """A DataFrame, all of it, its ** ** as bold, short cells in one line."""
    html = frame.to_html(border=0)
    html = re.sub("<td>.{1,24}</td>", lambda m: m[0].replace(" ", "\N{NO-BREAK SPACE}"), html)
    return HTML(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html))
