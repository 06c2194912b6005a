"""A model, a loss of its outputs and a point ↦ the Gauss-Newton product v ↦ Jᵀ ∇²ℓ J v."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax import trees
from curvax.likelihoods import Likelihood
from curvax.objective import Objective, as_objective, require_model
from curvax.oracles.hessian import linearized_gradient
from curvax.oracles.linearization import (
    Linearized,
    LossAndGradient,
    at_precision,
    linearized,
    localized,
    unit_sized,
)
from curvax.products import Product, Root
from curvax.trees import Tree

Metric = Callable[..., Product]
"""`metric(part, outputs, *beside) -> product`: a curvature in the space of the outputs."""


def ggnvp(
    objective: Objective | Callable[[Tree], jax.Array], params: Tree, *, precision: Any = "highest"
) -> Product:
    """The product with the Gauss-Newton matrix of the loss at `params`.

        G v = Jᵀ ∇²ℓ(z) J v,   z = f(θ)

    Linearised once, so that each application costs a forward and a backward pass of tangents (with
    `microbatch=` the model is linearised anew each time, in the memory of one micro-batch). Local
    to the device under an axis. Martens, arXiv:1412.1193; positive semi-definite where
    the loss is convex in the outputs, and the Hessian itself where the model is linear.

    Args:
        objective: an `Objective` with `model=`; its loss a likelihood or any convex one.
        params: the point θ.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map on trees like `params`. With a likelihood and without micro-batches it knows
        its root, R v = Bᵀ J v, where B Bᵀ = ∇²ℓ.

    Raises:
        ValueError: the objective has no `model`.
    """
    return _linearized(as_objective(objective, "ggnvp", params), params, precision)[1]


def linearized_gauss_newton(
    objective: Objective, params: Tree, *, precision: Any = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `ggnvp`) from one linearisation."""
    gradient, product = _linearized(objective, params, precision)
    return gradient(), product


def _linearized(
    objective: Objective, params: Tree, precision: Any
) -> tuple[Callable[[], LossAndGradient], Product]:
    objective = require_model(objective, "The Gauss-Newton matrix, Jᵀ ∇²ℓ J,")
    return linearized_product(objective, params, loss_curvature, precision=precision)


@dataclasses.dataclass(frozen=True)
class ModelPass:
    """The model linearised at a point: one forward pass for everything that is pulled back."""

    objective: Objective
    model: Linearized

    kinds: Tree
    """A tree of arrays or shapes with the dtypes in which the model gives its outputs."""

    @property
    def outputs(self) -> Tree:
        """z, for the whole batch; where the loss is scaled, in float32 or wider."""
        return self.model.value

    def pull(self, cotangent: Tree) -> Tree:
        """Jᵀ c for c like the outputs: a backward pass."""
        return self.objective.unscaled(self.model.pull(self.objective.scaled(cotangent)))

    def loss_and_gradient(self) -> LossAndGradient:
        """((L, aux), ∇L)"""

        def scaled(z: Tree) -> tuple[jax.Array, jax.Array]:
            value = self.objective.loss_of(trees.cast_like(z, self.kinds))
            return self.objective.scaled(value), value

        (_, value), cotangent = jax.value_and_grad(scaled, has_aux=True)(self.outputs)
        return (value, self.model.aux), self.objective.unscaled(self.model.pull(cotangent))

    def product(self, metric: Metric, *beside: Tree) -> Product:
        """v ↦ Jᵀ M J v, where M = `metric(objective, outputs, *beside)`."""
        inner = metric(self.objective, self.outputs, *beside)
        return unit_sized(self.objective, inner.within(self.model.push, self.pull))


def model_pass(objective: Objective, params: Tree) -> ModelPass:
    """The objective's model linearised at `params`, over the whole batch in one piece."""
    params, local = localized(objective, params)
    kinds: Tree = None

    def outputs(params: Tree) -> tuple[Tree, Any]:
        nonlocal kinds
        z, aux = objective.outputs(params)
        kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), z)
        return z if objective.scale is None else trees.wide(z), aux

    model = linearized(outputs, params, local)
    return ModelPass(objective, model, kinds)


def linearized_product(
    objective: Objective, params: Tree, metric: Metric, *beside: Tree, precision: Any
) -> tuple[Callable[[], LossAndGradient], Product]:
    """(() ↦ ((L, aux), ∇L), v ↦ Jᵀ M J v), one linearisation for both.

    With micro-batches the model is linearised in each of them, at each application.

    Args:
        objective: has a `model`.
        params: the point.
        metric: M, from the objective, its outputs and what lies beside.
        beside: trees with a leading axis of examples, cut like the batch.
        precision: of the matrix products.
    """
    if not objective.microbatch:
        with jax.default_matmul_precision(precision):
            whole = model_pass(objective, params)
            product = whole.product(metric, *beside)
        return whole.loss_and_gradient, at_precision(precision, product)

    def scanned(v: Tree) -> Tree:
        apply = lambda part, *rest: model_pass(part, params).product(metric, *rest)(v)
        return objective.average(apply, *beside)

    gradient = lambda: objective.value_aux_and_grad(params)
    return gradient, at_precision(precision, Product(scanned))


def loss_curvature(part: Objective, outputs: Tree, *beside: Tree) -> Product:
    """∇²ℓ in the outputs: known to a likelihood, by autodiff for any other loss."""
    if not isinstance(part.loss, Likelihood):
        return Product(linearized_gradient(Objective(part.loss_of), outputs)[1])
    loss, batch = part.loss, part.batch
    root = Root(
        lambda u: loss.root_transpose(outputs, batch, u),
        lambda e: loss.root(outputs, batch, e),
        jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
    )
    return Product(lambda u: loss.hessian_product(outputs, batch, u), root)
