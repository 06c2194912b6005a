"""Divergences between predictions: recorded ones, sums over all labels, and their Fisher form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, every_label, hard_targets, log_likelihood
from jax.sharding import PartitionSpec as P
from recorded_curvature import read
from small_problems import EXAMPLES, flat, net, net_batch, net_params
from trajectories import recorded

import curvax as cx
from curvax.analysis import fisher_kl

every_family = pytest.mark.parametrize("name", FAMILIES)


def objective_of(name, n=EXAMPLES, loss=None, **options):
    batch = dict(net_batch(n), y=hard_targets(name, n, 2))
    return cx.Objective(loss or FAMILIES[name]("y"), batch, model=net, **options)


def a_step(scale):
    """A step in a direction other than that of the parameters."""
    shifted = jax.tree.map(lambda x: jnp.sin(7 * x + jnp.arange(x.size).reshape(x.shape)), STEPS)
    return jax.tree.map(lambda x: scale * x, shifted)


STEPS = net_params()


def summed_over_labels(name, z, other):
    """Σ_y r(y|z) (log r(y|z) - log r(y|other)) of each example, [n]."""
    labels, weights = every_label(name, z)
    gain = lambda y: log_likelihood(name, z, y) - log_likelihood(name, other, y)
    return jnp.sum(weights * jax.vmap(gain)(labels), axis=0)


@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_divergences_are_the_recorded_ones(path):
    run = read(path)
    scales, objective = run.arrays["kl/scales"], run.objective()
    for i, direction in enumerate(jnp.asarray(run.arrays["kl/dirs"])):
        for j, scale in enumerate(scales):
            step = run.problem.unflatten(scale * direction)
            found = fisher_kl(objective, run.params, step)
            for way in ("forward", "reverse"):
                expected = run.arrays[f"kl/{way}"][i, j]
                # The recorded numbers are differences of losses too.
                np.testing.assert_allclose(getattr(found, way), expected, rtol=1e-9, atol=1e-15)
            form = run.arrays["kl/half_dFd"][i, j]
            np.testing.assert_allclose(found.quadratic, form, rtol=1e-10)


@every_family
def test_divergences_are_sums_over_all_labels(name):
    params, step = net_params(), a_step(0.2)
    z, other = (net(p, net_batch()) for p in (params, jax.tree.map(jnp.add, params, step)))
    found = fisher_kl(objective_of(name), params, step)
    forward, reverse = summed_over_labels(name, z, other), summed_over_labels(name, other, z)
    np.testing.assert_allclose(found.forward, jnp.mean(forward), rtol=1e-10)
    np.testing.assert_allclose(found.reverse, jnp.mean(reverse), rtol=1e-10)


@every_family
def test_divergences_agree_with_the_fisher_form_to_third_order(name):
    errors = []
    for scale in (1e-2, 1e-3):
        found = fisher_kl(objective_of(name), net_params(), a_step(scale))
        errors.append(np.abs([found.forward - found.quadratic, found.reverse - found.quadratic]))
    assert np.all(np.log10(errors[0] / errors[1]) > 2.95)


def test_divergences_of_a_linear_gaussian_model_equal_the_fisher_form():
    model = lambda params, batch: batch["x"] @ params["w"]
    objective = cx.Objective(cx.gaussian("y"), net_batch(), model=model)
    step = {"w": jnp.arange(8.0).reshape(4, 2)}
    found = fisher_kl(objective, {"w": jnp.ones((4, 2))}, step)
    moved = net_batch()["x"] @ step["w"]
    expected = 0.5 * np.mean(np.sum(np.asarray(moved) ** 2, axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}])
def test_masked_examples_do_not_count(options):
    mask = jnp.arange(EXAMPLES) % 3 > 0
    batch = dict(net_batch(), y=hard_targets("categorical", EXAMPLES, 2), mask=mask)
    batch["x"] = jnp.where(mask[:, None], batch["x"], 1e3)
    kept = jax.tree.map(lambda x: x[mask], batch)
    objective = lambda batch, **options: cx.Objective(
        cx.categorical("y", mask="mask"), batch, model=net, **options
    )
    found = fisher_kl(objective(batch, **options), net_params(), a_step(0.3))
    expected = fisher_kl(objective(kept), net_params(), a_step(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_divergences_over_devices_are_those_of_the_whole_batch():
    objective = objective_of("categorical", 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = lambda params, step, batch: fisher_kl(objective.on(batch), params, step, mean_over="data")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    found = jax.jit(mapped)(net_params(), a_step(0.3), objective.batch)
    expected = fisher_kl(objective, net_params(), a_step(0.3))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)


def test_loss_without_a_likelihood_is_refused():
    objective = objective_of("gaussian", loss=lambda z, batch: jnp.mean((z - batch["y"]) ** 2))
    with pytest.raises(ValueError, match="callable that does not define a distribution of labels"):
        fisher_kl(objective, net_params(), a_step(0.1))
