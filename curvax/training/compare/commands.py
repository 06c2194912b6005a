"""The commands `curvax train`, `compare`, `bench` and `resume`, given a config."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from curvax.training import progress, pseudo_labels
from curvax.training.checkpoints import CheckpointError
from curvax.training.compare import comparison, grid_search, report, step_cost
from curvax.training.compare.comparison import Outcomes, Variants
from curvax.training.config import configs
from curvax.training.config.renamed import current
from curvax.training.data.image_folders import visible
from curvax.training.experiment import Experiment, build
from curvax.training.runtime import distributed, run_dir
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.preemption import Stopped
from curvax.training.tasks import Task

OVERRIDABLE = ("data.path", "data.threads", "parallelism", "devices", "fsdp", "eval_batch")
"""Hardware and path options: the only fields that may differ on resume."""
_PER_HOST = ("data.path", "data.threads")
"""Fields that may differ between the processes of a run."""
_COMMANDS = ("train", "compare", "sweep")


class RunSpec(NamedTuple):
    """The command and methods of a run, kept as run.json in its folder for resuming."""

    command: str  # "train", "compare" or "sweep"
    optimizers: Sequence[str]  # the methods' texts, the baseline first if there is one
    seeds: int = 1
    fair: bool = False  # also train the baseline for twice the epochs
    fields: Mapping[str, Sequence[str]] = {}  # field ↦ values of a sweep
    method_epochs: Sequence[int] = ()  # of each, where a time gives them; else the config's

    def variants(self, config: ConfigDict) -> Variants:
        """The config of every variant, in the order of their folders."""
        variants = comparison.variants(config, self.optimizers, fair=self.fair)
        for name, epochs in zip(variants, self.method_epochs):
            variants[name] = comparison.replace(variants[name], epochs=epochs)
        return comparison.grid(variants, self.fields) if self.fields else variants

    def build(self, variant: ConfigDict, *, begins: bool = False) -> Experiment:
        """The experiment of one variant; those of a sweep are tested on held-out examples."""
        return build(variant, hold_out=bool(self.fields), begins=begins)

    def prepare(self, config: ConfigDict, *, begins: bool = True) -> dict[str, Experiment]:
        """The experiments of all variants, built and so checked before the first is trained."""
        variants = self.variants(config)
        built = {name: self.build(variant, begins=begins) for name, variant in variants.items()}
        for variant, seed in itertools.product(variants.values(), range(self.seeds)):
            if variant.data.labels is not None:
                pseudo_labels.find(variant, variant.seed + seed)
        return built


def configure(name: str, assignments: Sequence[str]) -> ConfigDict:
    """Loads a config and applies `--field=value` assignments; errors as in `configs`."""
    return configs.override(configs.load(name), assignments)


def with_overrides(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """The config of an existing run with `--field=value` applied to fields of `OVERRIDABLE`.

    The run's folder keeps its original config.

    Raises:
        ConfigError: another field, or as in `configs.override`; or the run's data are missing.
    """
    fields = ", ".join(f"`--{field}`" for field in OVERRIDABLE)
    for assignment in assignments:
        name = assignment.removeprefix("--").partition("=")[0]
        if current(name, warn=False) not in OVERRIDABLE:
            raise ConfigError(
                "The config of a run is fixed except for hardware and paths, and got "
                f"`{assignment}`. The fields that may change, as `--field=value`, are {fields}. "
                "For others start a new run with `curvax train`."
            )
    changed = configs.override(config, assignments)
    path = changed.data.path
    if path is not None and not Path(path).expanduser().exists():
        raise ConfigError(
            f"A run needs the data it was trained on, and {path} does not exist. Give their new "
            "place as `--data.path=PATH`."
        )
    return changed


def methods(config: ConfigDict) -> list[str]:
    """The texts of a config's methods: `baseline`, `optimizer` and `more_optimizers`."""
    return [config.baseline, config.optimizer, *config.more_optimizers]


