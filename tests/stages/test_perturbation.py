"""`sam_perturb` against naive loops of ascent steps and autodiff through the perturbation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_problem import GRADIENT, IS_BIAS, PARAMS, WEIGHTS, loss, objective, step
from small_problems import assert_trees_close, flat, quick_jit

import curvax as cx

# Several steps, and derivatives through all of them.


def in_jax(g: Any, p: float) -> jax.Array:
    q = p / (p - 1)
    return jnp.sign(g) * jnp.abs(g) ** (q - 1) / jnp.sum(jnp.abs(g) ** q) ** (1 / p)


def ascended(
    weights: Any, rho: float, p: float = 2, steps: int = 1, *, adaptive: bool = False,
    projected: bool = True, step_size: float | None = None,
) -> jax.Array:  # fmt: skip
    """θ + ε̂ by a loop over steps: the first of length ρ, later ones shorter, pulled back."""
    t = jnp.where(IS_BIAS, 1.0, jnp.abs(weights) + 0.01) if adaptive else jnp.ones(weights.size)
    epsilon = rho * in_jax(t * jax.grad(loss)(weights), p)
    for _ in range(steps - 1):
        g = jax.grad(loss)(weights + t * epsilon)
        epsilon += (rho / steps if step_size is None else step_size) * in_jax(t * g, p)
        length = jnp.sum(jnp.abs(epsilon) ** p) ** (1 / p)
        epsilon = jnp.where(projected & (length > rho), rho / length, 1.0) * epsilon
    return weights + t * epsilon


ASCENTS: dict[str, dict[str, Any]] = {
    "p=2": {},
    "p=3": {"p": 3},
    "ASAM": {"adaptive": True},
    "p=2, 3 steps": {"steps": 3},
    "p=3, 3 steps": {"p": 3, "steps": 3},
    "ASAM, 3 steps": {"adaptive": True, "steps": 3},
    "short steps": {"steps": 3, "step_size": 0.05},
    "free steps": {"steps": 3, "projected": False},
    "free steps of a length": {"steps": 2, "projected": False, "step_size": 0.05},
}


def stage_of(ascent_options: dict[str, Any], **more: Any) -> cx.Stage:
    options = {**ascent_options, **more}
    if options.pop("adaptive", False):
        options["ascent"] = cx.asam(0.01)
    return cx.sam_perturb(0.3, **options)


@pytest.fixture(scope="module", params=ASCENTS)
def ascent_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ASCENTS[request.param]


def test_several_ascent_steps_are_the_loop(ascent_options):
    naive = quick_jit(lambda w: jax.grad(loss)(ascended(w, 0.3, **ascent_options)))
    updates, _ = quick_jit(lambda p: step(stage_of(ascent_options), params=p))(PARAMS)
    np.testing.assert_allclose(flat(updates), naive(WEIGHTS), rtol=1e-11, atol=1e-13)


def test_second_order_is_autodiff_through_the_perturbation(ascent_options):
    naive = quick_jit(jax.grad(lambda w: loss(ascended(w, 0.3, **ascent_options))))
    tx = stage_of(ascent_options, second_order=True)
    updates, _ = quick_jit(lambda p: step(tx, params=p))(PARAMS)
    # The two sum the same terms in another order.
    np.testing.assert_allclose(flat(updates), naive(WEIGHTS), rtol=1e-12, atol=1e-13)


def test_second_order_records_the_first_order_gradient_norm():
    _, first = step(cx.sam_perturb(0.3))
    updates, second = step(cx.sam_perturb(0.3, second_order=True))
    assert_trees_close(cx.diagnostics(second), cx.diagnostics(first), tol=1e-6)
    norm = float(cx.diagnostics(second)["perturbed_gradient_norm"])
    assert abs(np.linalg.norm(flat(updates)) - norm) > 1e-3


def test_projected_ascent_stays_in_the_ball():
    def farthest(**options: Any) -> float:
        return float(np.linalg.norm(ascended(WEIGHTS, 0.3, steps=3, **options) - WEIGHTS))

    assert farthest() <= 0.3 + 1e-12
    assert farthest(projected=False) > 0.35


# Some steps only.


def test_sam_every_two_steps_is_clean_in_between():
    tx = cx.sam_perturb(0.3, every=2) | cx.record(
        perturbed=lambda signal, params: signal.perturbed,
        value_p=lambda signal, params: signal.perturbed_value,
    )
    state, perturbed = tx.init(PARAMS), step(cx.sam_perturb(0.3))[0]
    for t in range(4):
        updates, state = step(tx, state)
        found = cx.diagnostics(state)
        if t % 2 == 0:
            assert_trees_close(updates, perturbed)
            measured = {
                name: x for name, x in found.items() if name not in ("perturbed", "value_p")
            }
        else:
            np.testing.assert_array_equal(flat(updates), GRADIENT)
            assert np.isnan(found["value_p"])
            assert all(found[name] == x for name, x in measured.items())
        assert found["perturbed"] == (t % 2 == 0)


def test_surrogate_gap_is_nan_where_the_loss_is_unknown():
    tx = cx.sam_perturb(0.3)
    grads = jax.grad(objective())(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    with pytest.warns(UserWarning, match="`surrogate_gap`.*`value=value`.*Objective"):
        found = cx.diagnostics(state)
    unknown = {name for name, x in found.items() if np.isnan(x)}
    assert unknown == {"loss", "surrogate_gap", "sigma_max"}
    assert np.isnan(cx.diagnostics(state)["loss"])  # without a second warning
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective(), value=2.0)
    assert cx.diagnostics(state)["loss"] == 2.0


def test_estimator_before_sam_supplies_the_loss():
    tx = cx.hutchinson_diag() | cx.sam_perturb(0.3)
    _, state = tx.update(
        jax.grad(objective())(PARAMS), tx.init(PARAMS), PARAMS, value_fn=objective()
    )
    np.testing.assert_allclose(cx.diagnostics(state)["loss"], loss(WEIGHTS), rtol=1e-6)


def test_random_ascent_draws_at_each_of_its_steps():
    """Three unprojected steps of the same direction would be 1 + 2/3 of one step's length."""
    w = jnp.zeros(64)
    offset = lambda p: 0.5 * jnp.sum(p**2)  # its gradient at a point is the point
    tx = cx.sam_perturb(1.0, steps=3, projected=False, ascent=cx.random_direction(1))
    found, _ = tx.update(w, tx.init(w), w, value_fn=offset)
    same = 1 + 2 / 3
    independent = np.sqrt(1 + 2 / 9)
    length = float(jnp.linalg.norm(found))
    assert abs(length - independent) < 0.25 * (same - independent) + 0.2
    assert length < same - 0.1


