"""Methods compared: the same model and data under several pipes, at matched epochs, over seeds.

An arm is one method under one setting, a name and a config. Each of its runs has a folder of its
own, so that what was stopped goes on where it was.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from curvax.training.compare.summary import Summary, summarise
from curvax.training.config.configs import ConfigError, assign
from curvax.training.config.recipe import outline
from curvax.training.experiment import Experiment
from curvax.training.loop import NotFinite, Report, fit
from curvax.training.runtime import run_dir
from curvax.training.runtime.run_dir import Outcome
from curvax.training.selection_metric import Goal

LARGEST_EIGENVALUE = "lambda_max"

Arms = dict[str, ConfigDict]
Outcomes = Mapping[str, Sequence[Outcome]]
"""For each arm its runs, one for each seed."""


class Score(NamedTuple):
    """What an arm reached, over seeds."""

    reached: Summary  # the score that is the goal
    lambda_max: Summary
    gain: Summary  # of that score over the base's, seed by seed
    seconds: float  # of a run


def variant(config: ConfigDict, **fields: object) -> ConfigDict:
    """A copy of the config with some top-level fields changed."""
    changed = config.copy_and_resolve_references()
    changed.update(fields)
    return changed


def arms(config: ConfigDict, optimizers: Sequence[str], *, fair: bool = False) -> Arms:
    """An arm for each method, and with `fair` one for the first, the base, at twice the epochs.

    One SAM step costs two gradients, so the paper lets its base run twice as long and counts the
    better score. Foret et al., SAM, arXiv:2010.01412, section 3.1.

    Raises:
        ConfigError: a method is given twice.
        RecipeError: a text cannot be read.
    """
    named = {n: variant(config, optimizer=t) for n, t in zip(labels(optimizers), optimizers)}
    if len(named) < len(optimizers):
        raise ConfigError(
            "Methods are compared by their texts, and one of them is given twice: "
            f"{', '.join(f'`{text}`' for text in optimizers)}."
        )
    if not fair:
        return named
    base = next(iter(named))
    longer = variant(named[base], epochs=2 * config.epochs)
    return {base: named.pop(base), f"{base}, 2 × epochs": longer, **named}


def labels(optimizers: Sequence[str]) -> list[str]:
    """Short names for the methods: their outlines, deeper ones where these coincide, or else the
    whole texts."""
    found = [outline(text) for text in optimizers]
    for longer in ([outline(text, deep=True) for text in optimizers], optimizers):
        found = [o if found.count(o) == 1 else long for o, long in zip(found, longer)]
    return found


def grid(methods: Arms, fields: Mapping[str, Sequence[str]]) -> Arms:
    """Every method at every point of a grid of field values, the last field fastest."""
    points: Arms = {}
    for (name, config), values in itertools.product(
        methods.items(), itertools.product(*fields.values())
    ):
        point = variant(config)
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
    """Every arm over `seeds` seeds, from its config's own on.

    Args:
        experiments: the arms, made ready.
        seeds: runs for each arm.
        folder: holds the runs' folders; those that are done there are read, not run.
        row: starts a row of the progress display, `(name, steps) -> report`.
        may_diverge: a run that met a NaN counts as one without figures, and the others go on.

    Raises:
        NotFinite: a run met a NaN, without `may_diverge`.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in experiments}
    for name, seed, place in places(experiments, seeds, folder):
        experiment = experiments[name]
        place.mkdir(parents=True, exist_ok=True)
        report = row(f"{name}, seed {seed}", experiment.steps)
        try:
            outcomes[name].append(fit(experiment.reseeded(seed), place, report))
        except NotFinite:
            if not may_diverge:
                raise
            outcomes[name].append(Outcome({}, []))
    return outcomes


def places(
    experiments: Mapping[str, Experiment], seeds: int, folder: Path
) -> Iterator[tuple[str, int, Path]]:
    """The name, the seed and the folder of every run, in their order."""
    for number, (name, experiment) in enumerate(experiments.items()):
        slug = re.sub(r"\W+", "-", name).strip("-")[:60]
        first = experiment.config.seed
        for seed in range(first, first + seeds):
            yield name, seed, folder / f"{number}-{slug}" / f"seed{seed}"


def not_begun(
    experiments: Mapping[str, Experiment], seeds: int, folder: Path
) -> Iterator[Experiment]:
    """The arms of runs that have no checkpoint yet."""
    for name, _, place in places(experiments, seeds, folder):
        if not any((place / "checkpoints").glob("[0-9]*/")):
            yield experiments[name]


def with_better_base(outcomes: Outcomes, goal: Goal) -> dict[str, Sequence[Outcome]]:
    """Puts first, as the base that counts, seed by seed the better of the first two arms."""
    (name, short), (_, long), *_ = outcomes.items()
    worth = lambda run: goal.worth(run.figures.get(goal.figure, math.nan))
    better = [max(pair, key=worth) for pair in zip(short, long)]
    return {f"{name}, better of both": better, **outcomes}


def score(outcomes: Outcomes, goal: Goal) -> dict[str, Score]:
    """The summary of every arm, gains counted from the first."""
    reached = {name: values(arm, goal.figure) for name, arm in outcomes.items()}
    base = next(iter(reached.values()))
    return {
        name: Score(
            summarise(reached[name]),
            summarise(values(arm, LARGEST_EIGENVALUE)),
            summarise([ours - theirs for ours, theirs in zip(reached[name], base)]),
            summarise(values(arm, "seconds")).mean,
        )
        for name, arm in outcomes.items()
    }


def values(arm: Sequence[Outcome], figure: str) -> list[float]:
    """A figure of every run of an arm; NaN where it was not measured or the run diverged."""
    return [run.figures.get(figure, math.nan) for run in arm]


def write(folder: Path, outcomes: Outcomes, scores: Mapping[str, Score], goal: Goal) -> None:
    """`compare.json`: for each arm its summaries and the figures of every run."""
    page = {
        name: {
            goal.name: scores[name].reached._asdict(),
            "lambda_max": scores[name].lambda_max._asdict(),
            "gain": scores[name].gain._asdict(),
            "runs": [run.figures for run in arm],
        }
        for name, arm in outcomes.items()
    }
    run_dir.write_json(folder / "compare.json", page)
