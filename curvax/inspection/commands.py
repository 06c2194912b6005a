"""What `curvax inspect` does: loads runs, measures them within a budget, writes a folder."""

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
from curvax.inspection.checkpoint_loss import Point, point
from curvax.inspection.encoding import encode
from curvax.inspection.findings import Facts, caveats, findings
from curvax.inspection.measures import MEASURES
from curvax.inspection.page import Content, page
from curvax.inspection.peak_lr import peak_rate
from curvax.inspection.render import Picture
from curvax.inspection.runner import Omission, Report, Survey, survey
from curvax.inspection.summary_table import headlines
from curvax.training.config.configs import numbers
from curvax.training.evaluation.trained_runs import Subject, load
from curvax.training.runtime import run_dir


def inspect(
    folders: Sequence[Path],
    minutes: float,
    examples: int,
    root: Path,
    assignments: Sequence[str] = (),
) -> Path:
    """Looks at the newest checkpoints of runs, and leaves what is found in a new folder.

    Args:
        folders: runs, arms or seeds; the first is what the others are compared with.
        minutes: the budget of loading and measuring; drawing comes on top.
        examples: of the training set, and of the test set, at most.
        root: where the new folder goes.
        assignments: as in `subjects.load`.

    Returns:
        The folder, with inspect.json, report.html and the pictures.

    Raises:
        RunError, CheckpointError, ConfigError: as in `subjects.load`.
    """
    budget, console = Budget(60 * minutes), Console()
    with _bar(console, minutes) as report:
        subjects = load(folders, assignments)
        points = {subject.name: point(subject, examples) for subject in subjects}
        found = survey(points, budget, report)
    folder = run_dir.create(root, "inspect", subjects[0].experiment.config)
    drawn = list(render.draw(found))
    found.omissions += [each for each in drawn if isinstance(each, Omission)]
    shown = [each for each in drawn if isinstance(each, Picture)]
    for picture in shown:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    content = _content(subjects, points, found, shown, budget)
    run_dir.write_text(folder / "report.html", page(content))
    run_dir.write_json(folder / "inspect.json", _json(content, found, budget))
    _tell(console, content, folder)
    return folder


def _content(
    subjects: Sequence[Subject],
    points: Mapping[str, Point],
    found: Survey,
    shown: Sequence[Picture],
    budget: Budget,
) -> Content:
    config = subjects[0].experiment.config
    size = max(p.objective.size for p in points.values())
    task = subjects[0].experiment.task
    facts = {subject.name: _facts(subject) for subject in subjects}
    return Content(
        title=f"The geometry of {config.name}",
        lead=f"The loss around the newest checkpoint of each run, on the first {size} training "
        f"{task.examples} of {config.data.name} with the labels that were trained on.",
        findings=findings(found),
        caveats=caveats(found, facts),
        about={s.name: _about(s, points[s.name], facts[s.name].rate) for s in subjects},
        headlines=list(headlines(found).values()),
        pictures=shown,
        omissions=found.omissions,
        closing=f"curvax {curvax.__version__}, {time.strftime('%Y-%m-%d %H:%M')}. Measuring took "
        f"{found.seconds:.0f} s of a budget of {budget.seconds:.0f} s. All numbers are in "
        "`inspect.json` beside this page.",
    )


def _facts(subject: Subject) -> Facts:
    config = subject.experiment.config
    return Facts(
        model=f"{config.model.name} {config.model.options.to_dict()}",
        rate=peak_rate(config.optimizer, numbers(config)),
        step=int(subject.state.step),
        steps=subject.experiment.steps,
        normalised="batch_stats" in subject.state.model_state,
    )


def _about(subject: Subject, point: Point, rate: float | None) -> dict[str, str]:
    experiment, config = subject.experiment, subject.experiment.config
    goal = experiment.task.goal
    scores = {"training": experiment.material.train, "test": experiment.material.test}
    form = lambda split: goal.form.format(experiment.score(subject.state, split)[goal.name])
    return {
        "method": f"`{config.optimizer}`",
        "learning rate at its peak": "not read" if rate is None else f"{rate:g}",
        "model": f"{config.model.name}, {point.size:,} parameters",
        "wrong labels": f"{experiment.material.wrong.mean():.0%}",
        "seed": str(config.seed),
        "step": f"{int(subject.state.step)} of {experiment.steps}",
        **{f"{name} {goal.title}": form(split) for name, split in scores.items()},
        "folder": f"`{subject.folder}`",
    }


def _json(content: Content, found: Survey, budget: Budget) -> dict[str, Any]:
    return {
        "curvax": curvax.__version__,
        "seconds": found.seconds,
        "budget": budget.seconds,
        "runs": content.about,
        "findings": content.findings,
        "caveats": content.caveats,
        "headlines": {each.name: encode(each.values) for each in content.headlines},
        "measures": encode(found.results),
        "left_out": [omission._asdict() for omission in found.omissions],
    }


def _tell(console: Console, content: Content, folder: Path) -> None:
    for sentence in (*content.findings, *content.caveats):
        console.print(f"- {sentence}", markup=False, highlight=False)
    for omission in content.omissions:
        if omission.kind != "inapplicable":
            text = f"- Not here: {omission.measure}. {omission.reason}"
            console.print(text, markup=False, highlight=False)
    console.print(f"Open {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bar(console: Console, minutes: float) -> Iterator[Report]:
    """A bar over the measures, with the time beside the budget."""
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
