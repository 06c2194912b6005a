"""The radius ρ of a perturbation: one for all leaves, or one for each."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree


class ByPath:
    """A value for each leaf of the parameters, by its path; `by_path` makes it."""

    def __init__(self, f: Callable[[Path], Any]):
        self.f = f


def by_path(f: Callable[[Path], Any]) -> ByPath:
    """Gives each leaf of the parameters a radius of its own, by its path.

    Args:
        f: `path -> ρ`, a number or a schedule; the path is a tuple of names from the root, such as
            `("Dense_0", "kernel")`.

    Returns:
        A `rho=` of `sam_perturb`, `sam`, `gsam` and `look_sam`. One norm is taken over all leaves.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda p: 0.5 * (p["w"] ** 2 + p["b"] ** 2)
        >>> rho = curvax.by_path(lambda path: 0.0 if path[-1] == "b" else 0.1)
        >>> tx = curvax.sam(optax.sgd(1.0), rho)
        >>> p = {"w": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> updates, state = tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss)
        >>> {name: round(float(u), 3) for name, u in updates.items()}
        {'b': -4.0, 'w': -3.06}
    """
    return ByPath(f)


def radius_of(rho: Any, step: jax.Array, params: Tree, *, stage: str) -> Tree:
    """ρ for each leaf of the parameters at a step.

    A callable is a schedule `step -> ρ`, or a function of the path if its argument is called so.

    Raises:
        ValueError: ρ is negative, or neither a number nor a tree prefix of the parameters.
    """
    f = rho.f if isinstance(rho, ByPath) else rho
    if isinstance(rho, ByPath) or (callable(rho) and _takes_a_path(rho)):
        spread = trees.map_with_path(lambda path, x: _called(f, path, stage), params)
    else:
        prefix = _called(rho, step, stage) if callable(rho) else rho
        spread = trees.broadcast_prefix(prefix, params)
    spread = jax.tree.map(lambda r: _called(r, step, stage) if callable(r) else r, spread)
    for value in jax.tree.leaves(spread):
        checks.check_range("rho", value, 0, jnp.inf, stage=stage)
    return spread


def _called(f: Callable[..., Any], argument: Any, stage: str) -> Any:
    try:
        return f(argument)
    except Exception as error:
        what = "path" if isinstance(argument, tuple) else "step"
        raise ValueError(
            f"`{stage}(rho=)` takes a schedule `step -> ρ`, or `curvax.by_path(f)` with a function "
            f"`path -> ρ` of the names of a leaf from the root; this one was called with the "
            f"{what} {argument!r} and raised {error!r}."
        ) from error


def _takes_a_path(f: Callable[..., Any]) -> bool:
    try:
        return next(iter(inspect.signature(f).parameters), None) == "path"
    except ValueError:  # builtins without a signature
        return False
