"""The README's picture: test accuracy and sharpness of AdamW, SAM and GSAM, from a measured table.

    python docs/make_picture.py

Reads tests/evidence/digits.md and writes docs/assets/digits-light.png and digits-dark.png.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "evidence" / "digits.md"
LABELS = {
    "adamw(cosine(lr))": "AdamW, 1e-3",
    "adamw(cosine(5e-4)), 2 × epochs": "AdamW, 5e-4, 2 × epochs",
    "adamw(cosine(5e-4))": "AdamW, 5e-4 (tuned)",
    "sam_perturb | adamw": "SAM over AdamW, 1e-3",
    "sam_perturb | gsam_project | adamw": "GSAM over AdamW, 1e-3",
}
INK = {"light": "#24292f", "dark": "#e6edf3"}
GREY, BLUE, ORANGE = "#8c959f", "#3b82c4", "#e08a1e"


class Row(NamedTuple):
    label: str
    accuracy: float
    accuracy_half_width: float
    """Of the 95 % interval, in points."""
    eigenvalue: float


def read() -> list[Row]:
    """The rows of `LABELS`, in that order."""
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in TABLE.read_text().splitlines()]
    rows = {row[0].replace("\\|", "|"): row for row in cells if len(row) == 4}
    number = lambda text: float(re.match(r"[-\d.]+", text)[0])  # type: ignore[index]
    width = lambda text: float(re.search(r"\(±([\d.]+)\)", text)[1])  # type: ignore[index]
    return [
        Row(label, number(rows[name][1]), width(rows[name][1]), number(rows[name][3]))
        for name, label in LABELS.items()
    ]


def style(theme: str) -> dict[str, Any]:
    """matplotlib's settings of a picture for light or for dark pages."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK[theme])
    return {"font.size": 11, "axes.titlesize": 11, "axes.edgecolor": GREY, **ink}


def draw(rows: list[Row], theme: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = INK[theme]
    with plt.rc_context(style(theme)):
        figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
        places = range(len(rows) - 1, -1, -1)
        colours = [ORANGE if "SAM" in row.label else BLUE for row in rows]
        accuracy, eigenvalue = axes
        accuracy.barh(places, [row.accuracy for row in rows], color=colours, height=0.66)
        accuracy.errorbar(
            [row.accuracy for row in rows], list(places),
            xerr=[row.accuracy_half_width for row in rows], fmt="none", ecolor=ink, capsize=3, lw=1,
        )  # fmt: skip
        for place, row in zip(places, rows, strict=True):
            accuracy.text(
                3, place, f"{row.accuracy:.1f}", va="center", color="white", weight="bold"
            )
            eigenvalue.text(row.eigenvalue + 4, place, f"{row.eigenvalue:.3g}", va="center")
        accuracy.set(xlim=(0, 100), xlabel="accuracy on clean test images, %")
        eigenvalue.barh(places, [row.eigenvalue for row in rows], color=colours, height=0.66)
        eigenvalue.set(xlim=(0, 225), xlabel="largest eigenvalue of the Hessian")
        accuracy.set_yticks(list(places), [row.label for row in rows])
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(axis="y", length=0)
            ax.set_facecolor("none")
        path = Path(__file__).parent / "assets" / f"digits-{theme}.png"
        figure.savefig(path, dpi=160, transparent=True, metadata={"Software": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    for theme in INK:
        print(draw(read(), theme).relative_to(ROOT))
