"""Training steps of public trainers, with the edits that train SAM in them.

Each is written after the documentation of a public trainer: Flax's imagenet example (linen, `pmap`,
batch norm), Flax's nnx examples (a loss with an aux), and Levanter (Equinox, `obj_fn=`). An edit
trains m-SAM, as computed by hand, or an error says what to write.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx
from flax.training import train_state
from small_problems import assert_trees_close

import curvax as cx

RHO, LEARNING_RATE, DEVICES, STEPS = 0.3, 0.1, 4, 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Dense(6, param_dtype=float)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=float)(x)
        return nn.Dense(3, param_dtype=float)(nn.relu(x))


def images() -> dict[str, jax.Array]:
    """A batch for four devices, [4, 5, ...]."""
    draw = jax.random.normal(jax.random.key(1), (DEVICES, 5, 4))
    return {"image": draw, "label": jnp.arange(DEVICES * 5).reshape(DEVICES, 5) % 3}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen_loss(params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, Any]:
    """The loss with decay, and (the new statistics, the logits)."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = Net().apply(variables, batch["image"], mutable=["batch_stats"])
    decay = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
    return cross_entropy(logits, batch["label"]) + 1e-4 * decay, (new["batch_stats"], logits)


def linen_variables() -> Any:
    return Net().init(jax.random.key(0), images()["image"][0])


def sam_by_hand() -> Any:
    """The parameters after steps of SAM with a perturbation of each device's own."""
    variables = linen_variables()
    params, stats = variables["params"], variables["batch_stats"]

    def of_device(params: Any, stats: Any, batch: Any) -> Any:
        loss = lambda p: linen_loss(p, stats, batch)
        gradient, (new, _) = jax.grad(loss, has_aux=True)(params)
        scale = RHO / optax.tree.norm(gradient)
        ahead = jax.tree.map(lambda w, g: w + scale * g, params, gradient)
        return jax.grad(loss, has_aux=True)(ahead)[0], new

    for _ in range(STEPS):
        each = jax.vmap(of_device, in_axes=(None, None, 0))(params, stats, images())
        gradient, stats = jax.tree.map(lambda x: x.mean(0), each)
        params = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, gradient)
    return params


class OwnState(train_state.TrainState):
    """As the example has it, on Flax's own."""

    batch_stats: Any


class OurState(cx.TrainState):
    """The same on `curvax.TrainState`, with fields of the trainer's own."""

    dynamic_scale: Any = None


def train_linen(
    tx: Any,
    state_class: Any = OurState,
    *,
    gradient: str = "objective",
    value_fn: str = "objective",
    averages: bool = False,
) -> Any:
    """Parameters after some steps under pmap, the same on every device.

    Args:
        gradient: what computes it, the "objective" or "jax".
        value_fn: what is passed: the "objective", "loss_fn" with its aux, a "closure" without,
            or "nothing".
        averages: whether the trainer averages the gradient itself.
    """

    def step(state: Any, batch: Any) -> Any:
        loss_fn = lambda params: linen_loss(params, state.batch_stats, batch)
        objective = cx.Objective(loss_fn, has_aux=True)
        taken = objective.value_and_grad if gradient == "objective" else None
        taken = taken or jax.value_and_grad(loss_fn, has_aux=True)
        (value, (stats, _)), grads = taken(state.params)
        if averages:
            grads = jax.lax.pmean(grads, "batch")
        known = {"objective": objective, "loss_fn": loss_fn, "closure": lambda p: loss_fn(p)[0]}
        extra = {} if value_fn == "nothing" else {"value_fn": known[value_fn], "value": value}
        stats = jax.lax.pmean(stats, "batch")
        return state.apply_gradients(grads=grads, batch_stats=stats, **extra)

    variables = linen_variables()
    state = state_class.create(apply_fn=Net().apply, tx=tx, **variables)
    state = jax_utils.replicate(state, jax.devices()[:DEVICES])
    mapped = jax.pmap(step, axis_name="batch", devices=jax.devices()[:DEVICES])
    for _ in range(STEPS):
        state = mapped(state, images())
    return jax.tree.map(lambda x: x[0], state.params)


