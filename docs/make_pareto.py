"""The picture of cheaper sharpness: accuracy against the time of a step, from measured tables.

    python docs/make_pareto.py

Reads tests/evidence/cheap_sharpness_*.md and writes docs/assets/pareto-light.png and
pareto-dark.png.
"""

import re
from pathlib import Path
from typing import NamedTuple

from make_picture import BLUE, GREY, INK, ORANGE, ROOT, style

TITLES = {"mixer": "Mixer, digits", "resnet": "ResNet, digits", "vit": "ViT, digits"}
LABELS = {
    "base": "base",
    "SAM": "SAM",
    "trajectory loss (SAF)": "SAF",
    "ascent on half of the batch": "½",
    "ascent on a quarter": "¼",
    "ascent on an eighth": "⅛",
    "along an average, β = 0.9": "average",
}


class Point(NamedTuple):
    label: str
    time: float
    """Of a step, in units of the base's."""
    accuracy: float
    half_width: float
    """Of the 95 % interval, in points."""


def read(table: Path) -> list[Point]:
    """The rows of `LABELS`."""
    found = []
    for line in table.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0] in LABELS:
            accuracy, half_width = map(float, re.findall(r"[\d.]+", cells[3]))
            found.append(Point(LABELS[cells[0]], float(cells[2]), accuracy, half_width))
    return found


def tables() -> dict[str, list[Point]]:
    paths = {name: ROOT / f"tests/evidence/cheap_sharpness_{name}.md" for name in TITLES}
    return {TITLES[name]: read(path) for name, path in paths.items() if path.exists()}


def draw(panels: dict[str, list[Point]], theme: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(style(theme)):
        size = (4.2 * len(panels), 3.4)
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
        for ax, (title, points) in zip(axes, panels.items(), strict=True):
            for point in points:
                colour = {"base": GREY, "SAM": ORANGE}.get(point.label, BLUE)
                ax.errorbar(
                    point.time, point.accuracy, yerr=point.half_width, fmt="o", color=colour,
                    capsize=3, lw=1,
                )  # fmt: skip
                ax.annotate(
                    point.label, (point.time, point.accuracy), (6, 4), textcoords="offset points"
                )
            ax.set(title=title, xlabel="time of a step, base = 1")
            ax.margins(x=0.15)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_facecolor("none")
        axes[0].set_ylabel("accuracy on clean test images, %")
        path = Path(__file__).parent / "assets" / f"pareto-{theme}.png"
        figure.savefig(path, dpi=110, transparent=True, metadata={"Software": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    for theme in INK:
        print(draw(tables(), theme).relative_to(ROOT))
