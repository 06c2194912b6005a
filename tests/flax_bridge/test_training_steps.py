"""The linen train state and the nnx losses, in the training steps that a user would write."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

from curvax import Objective, categorical, dense, natural_gradient, sam
from curvax.compat import as_pure
from curvax.flax_bridge import TrainState, nnx_loss

RHO = 0.1
REST = nnx.Not(nnx.Param)


def data(n=8):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.standard_normal((n, 4))),
        "label": jnp.asarray(rng.integers(0, 3, n)),
    }


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def assert_trees_close(a, b, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def hand_written_sam(loss, params, rho=RHO):
    """SAM's gradient and the auxiliary output of the first pass: arXiv:1910.01412, eq. 2 and 3."""
    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: p + rho * g / length, params, grads)
    return jax.grad(loss, has_aux=True)(moved)[0], aux


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x)
        x = nn.Dropout(0.5)(nn.relu(x), deterministic=not train)
        return nn.Dense(3, param_dtype=x.dtype)(x)


def linen_state(tx):
    model = Linen()
    variables = jax.jit(model.init)(jax.random.key(0), data()["image"])
    variables = jax.tree.map(lambda x: x.astype(float), variables)
    return TrainState.create(apply_fn=model.apply, tx=tx, **variables)


def test_linen_step_is_sam_with_one_dropout_key_and_clean_statistics():
    traces = []

    @jax.jit
    def step(state, batch, key):
        traces.append(step)

        def loss(params, batch, key):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return cross_entropy(logits, batch["label"]), new["batch_stats"]

        objective = Objective(loss, batch, has_aux=True, key=key)
        (value, batch_stats), grads = objective.value_and_grad(state.params)
        state = state.apply_gradients(grads=grads, value_fn=objective, batch_stats=batch_stats)
        return state, value

    state, batch, key = linen_state(sam(optax.sgd(0.3), RHO)), data(), jax.random.key(5)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(
            variables, batch["image"], True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return cross_entropy(logits, batch["label"]), new["batch_stats"]

    grads, stats = hand_written_sam(loss, state.params)
    new, value = step(state, batch, key)
    expected = jax.tree.map(lambda p, g: p - 0.3 * g, state.params, grads)
    assert_trees_close(new.params, expected)
    assert_trees_close(new.batch_stats, stats)
    np.testing.assert_allclose(value, loss(state.params)[0])
    assert (int(state.step), int(new.step)) == (0, 1)
    step(new, batch, key)
    assert len(traces) == 1


def test_train_state_passes_loss_value_and_gradient_to_the_transformation():
    seen: dict[str, Any] = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, updates=updates)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    grads, value_fn = {"w": jnp.ones(2)}, lambda params: jnp.sum(params["w"])
    new = state.apply_gradients(grads=grads, value_fn=value_fn, value=2.0)
    assert seen["value_fn"] is value_fn
    assert seen["value"] == 2.0
    assert seen["grad"] is seen["updates"] is grads
    assert new.tx is tx
    seen.clear()
    state.apply_gradients(grads=grads)
    assert set(seen) == {"updates"}


def test_train_state_without_a_loss_steps_as_flax_own_state():
    grads = {"w": jnp.asarray([0.5, -2.0])}
    given = {"apply_fn": None, "params": {"w": jnp.ones(2)}, "tx": optax.adam(0.1)}
    ours, flax = TrainState.create(**given), train_state.TrainState.create(**given)
    for _ in range(2):
        ours = ours.apply_gradients(grads=grads, value_fn=lambda p: 0.0)
        flax = flax.apply_gradients(grads=grads)
    assert_trees_close((ours.params, ours.opt_state), (flax.params, flax.opt_state), rtol=0)
    assert ours.step == flax.step
    assert ours.batch_stats == {}


def test_misspelt_field_of_the_train_state_is_refused():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    with pytest.raises(TypeError, match="batch_stat"):
        state.apply_gradients(grads=state.params, batch_stat={})


