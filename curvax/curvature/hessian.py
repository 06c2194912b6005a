"""A loss and a point ↦ the Hessian product v ↦ H v, and the gradient that comes with it."""

from collections.abc import Callable
from typing import Any

import jax

from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import MODES, check_mode
from curvax.curvature.linearization import (
    LossAndGradient,
    at_precision,
    at_unit_size,
    localized,
    tangent,
)
from curvax.curvature.modes import Matvec, way_to_products
from curvax.linear_operator import Product
from curvax.objective import Objective, as_objective

__all__ = ["MODES", "gradient_and_product", "hvp", "linearized_gradient", "linearized_hessian"]


def hvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: Any = "highest",
) -> Product:
    """The product with the Hessian of the loss at `params`: v ↦ ∇²L(θ) v.

    Linearised once, so that each application costs about one gradient (with `microbatch=`, and
    where JAX cannot linearise a kernel, the gradient is computed anew each time; memory is that of
    one micro-batch). Local to the device under an axis.

    Args:
        objective: an `Objective`, or a callable `params -> scalar`.
        params: the point θ.
        mode: `"forward-over-reverse"`, the cheapest; `"reverse-over-reverse"`, where a
            `custom_vjp` has no forward derivative; `"finite-differences"`, central, two gradients
            a product, where a kernel or a loop has neither, right to about 5e-5 where the loss
            computes in float32 and 7e-2 in bfloat16 (measured in
            `curvax.curvature.finite_differences`); `"auto"`, the first that JAX allows of the loss,
            found by tracing, with a warning where that is the last.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map from trees like `params` to trees like `params`.

    Raises:
        ValueError: an unknown mode.
        TypeError: JAX does not differentiate this loss in the mode that was asked for.
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


def linearized_gradient(
    objective: Objective, params: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Matvec]:
    """(((L, aux), ∇L), v ↦ H v) at `params`, one linearisation for all."""
    own = objective._device_part()
    out, product = _own_linearized(own, *localized(own, params), mode)
    product = at_unit_size(own, product)
    return objective._group_mean(out), lambda v: objective._group_mean(product(v))


def _own_linearized(
    own: Objective, params: Tree, local: frozenset[str], mode: str
) -> tuple[LossAndGradient, Matvec]:
    way = way_to_products(mode, own, params, once=bool(own.microbatch))
    if own.microbatch:
        # Linear maps of all micro-batches would be as large as that of the whole batch.
        product = lambda v: way.once(own, params, v)[1]
        out = own._value_aux_and_grad(params)
    else:
        out, product = way.many(own, params)
    return out, lambda v: product(tangent(v, params, local))


def gradient_and_product(
    objective: Objective, params: Tree, v: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Tree]:
    """(((L, aux), ∇L), H v) in one pass: the gradient shares its backward pass with the product."""
    own = objective._device_part()
    params, local = localized(own, params)
    way = way_to_products(mode, own, params, once=True)
    return objective._group_mean(way.once(own, params, tangent(v, params, local)))
