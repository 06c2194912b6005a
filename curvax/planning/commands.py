"""What `curvax plan` does, given a config: compile, read, say what helps, and keep it all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from curvax.planning import compiled_cost, plan, topologies
from curvax.planning.compiled_cost import Reading
from curvax.planning.memory_savers import Changes, layouts, remedies
from curvax.planning.topologies import Topology
from curvax.training import experiment
from curvax.training.compare import comparison, report
from curvax.training.data import sources
from curvax.training.runtime import run_dir

Read = Callable[[str, ConfigDict], Reading]


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
        optimizers: the methods' texts, the base first.
        variants: compile each with the model's blocks scanned, unrolled and recomputed.
        cache: where readings are kept for another time, by default `readings.FOLDER`.

    Raises:
        ValueError: a field does not fit, or the topology is none.
    """
    console, machine = Console(), topologies.find(topology)
    arms = _arms(config, optimizers, variants)
    with _progress(console, machine, cache or compiled_cost.FOLDER) as read:
        found = {name: read(name, arm) for name, arm in arms.items()}
        tried = {
            name: _try(name, remedies(arms[name], len(machine.devices)), read)
            for name, reading in found.items()
            if not reading.fits
        }
    folder = run_dir.create(root, "plan", config)
    run_dir.write_json(folder / "plan.json", plan.as_json(found, tried, machine))
    table, words = plan.table(found, machine), plan.words(found, tried, machine)
    run_dir.write_text(folder / "table.txt", f"{report.as_text(table)}\n{words}\n")
    console.print(table)
    console.print(f"{words}\nIn {folder}: plan.json, table.txt", markup=False, highlight=False)


def _arms(config: ConfigDict, optimizers: Sequence[str], variants: bool) -> Changes:
    arms = comparison.arms(config, optimizers)
    if not variants:
        return arms
    return {
        f"{name}, {way}": changed
        for name, arm in arms.items()
        for way, changed in layouts(arm).items()
    }


def _try(name: str, changes: Changes, read: Read) -> dict[str, Reading]:
    """The readings of an arm's changes, up to the first that fits."""
    tried: dict[str, Reading] = {}
    for change, config in changes.items():
        tried[change] = read(f"{name} {change}", config)
        if tried[change].fits:
            break
    return tried


def _unread(config: ConfigDict) -> ConfigDict:
    """The config with numbers in the place of the pixels' moments that data would be read for."""
    given = config.task != "images" or config.data.mean is not None
    if given or sources.find(config.data.name).moments is not None:
        return config
    changed = config.copy_and_resolve_references()
    channels = sources.of(config.data).shape[-1]
    changed.data.update(mean=(0.5,) * channels, std=(0.5,) * channels)
    return changed


@contextmanager
def _progress(console: Console, topology: Topology, cache: Path) -> Iterator[Read]:
    """Yields `(name, config) -> reading`, each with a line that tells what it waits for."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def read(name: str, config: ConfigDict) -> Reading:
            task = progress.add_task(name, total=1, doing="building")
            outline = experiment.outline(_unread(config), topology.devices)
            told = lambda what: progress.update(task, doing=what)
            reading = compiled_cost.read(outline, topology, cache, told)
            progress.update(task, completed=1, doing="fits" if reading.fits else "does not fit")
            return reading

        yield read
