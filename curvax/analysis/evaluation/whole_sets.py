"""A measure of a batch ↦ the same of an objective, or over all batches of a loader."""

from collections.abc import Callable
from typing import Any

import jax

from curvax.analysis.dataset_loss import Sweep
from curvax.analysis.evaluation.compiling import compiled_once
from curvax.arithmetic.trees import Tree
from curvax.objective import Objective, as_objective

Loss = Objective | Sweep | Callable[[Tree], jax.Array]


class Walk:
    """A sweep as an ascent sees it: a loss and a gradient, one pass over the data for both."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def value_aux_and_grad(self, params: Tree) -> tuple[tuple[jax.Array, None], Tree]:
        value, gradient = self.sweep.value_and_grad(params)
        return (value, None), gradient

    def local_axes(self, params: Tree) -> frozenset[str]:
        return frozenset()

    def batch_weight(self) -> None:
        return None


def as_loss(objective: Loss, where: str, params: Tree) -> Objective | Sweep:
    """What was given, a callable of the parameters as an objective."""
    return objective if isinstance(objective, Sweep) else as_objective(objective, where, params)


def averaged(
    measure: Callable[..., Tree],
    objective: Objective | Sweep,
    params: Tree,
    /,
    *arrays: Tree,
    **options: Any,
) -> Tree:
    """`measure(objective, params, *arrays, **options)`, compiled once; of a sweep, its mean over
    the batches by weight, in one pass.

    Args:
        measure: a mean over examples of what is linear in them; a function of its module.
        objective: what it measures.
        params: the point.
        *arrays: arguments of the compiled program.
        **options: static.
    """
    if isinstance(objective, Sweep):
        return objective.mean(measure, params, *arrays, **options)
    return compiled_once(measure)(objective, params, *arrays, **options)


def walked(
    measure: Callable[..., Tree],
    objective: Objective | Sweep,
    params: Tree,
    /,
    *arrays: Tree,
    **options: Any,
) -> Tree:
    """The same for a measure that needs the loss and the gradient of the whole at several points:
    of a sweep it is run step by step on the host, a pass over the data for each point."""
    if isinstance(objective, Sweep):
        return measure(Walk(objective), params, *arrays, **options)
    return compiled_once(measure)(objective, params, *arrays, **options)