# Errors.

PREFIX = r"must be a prefix of the parameters"
REFUSED = {
    "no norm": (lambda: cx.sam_perturb(0.1, p=0.5), r"p in \[1, ∞\], and p was 0\.5"),
    "no norm of a rule": (lambda: cx.dual_norm(0.5), r"p in \[1, ∞\]"),
    "a negative radius": (lambda: cx.sam_perturb(-0.1), r"`rho` in \[0"),
    "no steps": (lambda: cx.sam_perturb(0.1, steps=0), r"`steps` as a positive integer"),
    "every no step": (lambda: cx.sam_perturb(0.1, every=0), r"`every` as a positive integer"),
    "a negative eta": (lambda: cx.asam(-1.0), "eta=-1"),
    "an unknown side": (
        lambda: cx.gsam_project(0.1, onto="both"), "'perturbed' or 'clean', and got 'both'"
    ),
    "a rule that is none": (
        lambda: cx.sam_perturb(0.1, ascent="asam").init(PARAMS), r"`dual_norm\(2\)` or `asam"
    ),
    "a rule without parentheses": (
        lambda: cx.sam_perturb(0.1, ascent=cx.asam_all).init(PARAMS), "asam_all"
    ),
    "several norms": (
        lambda: cx.sam_perturb(
            0.1, ascent={"hidden": cx.dual_norm(1), "out": cx.dual_norm(2)}
        ).init(PARAMS),
        r"p in \[1, 2\]\. Give them the same p",
    ),
    "rules for other parameters": (
        lambda: cx.sam_perturb(0.1, ascent={"body": cx.asam()}).init(PARAMS), PREFIX
    ),
    "a mask for other parameters": (
        lambda: cx.sam_perturb(0.1, mask={"body": True}).init(PARAMS), PREFIX
    ),
    "radii for other parameters": (lambda: step(cx.sam_perturb({"body": 0.1})), PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_sam_errors_say_what_is_wrong(wrong):
    act, message = REFUSED[wrong]
    with pytest.raises((TypeError, ValueError), match=message):
        act()
