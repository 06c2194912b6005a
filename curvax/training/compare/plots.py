"""PNG plots of runs, drawn without pyplot, whose global state belongs to the caller."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvax.training.compare.comparison import LARGEST_EIGENVALUE, Outcomes, values
from curvax.training.compare.grid_search import Grid
from curvax.training.runtime.run_dir import Record
from curvax.training.selection_metric import SelectionMetric


def draw(outcomes: Outcomes, path: Path, metric: SelectionMetric) -> None:
    """Metrics over steps, a panel for each: mean and range over the seeds of each variant."""
    titles = {
        "train/loss": "training loss",
        metric.log_key: f"test {metric.title}",
        "train/surrogate_gap": "surrogate gap h",
        "train/damping": "damping λ",
    }
    runs = {name: [run.records for run in runs] for name, runs in outcomes.items()}
    seen = {
        name for repetitions in runs.values() for each in repetitions for r in each for name in r
    }
    recorded = [name for name in titles if name in seen]
    figure = Figure(figsize=(4.5 * len(recorded), 4.2), layout="constrained")
    panels = figure.subplots(1, len(recorded), squeeze=False)[0]
    for axes, name in zip(panels, recorded):
        for index, (label, repetitions) in enumerate(runs.items()):
            _curve(axes, name, label, repetitions, f"C{index}")
        axes.set(xlabel="step", title=titles[name])
        if name == "train/damping":
            _logarithmic(axes)
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=120)


def _curve(
    axes: Axes, name: str, label: str, repetitions: Sequence[Sequence[Record]], colour: str
) -> None:
    series = [[(r["step"], r[name]) for r in records if name in r] for records in repetitions]
    shared = min(map(len, series))
    if not shared:
        return
    steps = [step for step, _ in series[0][:shared]]
    each = np.array([[value for _, value in one[:shared]] for one in series])
    axes.plot(steps, each.mean(0), label=label, color=colour, linewidth=1.5)
    axes.fill_between(steps, each.min(0), each.max(0), color=colour, alpha=0.2, linewidth=0)


def _logarithmic(axes: Axes) -> None:
    if any(np.max(line.get_ydata(), initial=0.0) > 0 for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")


def draw_scores(outcomes: Outcomes, path: Path, metric: SelectionMetric) -> None:
    """Test score and largest Hessian eigenvalue: a row per variant, a dot per seed, a bar at the
    mean."""
    figure = Figure(figsize=(11, 1.4 + 0.5 * len(outcomes)), layout="constrained")
    reached, eigenvalue = figure.subplots(1, 2, sharey=True)
    _dots(reached, outcomes, metric.result_key, f"test {metric.title}")
    _dots(eigenvalue, outcomes, LARGEST_EIGENVALUE, "largest Hessian eigenvalue")
    if all(value > 0 for runs in outcomes.values() for value in values(runs, LARGEST_EIGENVALUE)):
        eigenvalue.set_xscale("log")
    reached.locator_params(axis="x", nbins=6)
    reached.set_yticks(range(len(outcomes)), list(outcomes))
    reached.set_ylim(len(outcomes) - 0.5, -0.5)
    figure.savefig(path, dpi=120)


def _dots(axes: Axes, outcomes: Outcomes, figure: str, title: str) -> None:
    for row, runs in enumerate(outcomes.values()):
        each = values(runs, figure)
        axes.plot(each, [row] * len(each), "o", color=f"C{row}", alpha=0.6)
        axes.plot(np.mean(each), row, "|", color="black", markersize=22, markeredgewidth=2)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")


def draw_sweep(grids: Sequence[Grid], path: Path) -> None:
    """Held-out scores: over one field as curves, over two as a heat map for each method."""
    if len(grids[0].fields) == 1:
        figure = Figure(figsize=(5.5, 4.2), layout="constrained")
        _sweep_curves(figure.subplots(), grids)
    else:
        figure = Figure(figsize=(5.5 * len(grids), 4.2), layout="constrained")
        for axes, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids):
            _heat_map(figure, axes, grid)
    figure.savefig(path, dpi=120)


def _sweep_curves(axes: Axes, grids: Sequence[Grid]) -> None:
    ((field, values),) = grids[0].fields.items()
    for grid in grids:
        deviations = np.nan_to_num(grid.array("deviation"))
        axes.errorbar(
            values, grid.array("mean"), deviations, marker="o", capsize=3, label=grid.method
        )
    axes.set(xlabel=field, ylabel=grids[0].title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _heat_map(figure: Figure, axes: Axes, grid: Grid) -> None:
    (rows, row_values), (columns, column_values) = grid.fields.items()
    means = grid.array("mean")
    image = axes.imshow(means, cmap="viridis", aspect="auto")
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_title(grid.method, fontsize="small")
    axes.set_xticks(range(len(column_values)), column_values)
    axes.set_yticks(range(len(row_values)), row_values)
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (i, j), mean in np.ndenumerate(means):
        ink = "black" if mean > middle else "white"
        axes.text(j, i, grid.metric.form.format(mean), ha="center", va="center", color=ink)
    figure.colorbar(image, label=grid.title)
