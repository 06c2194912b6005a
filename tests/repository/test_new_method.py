"""The method that docs/new_method.md writes outside of the package: short, on devices, in order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from pages import DOCS, blocks
from small_problems import assert_trees_close, net_batch, net_loss, net_params

import curvax as cx

CODE = next(blocks(DOCS / "new_method.md"))[1]
RHO, DECAY, SIGMA, DEVICES, STEPS = 0.3, 0.6, 0.8, 2, 3


@pytest.fixture(scope="module")
def f_sam() -> Any:
    names: dict[str, Any] = {}
    exec(compile(CODE, "docs/new_method.md", "exec"), names)
    return names["f_sam"]


def test_the_code_of_the_method_is_short():
    assert len(CODE.splitlines()) < 40


def by_hand(parts: Any) -> tuple[Any, Any]:
    """Every device ascends along its gradient less the average over devices and steps."""
    params = net_params()
    mean = jax.tree.map(jnp.zeros_like, params)

    def of_device(params: Any, part: Any, mean: Any) -> Any:
        d = jax.tree.map(lambda g, m: g - SIGMA * m, jax.grad(net_loss)(params, part), mean)
        scale = RHO / optax.tree.norm(d)
        return jax.grad(net_loss)(jax.tree.map(lambda w, d: w + scale * d, params, d), part)

    for _ in range(STEPS):
        clean = jax.vmap(jax.grad(net_loss), (None, 0))(params, parts)
        mean = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g.mean(0), mean, clean)
        found = jax.vmap(of_device, (None, 0, None))(params, parts, mean)
        params = jax.tree.map(lambda w, u: w - 0.1 * u.mean(0), params, found)
    return params, mean


def divided(batch: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def on_pmap(step: Any, params: Any, state: Any) -> tuple[Any, Any]:
    mapped = jax.pmap(step, axis_name="batch", devices=jax.devices()[:DEVICES])
    on_each = lambda tree: jax.tree.map(lambda x: np.stack([x] * DEVICES), tree)
    params, state, parts = on_each(params), on_each(state), divided(net_batch())
    for _ in range(STEPS):
        params, state = mapped(params, state, parts)
    return jax.tree.map(lambda x: x[0], (params, state))


def on_shard_map(step: Any, params: Any, state: Any) -> tuple[Any, Any]:
    mesh = jax.make_mesh((DEVICES,), ("batch",), devices=jax.devices()[:DEVICES])
    specs: Any = dict(in_specs=(P(), P(), P("batch")), out_specs=(P(), P()))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    for _ in range(STEPS):
        params, state = mapped(params, state, net_batch())
    return params, state


@pytest.mark.parametrize("run", [on_pmap, on_shard_map])
def test_devices_share_the_average_and_ascend_on_their_own(f_sam, run):
    tx = f_sam(optax.sgd(0.1), RHO, sigma=SIGMA, decay=DECAY, mean_over="batch")

    def step(params: Any, state: Any, part: Any) -> Any:
        objective = cx.Objective(net_loss, part)
        _, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params, state = run(step, net_params(), tx.init(net_params()))
    expected, mean = by_hand(divided(net_batch()))
    assert_trees_close(jax.device_get(params), jax.device_get(expected), tol=1e-10)
    found = optax.tree.get(state, "ema")
    assert_trees_close(jax.device_get(found), jax.device_get(mean), tol=1e-10)


def test_at_sigma_zero_it_is_sam(f_sam):
    objective = cx.Objective(net_loss, net_batch())
    params, (_, grads) = net_params(), objective.value_and_grad(net_params())
    found, expected = (
        tx.update(grads, tx.init(params), params, value_fn=objective)[0]
        for tx in (f_sam(optax.sgd(0.1), RHO, sigma=0.0), cx.sam(optax.sgd(0.1), RHO))
    )
    assert_trees_close(found, expected)


def test_it_keeps_the_rules_of_order(f_sam):
    tx = f_sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`clip_by_global_norm` would be lost"):
        optax.clip_by_global_norm(1.0) | tx
    with pytest.raises(ValueError, match="the last mini-batch"):
        optax.MultiSteps(tx, 2).init(net_params())
    objective = cx.Objective(net_loss, net_batch())
    _, grads = objective.value_and_grad(net_params())
    clipped = jax.tree.map(lambda g: 0.5 * g, grads)
    with pytest.raises(ValueError, match="would be lost"):
        tx.update(clipped, tx.init(net_params()), net_params(), value_fn=objective)
