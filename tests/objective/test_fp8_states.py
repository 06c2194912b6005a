"""States that are overwritten by their gradients: of pieces and devices the largest, no mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx

N, DEVICES = 8, 8
OWN = "_overwrite_with_gradient"


@jax.custom_vjp
def watched(x: jax.Array, history: jax.Array, backward: jax.Array) -> jax.Array:
    """x, whose largest entries, and those of what flows back, are the next states."""
    return x


def _forward(x: jax.Array, history: jax.Array, backward: jax.Array) -> Any:
    return x, (x, history, backward)


def _backward(kept: Any, g: jax.Array) -> Any:
    x, history, backward = kept
    rolled = lambda old, x: jnp.roll(old, 1).at[0].set(jnp.max(jnp.abs(x)))
    return g, rolled(history, x), rolled(backward, g)


watched.defvjp(_forward, _backward)


def loss(variables: Any, batch: Any) -> jax.Array:
    states = variables[OWN]
    z = watched(batch["x"] @ variables["params"]["w"], states["history"], states["backward"])
    return jnp.mean(jnp.sum((z - batch["y"]) ** 2, axis=1))


def make_variables() -> Any:
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    return {"params": params, OWN: {"history": jnp.arange(3.0), "backward": jnp.zeros(3)}}


def make_batch() -> Any:
    x = jax.random.normal(jax.random.key(1), (N, 3)) * (1 + jnp.arange(float(N)))[:, None]
    return {"x": x, "y": jnp.ones((N, 2))}


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_overwritten_states_of_microbatches_are_those_of_the_whole_batch(microbatch):
    expected = jax.value_and_grad(loss)(make_variables(), make_batch())
    objective = cx.Objective(loss, make_batch(), microbatch=microbatch)
    assert_same(jax.jit(objective.value_and_grad)(make_variables()), expected)


def test_overwritten_states_of_weighted_microbatches_are_those_of_the_whole_batch():
    def weighed(variables: Any, batch: Any) -> jax.Array:
        rows = jnp.sum((watched(
            batch["x"] @ variables["params"]["w"], **variables[OWN]
        ) - batch["y"]) ** 2, axis=1)  # fmt: skip
        return jnp.sum(batch["m"] * rows) / jnp.sum(batch["m"])

    batch = {**make_batch(), "m": jnp.arange(float(N)) + 0.5}
    expected = jax.value_and_grad(weighed)(make_variables(), batch)
    objective = cx.Objective(weighed, batch, microbatch=2, weight="m")
    assert_same(jax.jit(objective.value_and_grad)(make_variables()), expected)


@pytest.mark.parametrize("sequential", [False, True])
def test_overwritten_states_of_groups_are_the_largest(sequential):
    variables, batch = make_variables(), make_batch()
    tx = cx.per_group(4, optax.identity(), sequential=sequential)
    objective = cx.Objective(loss, batch)
    found, _ = tx.update(variables, tx.init(variables), variables, value_fn=objective)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 4)]
    each = [jax.grad(loss)(variables, half) for half in halves]
    largest = jax.tree.map(jnp.maximum, *(g[OWN] for g in each))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(g["params"] for g in each))
    assert_same(found, {"params": mean, OWN: largest})


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_overwritten_states_of_devices_are_the_largest():
    tx = optax.chain(cx.pmean_updates("batch"))

    def step(variables: Any, batch: Any) -> Any:
        _, grads = cx.Objective(loss, batch).value_and_grad(variables)
        return tx.update(grads, tx.init(variables), variables)[0]

    shards = jax.tree.map(lambda x: x.reshape(DEVICES, 1, *x.shape[1:]), make_batch())
    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)
    found = mapped(make_variables(), shards)
    expected = jax.grad(loss)(make_variables(), make_batch())
    assert_same(found["params"], expected["params"])
    assert_same(found[OWN]["history"], expected[OWN]["history"])
