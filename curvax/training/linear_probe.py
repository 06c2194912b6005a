"""A linear classifier of a frozen representation, the score of a contrastive training.

Logistic regression on the representation of the training images without augmentation, each feature
scaled to unit variance; by scikit-learn, with its default regularisation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from curvax.arithmetic.trees import Tree
from curvax.training import scoring
from curvax.training.augment.transforms import Batch
from curvax.training.data.datasets import Examples
from curvax.training.parallelism import Jit
from curvax.training.step import State
from curvax.training.tasks import Task

_STEPS = 1000
"""The most steps of L-BFGS; scikit-learn's default of 100 is too few for some representations."""


class Features(NamedTuple):
    """The representation of some examples, with their classes."""

    features: np.ndarray  # [N, width]
    label: np.ndarray  # integers [N]


Represent = Callable[[Tree, Tree, Batch], dict[str, jax.Array]]
"""(params, model_state, batch) ↦ features, classes and mask, on every device."""


def make_represent(model: nn.Module, task: Task, parallelism: Jit) -> Represent:
    """The compiled representation of a batch, with the model in evaluation mode."""

    def represent(params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        seen = task.in_test(batch)
        variables = {"params": params, **model_state}
        features: Any = model.apply(variables, seen["input"][:, 0], method="represent")
        label = jnp.argmax(seen["label"], axis=-1)
        return {"features": features, "label": label, "mask": batch["mask"]}

    return jax.jit(represent, out_shardings=parallelism.replicated)


def features_of(
    represent: Represent, state: State, split: Examples, size: int, parallelism: Jit
) -> Features:
    """The representation of a whole split, in chunks of about `size` examples."""
    found = [
        jax.device_get(represent(state.evaluated, state.model_state, parallelism.place(chunk)))
        for chunk in scoring.chunks(split, size, parallelism)
    ]
    joined = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    mask = joined["mask"]
    return Features(joined["features"][mask], joined["label"][mask])


def accuracy(train: Features, test: Features) -> float:
    """The share of `test` that a linear classifier of `train` classifies correctly."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
    return float(classifier.fit(*train).score(*test))