def test_optax_lbfgs_runs_in_the_train_state():
    loss = lambda params: jnp.sum((params["w"] - jnp.asarray([1.0, -2.0])) ** 2)
    state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=optax.lbfgs())
    for _ in range(3):
        value, grads = jax.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads, value_fn=loss, value=value)
    np.testing.assert_allclose(state.params["w"], [1.0, -2.0], atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_model():
    """In float64, running statistics included."""
    model = Nnx(nnx.Rngs(0))
    double = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x
    nnx.update(model, jax.tree.map(double, as_pure(nnx.state(model))))
    return model


def nnx_cross_entropy(model, batch):
    return cross_entropy(model(batch["image"]), batch["label"])


@nnx.jit
def nnx_step(model, optimizer, batch):
    loss, params = nnx_loss(model, nnx_cross_entropy)
    objective = Objective(loss, batch, has_aux=True)
    (value, state), grads = objective.value_and_grad(params)
    optimizer.update(model, grads, value_fn=objective)
    nnx.update(model, state)
    return value


def test_nnx_step_is_sam_with_one_dropout_mask_and_clean_statistics():
    model, batch = nnx_model(), data()
    optimizer = nnx.Optimizer(model, sam(optax.sgd(0.3), RHO), wrt=nnx.Param)
    twin = nnx.clone(model)
    for _ in range(2):
        params, rest = (as_pure(nnx.state(twin, kind)) for kind in (nnx.Param, REST))
        loss = partial(nnx_twin_loss, nnx.graphdef(twin), rest, batch)
        grads, after = hand_written_sam(loss, params)
        value = nnx_step(model, optimizer, batch)
        np.testing.assert_allclose(value, loss(params)[0])
        nnx.update(twin, after)
        nnx.update(twin, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads))
        assert_trees_close(plain(model), plain(twin))
    assert int(model.dropout.rngs.count[...]) == 2


def nnx_twin_loss(graphdef, rest, batch, params):
    live = nnx.merge(graphdef, params, rest, copy=True)
    value = nnx_cross_entropy(live, batch)
    return value, as_pure(nnx.state(live, REST))


def plain(model):
    """All of a model's arrays, keys as numbers."""
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(keys, as_pure(nnx.state(model)))


def test_evaluating_an_nnx_loss_changes_nothing_and_is_repeatable():
    model, batch = nnx_model(), data()
    before = plain(model)
    loss, params = nnx_loss(model, nnx_cross_entropy)
    first, state = loss(params, batch)
    second, _ = loss(as_pure(params), batch)
    assert first == second
    assert_trees_close(plain(model), before, rtol=0)
    nnx.update(model, state)
    assert loss(params, batch)[0] == first
    assert nnx_loss(model, nnx_cross_entropy)[0](params, batch)[0] != first


def test_parameters_of_an_nnx_loss_do_not_follow_the_module():
    model, batch = nnx_model(), data()
    loss, params = nnx_loss(model, nnx_cross_entropy)
    before = loss(params, batch)[0]
    nnx.update(model, jax.tree.map(lambda p: p + 1.0, as_pure(params)))
    assert loss(params, batch)[0] == before


def test_key_of_an_nnx_loss_changes_its_masks_and_advances_streams_once():
    model, batch = nnx_model(), data()
    loss, params = nnx_loss(model, nnx_cross_entropy)
    values, states = zip(*(loss(params, batch, jax.random.key(seed)) for seed in (1, 1, 2)))
    assert values[0] == values[1] != values[2]
    assert {int(state["dropout"]["rngs"]["count"]) for state in states} == {1}
    assert "key" not in states[0]["dropout"]["rngs"]


def test_key_is_folded_into_every_stream_of_stacked_layers():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.scale * x)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stacked(rngs):
        return Layer(rngs)

    def masks(layers, x):
        return jnp.sum(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x) @ weights)

    weights = 2.0 ** jnp.arange(40)
    loss, params = nnx_loss(stacked(nnx.Rngs(0)), masks)
    x = jnp.ones(40)
    values = {float(loss(params, x, jax.random.key(seed))[0]) for seed in range(3)}
    assert len(values) == 3


def test_nnx_loss_of_selected_parameters_trains_them_alone():
    model, batch = nnx_model(), data()
    bias = nnx.All(nnx.Param, nnx.PathContains("last"))
    loss, params = nnx_loss(model, nnx_cross_entropy, wrt=bias)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=bias)
    grads = jax.grad(loss, has_aux=True)(params, batch)[0]
    before = np.asarray(model.first.kernel[...]), np.asarray(model.last.kernel[...])
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.first.kernel[...], before[0])
    assert np.abs(model.last.kernel[...] - before[1]).max() > 0


def test_nnx_module_is_the_model_of_an_objective():
    """Its natural gradient is that of the same network written by hand."""
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    batch = {"x": jax.random.normal(jax.random.key(1), (6, 3)), "label": jnp.arange(6) % 2}
    predict, params = nnx_loss(module, lambda model, batch: model(batch["x"]))
    likelihood = categorical("label")
    tx = natural_gradient(1.0, damping=0.1, solver=dense())

    def updates_of(objective, params):
        _, grads = objective.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=objective)[0]

    found = updates_of(Objective(likelihood, batch, model=predict, has_aux=True), params)
    by_hand = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    model = lambda p, batch: batch["x"] @ p["kernel"] + p["bias"][None]
    expected = updates_of(Objective(likelihood, batch, model=model), by_hand)
    assert_trees_close(dict(nnx.to_pure_dict(found)), expected)
