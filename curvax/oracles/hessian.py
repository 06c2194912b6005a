"""A loss and a point ↦ the Hessian product v ↦ H v, and the gradient that comes with it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.objective import Objective, as_objective
from curvax.oracles.linearization import (
    LossAndGradient,
    at_precision,
    at_unit_size,
    calls,
    localized,
    tangent,
)
from curvax.products import Product
from curvax.trees import Tree

Matvec = Callable[[Tree], Tree]

MODES = ("auto", "forward-over-reverse", "reverse-over-reverse", "finite-differences")


def hvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: Any = "highest",
) -> Product:
    """The product with the Hessian of the loss at `params`: v ↦ ∇²L(θ) v.

    Linearised once, so that each application costs about one gradient (with `microbatch=` the
    gradient is computed anew each time, and memory is that of one micro-batch). Local to the
    device under an axis.

    Args:
        objective: an `Objective`, or a callable `params -> scalar`.
        params: the point θ.
        mode: `"forward-over-reverse"`, the cheapest; `"reverse-over-reverse"`, where a
            `custom_vjp` or a kernel has no forward derivative; `"finite-differences"`, central,
            good to about the cube root of the precision squared; `"auto"`, the first that the
            loss allows of the first two.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map from trees like `params` to trees like `params`.

    Raises:
        ValueError: an unknown mode.
    """
    objective = as_objective(objective, "hvp")
    return linearized_hessian(objective, params, mode=mode, precision=precision)[1]


def linearized_hessian(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: Any = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `hvp`) from one linearisation."""
    check_mode(mode)
    with jax.default_matmul_precision(precision):
        out, product = linearized_gradient(objective, params, mode=mode)
    return out, at_precision(precision, Product(product))


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` is one of {MODES}, and was {mode!r}.")


def linearized_gradient(
    objective: Objective, params: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Matvec]:
    """(((L, aux), ∇L), v ↦ H v) at `params`, one linearisation for all."""
    own = objective.apart()
    out, product = _own_linearized(own, *localized(own, params), mode)
    product = at_unit_size(own, product)
    return objective.group_mean(out), lambda v: objective.group_mean(product(v))


def _own_linearized(
    own: Objective, params: Tree, local: frozenset[str], mode: str
) -> tuple[LossAndGradient, Matvec]:
    if mode == "finite-differences":
        return own.value_aux_and_grad(params), _differences(own, params)
    if own.microbatch:
        product = lambda v: gradient_and_product(own, params, v, mode=mode)[1]
        return own.value_aux_and_grad(params), product
    forward = lambda: _forward_linearized(own, params)
    reverse = lambda: _reverse_linearized(own, params)
    out, product = _by_mode(mode, own, params, forward, reverse)
    return out, lambda v: product(tangent(v, params, local))


def gradient_and_product(
    objective: Objective, params: Tree, v: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Tree]:
    """(((L, aux), ∇L), H v) in one pass: the gradient shares its backward pass with the product."""
    own = objective.apart()
    params, local = localized(own, params)
    return objective.group_mean(_own_product(own, params, tangent(v, params, local), mode))


def _own_product(own: Objective, params: Tree, v: Tree, mode: str) -> tuple[LossAndGradient, Tree]:
    if mode == "finite-differences":
        return own.value_aux_and_grad(params), _differences(own, params)(v)

    def forward(part: Objective) -> tuple[LossAndGradient, Tree]:
        grads, product, loss = jax.jvp(_gradient_of(part), (params,), (v,), has_aux=True)
        return (loss, grads), product

    def reverse(part: Objective) -> tuple[LossAndGradient, Tree]:
        out, product = _reverse_linearized(part, params)
        return out, product(v)

    return _by_mode(mode, own, params, lambda: own.average(forward), lambda: own.average(reverse))


def _gradient_of(objective: Objective) -> Callable[[Tree], tuple[Tree, tuple[jax.Array, Any]]]:
    """θ ↦ (∇L, (L, aux)), in the order in which JAX differentiates the first."""

    def gradient(params: Tree) -> tuple[Tree, tuple[jax.Array, Any]]:
        loss, grads = objective.value_aux_and_grad(params)
        return grads, loss

    return gradient


def _forward_linearized(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    grads, product, loss = jax.linearize(_gradient_of(objective), params, has_aux=True)
    return (loss, grads), product


def _reverse_linearized(objective: Objective, params: Tree) -> tuple[LossAndGradient, Matvec]:
    # H is symmetric: the transpose that reverse mode gives is the product itself.
    grads, pull, loss = jax.vjp(_gradient_of(objective), params, has_aux=True)
    return (loss, grads), lambda v: objective.unscaled(pull(objective.scaled(v))[0])


def _by_mode(
    mode: str,
    objective: Objective,
    params: Tree,
    forward: Callable[[], Any],
    reverse: Callable[[], Any],
) -> Any:
    if mode == "auto":
        return forward() if _forward_allowed(objective, params) else reverse()
    return forward() if mode == "forward-over-reverse" else reverse()


def _forward_allowed(objective: Objective, params: Tree) -> bool:
    """Whether forward mode can enter the gradient: not if it meets a `custom_vjp` there.

    JAX says so only when it compiles, so the traced program is searched for what it will refuse.
    """

    def product(p: Tree) -> Tree:
        return jax.jvp(lambda q: objective.value_aux_and_grad(q)[1], (p,), (p,))[1]

    if not calls("custom_vjp", objective, params):
        return True
    try:
        return not calls("custom_lin", product, params)
    except (TypeError, NotImplementedError):
        return False


def _differences(objective: Objective, params: Tree) -> Matvec:
    gradient = lambda p: objective.value_aux_and_grad(p)[1]

    def product(v: Tree) -> Tree:
        # The step that balances truncation, O(h²), against cancellation, O(ε/h).
        epsilon = jnp.finfo(jnp.result_type(*jax.tree.leaves(params), jnp.float32)).eps
        h = trees.ratio(epsilon ** (1 / 3) * (1 + trees.norm(params)), trees.norm(v))
        ahead = gradient(trees.add_scaled(params, h, v))
        behind = gradient(trees.add_scaled(params, -h, v))
        step = trees.ratio(jnp.ones(()), 2 * h)
        return trees.scale(step, trees.add_scaled(ahead, -1.0, behind))

    return product
