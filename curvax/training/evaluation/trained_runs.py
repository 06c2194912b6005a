"""Folders ↦ trained states: of all variants of a run, of one variant, or of one seed."""

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
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.run_dir import SEED, VARIANT
from curvax.training.step import State


class TrainedRun(NamedTuple):
    """A trained state with its experiment."""

    name: str  # of its variant, unique among the loaded runs
    folder: Path
    experiment: Experiment
    state: State


class _Stored(NamedTuple):
    """A run to load, described by its run folder."""

    root: Path
    folder: Path
    seed: int
    variant: str
    config: ConfigDict
    spec: RunSpec


def load(folders: Sequence[Path], assignments: Sequence[str] = ()) -> list[TrainedRun]:
    """Loads the newest checkpoint of every run that the folders stand for, in their order.

    A run of more devices than are available is loaded on fewer.

    Args:
        folders: a run folder stands for the first seed of each of its variants, the folder of a
            variant for its first seed.
        assignments: `--field=value` for fields of `commands.OVERRIDABLE`, applied to every run.

    Raises:
        ConfigError: a folder holds no run or no checkpoint, the runs are of different tasks, the
            data of a run are missing, or as in `commands.with_overrides`.
        CheckpointError: a checkpoint cannot be read.
    """
    seeds = (seed for folder in folders for seed in _seeds(folder.resolve()))
    found = [_stored(seed, assignments) for seed in dict.fromkeys(seeds)]
    for stored in found:
        _require_checkpoint(stored.folder)
        _require_same_task(found[0], stored)
    ready: dict[tuple[Path, str], Experiment] = {}
    runs = []
    for name, stored in zip(_unique_names(found), found):
        key = stored.root, stored.variant
        ready[key] = ready.get(key) or stored.spec.build(stored.config)
        experiment = ready[key].with_seed(stored.seed)
        state = _newest(experiment, stored.folder)
        runs.append(TrainedRun(name, stored.folder, experiment, state))
    return runs


def _newest(experiment: Experiment, folder: Path) -> State:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.restore(experiment.shapes)[0]
    finally:
        checkpoints.close()


def _seeds(folder: Path) -> Iterator[Path]:
    """The seed folders that a folder stands for."""
    if SEED.fullmatch(folder.name) and run_dir.is_run(folder.parent.parent):
        yield folder
    elif VARIANT.fullmatch(folder.name) and run_dir.is_run(folder.parent):
        yield _first_seed(folder)
    elif run_dir.is_run(folder):
        variants = [each for each in folder.iterdir() if VARIANT.fullmatch(each.name)]
        variants.sort(key=lambda variant: _number(VARIANT, variant))
        yield from map(_first_seed, variants)
    else:
        raise ConfigError(
            f"{folder} holds no run. Pass a folder that `curvax train` or `curvax compare` left, "
            "or one inside it: that of a method, as 0-adamw, or of a seed, as 0-adamw/seed0."
        )


def _number(pattern: re.Pattern[str], folder: Path) -> int:
    match = pattern.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _first_seed(variant: Path) -> Path:
    seeds = [each for each in variant.iterdir() if SEED.fullmatch(each.name)]
    return min(seeds, key=lambda seed: _number(SEED, seed), default=variant / "seed0")


def _stored(folder: Path, assignments: Sequence[str]) -> _Stored:
    root = folder.parent.parent
    config, spec = commands.read(root)
    variants = spec.variants(config)
    variant = list(variants)[_number(VARIANT, folder.parent)]
    config = commands.with_overrides(_on_available_devices(variants[variant]), assignments)
    return _Stored(root, folder, _number(SEED, folder), variant, config, spec)


def _on_available_devices(config: ConfigDict) -> ConfigDict:
    """The config with at most the available devices, in a number that divides its batch."""
    most = min(config.devices or jax.device_count(), jax.device_count())
    devices = max(n for n in range(1, most + 1) if config.batch % n == 0)
    return comparison.replace(config, devices=devices)


def _require_checkpoint(folder: Path) -> None:
    if not any((folder / "checkpoints").glob("[0-9]*/")):
        raise ConfigError(
            f"{folder} has no checkpoint. Train it first: `curvax resume {folder.parent.parent}` "
            "continues the run."
        )


def _require_same_task(first: _Stored, other: _Stored) -> None:
    same = lambda config: (config.task, config.data.name, config.loss)
    if same(first.config) != same(other.config):
        raise ConfigError(
            "Runs are compared on one task, data set and loss, and these differ: "
            f"{_described(first)}, and {_described(other)}. Inspect them one by one."
        )


def _described(stored: _Stored) -> str:
    config = stored.config
    loss = f" under the loss `{config.loss}`" if config.loss else ""
    return f"{stored.folder} is of the task `{config.task}` on `{config.data.name}`{loss}"


def _unique_names(found: Sequence[_Stored]) -> list[str]:
    """The names of the variants; where they coincide, with the seed and then the run folder."""
    names = [stored.variant for stored in found]
    for more in (lambda s: f"seed {s.seed}", lambda s: s.root.name):
        count = Counter(names)
        names = [f"{n}, {more(s)}" if count[n] > 1 else n for n, s in zip(names, found)]
    return names
