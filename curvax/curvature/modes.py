"""The ways to compute Hessian products, and the first of them that JAX supports for a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.curvature.differentiability import (
    Function,
    is_opaque,
    refusal,
    refuse_mode,
    replayed,
    warn_of_differences,
)
from curvax.curvature.finite_differences import differences
from curvax.objective import (
    LossAndGradient,
    Objective,
    microbatch_mean,
    scaling,
    value_aux_and_grad,
)


class Way(NamedTuple):
    """One way to compute Hessian products."""

    mode: str
    """The mode that it implements, one of `MODES`."""
    many: Callable[[Objective, Tree], tuple[LossAndGradient, Matvec]]
    """(objective, θ) ↦ (((L, aux), ∇L), v ↦ H v)."""
    once: Callable[[Objective, Tree, Tree], tuple[LossAndGradient, Tree]]
    """(objective, θ, v) ↦ (((L, aux), ∇L), H v), with micro-batches in the memory of one."""
    trial: Callable[[Function, Tree], Tree] | None
    """(∇L, θ) ↦ H θ, which JAX must be able to trace and lower; None if only ∇L is needed."""


def way_to_products(mode: str, objective: Objective, params: Tree, *, once: bool) -> Way:
    """The first way that implements the mode and that JAX supports.

    A loss of ordinary primitives takes the first way without trials. For other losses the
    derivatives are tried on the traced gradient, at no cost at run time.

    Args:
        mode: one of `MODES`.
        objective: the loss.
        params: the point θ.
        once: whether the product is taken with a single vector, so that linearising does not pay.

    Raises:
        TypeError: JAX supports none.
    """
    allowed = [way for way in WAYS[int(once) :] if mode in ("auto", way.mode)]
    if allowed[0].trial is None or not is_opaque(objective, params):
        return allowed[0]
    gradient = replayed(lambda p: value_aux_and_grad(objective, p)[1], params)
    what, reasons = "the gradient of this loss", list[str]()
    for way in allowed:
        if way.trial is None:
            warn_of_differences(what, reasons[0])
            return way
        derivative = lambda p, trial=way.trial: trial(gradient, p)
        reasons.append(refusal(derivative, params))
        if not reasons[-1]:
            return way
    raise refuse_mode(mode, what, reasons[0])


def gradient_of(objective: Objective) -> Callable[[Tree], tuple[Tree, tuple[jax.Array, Any]]]:
    """θ ↦ (∇L, (L, aux)), for JAX transformations with `has_aux=True`."""

    def gradient(params: Tree) -> tuple[Tree, tuple[jax.Array, Any]]:
        loss, grads = value_aux_and_grad(objective, params)
        return grads, loss

    return gradient


def _linearized(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    grads, product, loss = jax.linearize(gradient_of(objective), params, has_aux=True)
    return (loss, grads), product


def _pushed(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    product = lambda v: _pushed_once(objective, params, v)[1]
    return value_aux_and_grad(objective, params), product


def _pushed_once(objective: Objective, params: Tree, v: Tree) -> tuple[LossAndGradient, Tree]:
    def forward(part: Objective) -> tuple[LossAndGradient, Tree]:
        grads, product, loss = jax.jvp(gradient_of(part), (params,), (v,), has_aux=True)
        return (loss, grads), product

    return microbatch_mean(objective, forward)


def _reversed(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    # H is symmetric, so the vector-Jacobian product of the gradient is the Hessian product.
    grads, pull, loss = jax.vjp(gradient_of(objective), params, has_aux=True)
    return (loss, grads), lambda v: scaling.at_scale(pull, objective.scale)(v)[0]


def _reversed_once(objective: Objective, params: Tree, v: Tree) -> tuple[LossAndGradient, Tree]:
    def reverse(part: Objective) -> tuple[LossAndGradient, Tree]:
        out, product = _reversed(part, params)
        return out, product(v)

    return microbatch_mean(objective, reverse)


def _differenced(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    gradient = lambda p: value_aux_and_grad(objective, p)[1]
    return value_aux_and_grad(objective, params), differences(gradient, params)


def _differenced_once(objective: Objective, params: Tree, v: Tree) -> tuple[LossAndGradient, Tree]:
    out, product = _differenced(objective, params)
    return out, product(v)


WAYS = (
    Way(
        "forward-over-reverse", _linearized, _pushed_once,
        lambda gradient, p: jax.linearize(gradient, p)[1](p),
    ),
    Way(
        "forward-over-reverse", _pushed, _pushed_once,
        lambda gradient, p: jax.jvp(gradient, (p,), (p,))[1],
    ),
    Way(
        "reverse-over-reverse", _reversed, _reversed_once,
        lambda gradient, p: jax.vjp(gradient, p)[1](p)[0],
    ),
    Way("finite-differences", _differenced, _differenced_once, None),
)  # fmt: skip
