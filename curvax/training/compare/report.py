"""What runs came to, as tables and in plain words."""

import io
import math
from collections.abc import Mapping

from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curvax.training.compare.comparison import LARGEST_EIGENVALUE, Outcomes, Score
from curvax.training.compare.summary import Summary
from curvax.training.runtime.run_dir import Outcome
from curvax.training.selection_metric import Goal
from curvax.training.tasks import Task

Figures = Mapping[str, float]
_LOSS = "train/loss"

ROWS = {
    "test_accuracy": ("test accuracy", "{:.1%}"),
    "test_top5": ("test top-5 accuracy", "{:.1%}"),
    "test_squared_error": ("test squared error", "{:.3f}"),
    "test_loss": ("test loss", "{:.3f}"),
    "train_accuracy": ("training accuracy", "{:.1%}"),
    "train_squared_error": ("training squared error", "{:.3f}"),
    "train_loss": ("training loss", "{:.3f}"),
    "memorised": ("wrong labels learnt", "{:.1%}"),
    "lambda_max": ("largest Hessian eigenvalue", "{:.3g}"),
    "seconds": ("seconds", "{:.0f}"),
}
"""The figures at the end of a run: heading and format."""


def run_table(figures: Mapping[str, Figures]) -> Table:
    """A row for each figure, a column for each method."""
    table = Table("", *map(escape, figures))
    for name, (heading, form) in ROWS.items():
        if any(name in found for found in figures.values()):
            cells = (form.format(found.get(name, math.nan)) for found in figures.values())
            table.add_row(heading, *cells)
    return table


def spread(summary: Summary, form: str) -> str:
    """`83.1% ± 0.9% (±2.2%)`: mean, standard deviation, half width of the 95 % interval."""
    if math.isnan(summary.mean):
        return "diverged"
    mean, width = form.format(summary.mean), form.replace("+", "")
    if math.isnan(summary.deviation):
        return mean
    return f"{mean} ± {width.format(summary.deviation)} (±{width.format(summary.half_width)})"


def score_table(scores: Mapping[str, Score], goal: Goal) -> Table:
    """One row for each arm: score, gain over the base and λ_max as mean ± deviation (95 %)."""
    table = Table(
        "method", f"test {goal.title}", f"{goal.over} the base", "Hessian λ_max", "seconds a run"
    )
    measured = not all(math.isnan(score.lambda_max.mean) for score in scores.values())
    for place, (name, score) in enumerate(scores.items()):
        gain = Summary(*(goal.scale * x for x in score.gain))
        table.add_row(
            escape(name),
            spread(score.reached, goal.form),
            spread(gain, f"{{:+.{goal.digits}f}}") if place else "",
            spread(score.lambda_max, "{:.3g}") if measured else "",
            f"{score.seconds:.0f}",
        )
    table.caption = "mean ± standard deviation over seeds (± half width of the 95 % interval)"
    return table


def as_text(table: Table) -> str:
    """The table as it looks on a wide terminal."""
    page = io.StringIO()
    Console(file=page, width=200).print(table)
    return page.getvalue()


def gains(scores: Mapping[str, Score], goal: Goal) -> str:
    """What each arm won over the first, in plain words."""
    base, *others = scores
    lines = []
    for name in others:
        gain, _, width = (goal.scale * x for x in scores[name].gain)
        form = f"+.{goal.digits}f"
        line = f"{name}: {gain:{form}} {goal.over} {base}"
        if not math.isnan(width):
            line += f" (95 % interval {gain - width:{form}} to {gain + width:{form}})"
        lines.append(f"{name} diverged." if math.isnan(gain) else f"{line}.")
    return "\n".join(lines)


def verdict(config: ConfigDict, task: Task, outcomes: Outcomes) -> str:
    """What training the methods side by side showed, in plain words; the first is the base."""
    runs = {name: arm[0] for name, arm in outcomes.items()}
    (_, base), *others = runs.items()
    sentences = [_setting(config, task, base.figures)]
    sentences += [_performance(name, run, task.goal) for name, run in runs.items()]
    sentences += [_speed(name, run, base) for name, run in others]
    if len(others) == 1:
        ((_, method),) = others
        sentences += [_lead(base.figures, method.figures, task.goal)]
        sentences += _flatness(base.figures, method.figures)
    sentences += [f"This is one seed: `curvax compare {config.name} --seeds 3` shows the spread."]
    return " ".join(filter(None, sentences))


def _setting(config: ConfigDict, task: Task, figures: Figures) -> str:
    wrong = figures.get("wrong_labels")
    noise = f", {wrong:.0%} of them wrongly labelled" if wrong else ""
    examples = f"{int(figures['train_examples'])} {task.examples} of {config.data.name}"
    return f"The methods trained on the same {examples}{noise}."


def _performance(name: str, outcome: Outcome, goal: Goal) -> str:
    figures, learnt = outcome.figures, ""
    if "memorised" in figures:
        learnt = f"learnt {figures['memorised']:.0%} of the wrong labels and "
    scores = [record[goal.record] for record in outcome.records if goal.record in record]
    best = goal.form.format(goal.best(scores))
    claim = goal.claim.format(goal.form.format(figures[goal.figure]))
    return f"`{name}` {learnt}{claim} ({best} at its best epoch)."


def _speed(name: str, method: Outcome, base: Outcome) -> str:
    losses = lambda run: [(r["step"], r[_LOSS]) for r in run.records if _LOSS in r]
    lowest = min((loss for _, loss in losses(base)), default=-math.inf)
    step = next((step for step, loss in losses(method) if loss <= lowest), None)
    if step is None:
        return ""
    return (
        f"`{name}` came down to the lowest training loss of the base, {lowest:.3g}, at step "
        f"{step:.0f} of {method.figures['steps']:.0f}."
    )


def _lead(base: Figures, method: Figures, goal: Goal) -> str:
    gain = goal.worth(method[goal.figure]) - goal.worth(base[goal.figure])
    lead = f"{goal.scale * abs(gain):.{goal.digits}f} {goal.unit}".strip()
    return f"At the end it is {lead} {'ahead' if gain >= 0 else 'behind'}."


def _flatness(base: Figures, method: Figures) -> list[str]:
    a, b = (figures.get(LARGEST_EIGENVALUE, math.nan) for figures in (base, method))
    if not (a > 0 and b > 0):
        return []
    return [
        f"It ended where the loss is {max(a, b) / min(a, b):.1f} times "
        f"{'flatter' if b < a else 'sharper'}: the largest eigenvalue of the training loss's "
        f"Hessian is {b:.3g} there, and {a:.3g} at the base's end. (Part of that is the learning "
        "rate, where the two differ in it.)"
    ]
