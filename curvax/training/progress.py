"""A progress bar with the newest loss, accuracy and surrogate gap, and the time left."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "train {:.1%}",
    "test_accuracy": "test {:.1%}",
    "surrogate_gap": "gap {:.3g}",
}


@contextmanager
def bar(
    console: Console,
) -> Iterator[Callable[[str, int], Callable[[int, Mapping[str, float]], None]]]:
    """Yields a function that adds a row, `(name, steps) -> report`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:

        def row(name: str, steps: int) -> Callable[[int, Mapping[str, float]], None]:
            task = progress.add_task(name, total=steps, figures="compiling")
            seen: dict[str, float] = {}

            def report(step: int, figures: Mapping[str, float]) -> None:
                seen.update(figures)
                text = "  ".join(
                    form.format(seen[key]) for key, form in SHOWN.items() if key in seen
                )
                progress.update(task, completed=step, figures=text)

            return report

        yield row
