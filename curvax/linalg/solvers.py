"""A product v ↦ A v and a vector b ↦ an x with A x ≈ b, how good it is and why it is no better."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree


class StopReason(enum.IntEnum):
    """Why a solver stopped."""

    max_steps = 0
    """It used the products it was allowed."""
    tolerance = 1
    """‖b - A x‖ <= tol·‖b‖."""
    progress = 2
    """The quadratic model hardly fell any more."""
    negative_curvature = 3
    """A direction p with pᵀA p <= 0: the model has no minimum along it."""
    boundary = 4
    """The edge of the trust region."""
    breakdown = 5
    """A number that is not finite, a preconditioner or a matrix that is not positive definite."""
    direct = 6
    """A factorisation, not an iteration."""


class Solution(NamedTuple):
    """What a solver found, and how far to trust it."""

    x: Tree
    """Shaped and typed like b."""
    steps: jax.Array
    """Products used, int32 scalar."""
    residual: jax.Array
    """‖b - A x‖ / ‖b‖, and 0 for b = 0."""
    reason: jax.Array
    """A `StopReason`, int32 scalar."""


def check_solver(solver: Any, stage: str) -> None:
    """Refuses what is no solver.

    Raises:
        TypeError: the factory without its parentheses, say, or a name.
    """
    if not isinstance(solver, Solver):
        raise TypeError(
            f"`{stage}` takes a solver such as `cg(20)` or `dense()`, and got {solver!r}."
        )


def stateless(params: Tree) -> tuple[()]:
    """Nothing to keep from solve to solve."""
    del params
    return ()


def relative_residual(r: Tree, b: Tree) -> jax.Array:
    """‖r‖ / ‖b‖, and 0 for b = 0."""
    return trees.ratio(trees.norm(r), trees.norm(b))


@dataclasses.dataclass(frozen=True)
class Solver:
    """A way to solve A x = b; `solver(product, b)` is the `Solution`.

    Attributes:
        solve: `solve(product, b, state, *, diagonal=None, score=None) -> (Solution, state)`, for a
            product v ↦ A v on trees shaped and typed like b. `diagonal` is an estimate of that of
            the undamped A, for preconditioners; `score(x) -> scalar` ranks iterates, lower is
            better, the same on every device.
        init: `params -> state`, what one solve hands to the next.
    """

    solve: Callable[..., tuple[Solution, Any]]
    init: Callable[[Tree], Any] = stateless

    def __call__(
        self,
        product: Callable[[Tree], Tree],
        b: Tree = None,
        *,
        diagonal: Tree = None,
        score: Callable[[Tree], jax.Array] | None = None,
    ) -> Solution:
        """Solves once, from the state of a fresh start.

        Raises:
            TypeError: it was called with a step, as `inject_hyperparams` calls a schedule.
        """
        if not callable(product):
            raise TypeError(
                "A solver is called with a product and a vector, `solver(product, b)`, and got "
                f"{product!r} as the product. `optax.inject_hyperparams` takes every callable for "
                "a schedule but in curvax's own factories: name it in yours, "
                '`inject_hyperparams(..., static_args=("solver",))`.'
            )
        checks.refuse_complex(b, "A solver")
        return self.solve(product, b, self.init(b), diagonal=diagonal, score=score)[0]


def direct_solver(solve: Callable[[Callable[[Tree], Tree], Tree], Solution]) -> Solver:
    """The solver of a `solve(product, b)` that needs no more than that and keeps nothing."""

    def ignoring(
        product: Callable[[Tree], Tree],
        b: Tree,
        state: Any,
        *,
        diagonal: Tree = None,
        score: Any = None,
    ) -> tuple[Solution, Any]:
        del diagonal, score
        return solve(product, b), state

    return Solver(ignoring)
