"""Corner cases: donated buffers, zero weights, dropped values, options of wrong types."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx

WRONG: Any = 2.5
W = jnp.array([0.3, -0.7, 1.1])
X = jax.random.normal(jax.random.key(0), (8, 3))


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def step(tx, w, state, x=None):
    objective = cx.Objective(lambda p, x: loss(jax.tree.leaves(p)[0], x), X if x is None else x)
    updates, state = tx.update(objective.value_and_grad(w)[1], state, w, value_fn=objective)
    return optax.apply_updates(w, updates), state


@pytest.mark.parametrize(
    "tx",
    [
        cx.adahessian(0.1, key=jax.random.key(1)),
        cx.sam(optax.sgd(0.1), 0.1, ascent=cx.random_direction(3)),
    ],
)
def test_donating_the_state_keeps_the_key_of_the_transformation(tx):
    donating = jax.jit(lambda w, s: step(tx, w, s), donate_argnums=1)
    first, _ = donating(W, tx.init(W))
    again, _ = donating(W, tx.init(W))
    np.testing.assert_array_equal(first, again)


def masked(w, batch):
    total = jnp.sum(batch["m"])
    return jnp.sum(batch["m"] * jnp.tanh(batch["x"] @ w) ** 2) / total


MASKED = {"x": X, "m": jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])}


def test_microbatch_of_weight_zero_changes_nothing():
    whole = cx.Objective(masked, MASKED)
    pieces = cx.Objective(masked, MASKED, weight="m", microbatch=2)
    value, grads = whole.value_and_grad(W)
    found, found_grads = pieces.value_and_grad(W)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    np.testing.assert_allclose(found_grads, grads, rtol=1e-12)
    np.testing.assert_allclose(cx.hvp(pieces, W)(W), cx.hvp(whole, W)(W), rtol=1e-12)


@pytest.mark.parametrize("sequential", [False, True])
def test_group_of_weight_zero_changes_nothing(sequential):
    tx = cx.per_group(2, cx.sam_perturb(0.1), sequential=sequential)
    objective = cx.Objective(masked, MASKED, weight="m")
    _, grads = objective.value_and_grad(W)
    found, _ = tx.update(grads, tx.init(W), W, value_fn=objective)
    expected = 0
    for i in range(3):
        group = cx.Objective(masked, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], MASKED))
        _, g = group.value_and_grad(W)
        u, _ = cx.sam_perturb(0.1).update(g, cx.sam_perturb(0.1).init(W), W, value_fn=group)
        expected += group.batch["m"].sum() / 5 * u
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_clean_loss_is_recorded_where_the_caller_dropped_it(compiled):
    tx = cx.sam_perturb(0.1)

    def gap(w):
        objective = cx.Objective(loss, X)
        grads = objective.value_and_grad(w)[1]
        _, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        return cx.diagnostics(state)["loss"]

    np.testing.assert_allclose((jax.jit(gap) if compiled else gap)(W), loss(W, X), rtol=1e-6)


def test_cached_gradient_is_dropped_with_its_parameters():
    objective, params = cx.Objective(loss, X), W + 0
    with jax.checking_leaks():
        jax.jit(lambda w: objective.value_and_grad(w)[1])(W)
    for _ in range(9):
        _, grads = objective.value_and_grad(params)
    assert objective.cached_gradient(params, grads) is not None
    assert objective.cached_gradient(params, grads + 0) is None
    del grads
    gc.collect()
    assert objective.has_gradient_at(params)
    # Earlier records are dropped, except the last, whose gradient was alive in the next call.
    assert [record.value for record in objective.gradients.records] == [None, None]
    assert not objective.has_gradient_at(W)
    del params
    gc.collect()
    assert not objective.gradients.records


def test_b1_of_adahessian_follows_a_schedule():
    schedule = optax.linear_schedule(0.5, 0.9, 10)
    scheduled, state = W, cx.adahessian(0.1, schedule).init(W)
    tx = cx.adahessian(0.1, schedule)
    plain, fixed = W, cx.adahessian(0.1, 0.5)
    scheduled, state = step(tx, scheduled, state)
    plain, _ = step(fixed, plain, fixed.init(W))
    np.testing.assert_allclose(scheduled, plain, rtol=1e-6)
    assert np.isfinite(step(tx, scheduled, state)[0]).all()


def test_gsam_project_takes_a_signal_made_by_hand():
    g, g_p = jnp.array([1.0, 2.0, 0.0]), jnp.array([2.0, 0.0, 1.0])
    out, _ = cx.gsam_project(0.5).update(
        cx.Signal(g_p, gradient=g), cx.gsam_project(0.5).init(W), W
    )
    np.testing.assert_allclose(out.updates, g_p - 0.5 * (g - (g @ g_p) / (g_p @ g_p) * g_p))


def test_several_probes_run_on_explicitly_sharded_parameters():
    mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.arange(8.0) / 8, jax.NamedSharding(mesh, jax.P("b")))
        quadratic = lambda w: jnp.sum(w**3)
        objective = cx.Objective(quadratic)
        _, grads = objective.value_and_grad(w)
        tx = cx.hutchinson_diag(probes=2) | cx.stage(
            lambda p: (), lambda signal, state, params, **_: (
                signal._replace(updates=signal.diagonal), state
            ), name="diagonal as updates",
        )  # fmt: skip
        found, _ = tx.update(grads, tx.init(w), w, value_fn=objective)
        np.testing.assert_allclose(found, 6 * w, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cx.hutchinson_diag(probes=WRONG), "`probes` as a positive integer"),
        (lambda: cx.hutchinson_diag(sampler=WRONG), "sampler"),
        (lambda: cx.every(WRONG, cx.hutchinson_diag()), "`k` as a positive integer"),
        (lambda: cx.per_group(WRONG, cx.sam_perturb(0.1)), "`m` as a positive integer"),
        (lambda: cx.Objective(loss, X, microbatch=WRONG), "microbatch"),
        (lambda: cx.sam_perturb(np.float32(-0.1)), "`rho` in"),
        (lambda: cx.ema_rms(1.0), r"\[0, 1\)"),
        (lambda: cx.adahessian(0.1, b1=2), "`b1`"),
        (lambda: cx.sam_perturb(0.1, ascent=cx.asam).init(W), r"ascent=asam\(0.01\)"),
        (lambda: cx.every(2, cx.sam_perturb(0.1)) and step(
            cx.every(2, cx.sam_perturb(0.1)), W, cx.every(2, cx.sam_perturb(0.1)).init(W)
        ), "`every=` of its own"),
        (lambda: cx.sam(optax.sgd(0.1)).update(W, cx.sam(optax.sgd(0.1)).init(W)), "third"),
        (lambda: step(cx.sam_perturb((-0.1,)), (W,), cx.sam_perturb(0.1).init((W,))),
         "`rho` in"),
        (lambda: step(cx.per_group(3, cx.sam_perturb(0.1)), W, cx.sam_perturb(0.1).init(W)),
         r"per_group\(3"),
        (lambda: cx.restrict(cx.sam_perturb(0.1), {"b": True}).init({"a": W}), "prefix"),
        (lambda: cx.hvp(lambda w: jnp.sum(w**2), W)({"a": W}), "structure"),
    ],
)  # fmt: skip
def test_option_of_a_wrong_type_is_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


@pytest.mark.parametrize(
    ("rho", "words"),
    [
        (lambda path: {"a": 0.1}[path[0]], r"the path \('b',\).*KeyError"),
        (cx.by_path(lambda names: {"a": 0.1}[names[0]]), r"the path \('b',\).*KeyError"),
        (lambda names: {"a": 0.1}[names[0]], r"by_path\(f\).*the step"),
    ],
)
def test_failing_radius_says_which_path_or_step_it_was_called_with(rho, words):
    tx = cx.sam_perturb(rho)
    with pytest.raises(ValueError, match=words):
        tx.update({"b": W}, tx.init({"b": W}), {"b": W}, value_fn=lambda p: jnp.sum(p["b"] ** 2))
