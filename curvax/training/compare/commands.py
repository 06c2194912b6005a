"""What `curvax train`, `compare`, `bench` and `resume` do, given a config."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from curvax.training import progress, pseudo_labels
from curvax.training.checkpoints import CheckpointError
from curvax.training.compare import comparison, grid_search, plots, report, step_cost
from curvax.training.compare.comparison import Arms, Outcomes
from curvax.training.config import configs
from curvax.training.config.configs import ConfigError
from curvax.training.config.renamed import current
from curvax.training.data.image_folders import visible
from curvax.training.experiment import Experiment, build
from curvax.training.runtime import distributed, run_dir
from curvax.training.runtime.preemption import Stopped
from curvax.training.tasks import Task

PLACE = ("data.path", "data.threads", "parallelism", "devices", "fsdp", "eval_batch")
"""Fields that say where and on what a run computes, not what: all that may change once it began."""
_OF_HOST = ("data.path", "data.threads")


class RunSpec(NamedTuple):
    """What is done with a config; kept in the run's folder, so that it can be resumed."""

    command: str  # "train", "compare" or "sweep"
    optimizers: Sequence[str]  # the base first, where there is one
    seeds: int = 1
    fair: bool = False  # the base may run twice the epochs
    fields: Mapping[str, Sequence[str]] = {}  # a sweep's values

    def arms(self, config: ConfigDict) -> Arms:
        """The config of every arm, in the order of their folders' numbers."""
        arms = comparison.arms(config, self.optimizers, fair=self.fair)
        return comparison.grid(arms, self.fields) if self.fields else arms

    def ready(self, arm: ConfigDict, *, begins: bool = False) -> Experiment:
        """One arm made ready; a sweep's arms are scored on what they held out."""
        return build(arm, hold_out=bool(self.fields), begins=begins)

    def prepare(self, config: ConfigDict, *, begins: bool = True) -> dict[str, Experiment]:
        """Every arm made ready, and so checked before one begins."""
        arms = self.arms(config)
        ready = {name: self.ready(arm, begins=begins) for name, arm in arms.items()}
        for arm, seed in itertools.product(arms.values(), range(self.seeds)):
            if arm.data.labels is not None:
                pseudo_labels.find(arm, arm.seed + seed)
        return ready


def configure(name: str, assignments: Sequence[str]) -> ConfigDict:
    """The config of that name with `--field=value` applied; `ConfigError` where that fails."""
    return configs.override(configs.load(name), assignments)


