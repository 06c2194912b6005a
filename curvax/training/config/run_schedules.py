"""Schedules over a whole run: peak and number of steps ↦ the value at each step.

An optimiser's text uses them without `steps`, which the run's config supplies.
"""

from collections.abc import Sequence

import optax


def cosine(
    peak: float, warmup: int = 0, end: float = 0.0, *, steps: int | None = None
) -> optax.Schedule:
    """A linear rise from 0 over `warmup` steps, then half a cosine from `peak` to `end`.

    Args:
        peak: the largest value.
        warmup: number of steps of the rise.
        end: the value at the last step.
        steps: number of steps of the run.

    Raises:
        ValueError: `steps` is unknown, or the warm-up is not shorter than the run.
    """
    length = _after_warmup("cosine", warmup, steps)
    alpha = end / peak if peak else 0.0
    return _warmed(peak, warmup, optax.cosine_decay_schedule(peak, length, alpha))


def linear(
    peak: float, warmup: int = 0, end: float = 0.0, *, steps: int | None = None
) -> optax.Schedule:
    """A linear rise from 0 over `warmup` steps, then a straight line from `peak` to `end`.

    Arguments and errors as in `cosine`.
    """
    length = _after_warmup("linear", warmup, steps)
    return _warmed(peak, warmup, optax.linear_schedule(peak, end, length))


def constant(value: float, warmup: int = 0, *, steps: int | None = None) -> optax.Schedule:
    """A linear rise from 0 over `warmup` steps, then `value`. Errors as in `cosine`."""
    _after_warmup("constant", warmup, steps)
    return _warmed(value, warmup, optax.constant_schedule(value))


def step_decay(
    peak: float,
    at: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
    warmup: int = 0,
    *,
    steps: int | None = None,
) -> optax.Schedule:
    """A step function: `peak`, multiplied by `factor` at each of the fractions `at` of the run.

    Raises:
        ValueError: as in `cosine`, or a fraction lies outside (0, 1).
    """
    length = _after_warmup("step_decay", warmup, steps)
    if not all(0 < fraction < 1 for fraction in at):
        raise ValueError(
            f"`step_decay` drops at fractions of the run, each between 0 and 1, and `at` is "
            f"{list(at)}. Write half of the run as 0.5."
        )
    drops = {round(fraction * (warmup + length)) - warmup: factor for fraction in at}
    return _warmed(peak, warmup, optax.piecewise_constant_schedule(peak, drops))


def _after_warmup(name: str, warmup: int, steps: int | None) -> int:
    if steps is None:
        raise ValueError(
            f"`{name}` spans the training run, whose number of steps is not known here. Give it as "
            f"`{name}(..., steps=1000)`, or parse the text with `parse(text, steps=1000)`."
        )
    if not 0 <= warmup < steps:
        raise ValueError(
            f"`{name}` warms up over a part of the run, and `warmup` is {warmup} of {steps} steps. "
            "Use a warm-up of at least 0 and less than the number of steps."
        )
    return steps - warmup


def _warmed(peak: float, warmup: int, after: optax.Schedule) -> optax.Schedule:
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
