"""Points and a budget ↦ what was measured at each, and what was left out and why."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from curvax.inspection.budget import Budget, price
from curvax.inspection.checkpoint_loss import CheckpointLoss
from curvax.inspection.measures import MEASURES, Measure

Report = Callable[[int, str], None]
"""Told how many measures are over, and what begins."""


class Omission(NamedTuple):
    """Something that is not in the results."""

    measure: str  # its title
    runs: tuple[str, ...]
    kind: str  # "budget", "inapplicable" or "failed"
    reason: str


@dataclasses.dataclass
class Results:
    """What was found."""

    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """{measure: {run: what it returned, on the host}}"""
    omissions: list[Omission] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def of(self, measure: str) -> dict[str, Any]:
        """{run: result}, empty where nothing was found."""
        return self.results.get(measure, {})


def measure_all(
    points: Mapping[str, CheckpointLoss],
    budget: Budget,
    report: Report = lambda count, what: None,
    measures: tuple[Measure, ...] = MEASURES,
) -> Results:
    """Takes the measures in their order, each at all points, as far as the budget goes.

    One that does not fit is left out, and smaller ones after it are still taken. What a measure
    refuses or meets is noted, and the others go on.
    """
    found = Results()
    report(0, "the price of a gradient")
    prices = {name: price(point) for name, point in points.items()}
    for number, measure in enumerate(measures):
        apt = _where_it_applies(measure, points, found)
        estimate = sum(prices[name].of(measure.work(point)) for name, point in apt.items())
        if apt and budget.pace * estimate > budget.left:
            _leave_out(measure, apt, budget, estimate, found)
            continue
        with budget.spending(estimate):
            for name, point in apt.items():
                report(number, f"{measure.title}, {name}")
                _take(measure, name, point, found)
    found.seconds = budget.spent
    return found


def _where_it_applies(
    measure: Measure, points: Mapping[str, CheckpointLoss], found: Results
) -> dict[str, CheckpointLoss]:
    excuses = {name: measure.excuse(point) for name, point in points.items()}
    for reason in dict.fromkeys(filter(None, excuses.values())):
        runs = tuple(name for name, excuse in excuses.items() if excuse == reason)
        found.omissions.append(Omission(measure.title, runs, "inapplicable", reason))
    return {name: point for name, point in points.items() if not excuses[name]}


def _leave_out(
    measure: Measure,
    apt: Mapping[str, CheckpointLoss],
    budget: Budget,
    estimate: float,
    found: Results,
) -> None:
    reason = (
        f"It was expected to take {budget.pace * estimate:.0f} s, and {budget.left:.0f} s of the "
        f"budget of {budget.seconds:.0f} s were left."
    )
    found.omissions.append(Omission(measure.title, tuple(apt), "budget", reason))


def _take(measure: Measure, name: str, point: CheckpointLoss, found: Results) -> None:
    try:
        result = _on_host(measure.take(point))
    except ValueError as error:  # how `curvax.analysis` says that something does not apply
        found.omissions.append(Omission(measure.title, (name,), "inapplicable", str(error)))
    except Exception as error:  # a device out of memory, say: the other measures are worth having
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        found.omissions.append(Omission(measure.title, (name,), "failed", reason))
    else:
        found.results.setdefault(measure.name, {})[name] = result


def _on_host(value: Any) -> Any:
    """Arrays as those of NumPy. A tree map would sort the blocks of a network by name."""
    if isinstance(value, dict):
        return {name: _on_host(x) for name, x in value.items()}
    if isinstance(value, tuple):
        parts = map(_on_host, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return np.asarray(value) if isinstance(value, jax.Array) else value
