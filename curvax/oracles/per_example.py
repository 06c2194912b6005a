"""The losses of single examples and a point ↦ the empirical Fisher product v ↦ F̄ v."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import scalars, trees
from curvax.objective import Objective, as_objective, require_batch
from curvax.oracles.linearization import LossAndGradient, at_precision, linearized, localized
from curvax.products import Product, Root
from curvax.trees import Tree


def empirical_fvp(
    objective: Objective | Callable[[Tree], jax.Array], params: Tree, *, precision: Any = "highest"
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
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map on trees like `params`. Without micro-batches it knows its root,
        R v = √(wₙ/Σw) <gₙ, v>, [n].

    Raises:
        ValueError: the objective has no batch.
    """
    objective = require_batch(as_objective(objective, "empirical_fvp", params), "empirical_fvp")
    with jax.default_matmul_precision(precision):
        product = _linearized(objective, params)
    return at_precision(precision, product)


def linearized_empirical_fisher(
    objective: Objective, params: Tree, *, precision: Any = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `empirical_fvp`); the gradient is that of the whole batch, a pass apart."""
    product = empirical_fvp(objective, params, precision=precision)
    return objective.value_aux_and_grad(params), product


def _linearized(objective: Objective, params: Tree) -> Product:
    if not objective.microbatch:
        return _outer(objective, params)
    return Product(lambda v: objective.average(lambda part: _outer(part, params)(v)))


def _outer(objective: Objective, params: Tree) -> Product:
    """Σₙ wₙ gₙ gₙᵀ / Σₙ wₙ, over the whole batch in one piece."""
    params, local = localized(objective, params)
    losses, weight, push, pull = linearized(lambda p: _losses(objective, p), params, local)
    w = jnp.full_like(losses, 1 / losses.size)
    if weight is not None:
        w = trees.ratio(weight, jnp.sum(weight)).astype(losses.dtype)
    scale = lambda x: scalars.root(w) * x
    root = Root(lambda v: scale(push(v)), lambda u: pull(scale(u)), _shape(losses))
    return Product(lambda v: pull(w * push(v)), root)


def _losses(objective: Objective, params: Tree) -> tuple[jax.Array, jax.Array | None]:
    """(ℓ, w) of every example, [n] each."""
    return objective.each(lambda part: part.evaluate(params)[0])


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
