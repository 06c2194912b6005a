"""A trained state ↦ the loss around it, as the measures see it: examples, parameters, layout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax import Objective
from curvax.analysis import top_eigenpairs
from curvax.analysis.compiling import compiled_once
from curvax.arithmetic.trees import Tree
from curvax.flax_bridge import Layout, layout
from curvax.linalg import Eigenpairs
from curvax.training.data import datasets
from curvax.training.data.datasets import Examples
from curvax.training.evaluation.trained_runs import Subject

TOP = 5
"""Eigenpairs; the least that λ₁/λ₅ takes. Foret et al., SAM, arXiv:2010.01412, section 4.2."""
TOLERANCE = 1e-3
"""Of an eigenvalue's residual: three digits, more than a picture shows."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """A model as in evaluation, `(params, batch) -> outputs`; equal models are equal.

    The batch brings the model's state, such as batch statistics, once for each example, so that
    what is compiled for one run serves all runs of its model.
    """

    model: nn.Module

    def __call__(self, params: Tree, batch: Tree) -> Any:
        state = jax.tree.map(lambda x: x[0], batch["state"])
        return self.model.apply({"params": params, **state}, batch["input"])


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a loss. Equal models share what is compiled."""

    objective: Objective  # on training examples, with the labels that were trained on
    held_out: Objective  # on test examples
    params: Tree
    layout: Layout

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    @functools.cached_property
    def outputs(self) -> int:
        """The numbers that the model gives for an example."""
        found = jax.eval_shape(lambda p: self.objective.outputs(p)[0], self.params)
        return found.size // self.objective.size

    @functools.cached_property
    def pairs(self) -> Eigenpairs:
        """The eigenpairs of the Hessian at the upper end."""
        k = min(TOP, self.size)
        return top_eigenpairs(
            self.objective, self.params, k, end="largest", tol=TOLERANCE, max_products=300
        )

    @functools.cached_property
    def gradient(self) -> Tree:
        return gradient(self.objective, self.params)


@compiled_once
def gradient(objective: Objective, params: Tree) -> Tree:
    return objective.value_and_grad(params)[1]


def point(subject: Subject, examples: int) -> Point:
    """The loss on the first examples of the training set, and of the test set, at a state."""
    experiment, state = subject.experiment, subject.state
    variables = {"params": state.params, **state.model_state}
    return Point(
        _objective(subject, experiment.material.train, examples),
        _objective(subject, experiment.material.test, examples),
        state.params,
        layout(experiment.model, variables, experiment.example),
    )


def _objective(subject: Subject, split: Examples, examples: int) -> Objective:
    experiment = subject.experiment
    n = min(examples, split.size)
    whole = next(datasets.batches(split.rows(slice(n)), n, shuffle=False))
    batch = experiment.task.in_test({name: jnp.asarray(x) for name, x in whole.items()})
    repeated = lambda x: jnp.broadcast_to(x, (n, *x.shape))
    batch["state"] = jax.tree.map(repeated, subject.state.model_state)
    return Objective(experiment.task.likelihood("label"), batch, model=Predict(experiment.model))
