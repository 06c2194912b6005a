"""Products with the empirical Fisher matrix, the mean of the gradients' outer products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.curvature.differentiability import check_mode
from curvax.curvature.linearization import (
    at_precision,
    at_unit_size,
    linearized,
    localized,
    unit_sized,
)
from curvax.linear_operator import Product, Root
from curvax.objective import (
    LossAndGradient,
    Objective,
    as_objective,
    map_examples,
    microbatch_mean,
    require_batch,
    scaling,
    value_and_aux,
    value_aux_and_grad,
)


def empirical_fvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: str | None = "highest",
) -> Product:
    """The product with the empirical Fisher matrix, uncentred, at `params`.

        F̄ v = Σₙ wₙ gₙ <gₙ, v> / Σₙ wₙ,   gₙ = ∇ℓ(θ, xₙ)

    It uses the labels of the batch, whereas the Fisher matrix uses labels drawn from the model;
    the two differ unless the model fits the data. Martens, arXiv:1412.1193, section 11.

    The losses of the examples are linearised once, or with `Objective(microbatch=)` at every
    product. Under a device axis F̄ is that of this device's part of the batch.

    Args:
        objective: an `Objective` with a batch, with or without `model`. Every example along the
            leading axis is evaluated as a batch of one, with its own dropout key and weight.
        params: the point θ.
        mode: how the directional derivatives <gₙ, v> are computed, as for J v in `ggnvp`.
        precision: of matrix products, as in `jax.default_matmul_precision`.

    Returns:
        A `Product` on trees like `params`. Without micro-batches it has a root
        R v = √(wₙ/Σw) <gₙ, v>, [n].

    Raises:
        ValueError: the objective has no batch, or `mode` is unknown.
        TypeError: JAX cannot differentiate the losses in the given mode.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w, x: jnp.mean(x @ w)
        >>> objective = curvax.Objective(loss, jnp.array([[1.0, 0.0], [1.0, 2.0]]))
        >>> curvax.empirical_fvp(objective, jnp.zeros(2))(jnp.array([1.0, 0.0])).tolist()
        [1.0, 1.0]
    """
    check_mode(mode)
    objective = require_batch(as_objective(objective, "empirical_fvp", params), "empirical_fvp")
    with jax.default_matmul_precision(precision):
        product = _linearized(objective, params, mode)
    return at_precision(precision, product)


def linearized_empirical_fisher(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: str | None = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), product of `empirical_fvp`); the gradient takes a pass of its own."""
    product = empirical_fvp(objective, params, mode=mode, precision=precision)
    return value_aux_and_grad(objective, params), product


def _linearized(objective: Objective, params: Tree, mode: str) -> Product:
    if not objective.microbatch:
        return _outer(objective, params, mode)
    return Product(lambda v: microbatch_mean(objective, lambda part: _outer(part, params, mode)(v)))


def _outer(objective: Objective, params: Tree, mode: str) -> Product:
    """The product with Σₙ wₙ gₙ gₙᵀ / Σₙ wₙ, over the whole batch in one piece."""
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


def _scaled_pull(objective: Objective, pull: Matvec) -> Matvec:
    """`pull` of scaled losses, each divided by n as in the mean that the scale is chosen for."""

    def pulled(u: jax.Array) -> Tree:
        return trees.scale(u.size, scaling.at_scale(pull, objective.scale)(u / u.size))

    return at_unit_size(objective, pulled)


def _losses(objective: Objective, params: Tree) -> tuple[jax.Array, jax.Array | None]:
    """(losses, weights or None) of all examples, [n] each."""
    return map_examples(objective, lambda part, params: value_and_aux(part, params)[0], params)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
