"""A function of an objective ↦ its value on one batch, or over all batches of a `DatasetLoss`.

On an `Objective` the function is compiled once. On a `DatasetLoss` there are three ways, by what
the function needs:

    evaluate_mean         a mean over examples             one pass over the data
    evaluate_gradients    losses and gradients at points   one pass for each point
    evaluate_products     curvature products at a point    one pass for each product
"""

from collections.abc import Callable
from typing import Any

import jax

from curvax.analysis.compiling import compiled_once
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.arithmetic.trees import Tree
from curvax.objective import LossAndGradient, Objective, as_objective, value_aux_and_grad

Loss = Objective | DatasetLoss | Callable[[Tree], jax.Array]


class _DatasetObjective:
    """What an ascent needs of an `Objective`, for a loss over a whole data set."""

    def __init__(self, dataset_loss: DatasetLoss):
        self.dataset_loss = dataset_loss

    def local_axes(self, params: Tree) -> frozenset[str]:
        return frozenset()

    def batch_weight(self) -> None:
        return None


@value_aux_and_grad.register
def _(objective: _DatasetObjective, params: Tree) -> LossAndGradient:  # type: ignore[misc]
    value, gradient = objective.dataset_loss.value_and_grad(params)
    return (value, None), gradient


def as_loss(objective: Loss, where: str, params: Tree) -> Objective | DatasetLoss:
    """Wraps a callable `params -> scalar` as an `Objective`; others are returned unchanged."""
    return (
        objective if isinstance(objective, DatasetLoss) else as_objective(objective, where, params)
    )


def evaluate_mean(
    f: Callable[..., Tree],
    objective: Objective | DatasetLoss,
    params: Tree,
    /,
    *arrays: Tree,
    **options: Any,
) -> Tree:
    """Evaluates `f(objective, params, *arrays, **options)`, a mean over the examples.

    Over a `DatasetLoss`: the mean of f over the batches by weight, in one pass over the data.

    Args:
        f: a mean over examples; a module-level function, so that it is compiled once.
        objective: the first argument of f.
        params: the point.
        *arrays: arguments of the compiled program.
        **options: static.
    """
    if isinstance(objective, DatasetLoss):
        return objective.mean(f, params, *arrays, **options)
    return compiled_once(f)(objective, params, *arrays, **options)


def evaluate_gradients(
    f: Callable[..., Tree],
    objective: Objective | DatasetLoss,
    params: Tree,
    /,
    *arrays: Tree,
    **options: Any,
) -> Tree:
    """Like `evaluate_mean`, for functions of the full loss and gradient at several points.

    Over a `DatasetLoss`, f runs on the host, and each point costs a pass over the data.
    """
    if isinstance(objective, DatasetLoss):
        return f(_DatasetObjective(objective), params, *arrays, **options)
    return compiled_once(f)(objective, params, *arrays, **options)


def evaluate_products(
    f: Callable[..., Tree], objective: Loss, params: Tree, /, *arrays: Tree, **options: Any
) -> Tree:
    """Like `evaluate_mean`, for algorithms that apply a `Matrix` to vectors.

    Over a `DatasetLoss`, f runs on the host with `jit` disabled, so that JAX's loops in it are
    Python loops, and each product costs a pass over the data.
    """
    if isinstance(objective, DatasetLoss):
        with jax.disable_jit():
            return f(objective, params, *arrays, **options)
    if not isinstance(objective, Objective):
        objective = Objective(objective)
    return compiled_once(f)(objective, params, *arrays, **options)