def sam(**options: Any) -> cx.Stage:
    return cx.sam(optax.sgd(LEARNING_RATE), RHO, **options)


@pytest.mark.parametrize("value_fn", ["objective", "closure"])
@pytest.mark.parametrize("gradient", ["objective", "jax"])
def test_m_sam_runs_in_a_linen_trainer_under_pmap(gradient, value_fn):
    found = train_linen(sam(mean_over="batch"), gradient=gradient, value_fn=value_fn)
    assert_trees_close(found, sam_by_hand(), tol=1e-10)


EDITS: dict[str, tuple[Callable[[], Any], str]] = {
    "the optimiser alone": (
        lambda: train_linen(sam(mean_over="batch"), OwnState, value_fn="nothing"),
        "`curvax.TrainState`",
    ),
    "and our state": (
        lambda: train_linen(sam(mean_over="batch"), value_fn="nothing"),
        "value_fn=",
    ),
    "the loss with its aux": (
        lambda: train_linen(sam(mean_over="batch"), value_fn="loss_fn"),
        "has_aux=True",
    ),
    "the trainer's own mean": (
        lambda: train_linen(sam(mean_over="batch"), averages=True),
        "`mean_over=`",
    ),
    "no mean": (lambda: train_linen(sam()), "`pmean_updates('batch')`"),
    "no mean, of a stage": (
        lambda: train_linen(cx.sam_perturb(RHO) | optax.sgd(0.1), gradient="jax"),
        "pmean_updates('batch')",
    ),
    "clipping first": (
        lambda: train_linen(optax.chain(optax.clip_by_global_norm(1.0), sam(mean_over="batch"))),
        "optax.clip_by_global_norm(1.0) | base",
    ),
    "accumulation around": (
        lambda: train_linen(optax.MultiSteps(sam(mean_over="batch"), 2)),
        "optax.MultiSteps(base, k)",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_wrong_edit_of_a_linen_trainer_raises_with_what_to_write(edit):
    act, cure = EDITS[edit]
    with pytest.raises((TypeError, ValueError), match=re.escape(cure)):
        act()


# Equinox models, `obj_fn=` and `loss=`, as Levanter's step passes them.


def levanter_step(tx: Any, model: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """One step: the trainable arrays are differentiated, the objective is of them alone."""

    def loss_of(model: Any, batch: Any) -> jax.Array:
        return jnp.mean((jax.vmap(model)(batch["x"])[:, 0] - batch["y"]) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_of)(model, batch)
    trainable = eqx.filter(model, eqx.is_inexact_array)
    obj_fn = lambda trainable: loss_of(eqx.combine(trainable, model), batch)
    updates, state = tx.update(grads, state, params=trainable, obj_fn=obj_fn, loss=loss)
    return eqx.apply_updates(model, updates), state


def equinox_problem() -> tuple[Any, Any]:
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, dtype=float, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (12, 3))
    return model, {"x": x, "y": jnp.sin(x[:, 0])}


def equinox_sam_by_hand() -> Any:
    model, batch = equinox_problem()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any) -> jax.Array:
        out = jax.vmap(eqx.combine(params, static))(batch["x"])[:, 0]
        return jnp.mean((out - batch["y"]) ** 2)

    gradient = jax.grad(loss)(params)
    scale = RHO / optax.tree.norm(gradient)
    ahead = jax.tree.map(lambda w, g: w + scale * g, params, gradient)
    return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, jax.grad(loss)(ahead))


def test_sam_runs_in_a_step_that_passes_obj_fn():
    model, batch = equinox_problem()
    state = sam().init(eqx.filter(model, eqx.is_inexact_array))
    step = eqx.filter_jit(functools.partial(levanter_step, sam()))
    model, state = step(model, state, batch)
    trained = eqx.filter(model, eqx.is_inexact_array)
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(equinox_sam_by_hand()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    figures = cx.diagnostics(state)
    assert figures["surrogate_gap"] == figures["perturbed_loss"] - figures["loss"] > 0


def test_sophia_runs_in_a_step_that_passes_obj_fn():
    model, batch = equinox_problem()
    ours, theirs = cx.sophia_h(1e-2), optax.contrib.sophia(1e-2)
    params = eqx.filter(model, eqx.is_inexact_array)
    one = lambda tx: eqx.filter_jit(levanter_step)(tx, model, tx.init(params), batch)[0]
    # The first step of either divides by no curvature yet: one of signs.
    for a, b in zip(jax.tree.leaves(one(ours)), jax.tree.leaves(one(theirs))):
        if eqx.is_array(a):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# nnx as Flax's examples have it: a loss of the module that returns the logits too.


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def loss_fn(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits = model(batch["image"])
    return cross_entropy(logits, batch["label"]), logits


def nnx_batch() -> Any:
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), images())
    # Batch norm keeps its statistics in float32, whatever the inputs.
    return whole | {"image": whole["image"].astype(jnp.float32)}


