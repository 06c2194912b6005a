"""Where a trained classifier ranks the right class, over a test set.

The score is that of training: a class tied with the right one ranks before it, and so does a NaN.
Where some of the classes are not there, as in ImageNet-R, they are not chosen from either.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.arithmetic.trees import Tree
from curvax.training import scoring
from curvax.training.augment.transforms import Batch
from curvax.training.evaluation.test_sets import Benchmark
from curvax.training.experiment import Experiment
from curvax.training.step import State

MEAN = "mean"
_FEW = 10  # classes, among which a top-5 says little

Ahead = Callable[[Tree, Tree, Batch, jax.Array], jax.Array]
"""(params, model_state, batch, among) ↦ int32 [B]: how many wrong classes rank before the best of
the right ones, which "right" of the batch tells, bool [B, classes]."""


class Found(NamedTuple):
    """How a model did on one test set."""

    name: str
    examples: int
    classes: int  # that it chose from
    top1: float
    top5: float | None


def make_ahead(experiment: Experiment) -> Ahead:
    """The compiled map, for all test sets of an experiment."""
    clean = scoring.make_clean(experiment.model, experiment.task)

    @jax.jit
    def ahead(params: Tree, model_state: Tree, batch: Batch, among: jax.Array) -> jax.Array:
        right, objective = batch["right"], clean(model_state, batch)
        assert objective.model is not None
        logits = objective.model(params, objective.batch)
        best = jnp.max(jnp.where(right, logits, -jnp.inf), axis=-1, keepdims=True)
        return jnp.sum(~(logits < best) & ~right & among[None], axis=-1)

    return ahead


def rank(experiment: Experiment, state: State, benchmark: Benchmark, ahead: Ahead) -> Found:
    """How often the class is named rightly; errors as in `Examples.gather`."""
    name, examples, among, _ = benchmark
    places, seen = [], 0
    for batch in scoring.chunks(examples, experiment.config.eval_batch, experiment.regime):
        count = int(batch["mask"].sum())
        right = _right(batch["label"], benchmark, slice(seen, seen + count))
        placed = experiment.regime.place(batch | {"right": right})
        found = ahead(state.params, state.model_state, placed, jnp.asarray(among))
        places.append(np.asarray(found)[:count])  # what fills the batch up comes last
        seen += count
    place = np.concatenate(places)
    top5 = float((place < 5).mean()) if len(among) > _FEW else None
    return Found(name, len(place), int(among.sum()), float((place < 1).mean()), top5)


def _right(label: np.ndarray, benchmark: Benchmark, rows: slice) -> np.ndarray:
    """bool [B, classes]: the right classes of each example."""
    right = np.zeros((len(label), len(benchmark.among)), bool)
    if benchmark.right is None:
        right[np.arange(len(label)), label] = True
        return right
    for row, labels in zip(right, benchmark.right[rows]):
        row[list(labels)] = True
    return right


def means(found: Sequence[Found]) -> dict[str, Found]:
    """Over sets that lie together, `fog/1` and `fog/2`, and over all that lie in folders."""
    groups: dict[str, list[Found]] = {}
    for each in found:
        if "/" in each.name:
            groups.setdefault(each.name.rpartition("/")[0], []).append(each)
    if groups:
        groups[MEAN] = [each for group in groups.values() for each in group]
    return {name: _mean(name, group) for name, group in groups.items()}


def _mean(name: str, found: Sequence[Found]) -> Found:
    """Every set counts alike."""
    top1 = float(np.mean([each.top1 for each in found]))
    top5 = [each.top5 for each in found if each.top5 is not None]
    return Found(
        name,
        sum(each.examples for each in found),
        found[0].classes,
        top1,
        float(np.mean(top5)) if top5 else None,
    )
