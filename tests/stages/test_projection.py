"""GSAM's projection and the penalty of the gap against formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sam_problem import GRADIENT, WEIGHTS, loss, step
from small_problems import flat

import curvax as cx


@pytest.mark.parametrize("project", [cx.gsam_project(0.4), cx.penalize_gap(0.4)])
def test_projections_pass_the_clean_gradient_of_skipped_steps(project):
    tx = cx.sam_perturb(0.3, every=2) | project
    _, state = step(tx)
    updates, _ = step(tx, state)
    np.testing.assert_array_equal(flat(updates), GRADIENT)


@pytest.fixture(scope="module")
def perturbed_gradient() -> np.ndarray:
    return np.asarray(jax.grad(loss)(WEIGHTS + 0.3 * GRADIENT / np.linalg.norm(GRADIENT)))


def orthogonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit = b / np.linalg.norm(b)
    return a - (a @ unit) * unit


def test_gsam_reduces_the_gap_with_the_perturbed_loss(perturbed_gradient):
    updates, _ = step(cx.sam_perturb(0.3) | cx.gsam_project(0.4))
    expected = perturbed_gradient - 0.4 * orthogonal(GRADIENT, perturbed_gradient)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_gsam_onto_the_clean_loss_is_its_formula(perturbed_gradient):
    updates, _ = step(cx.sam_perturb(0.3) | cx.gsam_project(0.4, onto="clean"))
    expected = GRADIENT + 0.4 * orthogonal(perturbed_gradient, GRADIENT)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_alpha_follows_its_schedule(perturbed_gradient):
    tx = cx.sam_perturb(0.3) | cx.gsam_project(lambda count: 0.4 * count)
    first, state = step(tx)
    second, _ = step(tx, state)
    np.testing.assert_allclose(flat(first), perturbed_gradient, rtol=1e-12)
    expected = perturbed_gradient - 0.4 * orthogonal(GRADIENT, perturbed_gradient)
    np.testing.assert_allclose(flat(second), expected, rtol=1e-11, atol=1e-13)


def test_penalty_is_the_gradient_of_the_penalised_loss():
    epsilon = 0.3 * GRADIENT / np.linalg.norm(GRADIENT)

    def penalised(w: Any) -> jax.Array:
        gap = loss(w + epsilon) - loss(w)
        return loss(w + epsilon) + 0.7 * gap

    updates, _ = step(cx.sam_perturb(0.3) | cx.penalize_gap(0.7))
    np.testing.assert_allclose(flat(updates), jax.grad(penalised)(WEIGHTS), rtol=1e-11, atol=1e-13)


# Diagnostics.


def test_sam_diagnostics_are_what_their_names_say(perturbed_gradient):
    _, state = step(cx.gsam(optax.adam(0.1), 0.3, 0.4))
    epsilon = 0.3 * GRADIENT / np.linalg.norm(GRADIENT)
    gap = loss(WEIGHTS + epsilon) - loss(WEIGHTS)
    norm, norm_p = np.linalg.norm(GRADIENT), np.linalg.norm(perturbed_gradient)
    expected = {
        "loss": loss(WEIGHTS),
        "perturbed_loss": loss(WEIGHTS + epsilon),
        "surrogate_gap": gap,
        "sigma_max": 2 * gap / 0.3**2,
        "cosine": GRADIENT @ perturbed_gradient / (norm * norm_p),
        "rho": 0.3,
        "gradient_norm": norm,
        "perturbed_gradient_norm": norm_p,
    }
    found = cx.diagnostics(state)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
