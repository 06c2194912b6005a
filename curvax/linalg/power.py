"""Power iteration for the eigenvalue of largest magnitude of a symmetric product v ↦ C v."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.devices import axes


class Eigenpair(NamedTuple):
    """An approximate eigenvalue with its vector and its error."""

    value: jax.Array
    """λ = vᵀ C v, a scalar."""
    vector: Tree
    """v with ‖v‖ = 1, shaped and typed like the start vector."""
    residual: jax.Array
    """‖C v - λ v‖, a bound on the distance from λ to the nearest eigenvalue."""
    steps: jax.Array
    """Products used, an int32 scalar."""
    converged: jax.Array
    """Whether residual <= tol·|λ|."""


def power_iteration(
    product: Matvec, v0: Tree, *, max_steps: int = 100, tol: float = 1e-3
) -> Eigenpair:
    """The eigenvalue of largest magnitude and its vector, by power iteration.

        v ← C v / ‖C v‖,   λ = vᵀ C v

    Args:
        product: v ↦ C v, symmetric.
        v0: a start vector that is not orthogonal to the eigenvector, such as a Gaussian probe.
        max_steps: maximum number of products.
        tol: stops once ‖C v - λ v‖ <= tol·|λ|.

    Returns:
        An `Eigenpair` of `value`, `vector`, `residual`, `steps` and `converged`.

    Raises:
        TypeError: v0 is complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> pair = curvax.power_iteration(lambda v: jnp.array([1.0, -3.0]) * v, jnp.ones(2))
        >>> round(float(pair.value), 3), bool(pair.converged)
        (-3.0, True)
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
