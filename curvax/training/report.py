"""What runs came to, as tables and in plain words."""

import io
import math
from collections.abc import Mapping

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from curvax.training.compare import Score
from curvax.training.statistics import Summary

Figures = Mapping[str, float]

COLUMNS = {
    "test_accuracy": ("test accuracy", "{:.1%}"),
    "test_top5": ("test top-5", "{:.1%}"),
    "test_loss": ("test loss", "{:.3f}"),
    "train_accuracy": ("train accuracy", "{:.1%}"),
    "train_loss": ("train loss", "{:.3f}"),
    "memorised": ("wrong labels learnt", "{:.1%}"),
    "hessian_max": ("Hessian λ_max", "{:.3g}"),
    "seconds": ("seconds", "{:.0f}"),
}
"""The figures at the end of a run: heading and format."""


def run_table(outcomes: Mapping[str, Figures]) -> Table:
    """One row for each method, one column for each figure that any of them has."""
    shown = [name for name in COLUMNS if any(name in figures for figures in outcomes.values())]
    table = Table("method", *(COLUMNS[name][0] for name in shown))
    for method, figures in outcomes.items():
        table.add_row(
            method, *(COLUMNS[name][1].format(figures.get(name, math.nan)) for name in shown)
        )
    return table


def spread(summary: Summary, form: str) -> str:
    """`83.1% ± 0.9% (±2.2%)`: mean, standard deviation, half width of the 95 % interval."""
    mean, width = form.format(summary.mean), form.replace("+", "")
    if math.isnan(summary.deviation):
        return mean
    return f"{mean} ± {width.format(summary.deviation)} (±{width.format(summary.half_width)})"


def score_table(scores: Mapping[str, Score]) -> Table:
    """One row for each arm: accuracy, gain over the base and λ_max as mean ± deviation (95 %)."""
    table = Table(
        "method", "test accuracy", "points over the base", "Hessian λ_max", "seconds a run"
    )
    for name, score in scores.items():
        points = Summary(*(100 * x for x in score.gain))
        table.add_row(
            name,
            spread(score.accuracy, "{:.1%}"),
            spread(points, "{:+.1f}") if any(score.gain) else "",
            spread(score.hessian_max, "{:.3g}"),
            f"{score.seconds:.0f}",
        )
    table.caption = "mean ± standard deviation over seeds (± half width of the 95 % interval)"
    return table


def as_text(table: Table) -> str:
    """The table as it looks on a wide terminal."""
    page = io.StringIO()
    Console(file=page, width=200).print(table)
    return page.getvalue()


def gains(scores: Mapping[str, Score]) -> str:
    """What each arm won over the first, in plain words."""
    base, *others = scores
    lines = []
    for name in others:
        gain = scores[name].gain
        points, width = 100 * gain.mean, 100 * gain.half_width
        interval = (
            ""
            if math.isnan(width)
            else f" (95 % interval {points - width:+.1f} to {points + width:+.1f})"
        )
        lines.append(f"{name}: {points:+.1f} points over {base}{interval}.")
    return "\n".join(lines)


def verdict(config: ConfigDict, figures: Mapping[str, Figures]) -> str:
    """What training the base and the method side by side showed, in plain words."""
    (_, base), (name, method) = figures.items()
    gain = 100 * (method["test_accuracy"] - base["test_accuracy"])
    return " ".join(
        [
            _setting(config, base),
            *(_performance(*item) for item in figures.items()),
            f"That is {abs(gain):.1f} points {'more' if gain >= 0 else 'fewer'} for {name}.",
            *_flatness(base, method),
            f"One seed shows no spread: `curvax compare {config.name} --seeds 3` does.",
        ]
    )


def _setting(config: ConfigDict, figures: Figures) -> str:
    noise = f", {config.data.noise:.0%} of whose labels are wrong" if config.data.noise else ""
    examples = int(figures["train_examples"])
    return f"Both methods saw the same {examples} training images of {config.data.name}{noise}."


def _performance(name: str, figures: Figures) -> str:
    learnt = (
        f" learnt {figures['memorised']:.0%} of the wrong labels and"
        if "memorised" in figures
        else ""
    )
    return f"{name}{learnt} names {figures['test_accuracy']:.1%} of the test images rightly."


def _flatness(base: Figures, method: Figures) -> list[str]:
    a, b = (figures.get("hessian_max", math.nan) for figures in (base, method))
    if not (a > 0 and b > 0):
        return []
    return [
        f"The largest eigenvalue of the training loss's Hessian is {b:.3g} where it ended and "
        f"{a:.3g} where the base did: {max(a, b) / min(a, b):.1f} times "
        f"{'flatter' if b < a else 'sharper'}."
    ]
