"""A config made ready to run: model, optimiser, loss, data, and the compiled functions."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from curvax import models, recipe
from curvax.flax_bridge import Layout, layout
from curvax.training import config as configs
from curvax.training import data, evaluate, material, metrics
from curvax.training.data import Split
from curvax.training.material import Material
from curvax.training.step import Criterion, State, init, make_step

CRITERIA: dict[str, Criterion] = {
    "softmax": metrics.softmax_cross_entropy,
    "sigmoid": metrics.sigmoid_cross_entropy,
}


class ExperimentError(ValueError):
    """A config whose parts do not fit together."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a run needs. Runs of one config under other seeds share the compiled functions."""

    config: ConfigDict
    hold_out: bool
    material: Material
    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs
    criterion: Criterion
    step: Any  # compiled (State, batch) -> (State, Measured)
    predict: evaluate.Predict
    largest_eigenvalue: evaluate.Curvature

    @property
    def steps_per_epoch(self) -> int:
        return len(self.material.train.labels) // self.config.batch

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def init(self) -> State:
        """The state before the first step."""
        image = jnp.asarray(data.to_float(self.material.train.images[:1]))
        return init(self.model, self.optimizer, image, self.config.seed)

    def batches(self) -> Any:
        """Shuffled training batches without end, whose place can be kept and set."""
        return data.batches(self.material.train, self.config.batch, seed=self.config.seed)

    def reseeded(self, seed: int) -> "Experiment":
        """The same experiment with other parameters, label noise, data order and draws."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return dataclasses.replace(
            self, config=config, material=material.gather(config, self.hold_out)
        )

    def score(self, state: State, split: Split) -> dict[str, float]:
        """Loss and accuracy on a split, and top-5 accuracy beyond ten classes."""
        labels = jnp.asarray(split.labels)
        logits = evaluate.logits(self.predict, state, split, self.config.eval_batch)
        scores = {
            "loss": self.criterion(logits, labels),
            "accuracy": metrics.top1(logits, labels),
        }
        if self.material.classes > 10:
            scores["top5"] = metrics.top5(logits, labels)
        return {name: float(value) for name, value in scores.items()}

    def test(self, state: State) -> dict[str, float]:
        """The scores on the test set, or on what was held out."""
        return self.score(state, self.material.test)

    def appraise(self, state: State) -> dict[str, float]:
        """The figures of a trained state: scores, wrong labels learnt, largest eigenvalue."""
        train, wrong = self.material.train, self.material.wrong
        figures = {f"test_{name}": value for name, value in self.test(state).items()}
        figures |= {f"train_{name}": value for name, value in self.score(state, train).items()}
        figures["train_examples"] = len(train.labels)
        if wrong.any():
            of_wrong = Split(train.images[wrong], train.labels[wrong])
            figures["memorised"] = self.score(state, of_wrong)["accuracy"]
        if count := self.config.hessian_examples:
            images, labels = data.to_float(train.images[:count]), train.labels[:count]
            batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
            value = self.largest_eigenvalue(state.params, state.model_state, batch)
            figures["lambda_max"] = float(value)
        return figures


def build(config: ConfigDict, *, hold_out: bool = False) -> Experiment:
    """Makes a config ready to run, and traces one step of it, so that what is wrong shows here.

    Args:
        hold_out: keep 10 % of the training set out of training and score on it, not on test.

    Raises:
        ValueError: a field does not fit.
    """
    configs.check(config)
    if config.loss not in CRITERIA:
        raise ExperimentError(f"`loss` is one of {', '.join(CRITERIA)}, and was `{config.loss}`.")
    gathered = material.gather(config, hold_out)
    steps = config.epochs * (len(gathered.train.labels) // config.batch)
    if steps < 1:
        raise ExperimentError(
            f"{config.epochs} epochs of {len(gathered.train.labels)} training examples in batches "
            f"of {config.batch} are no step. Raise `epochs` or lower `batch`."
        )
    model = models.build(config.model.name, gathered.classes, **config.model.options)
    names = configs.numbers(config) | {"layout": _layout(model, gathered)}
    optimizer = recipe.parse(config.optimizer, steps=steps, names=names)
    criterion = CRITERIA[config.loss]
    transform = material.transform(config, gathered.classes)
    predict = evaluate.make_predict(model, *material.moments(config))
    experiment = Experiment(
        config,
        hold_out,
        gathered,
        model,
        optimizer,
        criterion,
        make_step(model, optimizer, criterion, transform, config.microbatch),
        predict,
        evaluate.make_largest_eigenvalue(predict, criterion),
    )
    jax.eval_shape(experiment.step, jax.eval_shape(experiment.init), next(experiment.batches()))
    return experiment


def _layout(model: nn.Module, gathered: Material) -> Layout:
    """What each parameter is, for `spatial_average(layout=layout)` in the optimiser's text."""
    image = jax.ShapeDtypeStruct((1, *gathered.train.images.shape[1:]), jnp.float32)
    return layout(model, jax.eval_shape(model.init, jax.random.key(0), image), image)
