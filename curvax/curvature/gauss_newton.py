"""Products with the Gauss-Newton matrix, v ↦ Jᵀ ∇²ℓ J v, and the linearised model behind them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.hessian import linearized_gradient
from curvax.curvature.linearization import (
    Linearized,
    at_precision,
    linearized,
    localized,
    unit_sized,
)
from curvax.likelihoods import Likelihood
from curvax.linear_operator import Product, Root
from curvax.objective import (
    LossAndGradient,
    Objective,
    as_objective,
    loss_of_outputs,
    microbatch_mean,
    require_model,
    scaling,
    value_aux_and_grad,
)

Metric = Callable[..., Product]
"""`metric(objective, outputs, *batched) -> product`: a curvature in the space of the outputs."""


def ggnvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: str | None = "highest",
) -> Product:
    """The product with the generalised Gauss-Newton matrix of the loss at `params`.

        G v = Jᵀ ∇²ℓ(z) J v,   z = f(θ),   J = ∂f/∂θ

    G is positive semi-definite if the loss is convex in the outputs, and equals the Hessian if the
    model is linear. Martens, arXiv:1412.1193, section 9.

    The model is linearised once, after which a product costs one pass of tangents forward and one
    of cotangents back. With `Objective(microbatch=)` it is linearised at every product, in the
    memory of one micro-batch. Under a device axis G is that of this device's part of the batch.

    Args:
        objective: an `Objective` with `model=`, whose loss is a likelihood or any other loss
            of the outputs.
        params: the point θ.
        mode: how J v is computed: by forward mode (`"forward-over-reverse"`), as the transpose of
            Jᵀ (`"reverse-over-reverse"`), or by differences of the outputs
            (`"finite-differences"`); `"auto"` takes the first that JAX supports, as in `hvp`. Jᵀ u
            always takes reverse mode. The mode also applies to ∇²ℓ of a loss that is not a
            likelihood.
        precision: of matrix products, as in `jax.default_matmul_precision`.

    Returns:
        A `Product` on trees like `params`. With a likelihood and without micro-batches it has a
        root R v = Bᵀ J v, where B Bᵀ = ∇²ℓ.

    Raises:
        ValueError: the objective has no `model`, or `mode` is unknown.
        TypeError: JAX cannot differentiate the model in the given mode.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros(2)}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> curvax.ggnvp(objective, jnp.zeros(2))(jnp.ones(2)).tolist()
        [0.5, 2.0]
    """
    objective = as_objective(objective, "ggnvp", params)
    return _linearized(objective, params, mode, precision)[1]


def linearized_gauss_newton(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: str | None = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), product of `ggnvp`) from one linearisation."""
    gradient, product = _linearized(objective, params, mode, precision)
    return gradient(), product


def _linearized(
    objective: Objective, params: Tree, mode: str, precision: str | None
) -> tuple[Callable[[], LossAndGradient], Product]:
    check_mode(mode)
    objective = require_model(objective, "The Gauss-Newton matrix, Jᵀ ∇²ℓ J,")
    metric = functools.partial(loss_curvature, mode=mode)
    return linearized_product(objective, params, metric, mode=mode, precision=precision)


@dataclasses.dataclass(frozen=True)
class ModelPass:
    """The model linearised at a point: one forward pass, shared by gradient and products."""

    objective: Objective
    model: Linearized

    kinds: Tree
    """A tree of arrays or shapes with the dtypes of the model's outputs."""

    @property
    def outputs(self) -> Tree:
        """z for the whole batch; in float32 or wider if the loss is scaled."""
        return self.model.value

    def pull(self, cotangent: Tree) -> Tree:
        """Jᵀ c for a cotangent c of the outputs, by one backward pass."""
        return scaling.at_scale(self.model.pull, self.objective.scale)(cotangent)

    def pull_sum(self, cotangent: Tree, weight: jax.Array) -> Tree:
        """Jᵀ c for a cotangent of a sum over the examples instead of a mean.

        `Objective(scale=)` is chosen for the mean, so c is divided by the total `weight` of the
        examples before the backward pass, and the result multiplied by it.
        """
        if self.objective.scale is None:
            return self.pull(cotangent)
        return trees.scale(weight, self.pull(trees.scale(1 / weight, cotangent)))

    def loss_and_gradient(self) -> LossAndGradient:
        """((L, aux), ∇L)"""
        scale = self.objective.scale

        def scaled(z: Tree) -> tuple[jax.Array, jax.Array]:
            value = loss_of_outputs(self.objective, trees.cast_like(z, self.kinds))
            return scaling.scaled(value, scale), value

        (_, value), cotangent = jax.value_and_grad(scaled, has_aux=True)(self.outputs)
        return (value, self.model.aux), scaling.unscaled(self.model.pull(cotangent), scale)

    def product(self, metric: Metric, *batched: Tree) -> Product:
        """v ↦ Jᵀ M J v, where M = `metric(objective, outputs, *batched)`."""
        inner = metric(self.objective, self.outputs, *batched)
        return unit_sized(self.objective, inner.within(self.model.push, self.pull))


def model_pass(objective: Objective, params: Tree, *, mode: str = "auto") -> ModelPass:
    """Linearises the objective's model at `params`, on the whole batch in one piece."""
    params, local = localized(objective, params)
    kinds: Tree = None

    def outputs(params: Tree) -> tuple[Tree, Any]:
        nonlocal kinds
        z, aux = objective.outputs(params)
        kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), z)
        return z if objective.scale is None else trees.wide(z), aux

    model = linearized(outputs, params, local, mode=mode)
    return ModelPass(objective, model, kinds)


def linearized_product(
    objective: Objective,
    params: Tree,
    metric: Metric,
    *batched: Tree,
    mode: str = "auto",
    precision: str | None,
) -> tuple[Callable[[], LossAndGradient], Product]:
    """(() ↦ ((L, aux), ∇L), v ↦ Jᵀ M J v) from one linearisation.

    With micro-batches the model is linearised on each of them at every product.

    Args:
        objective: an objective with a `model`.
        params: the point θ.
        metric: `metric(objective, outputs, *batched) -> M`.
        batched: trees with a leading axis of examples, divided like the batch.
        mode: of J v, as in `ggnvp`.
        precision: of matrix products.
    """
    if not objective.microbatch:
        with jax.default_matmul_precision(precision):
            whole = model_pass(objective, params, mode=mode)
            product = whole.product(metric, *batched)
        return whole.loss_and_gradient, at_precision(precision, product)

    def scanned(v: Tree) -> Tree:
        at = lambda part: model_pass(part, params, mode=mode)
        apply = lambda part, *rest: at(part).product(metric, *rest)(v)
        return microbatch_mean(objective, apply, *batched)

    gradient = lambda: value_aux_and_grad(objective, params)
    return gradient, at_precision(precision, Product(scanned))


def loss_curvature(part: Objective, outputs: Tree, *batched: Tree, mode: str = "auto") -> Product:
    """∇²ℓ in the outputs, in closed form for a likelihood and by autodiff for any other loss."""
    if not isinstance(part.loss, Likelihood):
        of_outputs = Objective(functools.partial(loss_of_outputs, part))
        return Product(linearized_gradient(of_outputs, outputs, mode=mode)[1])
    loss, batch = part.loss, part.batch
    root = Root(
        lambda u: loss.root_transpose(outputs, batch, u),
        lambda e: loss.root(outputs, batch, e),
        jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
    )
    return Product(lambda u: loss.hessian_product(outputs, batch, u), root)