def train_nnx(edit: Callable[[Any, Any, Any], Any], tx: Any) -> Any:
    """The module after some steps, each `edit(model, optimizer, batch)`."""
    model = Mlp(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(edit)
    for _ in range(STEPS):
        step(model, optimizer, nnx_batch())
    return model


def as_the_example(model: Any, optimizer: Any, batch: Any) -> None:
    _, grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    optimizer.update(model, grads)


def with_a_loss_of_parameters(model: Any, optimizer: Any, batch: Any) -> None:
    loss, params = cx.nnx_loss(model, loss_fn, has_aux=True)
    objective = cx.Objective(loss, batch, has_aux=True)
    (value, (logits, state)), grads = objective.value_and_grad(params)
    assert logits.shape == (20, 3)
    optimizer.update(model, grads, value_fn=objective, value=value)
    nnx.update(model, state)


def with_a_loss_of_the_module(model: Any, optimizer: Any, batch: Any) -> None:
    _, grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    optimizer.update(model, grads, value_fn=lambda model: loss_fn(model, batch)[0])


def without_the_aux_said(model: Any, optimizer: Any, batch: Any) -> None:
    loss, params = cx.nnx_loss(model, loss_fn)
    objective = cx.Objective(loss, batch, has_aux=True)
    _, grads = objective.value_and_grad(params)
    optimizer.update(model, grads, value_fn=objective)


def state_of(model: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def test_sam_at_radius_zero_trains_an_nnx_module_as_the_example():
    plain = train_nnx(as_the_example, optax.sgd(LEARNING_RATE))
    ours = train_nnx(with_a_loss_of_parameters, cx.sam(optax.sgd(LEARNING_RATE), 0.0))
    for x, y in zip(state_of(ours), state_of(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_sam_of_an_nnx_module_keeps_the_clean_statistics():
    graphdef, params, *others = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)
    rest = others[0]

    def loss(params: Any) -> tuple[jax.Array, Any]:
        live = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(live, nnx_batch())[0], nnx.state(live, nnx.BatchStat)

    for _ in range(STEPS):
        gradient, stats = jax.grad(loss, has_aux=True)(params)
        ahead = optax.tree.add_scale(params, RHO / optax.tree.norm(gradient), gradient)
        ascended, _ = jax.grad(loss, has_aux=True)(ahead)
        params = optax.tree.add_scale(params, -LEARNING_RATE, ascended)
        rest = stats
    ours = train_nnx(with_a_loss_of_parameters, cx.sam(optax.sgd(LEARNING_RATE), RHO))
    expected = [*jax.tree.leaves(params), *jax.tree.leaves(rest)]
    found = [
        *jax.tree.leaves(nnx.state(ours, nnx.Param)),
        *jax.tree.leaves(nnx.state(ours, nnx.BatchStat)),
    ]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


NNX_EDITS = {
    "the optimiser alone": (as_the_example, "value_fn="),
    "a loss of the module": (with_a_loss_of_the_module, "nnx_loss"),
    "an aux that is not said": (without_the_aux_said, "has_aux=True"),
}


@pytest.mark.parametrize("edit", NNX_EDITS)
def test_wrong_edit_of_an_nnx_step_raises_with_what_to_write(edit):
    step, cure = NNX_EDITS[edit]
    with pytest.raises((TypeError, ValueError), match=re.escape(cure)):
        train_nnx(step, cx.sam(optax.sgd(LEARNING_RATE), RHO))
