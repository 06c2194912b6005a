"""One training step: a state and a batch ↦ the next state and what the step measured."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.training import metrics
from curvax.trees import Tree, label, names

Batch = dict[str, jax.Array]
Criterion = Callable[[jax.Array, jax.Array], jax.Array]
Transform = Callable[[jax.Array, Batch], Batch]


class State(NamedTuple):
    """All that the next step needs, but the place in the data."""

    step: jax.Array  # int32 []
    params: Tree
    model_state: Tree  # batch statistics, {} without
    opt_state: Tree
    key: jax.Array  # typed key [], from which each step folds its own


class Measured(NamedTuple):
    """What one step measured, on the device until somebody asks."""

    figures: dict[str, jax.Array]  # loss, accuracy and what the stages record, float32 []
    finite: jax.Array  # bool [1 + 2·leaves]: the loss, each gradient leaf, each update leaf


def init(
    model: nn.Module, optimizer: optax.GradientTransformation, image: jax.Array, seed: int
) -> State:
    """The state before the first step, for images shaped like `image` [1, H, W, C]."""
    of_params, of_steps = jax.random.split(jax.random.key(seed))
    variables = dict(_variables(model, of_params, image))
    params = variables.pop("params")
    opt_state = _watched(optimizer).init(params)
    return State(jnp.zeros((), jnp.int32), params, variables, opt_state, of_steps)


@functools.partial(jax.jit, static_argnums=0)
def _variables(model: nn.Module, key: jax.Array, image: jax.Array) -> Any:
    return model.init(key, image)


def objective(
    model: nn.Module,
    criterion: Criterion,
    model_state: Tree,
    batch: Batch,
    key: jax.Array,
    microbatch: int | None = None,
) -> curvax.Objective:
    """The training loss on a batch, whose aux is the new batch statistics and the accuracy."""

    def loss(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, new = model.apply(
            {"params": params, **model_state},
            batch["image"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        value = criterion(logits, batch["label"])
        return value, (new, metrics.top1(logits, batch["label"]))

    return curvax.Objective(loss, batch, has_aux=True, key=key, microbatch=microbatch)


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    criterion: Criterion,
    transform: Transform,
    microbatch: int | None = None,
) -> Callable[[State, Batch], tuple[State, Measured]]:
    """The compiled step; it takes the state's buffers over, so use the state it returns."""
    optimizer = _watched(optimizer)

    def step(state: State, batch: Batch) -> tuple[State, Measured]:
        augmentation, dropout = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = transform(augmentation, batch)
        value_fn = objective(model, criterion, state.model_state, batch, dropout, microbatch)
        (loss, (model_state, accuracy)), grads = value_fn.value_and_grad(state.params)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value_fn=value_fn, value=loss
        )
        params = optax.apply_updates(state.params, updates)
        figures = {"accuracy": accuracy, **curvax.diagnostics(opt_state), "loss": loss}
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
