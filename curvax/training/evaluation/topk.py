"""Top-1 and top-5 accuracy of a trained classifier on an evaluation set.

As in training, a class tied with the correct one ranks before it, and so does a NaN. Classes that
an evaluation set lacks, as ImageNet-R does, are excluded from the predictions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import Attack
from curvax.arithmetic.trees import Tree
from curvax.training import scoring
from curvax.training.augment.transforms import Batch
from curvax.training.evaluation.test_sets import EvalSet
from curvax.training.experiment import Experiment
from curvax.training.step import State

MEAN = "mean"
_FEW = 10  # classes up to which no top-5 is reported

Rank = Callable[[Tree, Tree, Batch, jax.Array], jax.Array]
"""(params, model_state, batch, among) ↦ int32 [B]: the number of wrong classes that rank before the
best correct one. batch["right"], bool [B, classes], marks the correct classes."""


class TopKScores(NamedTuple):
    """The result on one evaluation set."""

    name: str
    examples: int
    classes: int  # that may be predicted
    top1: float
    top5: float | None


def make_rank(experiment: Experiment, attack: Attack | None = None) -> Rank:
    """The compiled `Rank` of an experiment, for all its evaluation sets, on attacked images."""
    eval_objective = scoring.make_eval_objective(experiment.model, experiment.task)

    @jax.jit
    def rank_of(params: Tree, model_state: Tree, batch: Batch, among: jax.Array) -> jax.Array:
        right, objective = batch["right"], eval_objective(model_state, batch)
        if attack is not None:
            delta = attack(objective, params, key=jax.random.key(0))
            objective = attack.moved(objective, delta)
        assert objective.model is not None
        logits = objective.model(params, objective.batch)
        best = jnp.max(jnp.where(right, logits, -jnp.inf), axis=-1, keepdims=True)
        return jnp.sum(~(logits < best) & ~right & among[None], axis=-1)

    return rank_of


def evaluate(experiment: Experiment, state: State, eval_set: EvalSet, rank_of: Rank) -> TopKScores:
    """Evaluates a state on an evaluation set; errors as in `Examples.gather`."""
    name, examples, among, _ = eval_set
    places, seen = [], 0
    for batch in scoring.chunks(examples, experiment.config.eval_batch, experiment.parallelism):
        count = int(batch["mask"].sum())
        right = _right(batch["label"], eval_set, slice(seen, seen + count))
        placed = experiment.parallelism.place(batch | {"right": right})
        found = rank_of(state.evaluated, state.model_state, placed, jnp.asarray(among))
        places.append(np.asarray(found)[:count])  # padding comes last
        seen += count
    place = np.concatenate(places)
    top5 = float((place < 5).mean()) if len(among) > _FEW else None
    return TopKScores(name, len(place), int(among.sum()), float((place < 1).mean()), top5)


def _right(label: np.ndarray, eval_set: EvalSet, rows: slice) -> np.ndarray:
    """bool [B, classes]: the correct classes of each example."""
    right = np.zeros((len(label), len(eval_set.among)), bool)
    if eval_set.right is None:
        right[np.arange(len(label)), label] = True
        return right
    for row, labels in zip(right, eval_set.right[rows]):
        row[list(labels)] = True
    return right


def means(found: Sequence[TopKScores]) -> dict[str, TopKScores]:
    """Means over the sets of one folder, as `fog/1` and `fog/2`, and over all sets in folders."""
    groups: dict[str, list[TopKScores]] = {}
    for each in found:
        if "/" in each.name:
            groups.setdefault(each.name.rpartition("/")[0], []).append(each)
    if groups:
        groups[MEAN] = [each for group in groups.values() for each in group]
    return {name: _mean(name, group) for name, group in groups.items()}


def _mean(name: str, found: Sequence[TopKScores]) -> TopKScores:
    """The mean of the scores, in which every set has the same weight."""
    top1 = float(np.mean([each.top1 for each in found]))
    top5 = [each.top5 for each in found if each.top5 is not None]
    return TopKScores(
        name,
        sum(each.examples for each in found),
        found[0].classes,
        top1,
        float(np.mean(top5)) if top5 else None,
    )
