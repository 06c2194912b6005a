"""`fisher_ascent`: its length in the Fisher metric, its mask, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from labelled_net import batch_of, objective
from small_problems import assert_trees_close, flat, net, net_params

import curvax as cx


@pytest.mark.parametrize("solver", [cx.cg(100, tol=1e-13), cx.dense(), cx.row_space()])
def test_fisher_ascent_has_length_rho_in_the_fisher_metric(solver):
    params, value_fn, rho, lam = net_params(), objective("categorical"), 0.2, 0.05
    tx = cx.sam_perturb(rho, ascent=cx.fisher_ascent(lam, solver=solver))
    grads = value_fn.value_and_grad(params)[1]
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params)) + lam * np.eye(21)
    x = np.linalg.solve(matrix, flat(grads))
    epsilon = rho * x / np.sqrt(x @ matrix @ x)
    unravel = ravel_pytree(params)[1]
    expected = jax.grad(value_fn)(unravel(jnp.asarray(flat(params) + epsilon)))
    assert_trees_close(updates, expected, 1e-8)


def test_fisher_ascent_moves_predictions_by_a_divergence_of_half_rho_squared():
    """KL of unit Gaussians is ½ the mean squared distance of their means."""
    params, rho, value_fn = net_params(), 1e-3, objective("gaussian")
    metric = cx.fisher_ascent(1e-9, solver=cx.dense())
    grads = jax.grad(value_fn)(params)
    epsilon = metric.direction(value_fn, params, grads, lambda tree: tree, ())
    moved = jax.tree.map(lambda p, e: p + rho * e, params, epsilon)
    change = net(moved, batch_of()) - net(params, batch_of())
    assert 0.5 * float(jnp.mean(jnp.sum(change**2, axis=1))) == pytest.approx(
        0.5 * rho**2, rel=0.02
    )


def test_fisher_ascent_respects_the_mask():
    params, value_fn = net_params(), objective("categorical")
    tx = cx.sam_perturb(
        0.2,
        ascent=cx.fisher_ascent(0.05, solver=cx.dense()),
        mask={"hidden": True, "out": False},
    )
    grads = value_fn.value_and_grad(params)[1]
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params))
    size = flat(params["hidden"]).size
    block = matrix[:size, :size] + 0.05 * np.eye(size)
    x = np.linalg.solve(block, flat(grads["hidden"]))
    epsilon = np.zeros(21)
    epsilon[:size] = 0.2 * x / np.sqrt(x @ block @ x)
    unravel = ravel_pytree(params)[1]
    assert_trees_close(
        updates, jax.grad(value_fn)(unravel(jnp.asarray(flat(params) + epsilon))), 1e-8
    )


@pytest.mark.parametrize("options", [{"steps": 2}, {"second_order": True}])
def test_fisher_ascent_refuses_several_steps_and_second_order(options):
    with pytest.raises(ValueError, match="in one step of first order"):
        cx.sam_perturb(0.1, ascent=cx.fisher_ascent(), **options)


def test_fisher_ascent_of_a_zero_gradient_does_not_move():
    params, value_fn = net_params(), objective("gaussian")
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = cx.sam_perturb(0.2, ascent=cx.fisher_ascent()) | optax.sgd(1.0)
    updates, _ = tx.update(zeros, tx.init(params), params, value_fn=value_fn)
    at_rest = jax.tree.map(lambda g: -g, jax.grad(value_fn)(params))
    assert_trees_close(updates, at_rest, 1e-12)