def placed(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """The config of a run where `--field=value` changes fields of `PLACE`.

    It holds for this time: the run's folder keeps the config that it began with.

    Raises:
        ConfigError: another field, or as in `config.override`.
        RunError: the run's data is not there.
    """
    fields = ", ".join(f"`--{field}`" for field in PLACE)
    for assignment in assignments:
        name = assignment.removeprefix("--").partition("=")[0]
        if current(name, warn=False) not in PLACE:
            raise ConfigError(
                f"A run keeps its config but for where it computes, and got `{assignment}`. What "
                f"may change, each as `--field=value`, is {fields}; for the rest begin another run "
                "with `curvax train`."
            )
    changed = configs.override(config, assignments)
    path = changed.data.path
    if path is not None and not Path(path).expanduser().exists():
        raise run_dir.RunError(
            f"A run needs the data it was trained on, and {path} is not there. Say where that "
            "data is now with `--data.path=PATH`."
        )
    return changed


def methods(config: ConfigDict) -> list[str]:
    """The texts of a config's methods: its base, its own, and the others."""
    return [config.baseline, config.optimizer, *config.more_optimizers]


def start(config: ConfigDict, plan: RunSpec, root: Path) -> None:
    """Carries a plan out in a new run folder under `root`."""
    distributed.require_same(_options(config, plan))
    with distributed.together():
        if distributed.first():
            run_dir.check_root(root)
        experiments = plan.prepare(config)
    name = ""
    if distributed.first():
        folder = run_dir.create(root, plan.command, config)
        run_dir.write_spec(folder, plan._asdict())
        name = str(folder)
    _carry_out(config, plan, experiments, Path(distributed.agreed(name)))


def resume(folder: Path, assignments: Sequence[str] = ()) -> None:
    """Goes on with what was begun in a run folder; errors as in `read` and `placed`.

    Another place changes its numbers by rounding, and by what goes by device under `shard_map` and
    `pmap`: dropout, and batch norm and climbing outside of groups. Weights to begin with are looked
    for where a run has not begun.

    Args:
        assignments: `--field=value` for fields of `PLACE`.
    """
    with distributed.together():
        config, plan = read(folder)
        config = placed(config, assignments)
    distributed.require_same({"folder": folder.resolve().name} | _options(config, plan))
    with distributed.together():
        experiments = plan.prepare(config, begins=False)
        for experiment in comparison.not_begun(experiments, plan.seeds, folder):
            experiment.trained()
    _carry_out(config, plan, experiments, folder)


def _options(config: ConfigDict, plan: RunSpec) -> dict[str, Any]:
    """All that a run is told, by name, but for what each host has its own way."""
    told = configs.flat(config) | plan._asdict()
    return {name: value for name, value in told.items() if name not in _OF_HOST}


def read(folder: Path) -> tuple[ConfigDict, RunSpec]:
    """The config of a run folder, and what is done with it.

    Raises:
        RunError: the folder is not a run's, or a file of it is damaged.
    """
    config, page = run_dir.read_config(folder), run_dir.read_spec(folder)
    try:
        plan = RunSpec(**page)
        _FINISH[plan.command]
    except (TypeError, KeyError) as error:
        raise run_dir.bad_spec(folder) from error
    return config, plan


def _carry_out(
    config: ConfigDict, plan: RunSpec, experiments: Mapping[str, Experiment], folder: Path
) -> None:
    with _way_back(folder), _held(folder):
        console = Console(quiet=not distributed.first())
        _line(console, f"If this is interrupted: curvax resume {folder}")
        if not distributed.first():
            print(distributed.way_back(folder), file=sys.stderr, flush=True)
        task = next(iter(experiments.values())).task
        with progress.bar(console, task.goal) as row:
            may_diverge = plan.command != "train"
            outcomes = comparison.run(experiments, plan.seeds, folder, row, may_diverge=may_diverge)
        if distributed.first():
            table, words = _FINISH[plan.command](config, plan, task, outcomes, folder)
            _publish(console, folder, table, words)
        _line(console, f"TensorBoard: tensorboard --logdir {folder}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder for this run alone, whose first process holds it."""
    with contextlib.ExitStack() as hold:
        with distributed.together():
            if distributed.first():
                hold.enter_context(run_dir.held(folder))
        yield


@contextlib.contextmanager
def _way_back(folder: Path) -> Iterator[None]:
    """What ends a run in the folder early says how to go on."""
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
        raise run_dir.RunError(
            f"The run folder {folder} could not be written ({error.strerror or error}). What is in "
            f"it is kept. Make room and go on with `curvax resume {folder}`."
        ) from error


def _finish_training(
    config: ConfigDict, plan: RunSpec, task: Task, outcomes: Outcomes, folder: Path
) -> tuple[Table, str]:
    plots.draw(outcomes, folder / "curves.png", task.goal)
    table = report.run_table({name: arm[0].figures for name, arm in outcomes.items()})
    return table, report.verdict(config, task, outcomes) if len(outcomes) > 1 else ""


def _finish_comparison(
    config: ConfigDict, plan: RunSpec, task: Task, outcomes: Outcomes, folder: Path
) -> tuple[Table, str]:
    plots.draw(outcomes, folder / "curves.png", task.goal)
    if plan.fair:
        outcomes = comparison.with_better_base(outcomes, task.goal)
    scores = comparison.score(outcomes, task.goal)
    comparison.write(folder, outcomes, scores, task.goal)
    plots.draw_scores(outcomes, folder / "compare.png", task.goal)
    return report.score_table(scores, task.goal), report.gains(scores, task.goal)


def _finish_sweep(
    config: ConfigDict, plan: RunSpec, task: Task, outcomes: Outcomes, folder: Path
) -> tuple[Table, str]:
    names = comparison.labels(plan.optimizers)
    grids = grid_search.grids(outcomes, names, plan.fields, task.goal)
    grid_search.write(folder, grids)
    plots.draw_sweep(grids, folder / "sweep.png")
    return grid_search.table(grids), grid_search.words(grids, config.name)


_FINISH = {"train": _finish_training, "compare": _finish_comparison, "sweep": _finish_sweep}


def measure_costs(config: ConfigDict, optimizers: Sequence[str], pairs: int, root: Path) -> None:
    """`curvax bench`: the costs of a step of each method, printed and kept in a new folder."""
    console = Console()
    run_dir.check_root(root)
    experiments = RunSpec("bench", optimizers).prepare(config)
    goal = next(iter(experiments.values())).task.goal
    with progress.bar(console, goal) as row:
        costs = step_cost.measure(experiments, pairs, row("pairs", pairs))
    folder = run_dir.create(root, "bench", config)
    step_cost.write(folder, costs)
    _publish(console, folder, step_cost.table(costs), "")


def _publish(console: Console, folder: Path, table: Table, words: str) -> None:
    """Prints the result, and keeps it in the folder as `table.txt`."""
    run_dir.write_text(folder / "table.txt", f"{report.as_text(table)}\n{words}\n")
    console.print(table)
    console.print(words, markup=False, highlight=False)
    files = ", ".join(path.name for path in visible(folder) if path.is_file())
    _line(console, f"In {folder}: {files}")


def _line(console: Console, text: str) -> None:
    """A line that is not wrapped, so that its paths can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
