"""Small models on 512 images, some of them wrongly labelled, for evidence over many trainings.

A step is compiled once for a model and a method: seed, ρ and α are its arguments.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import curvax as cx
from curvax.training.data import datasets
from curvax.training.data.labelled_images import flip_labels, load, moments, normalise

SIZE, NOISE, BATCH = 512, 0.4, 64
LIKELIHOOD = cx.categorical("y")

Batch = dict[str, jax.Array]
"""{"x": images [N, H, W, 1], "y": labels [N]}"""


class Images(NamedTuple):
    train: Batch
    """`SIZE` images, a part of whose labels is wrong."""
    test: Batch
    """Others, rightly labelled."""
    like_train: Batch
    """The same others, as many of their labels wrong as of the training images'."""


@functools.lru_cache(maxsize=2)
def images(name: str, seed: int, *, noise: float = NOISE, tests: int = 2000) -> Images:
    """The images of one seed, which draws them and the labels that are wrong."""
    whole = load(name, seed=seed)
    train = datasets.take(whole.train, SIZE, seed=seed)
    test = datasets.take(whole.test, min(tests, whole.test.size), seed=seed)
    scale = moments(train.inputs)
    wrong = lambda part, seed: flip_labels(part.labels, noise, 10, seed=seed)

    def batch(part: datasets.Split, labels: np.ndarray) -> Batch:
        x = normalise(datasets.numbers(part.inputs), *scale)
        return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}

    return Images(
        batch(train, wrong(train, seed)),
        batch(test, test.labels),
        batch(test, wrong(test, seed + 1000)),
    )


class Trainer:
    """A model under GSAM over a base: SAM at α = 0, the base itself at ρ = 0.

    Args:
        model: of `curvax.models`, without batch statistics.
        base: `schedule -> transformation`.
        rate: where the schedule, a cosine to zero, begins.
        m: examples in a group with an ascent of its own, the whole batch by default.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Callable[[optax.Schedule], optax.GradientTransformation],
        rate: float,
        *,
        m: int = BATCH,
        batch: int = BATCH,
        epochs: int = 60,
    ):
        self.model, self.m, self.batch, self.epochs = model, m, batch, epochs
        self.base = base(optax.cosine_decay_schedule(rate, epochs * SIZE // batch))

    def method(self, rho: Any, alpha: Any) -> cx.Stage:
        stages = cx.sam_perturb(rho) | cx.gsam_project(alpha)
        return (stages if self.m == self.batch else cx.per_group(self.m, stages)) | self.base

    def predict(self, params: Any, batch: Batch) -> Any:
        return self.model.apply({"params": params}, batch["x"])

    def objective(self, batch: Batch) -> cx.Objective:
        return cx.Objective(LIKELIHOOD, batch, model=self.predict)

    def trained(self, train: Batch, seed: int, rho: float, alpha: float = 0.0) -> Any:
        """The parameters at the end."""
        *_, params = self.epoch_by_epoch(train, seed, rho, alpha)
        return params

    def epoch_by_epoch(
        self, train: Batch, seed: int, rho: float, alpha: float = 0.0
    ) -> Iterator[Any]:
        """The parameters before the first epoch and after each."""
        params, state = self._start(train["x"][:1], seed)
        order = np.random.default_rng(seed)
        yield params
        for _ in range(self.epochs):
            for rows in np.split(order.permutation(SIZE), SIZE // self.batch):
                params, state = self._step(params, state, train, rows, rho, alpha)
            yield params

    @functools.partial(jax.jit, static_argnums=0)
    def _start(self, example: jax.Array, seed: int) -> tuple[Any, Any]:
        params = self.model.init(jax.random.key(seed), example)["params"]
        return params, self.method(0.0, 0.0).init(params)

    @functools.partial(jax.jit, static_argnums=0)
    def _step(
        self, params: Any, state: Any, train: Batch, rows: jax.Array, rho: Any, alpha: Any
    ) -> tuple[Any, Any]:
        objective = self.objective(jax.tree.map(lambda x: x[rows], train))
        loss, grads = objective.value_and_grad(params)
        updates, state = self.method(rho, alpha).update(
            grads, state, params, value_fn=objective, value=loss
        )
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnums=0)
    def scores(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(the share that is named wrongly, the mean loss)"""
        wrong = jnp.argmax(self.predict(params, batch), axis=-1) != batch["y"]
        return jnp.mean(wrong), self.objective(batch)(params)


def kept(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`run` with its results kept as JSON in the folder `CURVAX_EVIDENCE`, if one is given: a
    comparison that was stopped resumes."""

    @functools.wraps(run)
    def call(*args: Any) -> dict[str, Any]:
        folder = os.environ.get("CURVAX_EVIDENCE")
        if folder is None:
            return run(*args)
        file = pathlib.Path(folder) / f"{'-'.join(map(str, (run.__name__, *args)))}.json"
        if not file.exists():
            file.write_text(json.dumps(run(*args)))
        return json.loads(file.read_text())

    return call
