"""States before the first step, some of which hold Kronecker factors that an earlier stage makes.

The shapes of factors follow from the model, not from the parameters alone. The `init` of a stage
that makes factors has an attribute `factors`, and stages that keep factors from step to step take
them as the second argument of their `init`.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree

MakeFactors = Callable[[Tree, Any], Any]
"""(parameters, factors of earlier stages or None) ↦ factors of zeros, or None."""

_whole: contextvars.ContextVar[tuple[Callable[[Tree], Tree], ...]] = contextvars.ContextVar(
    "whole", default=()
)


@contextlib.contextmanager
def restricted(fill: Callable[[Tree], Tree]) -> Iterator[None]:
    """Within it, `init` receives a part of the parameters, and `fill` makes the whole of it."""
    token = _whole.set((fill, *_whole.get()))
    try:
        yield
    finally:
        _whole.reset(token)


def whole(part: Tree) -> Tree:
    """The parameters of the model, of what `init` received."""
    for fill in _whole.get():
        part = fill(part)
    return part


def telling(init: Callable[..., Any], **told: Any) -> Callable[..., Any]:
    """An `init` that tells others of its stage: which leaves it `moves`, as `warn_of_frozen` reads,
    or how to make its `factors`.
    """
    init = functools.partial(init)
    vars(init).update(told)
    return init


def takes_factors(init: Callable[..., Any]) -> bool:
    """Whether an `init` takes factors as its second argument."""
    try:
        return "factors" in inspect.signature(init).parameters
    except ValueError:  # of a builtin, such as `tuple`
        return False


def initial(part: optax.GradientTransformation, params: Tree, factors: Any) -> optax.OptState:
    """The state of a part behind stages that make these factors."""
    if factors is not None and takes_factors(part.init):
        return part.init(params, factors)
    return part.init(params)


def factors_behind(part: optax.GradientTransformation, params: Tree, factors: Any) -> Any:
    """The factors that the next part receives."""
    make: MakeFactors | None = getattr(part.init, "factors", None)
    return factors if make is None else make(params, factors)


def initial_of_all(
    parts: Sequence[optax.GradientTransformation], params: Tree, factors: Any
) -> tuple[optax.OptState, ...]:
    """The states of parts one behind the other."""
    states = []
    for part in parts:
        states.append(initial(part, params, factors))
        factors = factors_behind(part, params, factors)
    return tuple(states)


def factors_of_all(parts: Sequence[optax.GradientTransformation]) -> MakeFactors | None:
    """The factors behind all of these parts; None if none of them makes any."""
    if not any(hasattr(part.init, "factors") for part in parts):
        return None

    def made(params: Tree, factors: Any) -> Any:
        for part in parts:
            factors = factors_behind(part, params, factors)
        return factors

    return made


def zeros_to_keep(params: Tree, factors: Any = None) -> Tree:
    """Zeros for what is kept of an estimate: a diagonal, or the arrays of factors.

    In float32 or wider.
    """
    kept = params if factors is None else tuple(jax.tree.leaves(factors))
    return jax.tree.map(lambda x: trees.widen(jnp.zeros_like(x)), kept)
