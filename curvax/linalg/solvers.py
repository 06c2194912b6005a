"""The interface of solvers of A x = b, where A is given as a product v ↦ A v."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Score


class StopReason(enum.IntEnum):
    """Why a solver stopped, the type of `Solution.reason`.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> solution = curvax.cg(10)(lambda v: 2 * v, jnp.ones(3))
        >>> curvax.StopReason(int(solution.reason)).name
        'tolerance'
    """

    max_steps = 0
    """The maximum number of products was used."""
    tolerance = 1
    """The residual is small: ‖b - A x‖ <= tol·‖b‖."""
    progress = 2
    """The quadratic model stopped decreasing (the option `progress` of `cg`)."""
    negative_curvature = 3
    """The direction p has pᵀA p <= 0, so that the model has no minimum along it."""
    boundary = 4
    """The iterate reached the boundary of the trust region."""
    breakdown = 5
    """A value was not finite, or the preconditioner or the matrix not positive definite."""
    direct = 6
    """The solution comes from a factorisation, not from an iteration."""


class Solution(NamedTuple):
    """The approximate solution of A x = b, with its accuracy.

    Attributes:
        x: the solution, shaped and typed like b.
        steps: products used, an int32 scalar.
        residual: ‖b - A x‖ / ‖b‖, and 0 for b = 0; 0 from `kronecker`, which does not compute it.
        reason: why the solver stopped, a `StopReason` as an int32 scalar.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> solution = curvax.cg(10)(lambda v: 2 * v, jnp.array([3.0, 4.0]))
        >>> [round(x, 3) for x in solution.x.tolist()], int(solution.steps)
        ([1.5, 2.0], 1)
        >>> float(solution.residual) < 1e-6
        True
    """

    x: Tree
    steps: jax.Array
    residual: jax.Array
    reason: jax.Array


def check_solver(solver: object, stage: str) -> None:
    """Checks that an argument is a `Solver`.

    Raises:
        TypeError: it is something else, such as a factory without its parentheses, or a name.
    """
    if not isinstance(solver, Solver):
        raise TypeError(
            f"`{stage}` takes a solver such as `cg(20)` or `dense()`, and received {solver!r}."
        )


def stateless(params: Tree) -> tuple[()]:
    """The state of a solver that keeps nothing between solves."""
    del params
    return ()


def relative_residual(r: Tree, b: Tree) -> jax.Array:
    """‖r‖ / ‖b‖, and 0 for b = 0."""
    return trees.ratio(trees.norm(r), trees.norm(b))


@dataclasses.dataclass(frozen=True)
class Solver:
    """A method to solve A x = b, where A is a product v ↦ A v on trees shaped and typed like b.

    `solver(product, b)` returns a `Solution`. Solvers that warm-start have a state, which stages
    such as `solve` keep from update to update.

    Attributes:
        solve: `solve(product, b, state, *, diagonal=None, score=None) -> (Solution, state)`.
            `diagonal` is an estimate of the diagonal of A without damping, for preconditioners;
            `score(x) -> scalar` ranks iterates for backtracking, lower is better, with the same
            value on every device.
        init: `params -> state`, the state before the first solve.
        uses_factors: whether `solve` also takes `factors`, the Kronecker factors that earlier
            stages set or None, and `init` takes them as a second argument.
        prepare: of a solver that can precondition another, `prepare(product, state, factors) ->
            (v ↦ A⁻¹v, state)`.
        measures: whether the steps and the residual of its solutions are computed.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> solver = curvax.Solver(lambda product, b, state, **options: (b, state))
        >>> solver(lambda v: v, jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    solve: Callable[..., tuple[Solution, Tree]]
    init: Callable[..., Tree] = stateless
    uses_factors: bool = False
    prepare: Callable[..., tuple[Matvec, Tree]] | None = None
    measures: bool = True

    def __call__(
        self,
        product: Matvec,
        b: Tree = None,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
        factors: Any = None,
    ) -> Solution:
        """Solves A x = b once, from a new state.

        Args:
            product: v ↦ A v, symmetric.
            b: a pytree of arrays.
            diagonal: an estimate of the diagonal of A without damping, like b.
            score: `score(x) -> scalar`, for `cg(backtrack=True)`.
            factors: Kronecker factors, for `kronecker` and for `cg(preconditioner=kronecker())`.

        Raises:
            TypeError: `product` is not callable, or b is complex.
        """
        if not callable(product):
            raise TypeError(
                "A solver is called with a product and a vector, `solver(product, b)`, and the "
                f"product is {product!r}, not a callable. `optax.inject_hyperparams` treats every "
                "callable option as a schedule, except in curvax's own factories: exclude it in "
                "yours, "
                '`inject_hyperparams(..., static_args=("solver",))`.'
            )
        checks.refuse_complex(b, "A solver")
        state = self.init(b, factors) if self.uses_factors else self.init(b)
        known = {"factors": factors} if self.uses_factors else {}
        return self.solve(product, b, state, diagonal=diagonal, score=score, **known)[0]


def direct_solver(solve: Callable[[Matvec, Tree], Solution]) -> Solver:
    """Converts `solve(product, b) -> Solution` to a `Solver` without state or preconditioner."""

    def ignoring(
        product: Matvec,
        b: Tree,
        state: Tree,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
    ) -> tuple[Solution, Tree]:
        del diagonal, score
        return solve(product, b), state

    return Solver(ignoring)
