"""A symmetric product v ↦ C v ↦ its eigenpair of largest magnitude."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes


class Eigenpair(NamedTuple):
    """An eigenvalue with its vector, and how far to trust it."""

    value: jax.Array
    """λ = vᵀ C v, of largest |λ|."""
    vector: Tree
    """v, ‖v‖ = 1."""
    residual: jax.Array
    """‖C v - λ v‖, a bound on the distance from λ to the spectrum."""
    steps: jax.Array
    """Products used."""
    converged: jax.Array
    """residual <= tol·|λ|."""


def power_iteration(
    product: Callable[[Tree], Tree], v0: Tree, *, max_steps: int = 100, tol: float = 1e-3
) -> Eigenpair:
    """The eigenpair of largest magnitude by power iteration from `v0`.

    Args:
        product: v ↦ C v, symmetric.
        v0: a start vector with a part along the eigenvector, such as a Gaussian probe.
        max_steps: products at most.
        tol: stop once ‖C v - λ v‖ <= tol·|λ|.

    Returns:
        An `Eigenpair`. The residual is that of the returned vector and value.

    Raises:
        TypeError: v0 is complex.
    """
    checks.refuse_complex(v0, "power_iteration")

    unit = lambda v: trees.cast_like(trees.unit(v), v)

    def measure(v: Tree, steps: jax.Array) -> tuple[Eigenpair, Tree]:
        cv = product(v)
        checks.refuse_complex(cv, "power_iteration")
        value = trees.dot(v, cv)
        residual = trees.norm(trees.add_scaled(cv, -value, v))
        return Eigenpair(value, v, residual, steps, residual <= tol * jnp.abs(value)), cv

    def go_on(carry: tuple[Eigenpair, Tree]) -> jax.Array:
        pair, _ = carry
        return ~pair.converged & (pair.steps < max_steps)

    def body(carry: tuple[Eigenpair, Tree]) -> tuple[Eigenpair, Tree]:
        pair, cv = carry
        return measure(unit(cv), pair.steps + 1)

    pair, _ = axes.while_loop(go_on, body, measure(unit(v0), jnp.ones((), jnp.int32)))
    return pair
