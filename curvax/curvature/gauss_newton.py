"""A model, a loss of its outputs and a point ↦ the Gauss-Newton product v ↦ Jᵀ ∇²ℓ J v."""

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
    LossAndGradient,
    at_precision,
    linearized,
    localized,
    unit_sized,
)
from curvax.likelihoods import Likelihood
from curvax.linear_operator import Product, Root
from curvax.objective import Objective, as_objective, require_model

Metric = Callable[..., Product]
"""`metric(part, outputs, *beside) -> product`: a curvature in the space of the outputs."""


def ggnvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    mode: str = "auto",
    precision: Any = "highest",
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
        mode: of J v: `"forward-over-reverse"`, by forward mode; `"reverse-over-reverse"`, as the
            transpose of Jᵀ, where a `custom_vjp` has no forward derivative;
            `"finite-differences"`, of the outputs, where a kernel or a loop has neither, as right
            as in `hvp`; `"auto"`, the first that JAX allows, with a warning where that is the last.
            Jᵀ u is by reverse mode, and ∇²ℓ of a loss that is no likelihood in the mode of `hvp`.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map on trees like `params`. With a likelihood and without micro-batches it knows
        its root, R v = Bᵀ J v, where B Bᵀ = ∇²ℓ.

    Raises:
        ValueError: the objective has no `model`, or an unknown mode.
        TypeError: JAX does not differentiate the model in the mode that was asked for.
    """
    objective = as_objective(objective, "ggnvp", params)
    return _linearized(objective, params, mode, precision)[1]


def linearized_gauss_newton(
    objective: Objective, params: Tree, *, mode: str = "auto", precision: Any = "highest"
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `ggnvp`) from one linearisation."""
    gradient, product = _linearized(objective, params, mode, precision)
    return gradient(), product


def _linearized(
    objective: Objective, params: Tree, mode: str, precision: Any
) -> tuple[Callable[[], LossAndGradient], Product]:
    check_mode(mode)
    objective = require_model(objective, "The Gauss-Newton matrix, Jᵀ ∇²ℓ J,")
    metric = functools.partial(loss_curvature, mode=mode)
    return linearized_product(objective, params, metric, mode=mode, precision=precision)


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
        return self.objective._unscaled(self.model.pull(self.objective._scaled(cotangent)))

    def pull_sum(self, cotangent: Tree, weight: jax.Array) -> Tree:
        """Jᵀ c for c that counts each example fully, as the mean that a scale is chosen for does
        not; `weight` is that of all examples."""
        if self.objective.scale is None:
            return self.pull(cotangent)
        return trees.scale(weight, self.pull(trees.scale(1 / weight, cotangent)))

    def loss_and_gradient(self) -> LossAndGradient:
        """((L, aux), ∇L)"""

        def scaled(z: Tree) -> tuple[jax.Array, jax.Array]:
            value = self.objective._loss_of(trees.cast_like(z, self.kinds))
            return self.objective._scaled(value), value

        (_, value), cotangent = jax.value_and_grad(scaled, has_aux=True)(self.outputs)
        return (value, self.model.aux), self.objective._unscaled(self.model.pull(cotangent))

    def product(self, metric: Metric, *beside: Tree) -> Product:
        """v ↦ Jᵀ M J v, where M = `metric(objective, outputs, *beside)`."""
        inner = metric(self.objective, self.outputs, *beside)
        return unit_sized(self.objective, inner.within(self.model.push, self.pull))


def model_pass(objective: Objective, params: Tree, *, mode: str = "auto") -> ModelPass:
    """The objective's model linearised at `params`, over the whole batch in one piece."""
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
    *beside: Tree,
    mode: str = "auto",
    precision: Any,
) -> tuple[Callable[[], LossAndGradient], Product]:
    """(() ↦ ((L, aux), ∇L), v ↦ Jᵀ M J v), one linearisation for both.

    With micro-batches the model is linearised in each of them, at each application.

    Args:
        objective: has a `model`.
        params: the point.
        metric: M, from the objective, its outputs and what lies beside.
        beside: trees with a leading axis of examples, cut like the batch.
        mode: of J v, as in `ggnvp`.
        precision: of the matrix products.
    """
    if not objective.microbatch:
        with jax.default_matmul_precision(precision):
            whole = model_pass(objective, params, mode=mode)
            product = whole.product(metric, *beside)
        return whole.loss_and_gradient, at_precision(precision, product)

    def scanned(v: Tree) -> Tree:
        at = lambda part: model_pass(part, params, mode=mode)
        apply = lambda part, *rest: at(part).product(metric, *rest)(v)
        return objective._microbatch_mean(apply, *beside)

    gradient = lambda: objective._value_aux_and_grad(params)
    return gradient, at_precision(precision, Product(scanned))


def loss_curvature(part: Objective, outputs: Tree, *beside: Tree, mode: str = "auto") -> Product:
    """∇²ℓ in the outputs: known to a likelihood, by autodiff for any other loss."""
    if not isinstance(part.loss, Likelihood):
        return Product(linearized_gradient(Objective(part._loss_of), outputs, mode=mode)[1])
    loss, batch = part.loss, part.batch
    root = Root(
        lambda u: loss.root_transpose(outputs, batch, u),
        lambda e: loss.root(outputs, batch, e),
        jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
    )
    return Product(lambda u: loss.hessian_product(outputs, batch, u), root)
