"""Diagonals of Gauss-Newton and Fisher matrices: exact values, bias, standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from labelled_net import LIKELIHOODS, objective
from small_problems import assert_trees_close, flat, net, net_params, quick_jit

import curvax as cx


def signal_of(tx, value_fn, params, state=None):
    """(signal, state) after one step, the signal itself instead of its updates."""
    _, grads = value_fn.value_and_grad(params)
    state = tx.init(params) if state is None else state
    return tx.update(cx.Signal(grads, grads), state, params, value_fn=value_fn)


def many(make, value_fn, params, draws=4000):
    """Diagonals of independent draws, [draws, P]."""

    def one(key):
        tx = make(key)
        return ravel_pytree(signal_of(tx, value_fn, params)[0].diagonal)[0]

    return np.asarray(quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(11), draws)))


ESTIMATORS = {"gauss_newton_diag": cx.gauss_newton_diag, "fisher_diag": cx.fisher_diag}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampled_diagonals_are_unbiased(estimator, name):
    params, value_fn = net_params(), objective(name)
    found = many(ESTIMATORS[estimator], value_fn, params)
    exact = np.diag(np.asarray(cx.materialize(cx.ggnvp(value_fn, params), params)))
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    z = (found.mean(axis=0) - exact) / np.maximum(error, 1e-14)
    assert np.abs(z).max() < 4.5
    assert (found >= 0).all()
    assert (error > 0).any()


@pytest.mark.parametrize("options", [{"shards": 4}, {"probes": 3}, {"fraction": 0.5}])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampled_diagonals_are_unbiased_with_shards_probes_and_fraction(estimator, options):
    params, value_fn = net_params(), objective("categorical")
    found = many(lambda key: ESTIMATORS[estimator](key, **options), value_fn, params)
    whole = value_fn.first(options.get("fraction", 1.0))
    exact = np.diag(np.asarray(cx.materialize(cx.ggnvp(whole, params), params)))
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.abs((found.mean(axis=0) - exact) / error).max() < 4.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_relative_error_of_a_diagonal_is_its_standard_error(estimator):
    """The recorded error, over many draws, against the spread of the estimates themselves."""
    params, value_fn, probes = net_params(), objective("gaussian"), 4

    def one(key):
        signal, state = signal_of(ESTIMATORS[estimator](key, probes=probes), value_fn, params)
        d = ravel_pytree(signal.diagonal)[0]
        return d, state.figures["diagonal_relative_error"] * jnp.linalg.norm(d)

    keys = jax.random.split(jax.random.key(2), 3000)
    diagonals, errors = map(np.asarray, quick_jit(jax.vmap(one))(keys))
    spread = np.sqrt(diagonals.var(axis=0, ddof=1).sum())
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(spread, rel=0.05)


def test_gauss_newton_diag_is_exact_for_one_output_of_a_linear_model():
    """With one example and one output the only sign squares away."""
    value_fn = cx.Objective(
        cx.gaussian("y"),
        {"x": jnp.array([[1.0, 2.0, -3.0]]), "y": jnp.zeros((1, 1))},
        model=lambda p, batch: batch["x"] @ p["w"],
    )
    params = {"w": jnp.ones((3, 1))}
    diagonal = signal_of(cx.gauss_newton_diag(), value_fn, params)[0].diagonal
    np.testing.assert_allclose(diagonal["w"][:, 0], [1.0, 4.0, 9.0])


def test_fisher_diag_is_the_square_of_one_gradient_on_drawn_labels():
    """N (∇ mean ℓ(z, ŷ))²: found again from the labels that the same keys draw."""
    params, value_fn = net_params(), objective("categorical")
    tx = cx.fisher_diag(3)
    state = tx.init(params)
    signal, _ = signal_of(tx, value_fn, params, state)
    (key,) = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), 1)
    outputs = net(params, value_fn.batch)
    labels = value_fn.loss.sample(value_fn.example_keys(key), outputs, value_fn.batch)
    log_p = lambda p: jax.nn.log_softmax(net(p, value_fn.batch))[jnp.arange(8), labels]
    gradient = jax.grad(lambda p: -jnp.mean(log_p(p)))(params)
    assert_trees_close(signal.diagonal, jax.tree.map(lambda g: 8 * g**2, gradient), 1e-12)


@pytest.mark.parametrize("name", ["categorical", "weighted", "masked"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_microbatches_give_the_same_diagonal(estimator, name):
    params = net_params()
    whole = signal_of(ESTIMATORS[estimator](7), objective(name), params)[0]
    for size in (2, 4):
        pieces = objective(name, microbatch=size)
        found = signal_of(ESTIMATORS[estimator](7), pieces, params)[0]
        assert_trees_close(found.diagonal, whole.diagonal, 1e-12)
        assert_trees_close(found.updates, whole.updates, 1e-12)


@pytest.mark.parametrize("name", ["categorical", "weighted"])
def test_empirical_fisher_diag_is_the_mean_square_of_the_examples_gradients(name):
    params, value_fn = net_params(), objective(name)
    one = lambda p, x, y: -jax.nn.log_softmax(net(p, {"x": x[None]}))[0, y]
    batch = value_fn.batch
    grads = jax.vmap(jax.grad(one), (None, 0, 0))(params, batch["x"], batch["label"])
    w = batch["w"] if name == "weighted" else jnp.ones(8)
    mean = lambda g: jnp.tensordot(w / w.sum(), g**2, 1)
    expected = jax.tree.map(mean, grads)
    for options in ({}, {"microbatch": 2}):
        found = signal_of(cx.empirical_fisher_diag(), objective(name, **options), params)[0]
        assert_trees_close(found.diagonal, expected, 1e-12)
    dense = np.asarray(cx.materialize(cx.empirical_fvp(value_fn, params), params))
    np.testing.assert_allclose(flat(expected), np.diag(dense), rtol=1e-12)


def test_empirical_fisher_diag_is_not_the_square_of_the_mean():
    params, value_fn = net_params(), objective("categorical")
    found = signal_of(cx.empirical_fisher_diag(), value_fn, params)[0].diagonal
    square = jax.tree.map(jnp.square, jax.grad(value_fn)(params))
    assert (flat(found) > 1.5 * flat(square)).any()


MATRICES = {
    "hessian": cx.hvp,
    "gauss_newton": cx.ggnvp,
    "fisher": cx.fvp,
    "empirical_fisher": cx.empirical_fvp,
}


@pytest.mark.parametrize("curvature", MATRICES)
def test_exact_diag_is_the_diagonal_of_the_dense_matrix(curvature):
    params, value_fn = net_params(), objective("categorical")
    signal, _ = signal_of(cx.exact_diag(curvature), value_fn, params)
    matrix = np.asarray(cx.materialize(MATRICES[curvature](value_fn, params), params))
    np.testing.assert_allclose(flat(signal.diagonal), np.diag(matrix), rtol=1e-12, atol=1e-15)
    assert signal.matvec is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_diagonal_estimators_share_the_callers_gradient(estimator):
    """The updates are the estimator's own primal gradient, with the same numbers."""
    params, value_fn = net_params(), objective("categorical")
    _, grads = value_fn.value_and_grad(params)
    tx = ESTIMATORS[estimator]()
    signal, _ = tx.update(cx.Signal(grads, grads), tx.init(params), params, value_fn=value_fn)
    assert jax.tree.leaves(signal.updates)[0] is not jax.tree.leaves(grads)[0]
    assert_trees_close(signal.updates, grads, 1e-14)
    other = jax.tree.map(lambda g: 2 * g, grads)
    signal, _ = tx.update(cx.Signal(other, other), tx.init(params), params, value_fn=value_fn)
    assert jax.tree.leaves(signal.updates)[0] is jax.tree.leaves(other)[0]


