"""Gauss-Newton and Fisher products against dense matrices, expectations and recorded curvature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, every_label, hard_targets, log_likelihood, net_objective
from jax.flatten_util import ravel_pytree
from recorded_curvature import read
from small_problems import EXAMPLES, flat, matrix_of, net, net_batch, net_params, quick_jit
from trajectories import recorded

import curvax as cx
from curvax.curvature import empirical_fvp, fvp, ggnvp, hvp
from curvax.likelihoods import categorical, gaussian

every_family = pytest.mark.parametrize("name", FAMILIES)


MATRICES: dict[str, Any] = {
    "hessian": hvp,
    "ggn": ggnvp,
    "fisher": fvp,
    "empirical_fisher": empirical_fvp,
}


def assert_matrices_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_products_equal_the_recorded_matrices(path, matrix):
    run = read(path)
    found = run.matrix(lambda: MATRICES[matrix](run.objective(), run.params))
    assert_matrices_close(found, run.expected(matrix))


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_sampled_products_with_the_recorded_labels_are_the_recorded_ones(path, samples):
    run, name = read(path), f"mc_fisher_{samples}"
    labels = run.arrays[f"{name}/labels"]
    found = run.matrix(lambda: fvp(run.objective(), run.params, labels=labels))
    whole = f"{name}/matrix" in run.arrays
    expected = run.arrays[f"{name}/matrix" if whole else f"{name}/diag"]
    assert_matrices_close(found if whole else np.diag(found), expected)


@pytest.mark.parametrize("way", ["forward", "reverse"])
@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_half_the_fisher_form_is_the_recorded_divergence_to_third_order(path, way):
    run = read(path)
    directions = [run.problem.unflatten(d) for d in jnp.asarray(run.arrays["kl/dirs"])]
    product = quick_jit(lambda d: fvp(run.objective(), run.params)(d))
    forms = np.array([0.5 * flat(d) @ flat(product(d)) for d in directions])
    half = forms[:, None] * run.arrays["kl/scales"] ** 2
    np.testing.assert_allclose(half, run.arrays["kl/half_dFd"], rtol=1e-10)
    assert list(run.arrays["kl/scales"][-2:]) == [0.01, 0.001]
    error = np.abs(run.arrays[f"kl/{way}"] - half)[:, -2:]
    orders = np.log10(error[:, 0] / error[:, 1])
    # Along one of the ten directions the third derivative nearly vanishes.
    np.testing.assert_allclose(np.median(orders), 3, atol=0.02)


# Martens' two forms of the Fisher matrix.


def log_p(name: str) -> Any:
    """(θ, one example, label) ↦ log r(y | f(θ, x))."""

    def value(theta: jax.Array, unravel: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return log_likelihood(name, net(unravel(theta), {"x": x[None]}), y[None])[0]

    return value


def expected_over_labels(name: str, of_log_p: Any) -> np.ndarray:
    """The mean over examples of E_y[of_log_p(θ)], by summing over all labels."""
    batch, (theta, unravel) = net_batch(), ravel_pytree(net_params())
    labels, masses = every_label(name, net(net_params(), batch))
    np.testing.assert_allclose(jnp.sum(masses, axis=0), 1, rtol=1e-12)

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        return of_log_p(lambda t: log_p(name)(t, unravel, x, y), theta)

    over_examples = jax.vmap(one, in_axes=(0, 0))
    # A label at a time: counts have 1600.
    terms = lambda item: jnp.einsum("n,nij->ij", item[1], over_examples(batch["x"], item[0]))
    total = quick_jit(lambda: jnp.sum(jax.lax.map(terms, (labels, masses), batch_size=200), axis=0))
    return np.asarray(total()) / EXAMPLES


def outer(f: Any, theta: jax.Array) -> jax.Array:
    g = jax.grad(f)(theta)
    return g[:, None] * g[None, :]


@every_family
def test_gauss_newton_and_fisher_are_both_forms_of_the_expectation(name):
    """Martens, arXiv:1412.1193, eq. 3 and 4, and section 9."""
    squares = expected_over_labels(name, outer)
    curvature = expected_over_labels(name, lambda f, theta: -jax.hessian(f)(theta))
    np.testing.assert_allclose(squares, curvature, rtol=0, atol=1e-11)
    objective = net_objective(name)
    for product in (ggnvp, fvp):
        found = matrix_of(lambda product=product: product(objective, net_params()), net_params())
        np.testing.assert_allclose(found, squares, rtol=0, atol=1e-11)


def divergence(name: str, z: jax.Array, other: jax.Array) -> jax.Array:
    """The mean over examples of KL(r(·|z) || r(·|other)), by summing over all labels."""
    labels, masses = every_label(name, z)
    gain = jax.vmap(lambda y: log_likelihood(name, z, y) - log_likelihood(name, other, y))(labels)
    return jnp.mean(jnp.sum(masses * gain, axis=0))


@every_family
def test_divergence_both_ways_is_half_the_fisher_form_to_third_order(name):
    direction = jax.tree.map(lambda x: jnp.cos(7 * x), net_params())
    product = fvp(net_objective(name), net_params())(direction)
    form = 0.5 * flat(direction) @ flat(product)

    def errors(h: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda p, d: p + h * d, net_params(), direction)
        here, there = (net(p, net_batch()) for p in (net_params(), moved))
        both = jnp.stack([divergence(name, here, there), divergence(name, there, here)])
        return jnp.abs(both - h**2 * form)

    steps = 0.02 / 2.0 ** jnp.arange(4)
    error = quick_jit(jax.vmap(errors))(steps)
    orders = np.log2(error[:-1] / error[1:])
    # The next term makes the order of finite steps differ from 3 by as much as they are.
    np.testing.assert_allclose(orders, 3, atol=0.3)
    np.testing.assert_allclose(orders[-1], 3, atol=0.1)


@every_family
def test_gauss_newton_of_a_linear_model_is_the_hessian(name):
    linear = lambda params, batch: batch["x"] @ params["w"] + params["b"][None]
    batch = dict(net_batch(), y=hard_targets(name, EXAMPLES, 2))
    params = {"w": 0.3 * jnp.cos(jnp.arange(8.0)).reshape(4, 2), "b": jnp.array([0.1, -0.2])}
    objective = cx.Objective(FAMILIES[name]("y"), batch, model=linear)
    hessian = matrix_of(lambda: hvp(objective, params), params)
    np.testing.assert_allclose(
        matrix_of(lambda: ggnvp(objective, params), params), hessian, rtol=0, atol=1e-14
    )


# Sampled labels.


@every_family
def test_sampled_fisher_is_unbiased_with_error_falling_as_the_root_of_the_samples(name):
    objective, params = net_objective(name), net_params()
    v = jax.tree.map(jnp.cos, params)
    exact = flat(fvp(objective, params)(v))

    def sampled(samples: int, draws: int) -> np.ndarray:
        one = lambda key: ravel_pytree(fvp(objective, params, samples=samples, key=key)(v))[0]
        return np.asarray(quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))

    few = sampled(1, 2000)
    z = (few.mean(axis=0) - exact) / (few.std(axis=0, ddof=1) / np.sqrt(len(few)))
    assert np.max(np.abs(z)) < 4
    ratio = few.var(axis=0).sum() / sampled(8, 500).var(axis=0).sum()
    # The variances have relative errors of about √(2/500) times what heavy tails add.
    assert 5 < ratio < 12


@every_family
def test_the_sampled_fisher_is_the_mean_of_outer_products_of_scores(name):
    objective, (theta, unravel) = net_objective(name), ravel_pytree(net_params())
    labels = jnp.stack([hard_targets(name, EXAMPLES, 2), objective.batch["y"][::-1]])
    score = lambda x, y: jax.grad(log_p(name))(theta, unravel, x, y)
    each = jax.vmap(jax.vmap(score), in_axes=(None, 0))
    rows = quick_jit(each)(objective.batch["x"], labels).reshape(-1, theta.size)
    expected = rows.T @ rows / len(rows)
    found = matrix_of(lambda: fvp(objective, net_params(), labels=labels), net_params())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    one = matrix_of(lambda: fvp(objective, net_params(), labels=labels[0]), net_params())
    again = matrix_of(lambda: fvp(objective, net_params(), labels=labels[:1]), net_params())
    np.testing.assert_array_equal(one, again)


def test_fisher_at_the_batch_labels_is_the_empirical_fisher():
    objective, params = net_objective("categorical"), net_params()
    given = matrix_of(lambda: fvp(objective, params, labels=objective.batch["y"]), params)
    found = matrix_of(lambda: empirical_fvp(objective, params), params)
    np.testing.assert_allclose(found, given, rtol=0, atol=1e-15)


# Tokens, masks, weights.

TOKENS = 3


def token_net(params: Any, batch: Any) -> jax.Array:
    """Logits [n, TOKENS, 2]."""
    rows = net(params, {"x": batch["x"].reshape(-1, 4)})
    return rows.reshape(-1, TOKENS, 2)


def token_batch() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(4), 3)
    return {
        "x": jax.random.normal(keys[0], (EXAMPLES, TOKENS, 4)),
        "y": jax.random.randint(keys[1], (EXAMPLES, TOKENS), 0, 2),
        "mask": jax.random.bernoulli(keys[2], 0.6, (EXAMPLES, TOKENS)),
        "w": jnp.linspace(0.5, 2.0, EXAMPLES),
    }


PRODUCTS: dict[str, Any] = {
    "ggnvp": ggnvp,
    "fvp": fvp,
    "sampled": lambda objective, params: fvp(objective, params, labels=1 - objective.batch["y"]),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_masked_tokens_do_not_count_in_products(product):
    batch, params = token_batch(), net_params()
    loss = categorical("y", mask="mask", weights="w")
    tokens = cx.Objective(loss, batch, model=token_net)
    kept = {
        "x": batch["x"][batch["mask"]],
        "y": batch["y"][batch["mask"]],
        "w": jnp.tile(batch["w"][:, None], (1, TOKENS))[batch["mask"]],
    }
    rows = cx.Objective(categorical("y", weights="w"), kept, model=net)
    found = matrix_of(lambda: PRODUCTS[product](tokens, params), params)
    expected = matrix_of(lambda: PRODUCTS[product](rows, params), params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_the_empirical_fisher_takes_a_sequence_as_one_example():
    batch, params = token_batch(), net_params()
    tokens = cx.Objective(categorical("y", mask="mask"), batch, model=token_net)
    each = [jax.tree.map(lambda x, n=n: x[n : n + 1], batch) for n in range(EXAMPLES)]
    gradient = quick_jit(lambda batch: tokens.on(batch).value_and_grad(params)[1])
    rows = [flat(gradient(one)) for one in each]
    counts = np.asarray(batch["mask"].sum(axis=1))
    expected = sum(n * np.outer(g, g) for n, g in zip(counts, rows)) / counts.sum()
    found = matrix_of(lambda: empirical_fvp(tokens, params), params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_soft_labels_do_not_change_the_fisher():
    objective, params = net_objective("categorical"), net_params()
    smooth = 0.8 * jax.nn.one_hot(objective.batch["y"], 2) + 0.1
    soft = objective.on(dict(objective.batch, y=smooth))
    hard_matrix = matrix_of(lambda: fvp(objective, params), params)
    np.testing.assert_array_equal(matrix_of(lambda: fvp(soft, params), params), hard_matrix)
    draw: Any = dict(samples=2, key=jax.random.key(0))
    np.testing.assert_array_equal(
        matrix_of(lambda: fvp(soft, params, **draw), params),
        matrix_of(lambda: fvp(objective, params, **draw), params),
    )


# Any convex loss.


def two_headed(params: Any, batch: Any) -> Any:
    z = net(params, batch)
    return {"a": z[:, 0], "b": jnp.sinh(z)}


def pseudo_huber(outputs: Any, batch: Any) -> jax.Array:
    a, b = outputs["a"], outputs["b"] - batch["y"]
    return jnp.mean(jnp.sqrt(1 + a**2)) + jnp.mean(jnp.logaddexp(b[:, 0], b[:, 1]))


@jax.custom_vjp
def blocked_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)


blocked_sum.defvjp(lambda x: (jnp.sum(x), x), lambda x, g: (g * jnp.ones_like(x),))


def blocked_huber(outputs: Any, batch: Any) -> jax.Array:
    return blocked_sum(pseudo_huber(outputs, batch))


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("loss", [pseudo_huber, blocked_huber])
def test_gauss_newton_of_any_loss_is_the_dense_form(loss, microbatch):
    batch, (theta, unravel) = net_batch(), ravel_pytree(net_params())
    z, as_outputs = ravel_pytree(two_headed(net_params(), batch))
    outputs = lambda t: ravel_pytree(two_headed(unravel(t), batch))[0]
    jacobian = quick_jit(jax.jacfwd(outputs))(theta)
    curvature = quick_jit(jax.hessian(lambda u: pseudo_huber(as_outputs(u), batch)))(z)
    objective = cx.Objective(loss, batch, model=two_headed, microbatch=microbatch)
    found = matrix_of(lambda: ggnvp(objective, net_params()), net_params())
    np.testing.assert_allclose(found, jacobian.T @ curvature @ jacobian, rtol=0, atol=1e-13)
    assert ggnvp(objective, net_params()).root is None


def test_the_empirical_fisher_needs_no_model():
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.sum((net(params, batch) - batch["y"]) ** 2, axis=1) / 2)

    plain = cx.Objective(loss, net_batch())
    modelled = cx.Objective(gaussian("y"), net_batch(), model=net)
    found, expected = (
        matrix_of(lambda o=o: empirical_fvp(o, net_params()), net_params())
        for o in (plain, modelled)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
