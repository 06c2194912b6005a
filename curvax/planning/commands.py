"""`curvax plan`: compiles a config's methods for a topology, and reports memory and cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from curvax.planning import compiled_cost, memory_savers, plan, topologies
from curvax.planning.compiled_cost import CompiledCost
from curvax.planning.memory_savers import Changes
from curvax.planning.topologies import Topology
from curvax.training import experiment, tasks
from curvax.training.compare import comparison, report
from curvax.training.data import sources
from curvax.training.runtime import run_dir

Compile = Callable[[str, ConfigDict], CompiledCost]
"""(name for the display, config) ↦ the cost of its step."""


def plan_for(
    config: ConfigDict,
    optimizers: Sequence[str],
    topology: str,
    *,
    variants: bool = False,
    cache: Path | None = None,
    root: Path = Path("runs"),
) -> None:
    """Compiles a step of each method for a topology; prints the plan and keeps it in a new folder.

    Args:
        config: shared by all methods but for `optimizer`.
        optimizers: the methods' texts, the baseline first.
        topology: as in `topologies.find`.
        variants: compile each with the model's blocks scanned, unrolled and recomputed.
        cache: folder of earlier results, by default `compiled_cost.FOLDER`.
        root: where the new folder goes.

    Raises:
        ValueError: a field does not fit, or there is no such topology.
    """
    console, machine = Console(), topologies.find(topology)
    configs = _configs(config, optimizers, block_layouts=variants)
    with _progress(console, machine, cache or compiled_cost.FOLDER) as compiled:
        costs = {name: compiled(name, each) for name, each in configs.items()}
        tried = {
            name: _try(
                name, memory_savers.candidates(configs[name], len(machine.devices)), compiled
            )
            for name, cost in costs.items()
            if not cost.fits
        }
    folder = run_dir.create(root, "plan", config)
    run_dir.write_json(folder / "plan.json", plan.as_json(costs, tried, machine))
    table, summary = plan.table(costs, machine), plan.summary(costs, tried, machine)
    run_dir.write_text(folder / "table.txt", f"{report.as_text(table)}\n{summary}\n")
    console.print(table)
    console.print(f"{summary}\nIn {folder}: plan.json, table.txt", markup=False, highlight=False)


def _configs(config: ConfigDict, optimizers: Sequence[str], *, block_layouts: bool) -> Changes:
    methods = comparison.variants(config, optimizers)
    if not block_layouts:
        return methods
    return {
        f"{name}, {layout}": changed
        for name, method in methods.items()
        for layout, changed in memory_savers.block_layouts(method).items()
    }


def _try(name: str, changes: Changes, compiled: Compile) -> dict[str, CompiledCost]:
    """The costs under each change, up to the first that fits."""
    tried: dict[str, CompiledCost] = {}
    for change, config in changes.items():
        tried[change] = compiled(f"{name} {change}", config)
        if tried[change].fits:
            break
    return tried


def _without_data(config: ConfigDict) -> ConfigDict:
    """The config with fixed pixel statistics, if they would be measured on the training images.

    The values do not change the cost of a step.
    """
    given = config.task not in tasks.OF_IMAGES or config.data.mean is not None
    if given or sources.find(config.data.name).moments is not None:
        return config
    changed = config.copy_and_resolve_references()
    channels = sources.of(config.data).shape[-1]
    changed.data.update(mean=(0.5,) * channels, std=(0.5,) * channels)
    return changed


@contextmanager
def _progress(console: Console, topology: Topology, cache: Path) -> Iterator[Compile]:
    """Yields a `Compile` that shows a line for each step and what it is waiting for."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def compiled(name: str, config: ConfigDict) -> CompiledCost:
            task = progress.add_task(name, total=1, doing="building")
            outline = experiment.outline(_without_data(config), topology.devices)
            report_phase = lambda phase: progress.update(task, doing=phase)
            cost = compiled_cost.read(outline, topology, cache, report_phase)
            progress.update(task, completed=1, doing="fits" if cost.fits else "does not fit")
            return cost

        yield compiled
