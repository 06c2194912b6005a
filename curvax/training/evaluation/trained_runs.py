"""Folders ↦ the trained states in them: a whole run, one of its arms, or one seed of an arm."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from curvax.training.checkpoints import Checkpoints
from curvax.training.compare import commands, comparison
from curvax.training.compare.commands import RunSpec
from curvax.training.experiment import Experiment
from curvax.training.runtime import run_dir
from curvax.training.runtime.run_dir import RunError
from curvax.training.step import State

_ARM, _SEED = re.compile(r"(\d+)-.*"), re.compile(r"seed(\d+)")


class Subject(NamedTuple):
    """A trained state and all that it takes to look at it."""

    name: str  # of its method, told apart from the others
    folder: Path
    experiment: Experiment
    state: State


class _Place(NamedTuple):
    """A seed of an arm, as its run folder tells it."""

    root: Path
    folder: Path
    seed: int
    arm: str
    config: ConfigDict
    plan: RunSpec


def load(folders: Sequence[Path], assignments: Sequence[str] = ()) -> list[Subject]:
    """The newest checkpoint of every run that the folders name, in their order.

    A run folder stands for the first seed of each of its arms, an arm for its first seed. A run of
    more devices than are there is looked at on fewer.

    Args:
        assignments: `--field=value` for fields of `commands.PLACE`, in every run.

    Raises:
        RunError: a folder holds no run or no checkpoint, the runs are of different tasks, or the
            data of one is not there.
        CheckpointError: a checkpoint cannot be read.
        ConfigError: as in `commands.placed`.
    """
    found = (_place(folder, assignments) for given in folders for folder in _seeds(given.resolve()))
    places = list({place.folder: place for place in found}.values())
    for place in places:
        _require_checkpoint(place.folder)
        _require_same_task(places[0], place)
    ready: dict[tuple[Path, str], Experiment] = {}
    subjects = []
    for name, place in zip(_told_apart(places), places):
        key = place.root, place.arm
        ready[key] = ready.get(key) or place.plan.ready(place.config)
        experiment = ready[key].reseeded(place.seed)
        subjects.append(Subject(name, place.folder, experiment, _newest(experiment, place.folder)))
    return subjects


def _newest(experiment: Experiment, folder: Path) -> State:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.restore(experiment.shapes)[0]
    finally:
        checkpoints.close()


def _seeds(folder: Path) -> Iterator[Path]:
    """The folders of the seeds that a folder stands for."""
    if _SEED.fullmatch(folder.name) and run_dir.is_run(folder.parent.parent):
        yield folder
    elif _ARM.fullmatch(folder.name) and run_dir.is_run(folder.parent):
        yield _first_seed(folder)
    elif run_dir.is_run(folder):
        arms = [each for each in folder.iterdir() if _ARM.fullmatch(each.name)]
        yield from map(_first_seed, sorted(arms, key=lambda arm: _number(_ARM, arm)))
    else:
        raise RunError(
            f"{folder} holds no run. Pass a folder that `curvax train` or `curvax compare` left, "
            "or one of those inside it: an arm, as 0-adamw, or a seed of one, as 0-adamw/seed0."
        )


def _number(pattern: re.Pattern[str], folder: Path) -> int:
    match = pattern.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _first_seed(arm: Path) -> Path:
    seeds = [each for each in arm.iterdir() if _SEED.fullmatch(each.name)]
    return min(seeds, key=lambda seed: _number(_SEED, seed), default=arm / "seed0")


def _place(folder: Path, assignments: Sequence[str]) -> _Place:
    root = folder.parent.parent
    config, plan = commands.read(root)
    arms = plan.arms(config)
    arm = list(arms)[_number(_ARM, folder.parent)]
    config = commands.placed(_on_devices_there(arms[arm]), assignments)
    return _Place(root, folder, _number(_SEED, folder), arm, config, plan)


def _on_devices_there(config: ConfigDict) -> ConfigDict:
    """The config on as many of its devices as are there and divide its batch."""
    most = min(config.devices or jax.device_count(), jax.device_count())
    devices = max(n for n in range(1, most + 1) if config.batch % n == 0)
    return comparison.variant(config, devices=devices)


def _require_checkpoint(folder: Path) -> None:
    if not any((folder / "checkpoints").glob("[0-9]*/")):
        raise RunError(
            f"{folder} has no checkpoint to look at. Train it first: `curvax resume "
            f"{folder.parent.parent}` goes on with the run."
        )


def _require_same_task(first: _Place, other: _Place) -> None:
    same = lambda config: (config.task, config.data.name, config.loss)
    if same(first.config) != same(other.config):
        raise RunError(
            "Runs stand side by side where they have one loss on one kind of data: "
            f"{_told(first)}, and {_told(other)}. Inspect them one by one."
        )


def _told(place: _Place) -> str:
    config = place.config
    loss = f" under the loss `{config.loss}`" if config.loss else ""
    return f"{place.folder} is of the task `{config.task}` on `{config.data.name}`{loss}"


def _told_apart(places: Sequence[_Place]) -> list[str]:
    """The names of the arms, with the seed and then the run folder where they coincide."""
    names = [place.arm for place in places]
    for more in (lambda p: f"seed {p.seed}", lambda p: p.root.name):
        often = Counter(names)
        names = [f"{n}, {more(p)}" if often[n] > 1 else n for n, p in zip(names, places)]
    return names
