"""A progress bar with the latest loss, score and surrogate gap, and the remaining time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from curvax.training.selection_metric import SelectionMetric

_NAME = Column(no_wrap=True, overflow="ellipsis", max_width=20)


@contextmanager
def bar(
    console: Console, metric: SelectionMetric
) -> Iterator[Callable[[str, int], Callable[[int, Mapping[str, float]], None]]]:
    """Yields a function that adds a row: `row(name, steps)` gives `report(step, metrics)`."""
    shown = {
        "loss": "loss {:.3f}",
        "accuracy": "train {:.0%}",
        metric.result_key: f"test {metric.form}",
        "surrogate_gap": "gap {:.2g}",
        "damping": "λ {:.1g}",
    }
    columns = (
        TextColumn("{task.description}", markup=False, table_column=_NAME),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[metrics]}", markup=False, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:

        def row(name: str, steps: int) -> Callable[[int, Mapping[str, float]], None]:
            task = progress.add_task(name, total=steps, metrics="compiling")
            seen: dict[str, float] = {}

            def report(step: int, metrics: Mapping[str, float]) -> None:
                seen.update(metrics)
                text = "  ".join(
                    form.format(seen[key]) for key, form in shown.items() if key in seen
                )
                progress.update(task, completed=step, metrics=text)

            return report

        yield row
