"""The results of runs as tables and sentences."""

import io
import math
from collections.abc import Mapping

from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from curvax.training.compare.comparison import LARGEST_EIGENVALUE, Outcomes, Score
from curvax.training.compare.summary import Summary
from curvax.training.runtime.run_dir import Outcome
from curvax.training.selection_metric import SelectionMetric
from curvax.training.tasks import Task

Metrics = Mapping[str, float]
_LOSS = "train/loss"

ROWS = {
    "test_accuracy": ("test accuracy", "{:.1%}"),
    "test_top5": ("test top-5 accuracy", "{:.1%}"),
    "test_auc": ("test AUC", "{:.4f}"),
    "test_squared_error": ("test squared error", "{:.3f}"),
    "test_loss": ("test loss", "{:.3f}"),
    "train_accuracy": ("training accuracy", "{:.1%}"),
    "train_auc": ("training AUC", "{:.4f}"),
    "train_squared_error": ("training squared error", "{:.3f}"),
    "train_loss": ("training loss", "{:.3f}"),
    "memorised": ("wrong labels learnt", "{:.1%}"),
    "lambda_max": ("largest Hessian eigenvalue", "{:.3g}"),
    "seconds": ("seconds", "{:.0f}"),
}
"""Final metric ↦ heading and format."""


def run_table(metrics: Mapping[str, Metrics]) -> Table:
    """A row for each metric, a column for each variant."""
    table = Table("", *map(escape, metrics))
    for name, (heading, form) in ROWS.items():
        if any(name in found for found in metrics.values()):
            cells = (form.format(found.get(name, math.nan)) for found in metrics.values())
            table.add_row(heading, *cells)
    return table


def format_summary(summary: Summary, form: str) -> str:
    """`83.1% ± 0.9% (±2.2%)`: mean, standard deviation, half width of the 95 % interval."""
    if math.isnan(summary.mean):
        return "diverged"
    mean, width = form.format(summary.mean), form.replace("+", "")
    if math.isnan(summary.deviation):
        return mean
    return f"{mean} ± {width.format(summary.deviation)} (±{width.format(summary.half_width)})"


def score_table(scores: Mapping[str, Score], metric: SelectionMetric) -> Table:
    """A row for each variant: score, gain over the baseline, λ_max; mean ± deviation (95 %)."""
    # Wide enough for the calls of a pipe; a call is folded rather than cut.
    table = Table(
        Column("method", overflow="fold", min_width=20),
        f"test {metric.title}",
        f"{metric.over} the base",
        "λ_max",
        "seconds",
    )
    measured = not all(math.isnan(score.lambda_max.mean) for score in scores.values())
    for place, (name, score) in enumerate(scores.items()):
        gain = Summary(*(metric.scale * x for x in score.gain))
        table.add_row(
            escape(name),
            format_summary(score.reached, metric.form),
            format_summary(gain, f"{{:+.{metric.digits}f}}") if place else "",
            format_summary(score.lambda_max, "{:.3g}") if measured else "",
            f"{score.seconds:.0f}",
        )
    table.caption = "mean ± standard deviation over seeds (± half width of the 95 % interval)"
    return table


def as_text(table: Table) -> str:
    """The table as text of at most 200 columns."""
    page = io.StringIO()
    Console(file=page, width=200).print(table)
    return page.getvalue()


def gains(scores: Mapping[str, Score], metric: SelectionMetric) -> str:
    """A sentence for each variant about its gain over the first."""
    base, *others = scores
    lines = []
    for name in others:
        gain, _, width = (metric.scale * x for x in scores[name].gain)
        form = f"+.{metric.digits}f"
        line = f"{name}: {gain:{form}} {metric.over} {base}"
        if not math.isnan(width):
            line += f" (95 % interval {gain - width:{form}} to {gain + width:{form}})"
        lines.append(f"{name} diverged." if math.isnan(gain) else f"{line}.")
    return "\n".join(lines)


def verdict(config: ConfigDict, task: Task, outcomes: Outcomes) -> str:
    """A paragraph about one seed of each method; the first is the baseline."""
    runs = {name: runs[0] for name, runs in outcomes.items()}
    (_, base), *others = runs.items()
    sentences = [_setting(config, task, base.metrics)]
    sentences += [_performance(name, run, task.metric) for name, run in runs.items()]
    sentences += [_speed(name, run, base) for name, run in others]
    if len(others) == 1:
        ((_, method),) = others
        sentences += [_lead(base.metrics, method.metrics, task.metric)]
        sentences += _flatness(base.metrics, method.metrics)
    sentences += [f"This is one seed: `curvax compare {config.name} --seeds 3` shows the spread."]
    return " ".join(filter(None, sentences))


def _setting(config: ConfigDict, task: Task, metrics: Metrics) -> str:
    wrong = metrics.get("wrong_labels")
    noise = f", {wrong:.0%} of them wrongly labelled" if wrong else ""
    examples = f"{int(metrics['train_examples'])} {task.examples} of {config.data.name}"
    return f"The methods trained on the same {examples}{noise}."


def _performance(name: str, outcome: Outcome, metric: SelectionMetric) -> str:
    metrics, learnt = outcome.metrics, ""
    if "memorised" in metrics:
        learnt = f"learnt {metrics['memorised']:.0%} of the wrong labels and "
    scores = [record[metric.log_key] for record in outcome.records if metric.log_key in record]
    best = metric.form.format(metric.best(scores))
    claim = metric.claim.format(metric.form.format(metrics[metric.result_key]))
    return f"`{name}` {learnt}{claim} ({best} at its best epoch)."


def _speed(name: str, method: Outcome, base: Outcome) -> str:
    losses = lambda run: [(r["step"], r[_LOSS]) for r in run.records if _LOSS in r]
    lowest = min((loss for _, loss in losses(base)), default=-math.inf)
    step = next((step for step, loss in losses(method) if loss <= lowest), None)
    if step is None:
        return ""
    return (
        f"`{name}` reached the lowest training loss of the baseline, {lowest:.3g}, at step "
        f"{step:.0f} of {method.metrics['steps']:.0f}."
    )


def _lead(base: Metrics, method: Metrics, metric: SelectionMetric) -> str:
    gain = metric.key(method[metric.result_key]) - metric.key(base[metric.result_key])
    lead = f"{metric.scale * abs(gain):.{metric.digits}f} {metric.unit}".strip()
    return f"At the end it is {lead} {'ahead' if gain >= 0 else 'behind'}."


def _flatness(base: Metrics, method: Metrics) -> list[str]:
    a, b = (metrics.get(LARGEST_EIGENVALUE, math.nan) for metrics in (base, method))
    if not (a > 0 and b > 0):
        return []
    return [
        f"Its minimum is {max(a, b) / min(a, b):.1f} times "
        f"{'flatter' if b < a else 'sharper'}: the largest eigenvalue of the training loss's "
        f"Hessian is {b:.3g}, and {a:.3g} for the baseline. (Different learning rates cause a part "
        "of such differences.)"
    ]
