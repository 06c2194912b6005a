"""What `curvax evaluate` does: the newest checkpoints of a run on one or many test sets."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from curvax.training.evaluation import imagenet_real, test_sets, topk, trained_runs
from curvax.training.evaluation.test_sets import Benchmark
from curvax.training.evaluation.topk import Found
from curvax.training.evaluation.trained_runs import Subject
from curvax.training.experiment import Experiment
from curvax.training.runtime import run_dir

_FILE, _OWN = "evaluate.json", "own"

Page = dict[str, Any]
"""What evaluate.json holds: for each method the step and what was found, by the place of the data
and by test set. Two places may have test sets of one name."""


def command(
    folder: Path,
    path: Path | None,
    labels: Path | None,
    corruptions: bool,
    assignments: Sequence[str] = (),
) -> None:
    """`curvax evaluate`: prints tables, and keeps the numbers in evaluate.json of the run's folder.

    Args:
        folder: of a run, an arm of it or a seed of that.
        path: pictures or records to test on, rather than the run's own test set.
        labels: sets of right labels, as ImageNet-ReaL's.
        corruptions: also test on the run's own test images made worse.
        assignments: as in `subjects.load`.

    Raises:
        RunError, CheckpointError, ConfigError: as in `subjects.load`, or a run that names no
            classes.
        DataError: there is nothing to test on.
    """
    console, page, where = Console(), {}, _where(path, labels)
    for subject in trained_runs.load([folder], assignments):
        _require_classes(subject)
        found = _examine(subject, console, path, labels, corruptions)
        page[subject.name] = _entry(subject, where, found)
        console.print(*_tables(subject.name, found), sep="\n")
    _keep(folder / _FILE, page)
    console.print(f"In {folder / _FILE}", markup=False, highlight=False, soft_wrap=True)


def _where(path: Path | None, labels: Path | None) -> str:
    """The place of the pictures and, where they are given, of their labels."""
    place = str(path.resolve()) if path else _OWN
    return f"{place}, {labels.resolve()}" if labels else place


def _require_classes(subject: Subject) -> None:
    task = subject.experiment.config.task
    if task != "images":
        raise run_dir.RunError(
            f"`curvax evaluate` tells how often the class is named rightly, and {subject.folder} "
            f"is of the task `{task}`. `curvax inspect` takes runs of every task."
        )


def _examine(
    subject: Subject, console: Console, path: Path | None, labels: Path | None, corruptions: bool
) -> list[Found]:
    """Every test set in turn, under a bar that names it."""
    _, _, experiment, state = subject
    ahead, found = topk.make_ahead(experiment), []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        for benchmark in _benchmarks(experiment, path, labels, corruptions):
            progress.update(bar, description=escape(f"{subject.name} on {benchmark.name}"))
            found.append(topk.rank(experiment, state, benchmark, ahead))
    return found


def _benchmarks(
    experiment: Experiment, path: Path | None, labels: Path | None, corruptions: bool
) -> Iterator[Benchmark]:
    own = test_sets.of_run(experiment)
    for benchmark in [own] if path is None else test_sets.of_path(path, experiment):
        yield imagenet_real.with_labels(benchmark, labels) if labels else benchmark
    if corruptions:
        yield from test_sets.corrupted(experiment)


def _tables(name: str, found: Sequence[Found]) -> Iterator[Table]:
    """One of the sets that stand alone, and one of corruptions by strength."""
    if alone := [each for each in found if "/" not in each.name]:
        yield _list(name, alone)
    if together := [each for each in found if "/" in each.name]:
        yield _grid(name, together)


def _list(name: str, found: Sequence[Found]) -> Table:
    table = Table(escape(name), "images", "classes", "top-1", "top-5")
    for each in found:
        scores = _percent(each.top1), _percent(each.top5)
        table.add_row(escape(each.name), str(each.examples), str(each.classes), *scores)
    return table


def _grid(name: str, found: Sequence[Found]) -> Table:
    """A row for each corruption, a column for each strength, then means."""
    score = {each.name: each.top1 for each in found}
    columns = sorted({each.name.rpartition("/")[2] for each in found})
    table = Table(f"{escape(name)}, top-1", *map(escape, columns), topk.MEAN)
    for row, mean in topk.means(found).items():
        cells = (_percent(score.get(f"{row}/{column}")) for column in columns)
        table.add_row(escape(row), *cells, _percent(mean.top1))
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _entry(subject: Subject, where: str, found: Sequence[Found]) -> Page:
    every = [*found, *topk.means(found).values()]
    results = {each.name: each._asdict() for each in every}
    return {"step": int(subject.state.step), "results": {where: results}}


def _keep(path: Path, page: Page) -> None:
    """Adds to what was found of the same step before."""
    old = json.loads(path.read_text()) if path.exists() else {}
    for name, entry in page.items():
        if old.get(name, {}).get("step") == entry["step"]:
            kept = old[name]["results"]
            for where, results in entry["results"].items():
                kept[where] = kept.get(where, {}) | results
            entry["results"] = kept
    run_dir.write_json(path, old | page)
