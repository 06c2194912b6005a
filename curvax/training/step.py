"""One training step: a state and a batch ↦ the next state and what the step measured."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.training.augment import Batch
from curvax.training.tasks import Task
from curvax.trees import Tree, label, names


class State(NamedTuple):
    """All that the next step needs, but the place in the data."""

    step: jax.Array  # int32 []
    params: Tree
    model_state: Tree  # batch statistics, {} without
    opt_state: Tree
    key: jax.Array  # typed key [], from which each step folds its own


class Measured(NamedTuple):
    """What one step measured, on the device until somebody asks."""

    figures: dict[str, jax.Array]  # loss, scores and what the stages record, float32 []
    finite: jax.Array  # bool [1 + 2·leaves]: the loss, each gradient leaf, each update leaf


def init(
    model: nn.Module, optimizer: optax.GradientTransformation, example: jax.Array, seed: int
) -> State:
    """The state before the first step, for inputs shaped like `example` [1, ...]."""
    of_params, of_steps = jax.random.split(jax.random.key(seed))
    variables = dict(_variables(model, of_params, example))
    params = variables.pop("params")
    opt_state = _watched(optimizer).init(params)
    return State(jnp.zeros((), jnp.int32), params, variables, opt_state, of_steps)


@functools.partial(jax.jit, static_argnums=0)
def _variables(model: nn.Module, key: jax.Array, example: jax.Array) -> Any:
    return model.init(key, example)


def objective(
    model: nn.Module,
    task: Task,
    model_state: Tree,
    batch: Batch,
    key: jax.Array,
    microbatch: int | None = None,
) -> curvax.Objective:
    """The training loss on a batch, whose aux is the new batch statistics and the scores."""

    def predict(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        outputs, new = model.apply(
            {"params": params, **model_state},
            batch["input"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        scores = {name: score(outputs, batch["label"]) for name, score in task.scores.items()}
        return outputs, (new, scores)

    return curvax.Objective(
        task.likelihood("label"),
        batch,
        model=predict,
        has_aux=True,
        key=key,
        microbatch=microbatch,
    )


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    task: Task,
    microbatch: int | None = None,
) -> Callable[[State, Batch], tuple[State, Measured]]:
    """The compiled step; it takes the state's buffers over, so use the state it returns."""
    optimizer = _watched(optimizer)

    def step(state: State, batch: Batch) -> tuple[State, Measured]:
        augmentation, dropout = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = task.in_training(augmentation, batch)
        value_fn = objective(model, task, state.model_state, batch, dropout, microbatch)
        (loss, (model_state, scores)), grads = value_fn.value_and_grad(state.params)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value_fn=value_fn, value=loss
        )
        params = optax.apply_updates(state.params, updates)
        figures = {**scores, **curvax.diagnostics(opt_state), "loss": loss}
        finite = jnp.concatenate([opt_state[-1].finite, _finite(updates)])
        measured = Measured(figures, finite)
        return State(state.step + 1, params, model_state, opt_state, state.key), measured

    return jax.jit(step, donate_argnums=0)


class WatchState(NamedTuple):
    finite: jax.Array  # bool [1 + leaves]: the loss, each gradient leaf


def _watched(optimizer: optax.GradientTransformation) -> curvax.Stage:
    """The optimiser, and whether its clean pass was finite.

    Asked at the end of the pipe and not of the caller's gradient: AdaHessian has put its own copy
    in the place of that one, which the compiler then drops.
    """

    def start(params: Tree) -> WatchState:
        return WatchState(jnp.ones(1 + len(jax.tree.leaves(params)), bool))

    def watch(signal: curvax.Signal, state: WatchState, params: Tree, **extra: Any) -> Any:
        return signal, WatchState(_finite((signal.value, signal.gradient)))

    return curvax.pipe(optimizer, curvax.stage(start, watch))


def _finite(watched: Tree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(watched)])


def watched_names(params: Tree) -> list[str]:
    """What each entry of `Measured.finite` is about."""
    leaves = [label(names(path)) for path, _ in jax.tree.leaves_with_path(params)]
    return [
        "the loss",
        *(f"the gradient of `{leaf}`" for leaf in leaves),
        *(f"the update of `{leaf}`" for leaf in leaves),
    ]
