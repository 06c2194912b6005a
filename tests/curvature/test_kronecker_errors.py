"""What Kronecker factors refuse, and how they say so."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from kronecker_problems import normal, regression

import curvax as cx
from curvax.curvature.kronecker import kronecker_factors

PARAMS = {"w": normal(0, 3, 2)}
BATCH = {"x": normal(1, 4, 3)}


def linear(p: Any, batch: Any) -> jax.Array:
    return batch["x"] @ p["w"]


def objective() -> cx.Objective:
    return regression(linear, PARAMS, BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "monte-carlo"}, r"`kronecker_factors\(fisher=\)` is one of"),
        ({"sharing": "mean"}, r"`kronecker_factors\(sharing=\)` is one of"),
        ({"bias": "none"}, r"`kronecker_factors\(bias=\)` is one of"),
        ({"fisher": "sampled"}, r"takes either `labels` or a `key`.*received neither"),
        ({"key": jax.random.key(0)}, r"draws labels only with `fisher='sampled'`"),
        ({"fisher": "sampled", "labels": jnp.zeros((4, 3))}, r"`kronecker_factors\(labels=\)`"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kronecker_factors(objective(), PARAMS, **options)


def test_an_old_key_is_refused():
    with pytest.raises(TypeError, match=r"kronecker_factors\(key=\)"):
        kronecker_factors(objective(), PARAMS, fisher="sampled", key=jax.random.PRNGKey(0))


def test_a_loss_without_a_likelihood_has_only_empirical_factors():
    squared = lambda z, batch: jnp.mean(jnp.sum(jnp.square(z), axis=1))
    plain = cx.Objective(squared, BATCH, model=linear)
    with pytest.raises(ValueError, match=r"`kronecker_factors` with `fisher='exact'`"):
        kronecker_factors(plain, PARAMS)
    factors = kronecker_factors(plain, PARAMS, fisher="empirical")
    expected = kronecker_factors(objective(), PARAMS, fisher="empirical")
    assert jnp.allclose(factors.outputs[0], 4 * expected.outputs[0], rtol=1e-12)
    one = cx.Objective(lambda p, batch: jnp.mean(linear(p, batch)), BATCH)
    with pytest.raises(ValueError, match="needs the model and the loss of its outputs"):
        kronecker_factors(one, PARAMS, fisher="empirical")


def test_wrong_vectors_and_styles_are_refused():
    factors = kronecker_factors(objective(), PARAMS)
    with pytest.raises(ValueError, match="act on trees with the structure of the parameters"):
        factors({"w": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"`solve\(style=\)` is one of"):
        factors.solve(PARAMS, 0.1, "eigen")
    with pytest.raises(ValueError, match="Pass a positive"):
        factors.solve(PARAMS, 0.0, "heuristic")
    with pytest.raises(KeyError, match="has no Kronecker factors"):
        factors.factors_of("b")
    corrected = factors.corrected(objective(), PARAMS)
    with pytest.raises(ValueError, match="corrected eigenvalues have none"):
        corrected.solve(PARAMS, 0.1, "heuristic")


def test_one_example_and_dead_layers_give_finite_solutions():
    params = {"w": normal(0, 3, 2), "dead": jnp.zeros((2, 2)), "out": jnp.zeros((2, 1))}
    model = lambda p, batch: jax.nn.relu(batch["x"] @ p["w"]) @ p["dead"] @ p["out"]
    factors = kronecker_factors(regression(model, params, {"x": normal(1, 1, 3)}), params)
    for style in ("exact", "heuristic"):
        found = factors.solve(params, 1e-3, style)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
    assert jnp.allclose(factors.solve(params, 1e-3)["dead"], 1e3 * params["dead"])
    assert bool(jnp.all(jnp.isfinite(factors.solve(params, 0.0)["w"])))


def test_a_model_whose_parameters_reach_no_product_gets_a_diagonal():
    params = {"scale": normal(0, 3), "unused": normal(1, 2), "count": jnp.zeros((), int)}
    model = lambda p, batch: batch["x"] * p["scale"][None]
    factors = kronecker_factors(regression(model, params, BATCH), params)
    expected = jnp.mean(jnp.square(BATCH["x"]), axis=0)
    found = factors(params)
    assert jnp.allclose(found["scale"], expected * params["scale"], rtol=1e-12)
    assert not jnp.any(found["unused"])
    report = factors.report()
    assert [report[k].treatment for k in ("scale", "unused", "count")] == [
        "diagonal",
        "none",
        "none",
    ]


def test_factors_of_a_device_need_a_decision():
    own = lambda p, batch: kronecker_factors(regression(linear, PARAMS, batch), p).trace()
    split = {"x": BATCH["x"].reshape(2, 2, 3)}
    with pytest.raises(ValueError, match="no axis to average over was given"):
        jax.pmap(own, "batch", in_axes=(None, 0), devices=jax.devices()[:2])(PARAMS, split)
