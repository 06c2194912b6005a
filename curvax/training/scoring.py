"""Scores of a trained state, and the largest eigenvalue of its Hessian."""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import curvax
from curvax.arithmetic.trees import Tree
from curvax.training.augment.metrics import Ranking
from curvax.training.augment.transforms import Batch
from curvax.training.data import datasets
from curvax.training.data.datasets import Examples
from curvax.training.parallelism import Jit
from curvax.training.step import State
from curvax.training.tasks import Task

EvalObjective = Callable[[Tree, Batch], curvax.Objective]
"""(model_state, batch) ↦ the loss on the batch, with the model in evaluation mode."""
Scores = Callable[[Tree, Tree, Batch], dict[str, Any]]
"""(params, model_state, batch) ↦ loss, scores, the number of unmasked examples, and what the task's
rankings need."""
LargestEigenvalue = Callable[[Tree, Tree, Batch], jax.Array]
"""(params, model_state, batch) ↦ λ of largest magnitude."""
_COUNT, _RANKED = "examples", "ranked"


def make_eval_objective(model: nn.Module, task: Task) -> EvalObjective:
    """The loss over unmasked examples, without dropout and with fixed batch statistics."""

    def eval_objective(model_state: Tree, batch: Batch) -> curvax.Objective:
        def predict(params: Tree, batch: Batch) -> Any:
            return model.apply({"params": params, **model_state}, batch["input"])

        loss = task.loss("label", mask="mask")
        return curvax.Objective(loss, task.in_test(batch), model=predict)

    return eval_objective


def make_scores(eval_objective: EvalObjective, task: Task, parallelism: Jit) -> Scores:
    """The compiled scores of a batch, means over its unmasked examples.

    For a task with rankings also (outputs, labels, mask) of the batch, in every process.
    """

    @functools.partial(jax.jit, out_shardings=parallelism.replicated)
    def scores(params: Tree, model_state: Tree, batch: Batch) -> dict[str, Any]:
        objective = eval_objective(model_state, batch)
        assert objective.model is not None
        outputs, batch = objective.model(params, objective.batch), objective.batch
        found = {
            name: score(outputs, batch["label"], mask=batch["mask"])
            for name, score in task.scores.items()
        }
        ranked = (outputs, batch["label"], batch["mask"]) if task.rankings else ()
        loss, count = objective.loss(outputs, batch), batch["mask"].sum()
        return {"loss": loss, _COUNT: count, _RANKED: ranked, **found}

    return scores


def average(
    scores: Scores,
    state: State,
    split: Examples,
    size: int,
    parallelism: Jit,
    rankings: Mapping[str, Ranking] = MappingProxyType({}),
) -> dict[str, float]:
    """The scores over a whole split, in chunks of about `size` examples; each counts once.

    The rankings are not averaged: they see the examples of all chunks together.
    """
    params = state.evaluated
    found = [
        jax.device_get(scores(params, state.model_state, parallelism.place(chunk)))
        for chunk in chunks(split, size, parallelism)
    ]
    counts, ranked = ([one.pop(key) for one in found] for key in (_COUNT, _RANKED))
    mean = lambda name: float(np.average([one[name] for one in found], weights=counts))
    means = {name: mean(name) for name in found[0]}
    if not rankings:
        return means
    outputs, labels, mask = map(np.concatenate, zip(*ranked))
    return means | {name: rank(outputs[mask], labels[mask]) for name, rank in rankings.items()}


def chunks(split: Examples, size: int, parallelism: Jit) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of a split, in order and with masks.

    A chunk has `size` examples, rounded up to a multiple of the number of devices.
    """
    devices = parallelism.mesh.size
    return datasets.batches(
        split,
        -(-min(size, split.size) // devices) * devices,
        shuffle=False,
        epochs=1,
        drop_remainder=False,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )


def make_largest_eigenvalue(eval_objective: EvalObjective) -> LargestEigenvalue:
    """The largest eigenvalue of the loss's Hessian in magnitude, by power iteration.

    The residual at which the iteration stops bounds the relative error of λ by 3 %.
    """

    @jax.jit
    def product(params: Tree, model_state: Tree, batch: Batch, v: Tree) -> Tree:
        return curvax.hvp(eval_objective(model_state, batch), params)(v)

    def largest(params: Tree, model_state: Tree, batch: Batch) -> jax.Array:
        def compiled(v: Tree) -> Tree:
            with jax.disable_jit(False):
                return product(params, model_state, batch, v)

        start = curvax.gaussian_probe(jax.random.key(0), params)
        with jax.disable_jit():  # a Python loop: XLA runs convolutions in its loops slowly on CPUs
            return curvax.power_iteration(compiled, start, tol=3e-2).value

    return largest
