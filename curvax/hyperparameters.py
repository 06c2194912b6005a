"""Keeps static options of curvax's factories static under `optax.inject_hyperparams`.

Optax binds the arguments of a factory to its signature, then converts numbers to arrays and treats
callables as schedules. The signature of a curvax factory wraps its static options in an object that
Optax passes on unchanged, and the factory unwraps them. Users need not list them in `static_args`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Options = ParamSpec("Options")
Made = TypeVar("Made")

STATIC = frozenset(
    {
        "ascent", "block", "factors_every", "fraction", "index", "inverses_every", "key", "labels",
        "lag", "largest", "layout", "like", "m", "mask", "p", "probes", "sampler", "samples",
        "shape", "shards", "size", "solver", "steps",
    }
)  # fmt: skip
"""Names of static options: counts, norms, fractions of the batch, seeds, and callables that are
not schedules."""

_static_of: dict[str, tuple[str, ...]] = {}


def injectable(factory: Callable[Options, Made]) -> Callable[Options, Made]:
    """Decorates a factory so that `optax.inject_hyperparams` leaves its static options unchanged.

    Args:
        factory: a function whose options in `STATIC` are static.

    Returns:
        The factory, with a signature that wraps these options.
    """
    own = inspect.signature(factory)
    _static_of[factory.__name__] = tuple(sorted(STATIC & own.parameters.keys()))

    @functools.wraps(factory)
    def make(*args: Options.args, **options: Options.kwargs) -> Made:
        named = {name: _unwrapped(value) for name, value in options.items()}
        return factory(*map(_unwrapped, args), **named)

    parameters = list(own.parameters.values())
    signature = _Signature(parameters, return_annotation=own.return_annotation)
    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def static_options(factory: str) -> tuple[str, ...]:
    """The names of a factory's static options."""
    return _static_of.get(factory, ())


class _Static:
    """A wrapped option, which Optax takes for neither a number nor a schedule."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


class _Signature(inspect.Signature):
    """A signature whose `bind` wraps static options, defaults included."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name in STATIC or _is_no_period(name, value):
                bound.arguments[name] = _Static(value)
        return bound


def _is_no_period(name: str, value: Any) -> bool:
    """Whether this is `every=1`, which as an array would add a branch and a second gradient."""
    return name == "every" and isinstance(value, int) and value == 1


def _unwrapped(value: Any) -> Any:
    return value.value if isinstance(value, _Static) else value
