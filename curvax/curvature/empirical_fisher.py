"""The losses of single examples and a point ↦ the empirical Fisher product v ↦ F̄ v."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.linearization import (
    LossAndGradient,
    at_precision,
    at_unit_size,
    linearized,
    localized,
    unit_sized,
)
from curvax.linear_operator import Product, Root
from curvax.objective import Objective, as_objective, require_batch


def empirical_fvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: Any = "highest",
) -> Product:
    """The product with the mean of gₙ gₙᵀ over the examples, uncentred, at `params`.

        F̄ v = Σₙ wₙ gₙ <gₙ, v> / Σₙ wₙ,   gₙ = ∇L of the n-th example alone

    It takes the labels of the batch, where the Fisher matrix takes the model's own, and is no
    curvature of anything away from a perfect fit. Martens, arXiv:1412.1193, section 11. The vector
    of losses is linearised once (with `microbatch=` anew at each application). Local to the device
    under an axis.

    Args:
        objective: an `Objective` with a batch, with or without `model`. The leading axis counts
            the examples; each is evaluated as a batch of one, with a dropout key of its own, and
            has the weight of that batch where there is one.
        params: the point θ.
        mode: of <gₙ, v>, the derivatives of the losses along v, as that of J v in `ggnvp`.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map on trees like `params`. Without micro-batches it knows its root,
        R v = √(wₙ/Σw) <gₙ, v>, [n].

    Raises:
        ValueError: the objective has no batch, or an unknown mode.
        TypeError: JAX does not differentiate the losses in the mode that was asked for.
    """
    check_mode(mode)
    objective = require_batch(as_objective(objective, "empirical_fvp", params), "empirical_fvp")
    with jax.default_matmul_precision(precision):
        product = _linearized(objective, params, mode)
    return at_precision(precision, product)


def linearized_empirical_fisher(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: Any = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `empirical_fvp`); the gradient is that of the whole batch, a pass apart."""
    product = empirical_fvp(objective, params, mode=mode, precision=precision)
    return objective._value_aux_and_grad(params), product


def _linearized(objective: Objective, params: Tree, mode: str) -> Product:
    if not objective.microbatch:
        return _outer(objective, params, mode)
    return Product(lambda v: objective._microbatch_mean(lambda part: _outer(part, params, mode)(v)))


def _outer(objective: Objective, params: Tree, mode: str) -> Product:
    """Σₙ wₙ gₙ gₙᵀ / Σₙ wₙ, over the whole batch in one piece."""
    params, local = localized(objective, params)
    of = lambda p: _losses(objective, p)
    losses, weight, push, transpose = linearized(of, params, local, mode=mode)
    pull = transpose if objective.scale is None else _scaled_pull(objective, transpose)
    w = jnp.full_like(losses, 1 / losses.size)
    if weight is not None:
        w = trees.ratio(weight, jnp.sum(weight)).astype(losses.dtype)
    scale = lambda x: safe_math.root(w) * x
    root = Root(lambda v: scale(push(v)), lambda u: pull(scale(u)), _shape(losses))
    return unit_sized(objective, Product(lambda v: pull(w * push(v)), root))


def _scaled_pull(objective: Objective, pull: Callable[[jax.Array], Tree]) -> Any:
    """`pull` of scaled losses, which count as they do in the mean that the scale is for."""

    def pulled(u: jax.Array) -> Tree:
        return trees.scale(u.size, objective._unscaled(pull(objective._scaled(u / u.size))))

    return at_unit_size(objective, pulled)


def _losses(objective: Objective, params: Tree) -> tuple[jax.Array, jax.Array | None]:
    """(ℓ, w) of every example, [n] each."""
    return objective._map_examples(lambda part, params: part._evaluate(params)[0], params)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