def start(config: ConfigDict, spec: RunSpec, root: Path, *, budget: float | None = None) -> None:
    """Trains all variants of a spec in a new run folder under `root`.

    Args:
        budget: seconds of training steps for each run, in place of the config's epochs.
    """
    distributed.require_same({"budget": budget} | _options(config, spec))
    with distributed.together():
        if distributed.first():
            run_dir.check_root(root)
        if budget is not None:
            spec = spec._replace(method_epochs=_fitting(config, spec, budget))
        experiments = spec.prepare(config)
    name = ""
    if distributed.first():
        folder = run_dir.create(root, spec.command, config)
        run_dir.write_spec(folder, spec._asdict())
        name = str(folder)
    _train(config, spec, experiments, Path(distributed.agreed(name)))


def _fitting(config: ConfigDict, spec: RunSpec, budget: float) -> list[int]:
    """The whole epochs of each method whose steps take at most `budget` seconds, from timed steps.

    Raises:
        ConfigError: an epoch takes longer, or there are several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            "`--budget` times the steps in one process, and there are "
            f"{jax.process_count()}. Give `--epochs=N`, or compare in one process."
        )
    experiments = spec.prepare(config)
    found = []
    for name, cost in step_cost.measure(experiments, rounds=10).items():
        epoch = float(np.median(cost.seconds)) * experiments[name].steps_per_epoch
        epochs = int(budget / epoch)
        if epochs < 1:
            raise ConfigError(
                f"`--budget={budget:g}` gives each method whole epochs whose steps take at most so "
                f"many seconds, and one of `{name}` takes {epoch:.3g} s here. Give more, or fewer "
                "images, `--data.num_train=N`."
            )
        found.append(epochs)
    told = ", ".join(f"{epochs} of `{name}`" for name, epochs in zip(experiments, found))
    _line(Console(), f"Epochs in {budget:g} seconds of steps: {told}.")
    return found


def resume(folder: Path, assignments: Sequence[str] = ()) -> None:
    """Continues the run in a folder; errors as in `read` and `with_overrides`.

    On other devices the results differ by rounding and, under `shard_map` and `pmap`, by what is
    computed per device: dropout, and batch norm and perturbations outside of groups. The weights of
    `init_from` are needed only for variants without a checkpoint.

    Args:
        folder: the run folder.
        assignments: `--field=value` for fields of `OVERRIDABLE`.
    """
    with distributed.together():
        config, spec = read(folder)
        config = with_overrides(config, assignments)
    distributed.require_same({"folder": folder.resolve().name} | _options(config, spec))
    with distributed.together():
        experiments = spec.prepare(config, begins=False)
        for experiment in comparison.without_checkpoint(experiments, spec.seeds, folder):
            experiment.trained()
    _train(config, spec, experiments, folder)


def _options(config: ConfigDict, spec: RunSpec) -> dict[str, Any]:
    """All options that must be the same in every process of a run, by name."""
    options = configs.flat(config) | spec._asdict()
    return {name: value for name, value in options.items() if name not in _PER_HOST}


def read(folder: Path) -> tuple[ConfigDict, RunSpec]:
    """The config and the spec of a run folder.

    Raises:
        ConfigError: the folder holds no run, or a file of it is damaged.
    """
    config, page = run_dir.read_config(folder), run_dir.read_spec(folder)
    try:
        spec = RunSpec(**page)
    except TypeError as error:
        raise run_dir.bad_spec(folder) from error
    if spec.command not in _COMMANDS:
        raise run_dir.bad_spec(folder)
    return config, spec


def _train(
    config: ConfigDict, spec: RunSpec, experiments: Mapping[str, Experiment], folder: Path
) -> None:
    with _resume_hint(folder), _locked(folder):
        console = Console(quiet=not distributed.first())
        _line(console, f"If this is interrupted: curvax resume {folder}")
        if not distributed.first():
            print(distributed.resume_hint(folder), file=sys.stderr, flush=True)
        task = next(iter(experiments.values())).task
        with progress.bar(console, task.metric) as row:
            may_diverge = spec.command != "train"
            outcomes = comparison.run(experiments, spec.seeds, folder, row, may_diverge=may_diverge)
        if distributed.first():
            table, summary = _finish(config, spec, task, outcomes, folder)
            _publish(console, folder, table, summary)
        _line(console, f"TensorBoard: tensorboard --logdir {folder}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder for this run, in its first process."""
    with contextlib.ExitStack() as hold:
        with distributed.together():
            if distributed.first():
                hold.enter_context(run_dir.locked(folder))
        yield


