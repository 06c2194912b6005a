"""Several methods on the same model and data, for matched epochs and over seeds.

A variant is one method with one setting: a name and a config. Every run of a variant, one for each
seed, has a folder of its own, so that an interrupted comparison resumes where it stopped.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from curvax.training.compare.summary import Summary, summarise
from curvax.training.config.configs import assign
from curvax.training.config.recipe import outlines
from curvax.training.experiment import Experiment
from curvax.training.loop import NotFinite, Report, fit
from curvax.training.runtime import run_dir
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.run_dir import Outcome
from curvax.training.selection_metric import SelectionMetric

LARGEST_EIGENVALUE = "lambda_max"

Variants = dict[str, ConfigDict]
"""Variant ↦ config."""
Outcomes = Mapping[str, Sequence[Outcome]]
"""Variant ↦ its runs, one for each seed."""


class Score(NamedTuple):
    """The result of one variant over seeds."""

    reached: Summary  # of the selection metric
    lambda_max: Summary
    gain: Summary  # of the selection metric over the baseline's, paired by seed
    seconds: float  # per run


def replace(config: ConfigDict, **fields: object) -> ConfigDict:
    """A copy of the config with some top-level fields changed."""
    changed = config.copy_and_resolve_references()
    changed.update(fields)
    return changed


def variants(config: ConfigDict, optimizers: Sequence[str], *, fair: bool = False) -> Variants:
    """A variant for each method; with `fair` also the baseline for twice the epochs.

    A step of SAM costs two gradients, so the paper also trains its baseline for twice the epochs
    and counts the better score. Foret et al., SAM, arXiv:2010.01412, section 3.1.

    Args:
        config: shared by all methods but for `optimizer`.
        optimizers: the methods' texts, the baseline first.
        fair: add the longer baseline.

    Raises:
        ConfigError: a method is given twice, or a text cannot be parsed.
    """
    named = {n: replace(config, optimizer=t) for n, t in zip(labels(optimizers), optimizers)}
    if len(named) < len(optimizers):
        raise ConfigError(
            "Methods are compared by their texts, and one of them is given twice: "
            f"{', '.join(f'`{text}`' for text in optimizers)}."
        )
    if not fair:
        return named
    base = next(iter(named))
    longer = replace(named[base], epochs=2 * config.epochs)
    return {base: named.pop(base), f"{base}, 2 × epochs": longer, **named}


def labels(optimizers: Sequence[str]) -> list[str]:
    """Short names for the methods: their outlines, with the arguments in which equal ones differ,
    and whole texts where these still coincide."""
    found = outlines(optimizers)
    return [o if found.count(o) == 1 else text for o, text in zip(found, optimizers)]


def grid(methods: Variants, fields: Mapping[str, Sequence[str]]) -> Variants:
    """Every method at every point of a grid of field values; the last field varies fastest."""
    points: Variants = {}
    for (name, config), values in itertools.product(
        methods.items(), itertools.product(*fields.values())
    ):
        point = replace(config)
        for field, value in zip(fields, values):
            assign(point, field, value)
        setting = ", ".join(f"{field}={value}" for field, value in zip(fields, values))
        points[f"{name}, {setting}"] = point
    return points


def run(
    experiments: Mapping[str, Experiment],
    seeds: int,
    folder: Path,
    row: Callable[[str, int], Report],
    *,
    may_diverge: bool = False,
) -> dict[str, list[Outcome]]:
    """Trains every variant over `seeds` seeds, starting from its config's own.

    Args:
        experiments: variant ↦ its experiment.
        seeds: runs per variant.
        folder: holds the runs' folders; finished runs there are read, not repeated.
        row: starts a row of the progress display, `(name, steps) -> report`.
        may_diverge: record a run that met a NaN without metrics, and continue with the others.

    Raises:
        NotFinite: a run met a NaN, and `may_diverge` is False.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in experiments}
    for name, seed, run_folder in run_folders(experiments, seeds, folder):
        experiment = experiments[name]
        run_folder.mkdir(parents=True, exist_ok=True)
        report = row(f"{name}, seed {seed}", experiment.steps)
        try:
            outcomes[name].append(fit(experiment.with_seed(seed), run_folder, report))
        except NotFinite:
            if not may_diverge:
                raise
            outcomes[name].append(Outcome({}, []))
    return outcomes


def run_folders(
    experiments: Mapping[str, Experiment], seeds: int, folder: Path
) -> Iterator[tuple[str, int, Path]]:
    """Variant, seed and folder of every run, in the order of training.

    A folder that is there counts by its number, for earlier versions named some variants otherwise.
    """
    for number, (name, experiment) in enumerate(experiments.items()):
        slug = re.sub(r"\W+", "-", name).strip("-")[:60]
        place = next(folder.glob(f"{number}-*"), folder / f"{number}-{slug}")
        first = experiment.config.seed
        for seed in range(first, first + seeds):
            yield name, seed, place / f"seed{seed}"


def without_checkpoint(
    experiments: Mapping[str, Experiment], seeds: int, folder: Path
) -> Iterator[Experiment]:
    """The experiments of runs that have no checkpoint yet."""
    for name, _, run_folder in run_folders(experiments, seeds, folder):
        if not any((run_folder / "checkpoints").glob("[0-9]*/")):
            yield experiments[name]


def with_better_baseline(
    outcomes: Outcomes, metric: SelectionMetric
) -> dict[str, Sequence[Outcome]]:
    """Puts a new baseline first: for each seed, the better of the first two variants."""
    (name, short), (_, long), *_ = outcomes.items()
    key = lambda run: metric.key(run.metrics.get(metric.result_key, math.nan))
    better = [max(pair, key=key) for pair in zip(short, long)]
    return {f"{name}, better of both": better, **outcomes}


def score(outcomes: Outcomes, metric: SelectionMetric) -> dict[str, Score]:
    """Summarises every variant; gains are counted from the first."""
    reached = {name: values(runs, metric.result_key) for name, runs in outcomes.items()}
    base = next(iter(reached.values()))
    return {
        name: Score(
            summarise(reached[name]),
            summarise(values(runs, LARGEST_EIGENVALUE)),
            summarise([ours - theirs for ours, theirs in zip(reached[name], base)]),
            summarise(values(runs, "seconds")).mean,
        )
        for name, runs in outcomes.items()
    }


def values(runs: Sequence[Outcome], name: str) -> list[float]:
    """A metric of every run; NaN where it was not computed or the run diverged."""
    return [run.metrics.get(name, math.nan) for run in runs]


def write(
    folder: Path, outcomes: Outcomes, scores: Mapping[str, Score], metric: SelectionMetric
) -> None:
    """Writes compare.json: for each variant its summaries and the metrics of every run."""
    page = {
        name: {
            metric.name: scores[name].reached._asdict(),
            "lambda_max": scores[name].lambda_max._asdict(),
            "gain": scores[name].gain._asdict(),
            "runs": [run.metrics for run in runs],
        }
        for name, runs in outcomes.items()
    }
    run_dir.write_json(folder / "compare.json", page)
