"""Preconditioners v ↦ M⁻¹v for conjugate gradients."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.linalg.solvers import Solution, Solver
from curvax.linear_operator import Product

Preconditioner = Matvec | Scalar | Solver | None
"""A map v ↦ M⁻¹v, an exponent ξ for M = (|D| + λ)^ξ, `kronecker()`, or None for the identity."""


def check_preconditioner(preconditioner: object, solver: str) -> None:
    """Checks the option `preconditioner` of a solver.

    Raises:
        ValueError: it is neither None, a callable, an exponent in [0, 1], nor a solver by factors.
    """
    if isinstance(preconditioner, Solver) and preconditioner.prepare is None:
        raise ValueError(
            f"`{solver}(preconditioner=)` takes `kronecker()` of the solvers, and another one is "
            "no preconditioner: its solution is not linear in the vector."
        )
    if preconditioner is None or callable(preconditioner):
        return
    if isinstance(preconditioner, numbers.Real) and 0 <= float(preconditioner) <= 1:
        return
    if isinstance(preconditioner, jax.Array) and not preconditioner.shape:
        return
    raise ValueError(
        f"`{solver}(preconditioner=)` takes an exponent ξ in [0, 1] for the curvature's diagonal, "
        f"or a callable v ↦ M⁻¹v, and received {preconditioner!r}. Martens uses ξ = 0.75."
    )


def preconditioning(
    preconditioner: Preconditioner, product: Matvec, diagonal: Tree, solver: str
) -> Matvec:
    """The map v ↦ M⁻¹v on trees in float32 or wider.

    Args:
        preconditioner: the option.
        product: A, whose damping λ enters M.
        diagonal: an estimate D of the diagonal of A without damping, or None.
        solver: the name of the solver, for errors.

    Raises:
        ValueError: the option is an exponent, and there is no diagonal.
    """
    if preconditioner is None:
        return lambda v: v
    if callable(preconditioner):
        given = preconditioner
        return lambda v: trees.laid_out_like(given(v), v)
    if diagonal is None:
        raise ValueError(
            f"`{solver}(preconditioner={preconditioner})` is an exponent for the curvature's "
            "diagonal, and no earlier stage gave one. Put an estimator before the solve, as in "
            f"`fisher_diag() | fisher_matvec() | damp(1e-3) | solve({solver}(...))`, with "
            "`gauss_newton_diag`, `fisher_diag`, `empirical_fisher_diag`, `hutchinson_diag` or "
            "`squared_gradient`; or pass `diagonal=` to the solver itself."
        )
    damping = product.damping if isinstance(product, Product) else None
    scales = jax.tree.map(lambda d: _power(d, damping, preconditioner), diagonal)
    return lambda v: jax.tree.map(lambda x, s: (x / s).astype(x.dtype), v, scales)


def preconditioned(preconditioner: Solver, make: Callable[[Matvec], Solver]) -> Solver:
    """A solver with the solution by another one as its preconditioner.

    Its state is that of both.

    Args:
        preconditioner: a solver with `prepare`, such as `kronecker()`.
        make: (v ↦ M⁻¹v) ↦ the solver.
    """
    alone = make(lambda v: v)
    prepare = preconditioner.prepare
    assert prepare is not None

    def init(params: Tree, factors: Any = None) -> Tree:
        return alone.init(params), preconditioner.init(params, factors)

    def solve(
        product: Matvec, b: Tree, state: Tree, *, factors: Any = None, **options: Any
    ) -> tuple[Solution, Tree]:
        own, kept = state
        apply, kept = prepare(product, kept, factors)
        solution, own = make(apply).solve(product, b, own, **options)
        return solution, (own, kept)

    return Solver(solve, init, uses_factors=True)


def _power(diagonal: jax.Array, damping: Scalar | None, xi: Scalar) -> jax.Array:
    """(|D| + λ)^ξ, and 1 where |D| + λ is 0."""
    base = jnp.abs(trees.widen(diagonal)) + (0 if damping is None else damping)
    return jnp.where(base > 0, base, 1) ** xi