def test_fisher_diag_draws_by_step_and_seed():
    params, value_fn = net_params(), objective("categorical")
    tx = cx.fisher_diag(4)
    first, state = signal_of(tx, value_fn, params)
    second, _ = signal_of(tx, value_fn, params, state)
    again, _ = signal_of(tx, value_fn, params)
    assert (flat(first.diagonal) != flat(second.diagonal)).any()
    assert_trees_close(first.diagonal, again.diagonal, 0)


def test_fisher_matvec_with_samples_is_fvp_with_the_same_key():
    params, value_fn = net_params(), objective("categorical")
    tx = cx.fisher_matvec(samples=3, key=9)
    state = tx.init(params)
    v = jax.tree.map(jnp.ones_like, params)
    key = jax.random.fold_in(jax.random.key(9), 0)
    expected = cx.fvp(value_fn, params, samples=3, key=key)(v)
    assert_trees_close(signal_of(tx, value_fn, params, state)[0].matvec(v), expected, 1e-13)


@pytest.mark.parametrize("matvec", [cx.gauss_newton_matvec, cx.hessian_matvec])
def test_fraction_limits_the_batch_of_the_product_alone(matvec):
    params, value_fn = net_params(), objective("gaussian")
    v = jax.tree.map(jnp.ones_like, params)
    signal, _ = signal_of(matvec(fraction=0.5), value_fn, params)
    oracle = cx.ggnvp if matvec is cx.gauss_newton_matvec else cx.hvp
    assert_trees_close(signal.matvec(v), oracle(value_fn.first(0.5), params)(v), 1e-13)
    assert_trees_close(signal.updates, value_fn.value_and_grad(params)[1], 1e-13)


