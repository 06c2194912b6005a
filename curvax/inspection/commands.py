"""`curvax inspect`: loads runs, measures them within a time budget, writes a report."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

import curvax
from curvax.inspection import render
from curvax.inspection.budget import Budget
from curvax.inspection.checkpoint_loss import CheckpointLoss, checkpoint_loss
from curvax.inspection.encoding import encode
from curvax.inspection.findings import RunFacts, caveats, findings
from curvax.inspection.measures import MEASURES
from curvax.inspection.page import Content, page
from curvax.inspection.peak_lr import peak_rate
from curvax.inspection.render import RenderedFigure
from curvax.inspection.runner import Omission, Report, Results, measure_all
from curvax.inspection.summary_table import summary_rows
from curvax.training.evaluation.trained_runs import TrainedRun, load
from curvax.training.runtime import run_dir


def inspect(
    folders: Sequence[Path],
    minutes: float,
    examples: int,
    root: Path,
    assignments: Sequence[str] = (),
) -> Path:
    """Measures the newest checkpoints of runs and writes a report into a new folder.

    Args:
        folders: of runs, variants or seeds; the others are compared with the first.
        minutes: time budget of loading and measuring; drawing is extra.
        examples: number of training examples, and of test examples, at most.
        root: where the new folder goes.
        assignments: as in `trained_runs.load`.

    Returns:
        The folder, with inspect.json, report.html and the figures.

    Raises:
        ConfigError, CheckpointError: as in `trained_runs.load`.
    """
    budget, console = Budget(60 * minutes), Console()
    with _bar(console, minutes) as report:
        runs = load(folders, assignments)
        points = {run.name: checkpoint_loss(run, examples) for run in runs}
        found = measure_all(points, budget, report)
    folder = run_dir.create(root, "inspect", runs[0].experiment.config)
    drawn = list(render.draw(found))
    found.omissions += [each for each in drawn if isinstance(each, Omission)]
    shown = [each for each in drawn if isinstance(each, RenderedFigure)]
    for figure in shown:
        (folder / f"{figure.name}.png").write_bytes(figure.png)
    content = _content(runs, points, found, shown, budget)
    run_dir.write_text(folder / "report.html", page(content))
    run_dir.write_json(folder / "inspect.json", _json(content, found, budget))
    _print_summary(console, content, folder)
    return folder


def _content(
    runs: Sequence[TrainedRun],
    points: Mapping[str, CheckpointLoss],
    found: Results,
    shown: Sequence[RenderedFigure],
    budget: Budget,
) -> Content:
    config = runs[0].experiment.config
    size = max(p.objective.size for p in points.values())
    task = runs[0].experiment.task
    facts = {run.name: _facts(run) for run in runs}
    return Content(
        title=f"The geometry of {config.name}",
        lead=f"The loss around the newest checkpoint of each run, on the first {size} training "
        f"{task.examples} of {config.data.name} with the labels used in training.",
        findings=findings(found),
        caveats=caveats(found, facts),
        about={s.name: _about(s, points[s.name], facts[s.name].rate) for s in runs},
        rows=list(summary_rows(found).values()),
        figures=shown,
        omissions=found.omissions,
        closing=f"curvax {curvax.__version__}, {time.strftime('%Y-%m-%d %H:%M')}. Measuring took "
        f"{found.seconds:.0f} s of a budget of {budget.seconds:.0f} s. All numbers are in "
        "`inspect.json` next to this page.",
    )


def _facts(run: TrainedRun) -> RunFacts:
    config = run.experiment.config
    return RunFacts(
        model=f"{config.model.name} {config.model.options.to_dict()}",
        rate=peak_rate(run.experiment.optimizer, run.experiment.steps),
        step=int(run.state.step),
        steps=run.experiment.steps,
        normalised="batch_stats" in run.state.model_state,
    )


def _about(run: TrainedRun, point: CheckpointLoss, rate: float | None) -> dict[str, str]:
    experiment, config = run.experiment, run.experiment.config
    metric = experiment.task.metric
    scores = {"training": experiment.data.train, "test": experiment.data.test}
    form = lambda split: metric.form.format(experiment.score(run.state, split)[metric.name])
    return {
        "method": f"`{config.optimizer}`",
        "learning rate at its peak": "unknown" if rate is None else f"{rate:g}",
        "model": f"{config.model.name}, {point.size:,} parameters",
        "wrong labels": f"{experiment.data.wrong.mean():.0%}",
        "seed": str(config.seed),
        "step": f"{int(run.state.step)} of {experiment.steps}",
        **{f"{name} {metric.title}": form(split) for name, split in scores.items()},
        "folder": f"`{run.folder}`",
    }


def _json(content: Content, found: Results, budget: Budget) -> dict[str, Any]:
    return {
        "curvax": curvax.__version__,
        "seconds": found.seconds,
        "budget": budget.seconds,
        "runs": content.about,
        "findings": content.findings,
        "caveats": content.caveats,
        "headlines": {each.name: encode(each.values) for each in content.rows},
        "measures": encode(found.results),
        "left_out": [omission._asdict() for omission in found.omissions],
    }


def _print_summary(console: Console, content: Content, folder: Path) -> None:
    for sentence in (*content.findings, *content.caveats):
        console.print(f"- {sentence}", markup=False, highlight=False)
    for omission in content.omissions:
        if omission.kind != "inapplicable":
            text = f"- Left out: {omission.measure}. {omission.reason}"
            console.print(text, markup=False, highlight=False)
    console.print(f"Open {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bar(console: Console, minutes: float) -> Iterator[Report]:
    """A progress bar over the measures, with the time spent and the budget."""
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn(f"of {minutes:g} min"),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=len(MEASURES))
        yield lambda count, what: progress.update(task, completed=count, description=what)
        progress.update(task, completed=len(MEASURES), description="measured")
