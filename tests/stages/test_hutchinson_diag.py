"""`hutchinson_diag`: bias, variance, exact cases, shards and the shared gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagonals import show_diagonal
from small_problems import (
    assert_trees_close,
    dense_hessian,
    flat,
    net_batch,
    net_loss,
    net_params,
    quick_jit,
)

import curvax as cx


def diagonal_of(estimator: cx.Stage, params: Any, value_fn: Any) -> Any:
    tx = estimator | show_diagonal
    return tx.update(params, tx.init(params), params, value_fn=value_fn)[0]


# Off its diagonal as large as on it; leaves of equal shape, so that a probe shared by all of them
# would give row sums: (3, 4) for the 2 and 3 in the corner.
COUPLED = np.array([[2.0, 1.0, 0.5, 0.0], [1.0, 3.0, 0.0, -1.0], [0.5, 0.0, -1.0, 2.0],
                    [0.0, -1.0, 2.0, 1.5]])  # fmt: skip
LEAVES = {name: jnp.array([x]) for name, x in zip("abcd", (0.1, 0.2, 0.3, 0.4))}


def quadratic(params: Any) -> jax.Array:
    x = jnp.concatenate([params[name] for name in "abcd"])
    return 0.5 * x @ COUPLED @ x


def quadratic_over_examples(params: Any, batch: Any) -> jax.Array:
    """The same loss, each example with a share of the coupling of its own."""
    return jnp.mean(batch) * quadratic(params)


KEYS = jax.random.split(jax.random.key(11), 1000)


def many_diagonals(make: Any, value_fn: Any = quadratic) -> np.ndarray:
    """Estimates for many keys, [keys, 4]."""
    one = lambda key: diagonal_of(make(key), LEAVES, value_fn)
    return np.concatenate(list(quick_jit(jax.vmap(one))(KEYS).values()), axis=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(probes=3),
        dict(sampler=cx.gaussian_probe),
        dict(mode="reverse-over-reverse"),
    ],
    ids=["signs", "several probes", "normals", "reverse-over-reverse"],
)
def test_hutchinson_diag_is_unbiased_on_a_coupled_matrix(options):
    found = many_diagonals(lambda key: cx.hutchinson_diag(key, **options))
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(error > 0)
    assert np.all(np.abs(found.mean(axis=0) - np.diag(COUPLED)) < 4 * error)


def test_hutchinson_diag_has_the_variance_of_rademacher_probes():
    # Var (z ⊙ Az)ᵢ = Σ_{j≠i} Aᵢⱼ² for independent signs: neither one key nor one sign for all.
    expected = (COUPLED**2).sum(axis=1) - np.diag(COUPLED) ** 2
    found = many_diagonals(cx.hutchinson_diag).var(axis=0, ddof=1)
    np.testing.assert_allclose(found, expected, rtol=0.2)
    several = many_diagonals(lambda key: cx.hutchinson_diag(key, probes=4)).var(axis=0, ddof=1)
    np.testing.assert_allclose(several, expected / 4, rtol=0.2)


def test_hutchinson_probes_are_plus_and_minus_one():
    linear_in_pairs = lambda params: params["a"][0] * params["b"][0]
    found = many_diagonals(cx.hutchinson_diag, linear_in_pairs)[:, 0]
    assert set(np.unique(found)) == {-1.0, 1.0}
    assert abs(found.mean()) < 4 / np.sqrt(len(found))


def test_hutchinson_diag_is_exact_on_a_diagonal_hessian():
    params = net_params()
    quartic = lambda p: sum(jnp.sum(x**4) for x in jax.tree.leaves(p))
    expected = jax.tree.map(lambda x: 12 * x**2, params)
    for key in range(3):
        assert_trees_close(diagonal_of(cx.hutchinson_diag(key), params, quartic), expected)
    relative = cx.hutchinson_diag(probes=3)
    _, state = relative.update(params, relative.init(params), params, value_fn=quartic)
    assert cx.diagnostics(state)["diagonal_relative_error"] < 1e-12


@pytest.mark.parametrize("shards", [1, 4])
def test_relative_error_of_several_probes_is_their_standard_error(shards):
    value_fn = cx.Objective(quadratic_over_examples, jnp.ones(4))

    def run(key: jax.Array) -> Any:
        tx = cx.hutchinson_diag(key, probes=3, shards=shards) | show_diagonal
        diagonal, state = tx.update(LEAVES, tx.init(LEAVES), LEAVES, value_fn=value_fn)
        return optax.tree.norm(diagonal), cx.diagnostics(state)["diagonal_relative_error"]

    norm, relative = quick_jit(jax.vmap(run))(KEYS)
    variance = np.asarray((norm * relative) ** 2)
    expected = ((COUPLED**2).sum() - (np.diag(COUPLED) ** 2).sum()) / (3 * shards)
    error = variance.std(ddof=1) / np.sqrt(len(variance))
    assert abs(variance.mean() - expected) < 4 * error


def test_one_probe_records_no_standard_error():
    tx = cx.hutchinson_diag()
    _, state = tx.update(LEAVES, tx.init(LEAVES), LEAVES, value_fn=quadratic)
    assert cx.diagnostics(state) == {}


def test_probes_depend_on_key_and_step():
    tx = cx.hutchinson_diag(5) | show_diagonal
    start = tx.init(net_params())
    step = lambda state: tx.update(
        net_params(), state, net_params(), value_fn=cx.Objective(net_loss, net_batch())
    )
    first, state = step(start)
    second, _ = step(state)
    assert_trees_close(step(start)[0], first, tol=0)
    assert np.abs(flat(first) - flat(second)).max() > 1e-3
    typed = diagonal_of(
        cx.hutchinson_diag(jax.random.key(5)), net_params(), cx.Objective(net_loss, net_batch())
    )
    assert_trees_close(typed, first, tol=0)


def test_sampler_replaces_the_rademacher_probes():
    ones = lambda key, tree: jax.tree.map(jnp.ones_like, tree)
    objective = cx.Objective(net_loss, net_batch())
    found = diagonal_of(cx.hutchinson_diag(sampler=ones), net_params(), objective)
    rows = dense_hessian(objective, net_params()).sum(axis=1)
    np.testing.assert_allclose(flat(found), rows, rtol=1e-10, atol=1e-10)


def test_fraction_takes_the_first_part_of_the_batch():
    whole, half = cx.Objective(net_loss, net_batch(8)), cx.Objective(net_loss, net_batch(8))
    half = half.on(jax.tree.map(lambda x: x[:4], net_batch(8)))
    tx = cx.hutchinson_diag(fraction=0.5)
    assert_trees_close(
        diagonal_of(tx, net_params(), whole), diagonal_of(cx.hutchinson_diag(), net_params(), half)
    )
    # The gradient stays that of the whole batch.
    _, grads = whole.value_and_grad(net_params())
    updates, _ = tx.update(grads, tx.init(net_params()), net_params(), value_fn=whole)
    assert_trees_close(updates, grads, tol=0)


def test_hutchinson_diag_with_shards_is_the_mean_over_shards():
    key = jax.random.key(5)
    objective = cx.Objective(net_loss, net_batch(8))
    found = diagonal_of(cx.hutchinson_diag(key, shards=4), net_params(), objective)
    parts = []
    for i in range(4):
        z = cx.rademacher(jax.random.fold_in(jax.random.fold_in(key, 0), i), net_params())
        part = objective.on(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], net_batch(8)))
        parts.append(flat(z) * flat(cx.hvp(part, net_params())(z)))
    np.testing.assert_allclose(flat(found), np.mean(parts, axis=0), rtol=1e-12)


def test_shards_keep_the_estimate_unbiased_and_divide_its_variance():
    value_fn = cx.Objective(quadratic_over_examples, jnp.ones(4))
    one = many_diagonals(cx.hutchinson_diag, value_fn)
    several = many_diagonals(lambda key: cx.hutchinson_diag(key, shards=4), value_fn)
    error = several.std(axis=0, ddof=1) / np.sqrt(len(several))
    assert np.all(np.abs(several.mean(axis=0) - np.diag(COUPLED)) < 4 * error)
    np.testing.assert_allclose(several.var(axis=0), one.var(axis=0) / 4, rtol=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(probes=0), r"`probes` as a positive integer"),
        (dict(shards=0), r"`shards` as a positive integer"),
        (dict(fraction=0.0), r"`fraction` in \(0, 1\], and got 0\.0"),
        (dict(fraction=1.5), "got 1.5"),
    ],
)
def test_hutchinson_diag_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cx.hutchinson_diag(**options)


def test_shards_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"`hutchinson_diag\(shards=3\)`.* 8 examples"):
        diagonal_of(
            cx.hutchinson_diag(shards=3), net_params(), cx.Objective(net_loss, net_batch(8))
        )


def test_hutchinson_diag_never_replaces_a_different_gradient():
    objective, tx = cx.Objective(net_loss, net_batch()), cx.hutchinson_diag()
    params = net_params()
    _, grads = objective.value_and_grad(params)
    elsewhere = jax.tree.map(lambda x: x + 1, params)
    own, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
    assert_trees_close(own, grads)
    assert own["out"]["kernel"] is not grads["out"]["kernel"]
    clipped = optax.tree.scale(0.5, grads)
    for given, at in ((clipped, params), (grads, elsewhere)):
        kept, _ = tx.update(given, tx.init(params), at, value_fn=objective)
        assert kept is given
