"""`curvax evaluate`: the newest checkpoints of a run on one or many evaluation sets."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from curvax.training.augment import preprocessing
from curvax.training.evaluation import imagenet_real, test_sets, topk, trained_runs
from curvax.training.evaluation.test_sets import EvalSet
from curvax.training.evaluation.topk import TopKScores
from curvax.training.evaluation.trained_runs import TrainedRun
from curvax.training.experiment import Experiment
from curvax.training.runtime import run_dir
from curvax.training.runtime.errors import ConfigError

_FILE, _OWN = "evaluate.json", "own"

Page = dict[str, Any]
"""The content of evaluate.json: {variant: {"step": …, "results": {data path: {set: scores}}}}. Sets
in two places may have one name."""


def command(
    folder: Path,
    path: Path | None,
    labels: Path | None,
    corruptions: bool,
    assignments: Sequence[str] = (),
    attack: str | None = None,
) -> None:
    """`curvax evaluate`: prints tables and keeps the numbers in evaluate.json of the run's folder.

    Args:
        folder: of a run, of one of its variants, or of a seed.
        path: images or records to evaluate on; by default the run's own test set.
        labels: a file of correct labels, as ImageNet-ReaL's.
        corruptions: also evaluate on corrupted versions of the run's own test images.
        assignments: as in `trained_runs.load`.
        attack: also evaluate under this attack, a text as `pgd(2/255, steps=10)`.

    Raises:
        ConfigError: as in `trained_runs.load`, the text of the attack cannot be parsed, or the run
            is not of the task `images`.
        CheckpointError: as in `trained_runs.load`.
        DataError: there is nothing to evaluate on.
    """
    console, page, where = Console(), {}, _where(path, labels)
    for run in trained_runs.load([folder], assignments):
        _require_classes(run)
        found = _evaluate(run, console, path, labels, corruptions, attack)
        page[run.name] = _entry(run, where, found)
        console.print(*_tables(run.name, found), sep="\n")
    _keep(folder / _FILE, page)
    console.print(f"In {folder / _FILE}", markup=False, highlight=False, soft_wrap=True)


def _where(path: Path | None, labels: Path | None) -> str:
    """The path of the images and, if given, of their labels."""
    place = str(path.resolve()) if path else _OWN
    return f"{place}, {labels.resolve()}" if labels else place


def _require_classes(run: TrainedRun) -> None:
    task = run.experiment.config.task
    if task != "images":
        raise ConfigError(
            f"`curvax evaluate` computes classification accuracies, and {run.folder} is of the "
            f"task `{task}`. `curvax inspect` takes runs of every task."
        )


def _evaluate(
    run: TrainedRun,
    console: Console,
    path: Path | None,
    labels: Path | None,
    corruptions: bool,
    attack: str | None,
) -> list[TopKScores]:
    """The scores on every set, under a progress bar that names it."""
    _, _, experiment, state = run
    ranks, found = {"": topk.make_rank(experiment)}, []
    if attack:
        moved = preprocessing.attack(experiment.config, attack)
        ranks[f" under {moved}"] = topk.make_rank(experiment, moved)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        for eval_set in _eval_sets(experiment, path, labels, corruptions):
            for suffix, rank in ranks.items():
                named = eval_set._replace(name=eval_set.name + suffix)
                progress.update(bar, description=escape(f"{run.name} on {named.name}"))
                found.append(topk.evaluate(experiment, state, named, rank))
    return found


def _eval_sets(
    experiment: Experiment, path: Path | None, labels: Path | None, corruptions: bool
) -> Iterator[EvalSet]:
    own = test_sets.of_run(experiment)
    for eval_set in [own] if path is None else test_sets.of_path(path, experiment):
        yield imagenet_real.with_labels(eval_set, labels) if labels else eval_set
    if corruptions:
        yield from test_sets.corrupted(experiment)


def _tables(name: str, found: Sequence[TopKScores]) -> Iterator[Table]:
    """A table of the single sets, and one of corruptions by strength."""
    if alone := [each for each in found if "/" not in each.name]:
        yield _list(name, alone)
    if together := [each for each in found if "/" in each.name]:
        yield _grid(name, together)


def _list(name: str, found: Sequence[TopKScores]) -> Table:
    table = Table(escape(name), "images", "classes", "top-1", "top-5")
    for each in found:
        scores = _percent(each.top1), _percent(each.top5)
        table.add_row(escape(each.name), str(each.examples), str(each.classes), *scores)
    return table


def _grid(name: str, found: Sequence[TopKScores]) -> Table:
    """A row for each corruption, a column for each strength, and one for means."""
    score = {each.name: each.top1 for each in found}
    columns = sorted({each.name.rpartition("/")[2] for each in found})
    table = Table(f"{escape(name)}, top-1", *map(escape, columns), topk.MEAN)
    for row, mean in topk.means(found).items():
        cells = (_percent(score.get(f"{row}/{column}")) for column in columns)
        table.add_row(escape(row), *cells, _percent(mean.top1))
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _entry(run: TrainedRun, where: str, found: Sequence[TopKScores]) -> Page:
    every = [*found, *topk.means(found).values()]
    results = {each.name: each._asdict() for each in every}
    return {"step": int(run.state.step), "results": {where: results}}


def _keep(path: Path, page: Page) -> None:
    """Writes the results, together with earlier ones of the same step."""
    old = json.loads(path.read_text()) if path.exists() else {}
    for name, entry in page.items():
        if old.get(name, {}).get("step") == entry["step"]:
            kept = old[name]["results"]
            for where, results in entry["results"].items():
                kept[where] = kept.get(where, {}) | results
            entry["results"] = kept
    run_dir.write_json(path, old | page)
