"""What a trained state is worth: its scores, and the largest eigenvalue of its Hessian."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import curvax
from curvax.arithmetic.trees import Tree
from curvax.training.augment.transforms import Batch
from curvax.training.data import datasets
from curvax.training.data.datasets import Examples
from curvax.training.parallelism import Jit
from curvax.training.step import State
from curvax.training.tasks import Task

Clean = Callable[[Tree, Batch], curvax.Objective]
"""(model_state, batch) ↦ the loss on it, with the model as in evaluation."""
Scores = Callable[[Tree, Tree, Batch], dict[str, jax.Array]]
_COUNT = "examples"
Curvature = Callable[[Tree, Tree, Batch], jax.Array]


def make_clean(model: nn.Module, task: Task) -> Clean:
    """The loss over the unmasked examples, without dropout, batch statistics as they are."""

    def clean(model_state: Tree, batch: Batch) -> curvax.Objective:
        def predict(params: Tree, batch: Batch) -> Any:
            return model.apply({"params": params, **model_state}, batch["input"])

        likelihood = task.likelihood("label", mask="mask")
        return curvax.Objective(likelihood, task.in_test(batch), model=predict)

    return clean


def make_scores(clean: Clean, task: Task) -> Scores:
    """The compiled map (params, model_state, batch) ↦ loss and scores over unmasked examples, and
    how many those are."""

    @jax.jit
    def scores(params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        objective = clean(model_state, batch)
        assert objective.model is not None
        outputs, batch = objective.model(params, objective.batch), objective.batch
        found = {
            name: score(outputs, batch["label"], mask=batch["mask"])
            for name, score in task.scores.items()
        }
        return {"loss": objective.loss(outputs, batch), _COUNT: batch["mask"].sum(), **found}

    return scores


def average(
    scores: Scores, state: State, split: Examples, size: int, regime: Jit
) -> dict[str, float]:
    """The scores on a split, computed `size` examples at a time, each example counted once."""
    found = [
        jax.device_get(scores(state.params, state.model_state, regime.place(chunk)))
        for chunk in chunks(split, size, regime)
    ]
    counts = [one.pop(_COUNT) for one in found]
    return {name: float(np.average([f[name] for f in found], weights=counts)) for name in found[0]}


def chunks(split: Examples, size: int, regime: Jit) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of a split in order, about `size` examples at a time, with masks."""
    devices = regime.mesh.size
    return datasets.batches(
        split,
        -(-min(size, split.size) // devices) * devices,
        shuffle=False,
        epochs=1,
        drop_remainder=False,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )


def make_largest_eigenvalue(clean: Clean) -> Curvature:
    """The map (params, model_state, batch) ↦ λ of largest magnitude of the loss's Hessian.

    By power iteration. The residual that stops it bounds λ's relative error by 3 %.
    """

    @jax.jit
    def product(params: Tree, model_state: Tree, batch: Batch, v: Tree) -> Tree:
        return curvax.hvp(clean(model_state, batch), params)(v)

    def largest(params: Tree, model_state: Tree, batch: Batch) -> jax.Array:
        def compiled(v: Tree) -> Tree:
            with jax.disable_jit(False):
                return product(params, model_state, batch, v)

        start = curvax.gaussian_probe(jax.random.key(0), params)
        with jax.disable_jit():  # a loop in Python: XLA's own runs convolutions slowly on CPUs
            return curvax.power_iteration(compiled, start, tol=3e-2).value

    return largest
