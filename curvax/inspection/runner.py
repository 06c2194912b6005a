"""Checkpoints and a time budget ↦ results of measures, and what was left out and why."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from curvax.inspection.budget import Budget, price
from curvax.inspection.checkpoint_loss import CheckpointLoss
from curvax.inspection.measures import MEASURES, Measure

Report = Callable[[int, str], None]
"""`report(count, next)`, called with the number of measures done and the name of the next."""


class Omission(NamedTuple):
    """A measure or figure that is missing from the results."""

    measure: str  # title
    runs: tuple[str, ...]
    kind: str  # "budget", "inapplicable" or "failed"
    reason: str


@dataclasses.dataclass
class Results:
    """The results of all measures."""

    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """{measure: {run: result, on the host}}"""
    omissions: list[Omission] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def of(self, measure: str) -> dict[str, Any]:
        """{run: result}; empty if the measure has none."""
        return self.results.get(measure, {})


def measure_all(
    points: Mapping[str, CheckpointLoss],
    budget: Budget,
    report: Report = lambda count, what: None,
    measures: tuple[Measure, ...] = MEASURES,
) -> Results:
    """Takes the measures in order, each for all runs, as far as the budget allows.

    A measure that does not fit is left out, and cheaper ones after it are still taken. Errors of a
    measure become omissions.

    Args:
        points: run ↦ the loss around its checkpoint.
        budget: the time limit.
        report: called before every measure and run.
        measures: the most informative first.
    """
    found = Results()
    report(0, "timing a gradient")
    prices = {name: price(point) for name, point in points.items()}
    for number, measure in enumerate(measures):
        applicable = _applicable(measure, points, found)
        estimate = sum(prices[name].of(measure.work(point)) for name, point in applicable.items())
        if applicable and budget.pace * estimate > budget.left:
            _leave_out(measure, applicable, budget, estimate, found)
            continue
        with budget.spending(estimate):
            for name, point in applicable.items():
                report(number, f"{measure.title}, {name}")
                _take(measure, name, point, found)
    found.seconds = budget.spent
    return found


def _applicable(
    measure: Measure, points: Mapping[str, CheckpointLoss], found: Results
) -> dict[str, CheckpointLoss]:
    excuses = {name: measure.excuse(point) for name, point in points.items()}
    for reason in dict.fromkeys(filter(None, excuses.values())):
        runs = tuple(name for name, excuse in excuses.items() if excuse == reason)
        found.omissions.append(Omission(measure.title, runs, "inapplicable", reason))
    return {name: point for name, point in points.items() if not excuses[name]}


def _leave_out(
    measure: Measure,
    applicable: Mapping[str, CheckpointLoss],
    budget: Budget,
    estimate: float,
    found: Results,
) -> None:
    reason = (
        f"It was expected to take {budget.pace * estimate:.0f} s, and {budget.left:.0f} s of the "
        f"budget of {budget.seconds:.0f} s were left."
    )
    found.omissions.append(Omission(measure.title, tuple(applicable), "budget", reason))


def _take(measure: Measure, name: str, point: CheckpointLoss, found: Results) -> None:
    try:
        result = _on_host(measure.take(point))
    except ValueError as error:  # `curvax.analysis` raises it for inapplicable measures
        found.omissions.append(Omission(measure.title, (name,), "inapplicable", str(error)))
    except Exception as error:  # out of memory, for instance; continue with other measures
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        found.omissions.append(Omission(measure.title, (name,), "failed", reason))
    else:
        found.results.setdefault(measure.name, {})[name] = result


def _on_host(value: Any) -> Any:
    """Converts arrays to NumPy. Not by a tree map, which would sort the blocks of a network."""
    if isinstance(value, dict):
        return {name: _on_host(x) for name, x in value.items()}
    if isinstance(value, tuple):
        parts = map(_on_host, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return np.asarray(value) if isinstance(value, jax.Array) else value
