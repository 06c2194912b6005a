"""Exact zeros and NaNs: derivatives through a step stay finite, averages leave NaN out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import net_params, quick_jit

import curvax as cx
from curvax.arithmetic import safe_math

X = jax.random.normal(jax.random.key(0), (8, 4))
Y = jax.random.normal(jax.random.key(1), (8, 2))
CLASSES = jnp.arange(8) % 2


def dead_params() -> Any:
    """The third hidden unit is dead for every example, and one weight is exactly 0."""
    params = net_params()
    params["hidden"]["bias"] = jnp.array([0.0, 0.0, -100.0])
    params["out"]["kernel"] = params["out"]["kernel"].at[0, 0].set(0.0)
    return params


def relu_net(params: Any, batch: Any) -> jax.Array:
    hidden = batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    return jax.nn.relu(hidden) @ params["out"]["kernel"]


def saturated(params: Any, batch: Any) -> jax.Array:
    """Logits so far apart that probabilities are exactly 0."""
    return 1e4 * relu_net(params, batch)


GAUSSIAN = cx.Objective(cx.gaussian("y"), {"x": X, "y": Y}, model=relu_net)
CATEGORICAL = cx.Objective(cx.categorical("c"), {"x": X, "c": CLASSES}, model=saturated)

PIPES = {
    "sam": lambda h: cx.sam_perturb(h),
    "sam, p = 3": lambda h: cx.sam_perturb(h, p=3),
    "asam": lambda h: cx.sam_perturb(h, ascent=cx.asam_all()),
    "gsam": lambda h: cx.sam_perturb(0.1) | cx.gsam_project(h),
    "power": lambda h: cx.hutchinson_diag() | cx.ema_rms(0.9) | cx.scale_by_power(h),
    "decay": lambda h: cx.hutchinson_diag(probes=2) | cx.ema_rms(h) | cx.scale_by_power(0.5),
    "no eps": lambda h: cx.squared_gradient() | cx.ema_rms(h) | cx.scale_by_power(0.5, eps=0.0),
    "tiny eps": lambda h: (
        cx.squared_gradient() | cx.accumulate() | cx.scale_by_power(h, eps=1e-200)
    ),
    "sophia": lambda h: (
        cx.gauss_newton_diag() | cx.ema_mean(0.9) | cx.clip_by_diagonal(h, eps=1e-200)
    ),
    "trust region": lambda h: cx.gauss_newton_matvec() | cx.trust_region(h),
}


def after_a_step(make: Any, objective: cx.Objective, zero: bool) -> Any:
    def trained(h: jax.Array, params: Any) -> jax.Array:
        tx = make(h)
        value, gradient = jax.value_and_grad(objective)(params)
        gradient = jax.tree.map(lambda g: 0 * g if zero else g, gradient)
        updates, _ = tx.update(gradient, tx.init(params), params, value_fn=objective, value=value)
        return objective(optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates)))

    return quick_jit(jax.value_and_grad(trained, (0, 1)))(jnp.array(0.3), dead_params())


@pytest.mark.parametrize("name", PIPES)
def test_derivatives_through_a_step_with_a_dead_unit_are_finite(name):
    for found in jax.tree.leaves(after_a_step(PIPES[name], GAUSSIAN, zero=False)):
        assert np.all(np.isfinite(found))


@pytest.mark.parametrize("name", ["gsam", "power", "trust region"])
def test_derivatives_through_a_step_with_zero_gradient_are_finite(name):
    for found in jax.tree.leaves(after_a_step(PIPES[name], GAUSSIAN, zero=True)):
        assert np.all(np.isfinite(found))


def test_derivatives_through_roots_of_zero_probabilities_are_finite():
    for found in jax.tree.leaves(after_a_step(PIPES["sophia"], CATEGORICAL, zero=False)):
        assert np.all(np.isfinite(found))


def test_derivative_through_a_step_is_that_of_finite_differences():
    trained = lambda h: after_a_step_at(h)
    found = jax.grad(trained)(0.3)
    step = 1e-6
    expected = (trained(0.3 + step) - trained(0.3 - step)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def after_a_step_at(power: Any) -> jax.Array:
    tx = cx.squared_gradient() | cx.accumulate() | cx.scale_by_power(power)
    params = jnp.array([0.5, 0.0, -2.0])
    updates, _ = tx.update(2 * params, tx.init(params), params)
    return jnp.sum((params - 0.1 * updates) ** 2)


def test_safe_math_at_zero_has_finite_values_and_derivatives():
    value = lambda f, *x: (f(*x), *jax.grad(f, tuple(range(len(x))))(*map(jnp.asarray, x)))
    np.testing.assert_allclose(value(safe_math.root, 0.0), (0, 0))
    np.testing.assert_allclose(value(safe_math.root, 4.0), (2, 0.25))
    np.testing.assert_allclose(value(safe_math.power, 0.0, 0.5), (0, 0, 0))
    np.testing.assert_allclose(value(safe_math.power, 0.0, 1.0), (0, 1, 0))
    np.testing.assert_allclose(value(safe_math.power, 0.0, 0.0), (1, 0, 0))
    np.testing.assert_allclose(value(safe_math.power, 4.0, 0.5), (2, 0.25, 2 * np.log(4)))
    np.testing.assert_allclose(value(safe_math.quotient, 0.0, 1e-200), (0, 1e200, 0))
    np.testing.assert_allclose(value(safe_math.quotient, 3.0, 2.0), (1.5, 0.5, -0.75))
    np.testing.assert_allclose(value(safe_math.ratio, 3.0, 0.0), (0, 0, 0))


# Averages that survive a NaN or infinity in one step.

HUGE, BETA = 1e200, 0.9


def averaged(stage: Any, diagonals: list[Any]) -> tuple[list[np.ndarray], Any]:
    """(the average handed on at each step, the last state)"""
    state, shown = stage.init(jnp.zeros(3)), []
    for d in diagonals:
        signal, state = stage.update(cx.Signal(jnp.ones(3), diagonal=jnp.asarray(d)), state)
        shown.append(np.asarray(signal.diagonal))
    return shown, state


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [cx.ema_rms, cx.ema_mean])
def test_averages_leave_out_nan_and_infinity(make, wrong):
    good = [3.0, 4.0, 5.0]
    clean, _ = averaged(make(BETA), [good, good, good])
    shown, state = averaged(make(BETA), [good, [3.0, wrong, 5.0], good])
    assert np.isnan(shown[1][1])
    np.testing.assert_allclose(shown[1][[0, 2]], clean[1][[0, 2]])
    np.testing.assert_allclose(shown[2], clean[2])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_delayed_average_shows_nan_and_recovers():
    shown, state = averaged(cx.ema_mean(BETA, lag=1), [[3.0] * 3, [np.nan, 3.0, 3.0], [3.0] * 3])
    assert np.isnan(shown[1]).tolist() == [True, False, False]
    np.testing.assert_allclose(shown[2], 3.0)
    np.testing.assert_allclose(state.mean / state.weight, 3.0)


def test_ema_rms_clips_a_square_that_overflows():
    shown, state = averaged(cx.ema_rms(BETA), [[HUGE, 1.0, 1.0], [1.0] * 3])
    root = np.sqrt(np.finfo(float).max)
    np.testing.assert_allclose(shown[0], [root, 1, 1])
    weights = np.array([BETA, 1]) * (1 - BETA) / (1 - BETA**2)
    np.testing.assert_allclose(shown[1], [root * weights[0] ** 0.5, 1, 1])
    assert np.all(np.isfinite(state.mean_square))


def test_accumulate_leaves_out_nan_and_infinity():
    shown, state = averaged(cx.accumulate(), [[1.0] * 3, [np.nan, np.inf, 1.0], [1.0] * 3])
    assert np.isnan(shown[1]).tolist() == [True, True, False]
    np.testing.assert_allclose(shown[2], [2, 2, 3])
    largest = np.finfo(float).max
    _, state = averaged(cx.accumulate(), [[largest, 1.0, 1.0]] * 2)
    np.testing.assert_allclose(state.total, [largest, 2, 2])


def test_every_keeps_the_last_finite_diagonal():
    given = iter([[1.0, 1, 1], [np.nan, 2, 2], [3.0, 3, 3]])
    made = lambda signal, state, params=None, **extra: (
        signal._replace(diagonal=jnp.asarray(next(given))), state
    )  # fmt: skip
    source = cx.stage(lambda params: (), made)
    tx, params = cx.every(2, source), jnp.zeros(3)
    shown, state = [], tx.init(params)
    with jax.disable_jit():
        for _ in range(6):
            signal = cx.Signal(params, params)
            signal, state = tx.update(signal, state, params, value_fn=jnp.sum)
            shown.append(np.asarray(signal.diagonal))
    np.testing.assert_array_equal(
        shown, [[1, 1, 1], [1, 1, 1], [np.nan, 2, 2], [1, 2, 2], [3, 3, 3], [3, 3, 3]]
    )


def test_quadratic_step_keeps_finite_momentum_after_nan():
    tx = cx.quadratic_step()
    params = jnp.ones(3)
    signal = cx.Signal(jnp.array([1.0, jnp.nan, 1.0]), params, matvec=lambda v: 2 * v)
    _, state = tx.update(signal, tx.init(params), params)
    assert np.all(np.isfinite(state.previous))
    out, _ = tx.update(signal._replace(updates=params), state, params)
    np.testing.assert_allclose(out.updates, 0.5)


# A backward pass that divides by the length of what comes back.


@jax.custom_vjp
def measured(z: jax.Array) -> jax.Array:
    return z


def _pull(_: None, g: jax.Array) -> tuple[jax.Array]:
    length = jnp.linalg.norm(g, axis=-1, keepdims=True)
    return (length * (g / length),)


measured.defvjp(lambda z: (z, None), _pull)


@pytest.mark.parametrize("loss", [cx.gaussian("y"), lambda z, b: jnp.sum((z - b["y"]) ** 2) / 16])
def test_gauss_newton_product_is_exact_through_a_normalised_cotangent(loss):
    batch, params = {"x": X, "y": Y}, {"w": jnp.ones((4, 2))}
    v = {"w": jax.random.normal(jax.random.key(5), (4, 2))}
    odd = cx.Objective(loss, batch, model=lambda p, b: measured(b["x"] @ p["w"]))
    plain = cx.Objective(loss, batch, model=lambda p, b: b["x"] @ p["w"])
    found, expected = cx.ggnvp(odd, params)(v)["w"], cx.ggnvp(plain, params)(v)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(expected, X.T @ X @ v["w"] / 8, rtol=1e-12)
