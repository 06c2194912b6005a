"""PNG curves of runs. Figures are made without pyplot, so nothing of a caller's plots is touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvax.training.runs import Record

PANELS = {
    "train/loss": "training loss",
    "test/accuracy": "test accuracy",
    "train/surrogate_gap": "surrogate gap h",
}


def draw(runs: Mapping[str, Sequence[Sequence[Record]]], path: Path) -> None:
    """One panel for each figure that was recorded, one colour for each run name.

    Args:
        runs: for each name the records of its repetitions; their mean is drawn, with the band
            between the least and the greatest.
        path: where the PNG goes.
    """
    recorded = [name for name in PANELS if any(name in r for rs in runs.values() for r in rs[0])]
    figure = Figure(figsize=(4.5 * len(recorded), 4.2), layout="constrained")
    panels = figure.subplots(1, len(recorded), squeeze=False)[0]
    for axes, name in zip(panels, recorded):
        for index, (label, repetitions) in enumerate(runs.items()):
            _curve(axes, name, label, repetitions, f"C{index}")
        axes.set(xlabel="step", title=PANELS[name])
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(path, dpi=120)


def _curve(
    axes: Axes, name: str, label: str, repetitions: Sequence[Sequence[Record]], colour: str
) -> None:
    series = [[(r["step"], r[name]) for r in records if name in r] for records in repetitions]
    shared = min(map(len, series))
    if not shared:
        return
    steps = [step for step, _ in series[0][:shared]]
    values = np.array([[value for _, value in one[:shared]] for one in series])
    axes.plot(steps, values.mean(0), label=label, color=colour, linewidth=1.5)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def draw_sweep(
    grid: Mapping[str, Sequence[str]], scores: np.ndarray, spread: np.ndarray, title: str, path: Path
) -> None:
    """Held-out accuracy over one field as a curve, over two as a heat map.

    Args:
        grid: the values of each field, as written.
        scores: mean accuracies, one axis for each field.
        spread: their standard deviations over seeds, same shape.
    """
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    fields = list(grid)
    if len(fields) == 1:
        axes.errorbar(range(len(scores)), scores, np.nan_to_num(spread), marker="o", capsize=3)
        axes.set(xlabel=fields[0], ylabel="held-out accuracy")
        axes.set_xticks(range(len(scores)), grid[fields[0]])
        axes.grid(alpha=0.3)
    else:
        _heat_map(figure, axes, grid, scores)
    axes.set_title(title, fontsize="small", wrap=True)
    figure.savefig(path, dpi=120)


def _heat_map(
    figure: Figure, axes: Axes, grid: Mapping[str, Sequence[str]], scores: np.ndarray
) -> None:
    (rows, row_values), (columns, column_values) = grid.items()
    image = axes.imshow(scores, cmap="viridis", aspect="auto")
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_xticks(range(len(column_values)), column_values)
    axes.set_yticks(range(len(row_values)), row_values)
    middle = (scores.min() + scores.max()) / 2
    for (i, j), score in np.ndenumerate(scores):
        ink = "black" if score > middle else "white"
        axes.text(j, i, f"{100 * score:.1f}", ha="center", va="center", color=ink)
    figure.colorbar(image, label="held-out accuracy")
