"""Products with the Hessian, v ↦ H v, and the gradient from the same linearisation."""

from collections.abc import Callable

import jax

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.curvature.differentiability import MODES, check_mode
from curvax.curvature.linearization import (
    at_precision,
    at_unit_size,
    localized,
    tangent,
)
from curvax.curvature.modes import way_to_products
from curvax.linear_operator import Product
from curvax.objective import (
    LossAndGradient,
    Objective,
    as_objective,
    group_mean,
    pieces,
    value_aux_and_grad,
)

__all__ = ["MODES", "gradient_and_product", "hvp", "linearized_gradient", "linearized_hessian"]


def hvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: str | None = "highest",
) -> Product:
    """The product with the Hessian of the loss at `params`.

        H v = ∇²L(θ) v

    The gradient is linearised once, after which a product costs about one gradient. With
    `Objective(microbatch=)` it is linearised at every product, in the memory of one micro-batch.
    Under a device axis the Hessian is that of this device's part of the batch.

    Args:
        objective: an `Objective`, or a callable `params -> scalar`.
        params: the point θ.
        mode: how the gradient is differentiated.

            - `"forward-over-reverse"`: the cheapest.
            - `"reverse-over-reverse"`: for a `custom_vjp`, which has no forward derivative.
            - `"finite-differences"`: central differences of gradients, two a product, for kernels
              and loops that have neither derivative. The relative error is about 5e-5 in float32
              and 7e-2 in bfloat16 (see `curvax.curvature.finite_differences`).
            - `"auto"`: the first of these that JAX supports for this loss, found by tracing, with a
              warning if that is finite differences.
        precision: of matrix products, as in `jax.default_matmul_precision`.

    Returns:
        A `Product`, a linear map on trees like `params`.

    Raises:
        ValueError: `mode` is not one of these.
        TypeError: JAX cannot differentiate this loss in the given mode.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 3.0]) * w**2)
        >>> product = curvax.hvp(loss, jnp.zeros(2))
        >>> product(jnp.array([1.0, 1.0])).tolist()
        [2.0, 6.0]
    """
    objective = as_objective(objective, "hvp")
    return linearized_hessian(objective, params, mode=mode, precision=precision)[1]


def linearized_hessian(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: str | None = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), product of `hvp`) from one linearisation."""
    check_mode(mode)
    with jax.default_matmul_precision(precision):
        out, product = linearized_gradient(objective, params, mode=mode)
    return out, at_precision(precision, Product(product))


def linearized_gradient(
    objective: Objective, params: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Matvec]:
    """(((L, aux), ∇L), v ↦ H v) from one linearisation, at the current matmul precision."""
    own = pieces.device_part(objective)
    out, product = _own_linearized(own, *localized(own, params), mode)
    product = at_unit_size(own, product)
    return group_mean(objective, out), lambda v: group_mean(objective, product(v))


def _own_linearized(
    own: Objective, params: Tree, local: frozenset[str], mode: str
) -> tuple[LossAndGradient, Matvec]:
    way = way_to_products(mode, own, params, once=bool(own.microbatch))
    if own.microbatch:
        # The residuals of all micro-batches would take the memory of the whole batch.
        product = lambda v: way.once(own, params, v)[1]
        out = value_aux_and_grad(own, params)
    else:
        out, product = way.many(own, params)
    return out, lambda v: product(tangent(v, params, local))


def gradient_and_product(
    objective: Objective, params: Tree, v: Tree, *, mode: str = "auto"
) -> tuple[LossAndGradient, Tree]:
    """(((L, aux), ∇L), H v) for a single v, from one forward and backward pass."""
    own = pieces.device_part(objective)
    params, local = localized(own, params)
    way = way_to_products(mode, own, params, once=True)
    return group_mean(objective, way.once(own, params, tangent(v, params, local)))
