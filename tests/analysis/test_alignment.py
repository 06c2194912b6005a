"""Angles between gradients, shares of a subspace, norms of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_problems import flat, net_batch, net_loss, net_params

import curvax as cx
from curvax.analysis import alignment, block_norms, gradient_angle, top_eigenpairs

MATRIX = np.diag([4.0, 1.0, 0.5]) + 0.3
POINT = {"w": jnp.array([1.0, -2.0, 0.5])}


def quadratic(params):
    return 0.5 * params["w"] @ MATRIX @ params["w"]


def test_gradient_angle_on_a_quadratic_is_its_formula():
    g = MATRIX @ np.asarray(POINT["w"])
    g_p = g + 0.5 * MATRIX @ g / np.linalg.norm(g)
    cosine = g @ g_p / np.linalg.norm(g) / np.linalg.norm(g_p)
    found = gradient_angle(quadratic, POINT, 0.5)
    assert float(found.cosine) == pytest.approx(cosine, rel=1e-12)
    assert float(found.angle) == pytest.approx(np.arccos(cosine), rel=1e-10)
    norms = (float(found.norm), float(found.perturbed_norm))
    assert norms == pytest.approx((np.linalg.norm(g), np.linalg.norm(g_p)))


def test_small_angle_is_not_rounded_to_zero():
    """On a quadratic the angle is proportional to ρ, for ρ → 0."""
    angles = [float(gradient_angle(quadratic, POINT, rho).angle) for rho in (1e-4, 1e-9)]
    assert angles[0] / angles[1] == pytest.approx(1e5, rel=1e-3)


def test_gradient_angle_has_the_cosine_that_sam_records():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    tx = cx.sam_perturb(0.3, steps=2)
    _, grads = objective.value_and_grad(params)
    _, state = tx.update(grads, tx.init(params), params, value_fn=objective)
    found = gradient_angle(objective, params, 0.3, steps=2)
    assert float(found.cosine) == pytest.approx(float(cx.diagnostics(state)["cosine"]), rel=1e-6)


def test_angle_to_a_zero_gradient_is_a_right_angle():
    found = gradient_angle(quadratic, {"w": jnp.zeros(3)}, 0.1)
    assert (float(found.angle), float(found.cosine)) == (np.pi / 2, 0)


def test_share_of_a_gradient_in_all_eigenvectors_is_one():
    _, vectors = np.linalg.eigh(MATRIX)
    g = {"w": jnp.asarray(MATRIX @ np.asarray(POINT["w"]))}
    pairs = top_eigenpairs(quadratic, POINT, 2)
    found = alignment(g, pairs.vectors)
    parts = vectors.T[::-1] @ np.asarray(g["w"]) / np.linalg.norm(g["w"])
    np.testing.assert_allclose(np.abs(found.cosines), np.abs(parts[:2]), rtol=1e-6)
    assert float(found.share) == pytest.approx(np.sum(parts[:2] ** 2), rel=1e-6)
    whole = alignment(g, [{"w": jnp.asarray(v)} for v in vectors.T])
    assert float(whole.share) == pytest.approx(1, rel=1e-12)
    assert float(alignment({"w": jnp.zeros(3)}, pairs.vectors).share) == 0
    with pytest.raises(ValueError, match="shaped like the parameters"):
        alignment(g, {"w": jnp.ones(2)})


def test_block_norms_are_norms_of_the_matching_leaves():
    params = net_params()
    found = block_norms(params, {"hidden": "hidden", "kernels": "*/kernel"})
    assert float(found["hidden"]) == pytest.approx(np.linalg.norm(flat(params["hidden"])))
    kernels = np.concatenate([flat(params[name]["kernel"]) for name in ("hidden", "out")])
    assert float(found["kernels"]) == pytest.approx(np.linalg.norm(kernels))
    traced = jax.jit(lambda p: block_norms(p)["out"])(params)
    assert float(traced) == pytest.approx(np.linalg.norm(flat(params["out"])))
