"""What reproduce.ipynb has out of sight: how it shows code, pictures and tables."""

import inspect
import io
import re
import textwrap

import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown
from PIL import Image

BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#999999"  # Okabe-Ito
LOOKS = [(BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "v"), ("black", ":", "^")]
LOOKS = [*LOOKS, (ORANGE, (0, (6, 1, 1, 1, 1, 1)), "D")]  # five lines at most in a panel
LOOKS = [dict(zip(("color", "linestyle", "marker"), look)) for look in LOOKS]


def style():
    """How matplotlib draws in the notebook."""
    plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 11})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.facecolor": "white", "legend.frameon": False})


def show(*objects):
    """Their source, as code."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(x)).strip() for x in objects)
    return Markdown(f"```python\n{source}\n```")


def picture(figure):
    """A figure as PNG of 128 colours, a third of the bytes."""
    file = io.BytesIO()
    figure.savefig(file)
    plt.close(figure)
    return Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)


def table(frame):
    """A DataFrame, all of it, its ** ** as bold, short cells in one line."""
    html = frame.to_html(border=0)
    html = re.sub("<td>.{1,24}</td>", lambda m: m[0].replace(" ", "\N{NO-BREAK SPACE}"), html)
    return HTML(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html))
