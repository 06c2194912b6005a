"""SAM's perturbation against the formulas of its norms, radii and masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sam_problem import GRADIENT, IS_BIAS, PARAMS, WEIGHTS, loss, step, unravel
from small_problems import assert_trees_close, flat, quick_jit

import curvax as cx

IN_HIDDEN = (
    flat(jax.tree.map_with_path(lambda path, x: 0 * x + ("hidden" in str(path)), PARAMS)) == 1
)


def perturbation(rho: Any, state: Any = None, grads: Any = None, **options: Any) -> np.ndarray:
    """ε̂, flat: at θ + ε̂ the loss ½‖· - θ‖² has the gradient ε̂, to the rounding of θ + ε̂."""
    square = lambda x, y: jnp.sum((x - y) ** 2)
    distance = lambda p: sum(jax.tree.leaves(jax.tree.map(square, p, PARAMS))) / 2
    tx = cx.sam_perturb(rho, **options)
    state = tx.init(PARAMS) if state is None else state
    grads = unravel(jnp.asarray(GRADIENT)) if grads is None else grads
    return flat(tx.update(grads, state, PARAMS, value_fn=distance)[0])


# Directions.


def direct_formula(g: np.ndarray, p: float) -> np.ndarray:
    """sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p), and its limits."""
    if p == 1:
        return np.sign(g) * (np.arange(g.size) == np.argmax(np.abs(g)))
    if p == np.inf:
        return np.sign(g)
    q = p / (p - 1)
    return np.sign(g) * np.abs(g) ** (q - 1) / (np.abs(g) ** q).sum() ** (1 / p)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_perturbation_is_the_formula_of_its_dual_norm(p):
    found = perturbation(0.3, p=p)
    np.testing.assert_allclose(found, 0.3 * direct_formula(GRADIENT, p), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(found, p), 0.3, rtol=1e-12)
    np.testing.assert_allclose(
        perturbation(0.3, ascent=cx.dual_norm(p)), found, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_perturbation_is_the_steepest_of_the_ball(p):
    found = GRADIENT @ perturbation(0.3, p=p)
    others = np.random.default_rng(0).normal(size=(1000, GRADIENT.size))
    others *= 0.3 / np.linalg.norm(others, p, axis=1, keepdims=True)
    assert np.all(others @ GRADIENT < found)


def test_one_norm_moves_one_weight_where_several_are_largest():
    grads = {"a": jnp.array([2.0, -2.0]), "b": jnp.array([2.0])}
    tx = cx.sam_perturb(0.3, p=1)
    distance = lambda p: (jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)) / 2
    zeros = jax.tree.map(jnp.zeros_like, grads)
    moved, _ = tx.update(grads, tx.init(zeros), zeros, value_fn=distance)
    assert_trees_close(moved, {"a": jnp.array([0.3, 0.0]), "b": jnp.zeros(1)}, tol=1e-15)


SCALINGS = {
    "asam": (cx.asam(0.01), np.where(IS_BIAS, 1.0, np.abs(WEIGHTS) + 0.01)),
    "asam_all": (cx.asam_all(), np.abs(WEIGHTS)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_adaptive_perturbation_is_its_formula(name):
    ascent, t = SCALINGS[name]
    expected = 0.3 * t**2 * GRADIENT / np.linalg.norm(t * GRADIENT)
    np.testing.assert_allclose(perturbation(0.3, ascent=ascent), expected, rtol=1e-12, atol=1e-15)


def test_weight_scaled_normalises_without_the_weights():
    expected = 0.3 * np.abs(WEIGHTS) * GRADIENT / np.linalg.norm(GRADIENT)
    found = perturbation(0.3, ascent=cx.weight_scaled())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_adaptive_perturbation_in_the_maximum_norm_is_its_formula():
    t = SCALINGS["asam"][1]
    expected = 0.3 * t * direct_formula(t * GRADIENT, np.inf)
    found = perturbation(0.3, ascent=cx.asam(0.01), p=np.inf)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_random_direction_ignores_the_gradient():
    ascent = cx.random_direction(4)
    found = perturbation(0.3, ascent=ascent)
    elsewhere = unravel(jnp.cos(WEIGHTS))
    np.testing.assert_array_equal(found, perturbation(0.3, ascent=ascent, grads=elsewhere))
    np.testing.assert_allclose(np.linalg.norm(found), 0.3, rtol=1e-12)
    assert abs(found @ GRADIENT) < 0.3 * np.linalg.norm(GRADIENT)
    assert np.abs(found - perturbation(0.3, ascent=cx.random_direction(5))).max() > 1e-3


def test_random_direction_is_drawn_for_each_step_and_leaf():
    tx = cx.sam_perturb(0.3, ascent=cx.random_direction(4))
    _, state = step(tx)
    first, second = (perturbation(0.3, s, ascent=cx.random_direction(4)) for s in (None, state))
    assert np.abs(first - second).max() > 1e-3
    parts = unravel(jnp.asarray(first))
    assert np.abs(flat(parts["hidden"])[:3] - flat(parts["out"])[:3]).max() > 1e-3


# Options of the radius, groups of leaves, masks.


def by_layer(hidden: float, out: float) -> np.ndarray:
    return np.where(IN_HIDDEN, hidden, out) * GRADIENT / np.linalg.norm(GRADIENT)


RADII = {
    "number": (0.3, by_layer(0.3, 0.3)),
    "tree prefix": ({"hidden": 0.1, "out": 0.3}, by_layer(0.1, 0.3)),
    "function of the path": (
        cx.by_path(lambda names: 0.1 if "hidden" in names else 0.3),
        by_layer(0.1, 0.3),
    ),
    "callable of a path": (lambda path: 0.1 if "hidden" in path else 0.3, by_layer(0.1, 0.3)),
    "schedules by path": (
        cx.by_path(lambda names: lambda count: 0.1 * (1 + count) if "hidden" in names else 0.3),
        by_layer(0.1, 0.3),
    ),
    "schedule": (lambda count: 0.3 / (1 + count), by_layer(0.3, 0.3)),
    "Optax's schedule": (optax.linear_schedule(0.3, 0.0, 2), by_layer(0.3, 0.3)),
    "schedules by layer": (
        {"hidden": optax.constant_schedule(0.1), "out": lambda count: 0.3 - 0.1 * count},
        by_layer(0.1, 0.3),
    ),
}


@pytest.mark.parametrize("form", RADII)
def test_radius_can_be_a_number_a_tree_or_a_function_of_the_path(form):
    rho, expected = RADII[form]
    # Optax's schedules compute in float32.
    np.testing.assert_allclose(perturbation(rho), expected, rtol=1e-6)


def test_radius_follows_its_schedule():
    rho = lambda count: jnp.where(count == 0, 0.3, 0.1)
    _, state = step(cx.sam_perturb(rho))
    np.testing.assert_allclose(perturbation(rho), by_layer(0.3, 0.3), rtol=1e-12)
    np.testing.assert_allclose(perturbation(rho, state), by_layer(0.1, 0.1), rtol=1e-12)


def test_radius_can_be_traced():
    run = quick_jit(lambda rho: step(cx.sam_perturb(rho, steps=2))[0])
    assert_trees_close(run(0.3), step(cx.sam_perturb(0.3, steps=2))[0])


@pytest.mark.parametrize(
    "ascent",
    [
        {"hidden": cx.asam(0.01), "out": cx.dual_norm(2)},
        lambda path: cx.asam(0.01) if path[0] == "hidden" else cx.dual_norm(2),
    ],
    ids=["tree prefix", "callable on the path"],
)
def test_parameter_groups_have_their_own_scaling_under_one_norm(ascent):
    t = np.where(IN_HIDDEN, SCALINGS["asam"][1], 1.0)
    expected = 0.3 * t**2 * GRADIENT / np.linalg.norm(t * GRADIENT)
    np.testing.assert_allclose(perturbation(0.3, ascent=ascent), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "mask",
    [
        {"hidden": True, "out": False},
        lambda params: jax.tree.map_with_path(lambda path, x: "hidden" in str(path), params),
    ],
    ids=["tree prefix", "callable"],
)
def test_masked_leaves_stay_and_do_not_enter_the_norm(mask):
    masked = np.where(IN_HIDDEN, GRADIENT, 0.0)
    expected = 0.3 * masked / np.linalg.norm(masked)
    np.testing.assert_allclose(perturbation(0.3, mask=mask), expected, rtol=1e-12)
    drawn = perturbation(0.3, mask=mask, ascent=cx.random_direction(1))
    assert not drawn[~IN_HIDDEN].any()
    np.testing.assert_allclose(np.linalg.norm(drawn), 0.3, rtol=1e-12)
    # Their gradient is the perturbed one all the same.
    updates, _ = step(cx.sam_perturb(0.3, mask=mask))
    np.testing.assert_allclose(flat(updates), jax.grad(loss)(WEIGHTS + expected), rtol=1e-11)
