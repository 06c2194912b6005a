"""Solves A x = b by Kronecker factors, which are decomposed or inverted every k solves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Period, Scalar, Score
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.linalg import decompositions
from curvax.linalg.dense import finite_or_zero
from curvax.linalg.solvers import Solution, Solver
from curvax.linear_operator import as_product

STYLES = ("exact", "heuristic")


class KroneckerState(NamedTuple):
    step: jax.Array
    """Number of solves so far, int32 scalar."""
    kept: tuple[jax.Array, ...]
    """The eigenvectors and eigenvalues of the factors, or their inverses."""


def kronecker(every: int = 1, *, style: str = "exact", divided_over: AxisNames = None) -> Solver:
    """Solves (C + λI) x = b for Kronecker factors C = G ⊗ A, by factorising every k-th time.

    Behind a stage that sets `factors`, such as `fisher_kronecker`, as a solver, or as a
    preconditioner, `cg(5, preconditioner=kronecker())`. λ is that of `damp`. Between
    factorisations a solve costs two to four products with matrices of the factors' sizes.

    Args:
        every: k, number of solves per factorisation, a positive int. The stage that makes the
            factors then needs `like=`. With `heuristic`, λ is that of the factorisation.
        style: `exact` takes the eigenvectors of the factors; `heuristic` the inverses of the damped
            factors, (G + √λ/π I)⁻¹ ⊗ (A + √λ π I)⁻¹ with π² = (tr A / dim A) / (tr G / dim G),
            several times cheaper. Martens & Grosse, arXiv:1503.05671, section 6.3.
        divided_over: device axis of `pmap`, `shard_map` or, under `jit`, of the mesh of
            `jax.set_mesh`, or tuple of axes, among whose devices the factorisations are divided:
            each takes a share of the matrices, and one sum over the devices gives all of them to
            all. The factors must be averaged over these axes.

    Returns:
        A `Solver`. Residuals are not computed, and given as 0. A solution that is not finite is
        replaced by 0, with the reason `StopReason.breakdown`.

    Raises:
        ValueError: `every` is not positive, or `style` is unknown; in `update`, no earlier stage
            set factors, λ = 0 with `heuristic`, or the factors are local to an axis of
            `divided_over`.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([[1.0], [2.0]])}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> step = curvax.gauss_newton_kronecker() | curvax.solve(curvax.kronecker())
        >>> w = jnp.zeros((2, 1))
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = step.update(grads, step.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in updates[:, 0]]  # linear regression is solved in one step
        [-1.0, -1.0]
    """
    checks.check_count("kronecker", every=every)
    if style not in STYLES:
        raise ValueError(f"`kronecker(style=)` is one of {STYLES}, and is {style!r}.")

    def factorised(factors: Any, damping: Scalar) -> Any:
        return factors.eigen() if style == "exact" else factors.inverse(damping)

    def solved(found: Any, b: Tree, damping: Scalar) -> Tree:
        with jax.default_matmul_precision("highest"):
            return found.power(b, -1, damping) if style == "exact" else found(b)

    def init(params: Tree, factors: Any = None) -> KroneckerState | tuple[()]:
        del params
        if every == 1:
            return ()
        known = known_factors(factors, f"kronecker(every={every})", "leave `every` out")
        return nothing_kept(lambda: factorised(known, 1.0))

    def prepare(product: Matvec, state: Any, factors: Any) -> tuple[Matvec, Tree]:
        whole = as_product(product)
        factors = whole.curvature if factors is None else factors
        factors = needed_factors(factors, "kronecker", "fisher_kronecker() | solve(kronecker())")
        damping = 0.0 if whole.damping is None else whole.damping
        with jax.default_matmul_precision("highest"):
            over = shared_axes(factors, divided_over, "kronecker")

            def make() -> Any:
                with decompositions.divided(over):
                    return factorised(factors, damping)

            found, state = (make(), state) if every == 1 else kept_or_made(make, state, every)
        return lambda b: solved(found, b, damping), state

    def solve(
        product: Matvec,
        b: Tree,
        state: Any,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
        factors: Any = None,
    ) -> tuple[Solution, Tree]:
        del diagonal, score
        apply, state = prepare(product, state, factors)
        return _solution(apply(b)), state

    return Solver(solve, init, uses_factors=True, prepare=prepare, measures=False)


def needed_factors(factors: Any, where: str, example: str) -> Any:
    """The Kronecker factors that a stage or solver received.

    Raises:
        ValueError: no earlier stage set any.
    """
    if not hasattr(factors, "eigen"):
        raise ValueError(
            f"`{where}` needs Kronecker factors, and no earlier stage gave any. Put an estimator "
            f"before it, as in `{example}`; between stages write `|` or `curvax.pipe`, since "
            "`optax.chain` passes on the updates only."
        )
    return factors


def known_factors(factors: Any, where: str, otherwise: str) -> Any:
    """The factors of zeros that `init` received, of what is kept from step to step.

    Raises:
        ValueError: no stage before this one knows their shapes.
    """
    if factors is None:
        raise ValueError(
            f"`{where}` keeps decompositions of Kronecker factors, whose shapes follow from the "
            "model, and no stage before it in its pipe knows them. Pass an objective with the "
            "shapes of training to the stage that makes the factors, "
            f"`fisher_kronecker(like=objective)`, use `gradient_kronecker()`, or {otherwise}."
        )
    return factors


def nothing_kept(make: Callable[[], Any]) -> KroneckerState:
    """The state before the first factorisation that `make` would give."""
    zeros = tuple(map(jnp.zeros_like, jax.tree.leaves(jax.eval_shape(make))))
    return KroneckerState(jnp.zeros((), jnp.int32), zeros)


def kept_or_made(
    make: Callable[[], Any], state: KroneckerState, every: Period
) -> tuple[Any, KroneckerState]:
    """The factorisation that was kept, or in every k-th call that of `make`."""
    arrays = lambda: trees.cast_like(tuple(jax.tree.leaves(make())), state.kept)
    kept = axes.cond(state.step % every == 0, arrays, lambda: state.kept)
    found = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(make)), kept)
    return found, KroneckerState(state.step + 1, kept)


def shared_axes(factors: Any, divided_over: AxisNames, where: str) -> tuple[str, ...]:
    """The axes among whose devices factorisations are divided, bound or of the context's mesh.

    Raises:
        ValueError: the factors are not the same on these devices.
    """
    over = axes.bound(divided_over, where=f"`{where}(divided_over=)`")
    local = axes.varying(factors) | factors.structure.local
    if own := sorted(local & set(over)):
        raise ValueError(
            f"`{where}(divided_over={divided_over!r})` divides the factorisations among devices, "
            f"and the factors are each device's own over {own}. Average them, "
            f"`fisher_kronecker(mean_over={own[0]!r})`, or leave `divided_over` out."
        )
    return over or meshes.in_context(axes.as_tuple(divided_over))


def _solution(x: Tree) -> Solution:
    x, reason = finite_or_zero(x)
    return Solution(x, jnp.zeros((), jnp.int32), jnp.zeros(()), reason)