@contextlib.contextmanager
def _resume_hint(folder: Path) -> Iterator[None]:
    """Adds to whatever stops a run early how to resume it."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(f"{stopped} `curvax resume {folder}` goes on from there.") from stopped
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"stopped. `curvax resume {folder}` goes on from the last checkpoint."
        ) from stopped
    except (CheckpointError, distributed.ProcessLost):
        raise
    except jax.errors.JaxRuntimeError as error:
        raise distributed.lost(error, folder) from error
    except OSError as error:
        raise OSError(
            f"The run folder {folder} could not be written ({error.strerror or error}). Its "
            f"content is kept. Make room and continue with `curvax resume {folder}`."
        ) from error


def _finish(
    config: ConfigDict, spec: RunSpec, task: Task, outcomes: Outcomes, folder: Path
) -> tuple[Table, str]:
    """Writes the results of a command into its folder; returns the table and the summary."""
    from curvax.training.compare import plots  # matplotlib, when a run ends

    if spec.command == "sweep":
        return _finish_sweep(config.name, spec, task, outcomes, folder)
    plots.draw(outcomes, folder / "curves.png", task.metric)
    if spec.command == "train":
        table = report.run_table({name: runs[0].metrics for name, runs in outcomes.items()})
        return table, report.verdict(config, task, outcomes) if len(outcomes) > 1 else ""
    if spec.fair:
        outcomes = comparison.with_better_baseline(outcomes, task.metric)
    scores = comparison.score(outcomes, task.metric)
    comparison.write(folder, outcomes, scores, task.metric)
    plots.draw_scores(outcomes, folder / "compare.png", task.metric)
    return report.score_table(scores, task.metric), report.gains(scores, task.metric)


def _finish_sweep(
    name: str, spec: RunSpec, task: Task, outcomes: Outcomes, folder: Path
) -> tuple[Table, str]:
    from curvax.training.compare import plots

    methods = comparison.labels(spec.optimizers)
    grids = grid_search.grids(outcomes, methods, spec.fields, task.metric)
    grid_search.write(folder, grids)
    plots.draw_sweep(grids, folder / "sweep.png")
    return grid_search.table(grids), grid_search.best_points(grids, name)


def measure_costs(config: ConfigDict, optimizers: Sequence[str], pairs: int, root: Path) -> None:
    """`curvax bench`: prints the costs of a step of each method and keeps them in a new folder."""
    console = Console()
    run_dir.check_root(root)
    experiments = RunSpec("bench", optimizers).prepare(config)
    metric = next(iter(experiments.values())).task.metric
    with progress.bar(console, metric) as row:
        costs = step_cost.measure(experiments, pairs, row("pairs", pairs))
    folder = run_dir.create(root, "bench", config)
    step_cost.write(folder, costs)
    _publish(console, folder, step_cost.table(costs), "")


def _publish(console: Console, folder: Path, table: Table, summary: str) -> None:
    """Prints the result and keeps it as table.txt."""
    run_dir.write_text(folder / "table.txt", f"{report.as_text(table)}\n{summary}\n")
    console.print(table)
    console.print(summary, markup=False, highlight=False)
    files = ", ".join(path.name for path in visible(folder) if path.is_file())
    _line(console, f"In {folder}: {files}")


def _line(console: Console, text: str) -> None:
    """Prints a line without wrapping, so that its paths can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
