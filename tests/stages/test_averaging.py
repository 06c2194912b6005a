"""`per_group` against a loop over groups: updates, weights, draws, state."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sam_problem import PARAMS, objective, step
from small_problems import assert_trees_close, flat, net_batch, net_loss

import curvax as cx


def group_gradients(m: int, method: Any, batch: Any = None) -> np.ndarray:
    """The update of each contiguous group on its own, [groups, parameters]."""
    whole, out = objective() if batch is None else cx.Objective(net_loss, batch), []
    groups = whole.groups(m)
    for i in range(whole.size // m):
        part = whole.on(jax.tree.map(lambda x, i=i: x[i], groups))
        _, grads = part.value_and_grad(PARAMS)
        out.append(flat(method.update(grads, method.init(PARAMS), PARAMS, value_fn=part)[0]))
    return np.array(out)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("m", [2, 8])
def test_per_group_is_the_loop_over_groups(m, sequential):
    inner = cx.sam_perturb(0.3) | cx.gsam_project(0.4)
    updates, _ = step(cx.per_group(m, inner, sequential=sequential))
    expected = group_gradients(m, inner).mean(axis=0)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_parts_within_a_group_receive_its_own_loss():
    """Some of Optax's parts need `value=`, as `reduce_on_plateau` does."""

    def times_loss(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any):
        return jax.tree.map(lambda u: u * value, updates), state

    part = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), times_loss)
    found, _ = step(cx.per_group(2, cx.sam_perturb(0.3) | part))
    groups = objective().groups(2)
    losses = [net_loss(PARAMS, jax.tree.map(lambda x, i=i: x[i], groups)) for i in range(4)]
    expected = np.array(losses) @ group_gradients(2, cx.sam_perturb(0.3)) / 4
    np.testing.assert_allclose(flat(found), expected, rtol=1e-11, atol=1e-13)
    plateau = cx.per_group(2, cx.sam_perturb(0.3) | optax.contrib.reduce_on_plateau())
    assert_trees_close(step(plateau)[0], step(cx.per_group(2, cx.sam_perturb(0.3)))[0])


def test_per_group_ignores_the_given_gradient():
    tx = cx.per_group(2, cx.sam_perturb(0.3))
    nonsense = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    updates, _ = tx.update(nonsense, tx.init(PARAMS), PARAMS, value_fn=objective(), value=jnp.nan)
    assert_trees_close(updates, step(tx)[0])


@pytest.mark.parametrize("sequential", [False, True])
def test_groups_are_averaged_by_their_weight(sequential):
    batch = {**net_batch(), "tokens": jnp.array([1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 0.5, 0.5])}
    weighted = cx.Objective(net_loss, batch, weight="tokens")
    tx = cx.per_group(2, cx.sam_perturb(0.3), sequential=sequential)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=weighted)
    each = group_gradients(2, cx.sam_perturb(0.3), batch)
    weights = np.asarray(batch["tokens"]).reshape(4, 2).sum(axis=1)
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)
    groups = weighted.groups(2)
    losses = [net_loss(PARAMS, jax.tree.map(lambda x, i=i: x[i], groups)) for i in range(4)]
    np.testing.assert_allclose(
        cx.diagnostics(state)["loss"], np.average(losses, weights=weights), rtol=1e-6
    )


@pytest.mark.parametrize("sequential", [False, True])
def test_per_group_keeps_the_state_of_one_pipe(sequential):
    inner = cx.sam_perturb(0.3, ascent=cx.random_direction(3)) | optax.ema(0.9, debias=False)
    tx = cx.per_group(2, inner, sequential=sequential)
    start = tx.init(PARAMS)
    chex.assert_trees_all_equal_structs(start, inner.init(PARAMS))
    updates, state = step(tx, start)
    assert state[0].step == state[1].count == 1
    # Moments are averaged: here each is a tenth of its group's gradient.
    assert_trees_close(updates, state[1].ema)
    _, later = step(tx, state)
    drawn = {str(jax.random.key_data(s[0].keys[0])) for s in (start, state, later)}
    assert len(drawn) == 3


def test_groups_draw_their_own_directions():
    ascent = cx.random_direction(3)
    plain = lambda w, batch: jnp.mean(batch) * jnp.sum(w**3)
    w, same = jnp.ones(4), cx.Objective(plain, jnp.ones(4))
    tx = cx.per_group(1, cx.sam_perturb(0.3, ascent=ascent))
    grouped, _ = tx.update(w, tx.init(w), w, value_fn=same)
    single = cx.per_group(4, cx.sam_perturb(0.3, ascent=ascent))
    alone, _ = single.update(w, single.init(w), w, value_fn=same)
    # Examples that are all alike would give what one draw gives.
    assert np.abs(grouped - alone).max() > 1e-3


def test_groups_draw_probes_by_their_number():
    key, inner = jax.random.key(4), lambda key: cx.hutchinson_diag(key) | cx.scale_by_power(1.0)
    whole, found = objective(), step(cx.per_group(4, inner(key)))[0]
    expected = []
    for i in range(2):
        part = whole.on(jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], net_batch()))
        _, grads = part.value_and_grad(PARAMS)
        tx = inner(jax.random.fold_in(key, i))
        expected.append(flat(tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=part)[0]))
    np.testing.assert_allclose(flat(found), np.mean(expected, axis=0), rtol=1e-11)


@pytest.mark.parametrize("sequential", [False, True])
def test_per_group_hands_on_the_mean_loss_and_aux(sequential):
    def with_aux(w: Any, batch: Any) -> Any:
        return w * jnp.mean(batch), {"mean": jnp.mean(batch), "last": batch[-1].astype(int)}

    note: dict[str, Any] = {}

    def rule(signal: cx.Signal, state: Any, params: Any, **_: Any) -> Any:
        note["signal"] = signal
        return signal, state

    tx = cx.per_group(2, cx.sam_perturb(0.3), sequential=sequential)
    tx, w = tx | cx.stage(lambda params: (), rule), jnp.array(2.0)
    last = lambda path: "last" if path == ("last",) else None
    value_fn = cx.Objective(with_aux, jnp.arange(8.0), has_aux=True, reduce_aux=last)
    tx.update(w, tx.init(w), w, value_fn=value_fn)
    assert_trees_close(note["signal"].value, jnp.array(7.0))
    assert_trees_close(note["signal"].perturbed_value, jnp.array(2.3 * 3.5))
    assert_trees_close(note["signal"].aux, {"mean": jnp.array(3.5), "last": jnp.array(7)})


def test_groups_have_their_own_dropout_keys():
    def dropped(w: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.mean(batch * (w * jax.random.uniform(key, (), w.dtype)) ** 2)

    w, batch = jnp.array(1.0), jnp.ones(4)
    value_fn = cx.Objective(dropped, batch, key=jax.random.key(9))
    tx = cx.per_group(1, optax.identity())
    updates, _ = tx.update(w, tx.init(w), w, value_fn=value_fn)
    keys = [jax.random.fold_in(jax.random.key(9), i) for i in range(4)]
    expected = np.mean([2 * float(jax.random.uniform(key, (), w.dtype)) ** 2 for key in keys])
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_groups_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"3 does not divide its 8 "):
        step(cx.per_group(3, cx.sam_perturb(0.3)))
    with pytest.raises(ValueError, match=r"`m` as a positive integer"):
        cx.per_group(0, cx.sam_perturb(0.3))
