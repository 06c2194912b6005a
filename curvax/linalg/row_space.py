"""Solves (RᵀR + λI) x = b through the m × m matrix R Rᵀ, for a root R with few rows."""

import numbers

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.linalg import decompositions
from curvax.linalg.dense import finite_or_zero, solve_symmetric
from curvax.linalg.flatten import materialize, ravel, unravel
from curvax.linalg.solvers import Solution, Solver, direct_solver, relative_residual
from curvax.linear_operator import Product, Root


def row_space() -> Solver:
    """Solves (RᵀR + λI) x = b exactly in the row space of R, by the Woodbury identity.

        (RᵀR + λI)⁻¹ = (I - Rᵀ (R Rᵀ + λI)⁻¹ R) / λ

    R is the root of the product and λ its damping. A batch has m = examples × outputs rows, usually
    far fewer than parameters P: the solver takes m products with R Rᵀ and memory m² instead of P².
    Without damping (λ None or the number 0) it returns the least-norm solution x = (RᵀR)⁺ b. A
    traced λ must be positive.

    Returns:
        A `Solver`.

    Raises:
        ValueError: when the solver is called: the product has no root.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.eye(3)[:2], "y": jnp.zeros(2)}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> product = curvax.ggnvp(objective, jnp.zeros(3)).damped(0.5)
        >>> solution = curvax.row_space()(product, jnp.ones(3))
        >>> [round(x, 3) for x in solution.x.tolist()]
        [1.0, 1.0, 2.0]
    """

    def solve(product: Matvec, b: Tree) -> Solution:
        root, damping = _root_of(product)
        kernel = materialize(lambda u: root.forward(root.transpose(u)), root.rows)
        unit = trees.magnitude(b)
        rhs = trees.scale(trees.inverse(unit), b)
        rows = ravel(root.forward(rhs))
        none = damping is None or (isinstance(damping, numbers.Real) and damping == 0)
        solver = _least_norm if none else _damped
        x = trees.scale(unit, trees.wide(solver(root, kernel, rows, damping, rhs)))
        flat, reason = finite_or_zero(ravel(x))
        x = unravel(flat, b)
        rest = jax.tree.map(lambda y, z: trees.widen(y) - trees.widen(z), b, product(x))
        residual = relative_residual(rest, b)
        return Solution(x, jnp.int32(rows.size), residual, reason)

    return direct_solver(solve)


def _damped(
    root: Root, kernel: jax.Array, rows: jax.Array, damping: Scalar | None, b: Tree
) -> Tree:
    damping = jnp.asarray(damping, kernel.dtype)
    inner = solve_symmetric(kernel + damping * jnp.eye(rows.size, dtype=kernel.dtype), rows)
    along = root.transpose(unravel(inner, root.rows))
    return trees.scale(1 / damping, trees.add_scaled(b, -1.0, trees.laid_out_like(along, b)))


def _least_norm(
    root: Root, kernel: jax.Array, rows: jax.Array, damping: Scalar | None, b: Tree
) -> Tree:
    """(RᵀR)⁺ b = Rᵀ (R Rᵀ)⁺² R b."""
    del damping
    # R Rᵀ is divided by a power of two near its norm, since its inverse square may be out of range.
    unit = trees.magnitude(kernel)
    ((values, vectors),) = decompositions.eigh(kernel * trees.inverse(unit))
    floor = rows.size * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, values, 1), 0)
    with jax.default_matmul_precision("highest"):
        inner = vectors @ (inverse**2 * (vectors.T @ rows))
    along = trees.wide(root.transpose(unravel(inner * trees.inverse(unit), root.rows)))
    return trees.laid_out_like(trees.scale(trees.inverse(unit), along), b)


def _root_of(product: Matvec) -> tuple[Root, Scalar | None]:
    if not isinstance(product, Product) or product.root is None:
        raise ValueError(
            "`row_space` needs a root R of the curvature, C = RᵀR, and this product has none. "
            "Gauss-Newton and Fisher products of a likelihood have one, unless they are computed "
            "over micro-batches: use `gauss_newton_matvec()` or `fisher_matvec()` without "
            "`microbatch=`, or solve with `cg(20)` or `dense()`."
        )
    return product.root, product.damping
