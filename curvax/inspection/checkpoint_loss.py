"""A trained state ↦ the loss around it, as the measures take it: objective, parameters, layout."""

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
from curvax.training.evaluation.trained_runs import TrainedRun

TOP = 5
"""Number of eigenpairs, as λ₁/λ₅ needs. Foret et al., SAM, arXiv:2010.01412, section 4.2."""
TOLERANCE = 1e-3
"""Relative residual of an eigenvalue: three digits, more than a figure shows."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """A model in evaluation mode, `(params, batch) -> outputs`; hashable by its model.

    The batch holds the model's state, such as batch statistics, once per example, so that all runs
    of a model share compiled functions.
    """

    model: nn.Module

    def __call__(self, params: Tree, batch: Tree) -> Any:
        state = jax.tree.map(lambda x: x[0], batch["state"])
        return self.model.apply({"params": params, **state}, batch["input"])


@dataclasses.dataclass(frozen=True)
class CheckpointLoss:
    """The loss around one checkpoint. Runs of equal models share compiled functions."""

    objective: Objective  # on training examples, with the labels used in training
    held_out: Objective  # on test examples
    params: Tree
    layout: Layout

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    @functools.cached_property
    def outputs(self) -> int:
        """The number of model outputs per example."""
        found = jax.eval_shape(lambda p: self.objective.outputs(p)[0], self.params)
        return found.size // self.objective.size

    @functools.cached_property
    def pairs(self) -> Eigenpairs:
        """The eigenpairs of the Hessian with the largest eigenvalues."""
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


def checkpoint_loss(run: TrainedRun, examples: int) -> CheckpointLoss:
    """The loss of a run on the first `examples` of its training set and of its test set."""
    experiment, state = run.experiment, run.state
    variables = {"params": state.evaluated, **state.model_state}
    return CheckpointLoss(
        _objective(run, experiment.data.train, examples),
        _objective(run, experiment.data.test, examples),
        state.evaluated,
        layout(experiment.model, variables, experiment.example),
    )


def _objective(run: TrainedRun, split: Examples, examples: int) -> Objective:
    experiment = run.experiment
    n = min(examples, split.size)
    whole = next(datasets.batches(split.rows(slice(n)), n, shuffle=False))
    batch = experiment.task.in_test({name: jnp.asarray(x) for name, x in whole.items()})
    repeated = lambda x: jnp.broadcast_to(x, (n, *x.shape))
    batch["state"] = jax.tree.map(repeated, run.state.model_state)
    return Objective(experiment.task.loss("label"), batch, model=Predict(experiment.model))
