"""Draw results/method.svg, the picture of the method in README.md: `python -m extras.method_svg`."""

from pathlib import Path

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24292f; text-anchor: middle }
.small { font-size: 13px; fill: #57606a }
.bold { font-weight: 600 }
rect { fill: #f6f8fa; stroke: #8c959f; rx: 6px }
.new { fill: #ddf4ff; stroke: #0969da }
path { fill: none; stroke: #57606a; stroke-width: 1.5px; marker-end: url(#tip) }
.plain { marker-end: none }
#tip path { fill: #57606a; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } rect { fill: #161b22; stroke: #6e7681 }
  .new { fill: #0c2d6b; stroke: #4493f8 }
  path { stroke: #9198a1 } #tip path { fill: #9198a1 }
}
"""
TIP = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
TIP += ' orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>'


def box(x, y, width, height, lines, kind=""):
    """A rectangle with its upper left corner at (x, y), px, and lines of text, the first one bold."""
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>']
    top = y + height / 2 - 10 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        look = "bold" if i == 0 else "small"
        parts.append(f'<text class="{look}" x="{x + width / 2}" y="{top + 20 * i}">{line}</text>')
    return "\n".join(parts)


def arrow(*points):
    return f'<path d="M{" L".join(f"{x},{y}" for x, y in points)}"/>'


def line(*points):
    return arrow(*points).replace("<path", '<path class="plain"')


def note(x, y, text):
    return f'<text class="small" x="{x}" y="{y}">{text}</text>'


def method():
    """-> the picture, SVG"""
    groups = [box(615, y, 110, 44, [f"group {k}", "ΔW_G, α_G"]) for k, y in ((1, 40), (3, 180))]
    added = "α_i P(B_i) P(A_i) / (n + 1)"
    parts = [
        box(5, 20, 155, 60, ["images of task i", "seen once, not kept"]),
        box(5, 120, 155, 84, ["train (1)", "W0 + Σ α_G ΔW_G", "+ α_i B_i A_i"]),
        note(82, 228, "only α, B_i, A_i learn"),
        box(190, 132, 150, 60, ["adapter of task i", "B_i A_i, α_i"], "new"),
        box(
            357, 20, 228, 84, ["choose a group (2)", "the most similar by cosine,", "or a new one"]
        ),
        box(357, 140, 228, 84, ["prune, scale, merge (3, 4)", "ΔW_G ← α_G ΔW_G +", added]),
        *groups,
        box(615, 110, 110, 44, ["group 2", "ΔW_G, α_G"], "new"),
        note(670, 248, "at most G_max"),
        box(755, 90, 142, 84, ["one module", "W0 + Σ α_G ΔW_G", "no task id"]),
        arrow((82, 80), (82, 120)),
        arrow((160, 162), (190, 162)),
        arrow((267, 132), (267, 62), (357, 62)),
        arrow((471, 104), (471, 140)),
        arrow((585, 165), (600, 165), (600, 132), (615, 132)),
        arrow((725, 132), (755, 132)),
        line((725, 62), (740, 62), (740, 202), (725, 202)),
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 260" role="img">'
    title = "<title>Adapter, group, one module: how HAM takes in a task</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", TIP, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "results" / "method.svg"
    file.write_text(method(), "utf-8")