def test_fraction_that_microbatches_do_not_divide_is_refused():
    tx, params = cx.fisher_matvec(fraction=0.75), net_params()
    value_fn = objective("gaussian", microbatch=4)
    with pytest.raises(ValueError, match=r"on a fraction 0\.75 of the batch.*its 6 examples"):
        tx.update(params, tx.init(params), params, value_fn=value_fn)


def test_restrict_solves_with_the_block_of_the_matrix():
    """A solve on the hidden layer alone is that with its block of the matrix."""
    params, value_fn = net_params(), objective("gaussian")
    hidden = lambda p: {"hidden": True, "out": False}
    inside = cx.restrict(cx.fisher_matvec() | cx.damp(0.1) | cx.solve(cx.dense()), hidden)
    outside = cx.fisher_matvec() | cx.restrict(cx.damp(0.1) | cx.solve(cx.row_space()), hidden)
    matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params))
    grads = value_fn.value_and_grad(params)[1]
    size = flat(params["hidden"]).size
    block = matrix[:size, :size] + 0.1 * np.eye(size)
    expected = np.linalg.solve(block, flat(grads["hidden"]))
    for tx in (inside, outside):
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
        np.testing.assert_allclose(flat(updates["hidden"]), expected, rtol=1e-9)
        assert_trees_close(updates["out"], grads["out"])


def test_per_group_solves_for_each_group():
    params, value_fn = net_params(), objective("gaussian")
    tx = cx.per_group(4, cx.fisher_matvec() | cx.damp(0.1) | cx.solve(cx.dense()))
    grads = value_fn.value_and_grad(params)[1]
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    single = cx.natural_gradient(-1.0, damping=0.1, solver=cx.dense())
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        group = value_fn.on(jax.tree.map(lambda x, rows=rows: x[rows], value_fn.batch))
        g = group.value_and_grad(params)[1]
        halves.append(single.update(g, single.init(params), params, value_fn=group)[0])
    assert_trees_close(updates, jax.tree.map(lambda a, b: (a + b) / 2, *halves), 1e-10)


def test_every_keeps_a_fisher_diagonal_between_refreshes():
    params, value_fn = net_params(), objective("categorical")
    tx = cx.every(2, cx.fisher_diag(1)) | cx.scale_by_power(1.0, eps=1.0)
    state, kept = tx.init(params), []
    for _ in range(3):
        grads = value_fn.value_and_grad(params)[1]
        _, state = tx.update(grads, state, params, value_fn=value_fn)
        kept.append(flat(state[0].diagonal))
    assert (kept[0] == kept[1]).all()
    assert (kept[1] != kept[2]).any()
