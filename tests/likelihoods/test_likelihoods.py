"""Likelihoods of outputs against formulas, dense Hessians and the distributions themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, hard_targets, log_likelihood
from small_problems import assert_trees_close, quick_jit

import curvax as cx
from curvax.likelihoods import Likelihood, bernoulli, categorical, gaussian

EXAMPLES, CLASSES, TOKENS = 6, 3, 4
every_family = pytest.mark.parametrize("name", FAMILIES)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def problem(name: str, *shape: int, **batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    shape = shape or (EXAMPLES, CLASSES)
    return normal(0, *shape), {"y": hard_targets(name, *shape), **batch}


def hessian_of(loss: Any, z: jax.Array, batch: Any) -> np.ndarray:
    flat = lambda x: loss(x.reshape(z.shape), batch)
    return np.asarray(quick_jit(jax.hessian(flat))(z.ravel()))


def matrix_of(f: Any, z: jax.Array) -> np.ndarray:
    """The matrix of a linear map on arrays like z, a column for each unit array."""
    columns = quick_jit(jax.vmap(lambda e: f(e.reshape(z.shape)).ravel()))(jnp.eye(z.size))
    return np.asarray(columns).T


MASK = jnp.array([True, False, True, True, False, True])
WEIGHTS = jnp.array([0.5, 2.0, 0.0, 1.0, 3.0, 1.5])
TOKEN_MASK = jax.random.bernoulli(jax.random.key(9), 0.6, (EXAMPLES, TOKENS))


@every_family
def test_the_loss_is_the_mean_of_minus_the_log_likelihood(name):
    z, batch = problem(name)
    expected = -jnp.mean(log_likelihood(name, z, batch["y"]))
    assert_trees_close(FAMILIES[name]("y")(z, batch), expected)


@every_family
def test_weights_and_masks_give_a_weighted_mean(name):
    z, batch = problem(name, mask=MASK, w=WEIGHTS)
    each = -log_likelihood(name, z, batch["y"])
    of_batch = lambda batch: batch["w"]
    for options, w in (
        (dict(mask="mask"), 1.0 * MASK),
        (dict(weights=of_batch), WEIGHTS),
        (dict(mask="mask", weights="w"), MASK * WEIGHTS),
    ):
        loss = FAMILIES[name]("y", **options)
        np.testing.assert_allclose(loss(z, batch), np.average(each, weights=w), rtol=1e-12)
        np.testing.assert_allclose(loss.total_weight(batch), jnp.sum(w), rtol=1e-15)
        shares = (w / jnp.sum(w))[:, None]
        assert_trees_close(loss.site_weights(z, batch), shares, tol=1e-15)


@every_family
def test_mask_with_more_axes_makes_sites(name):
    z, batch = problem(name, EXAMPLES, TOKENS, CLASSES, mask=TOKEN_MASK, w=WEIGHTS)
    loss = FAMILIES[name]("y", mask="mask", weights="w")
    rows = lambda x: x.reshape(EXAMPLES * TOKENS, *x.shape[2:])
    w = rows(TOKEN_MASK * WEIGHTS[:, None])
    expected = np.average(-log_likelihood(name, rows(z), rows(batch["y"])), weights=w)
    np.testing.assert_allclose(loss(z, batch), expected, rtol=1e-12)
    np.testing.assert_allclose(loss.total_weight(batch), jnp.sum(w), rtol=1e-15)
    assert loss.site_weights(z, batch).shape == (EXAMPLES, TOKENS, 1)


def test_tokens_are_sites_of_logits_and_examples_sites_of_numbers():
    for name, count in (("categorical", EXAMPLES * TOKENS), ("gaussian", EXAMPLES)):
        _, batch = problem(name, EXAMPLES, TOKENS, CLASSES)
        assert FAMILIES[name]("y").total_weight(batch) == count


@pytest.mark.parametrize("options", [{}, {"mask": "mask"}, {"mask": "mask", "weights": "w"}])
@every_family
def test_products_and_roots_are_those_of_the_dense_hessian(name, options):
    z, batch = problem(name, mask=MASK, w=WEIGHTS)
    loss = FAMILIES[name]("y", **options)
    hessian = hessian_of(loss, z, batch)
    product = matrix_of(lambda v: loss.hessian_product(z, batch, v), z)
    np.testing.assert_allclose(product, hessian, rtol=0, atol=1e-14)
    root = matrix_of(lambda e: loss.root(z, batch, e), z)
    np.testing.assert_allclose(root @ root.T, hessian, rtol=0, atol=1e-14)
    transpose = matrix_of(lambda u: loss.root_transpose(z, batch, u), z)
    np.testing.assert_allclose(transpose, root.T, rtol=0, atol=1e-15)


def test_products_of_token_logits_are_those_of_the_dense_hessian():
    z, batch = problem("categorical", EXAMPLES, TOKENS, CLASSES, mask=TOKEN_MASK, w=WEIGHTS)
    loss = categorical("y", mask="mask", weights="w")
    product = matrix_of(lambda v: loss.hessian_product(z, batch, v), z)
    np.testing.assert_allclose(product, hessian_of(loss, z, batch), rtol=0, atol=1e-14)
    root = matrix_of(lambda e: loss.root(z, batch, e), z)
    np.testing.assert_allclose(root @ root.T, product, rtol=0, atol=1e-14)


@every_family
def test_weighted_scores_sum_to_the_gradient(name):
    z, batch = problem(name, mask=MASK, w=WEIGHTS)
    loss = FAMILIES[name]("y", mask="mask", weights="w")
    weighted = loss.site_weights(z, batch) * loss.scores(z, batch)
    assert_trees_close(weighted, jax.grad(loss)(z, batch), tol=1e-14)
    alone = jax.grad(lambda z: -log_likelihood(name, z, batch["y"][:1])[0])(z[:1])
    assert_trees_close(FAMILIES[name]("y").scores(z, batch)[:1], alone, tol=1e-14)


@every_family
def test_masked_entries_can_be_nan(name):
    z, batch = problem(name, mask=MASK, w=jnp.ones(EXAMPLES))
    loss = FAMILIES[name]("y", mask="mask")
    holes = z.at[1].set(jnp.nan).at[4].set(jnp.inf)
    broken = dict(batch, y=batch["y"].at[1].set(-7 if name == "categorical" else jnp.nan))
    kept = dict(batch, y=batch["y"][MASK], mask=MASK[MASK])
    keys = jax.random.split(jax.random.key(0), EXAMPLES)
    assert_trees_close(loss(holes, broken), loss(z[MASK], kept))
    for f in (
        lambda z, batch: jax.grad(loss)(z, batch),
        lambda z, batch: loss.hessian_product(z, batch, z),
        lambda z, batch: loss.root_transpose(z, batch, z),
        lambda z, batch: loss.root(z, batch, jnp.ones_like(z)),
        loss.scores,
    ):
        found = f(holes, broken)
        assert_trees_close(found[MASK], f(z[MASK], kept))
        np.testing.assert_array_equal(found[~MASK], 0)
    labels = loss.sample(keys, holes, broken)
    np.testing.assert_array_equal(labels[MASK], loss.sample(keys[MASK], z[MASK], kept))


@every_family
def test_loss_of_a_fully_masked_batch_is_zero(name):
    z, batch = problem(name, mask=jnp.zeros(EXAMPLES, bool))
    loss = FAMILIES[name]("y", mask="mask")
    value, gradient = jax.value_and_grad(loss)(z * jnp.nan, batch)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(loss.hessian_product(z, batch, z), 0)


# Labels.

DRAWS = 4000


def drawn(name: str, z: jax.Array, batch: Any) -> jax.Array:
    """The scores of labels drawn from the model, [DRAWS, *z]."""
    loss = FAMILIES[name]("y")

    def scores(key: jax.Array) -> jax.Array:
        labels = loss.sample(jax.random.split(key, len(z)), z, batch)
        return loss.on_labels(labels).scores(z, batch)

    return quick_jit(jax.vmap(scores))(jax.random.split(jax.random.key(1), DRAWS))


@every_family
def test_scores_of_samples_have_mean_zero_and_the_hessian_as_covariance(name):
    z, batch = problem(name, 2, CLASSES)
    s = np.asarray(drawn(name, z, batch)).reshape(DRAWS, -1)
    error = lambda x: x.std(axis=0) / np.sqrt(DRAWS) + 1e-12
    assert np.max(np.abs(s.mean(axis=0)) / error(s)) < 4
    # The loss is a mean over two examples; scores are of each alone.
    covariance = 2 * hessian_of(FAMILIES[name]("y"), z, batch)
    outer = s[:, :, None] * s[:, None, :]
    assert np.max(np.abs(outer.mean(axis=0) - covariance) / error(outer)) < 4


@every_family
def test_sampled_labels_have_the_shape_of_targets_and_follow_example_keys(name):
    z, batch = problem(name, EXAMPLES, TOKENS, CLASSES)
    loss = FAMILIES[name]("y")
    keys = jax.random.split(jax.random.key(0), EXAMPLES)
    labels = loss.sample(keys, z, batch)
    assert labels.shape == batch["y"].shape == loss.label_shape(batch)
    assert jnp.issubdtype(labels.dtype, jnp.integer) == (name == "categorical")
    part = jax.tree.map(lambda x: x[2:4], batch)
    np.testing.assert_array_equal(loss.sample(keys[2:4], z[2:4], part), labels[2:4])
    assert_trees_close(loss.on_labels(labels)(z, batch), loss(z, dict(batch, y=labels)), tol=0)


# Classes and probabilities.


def test_one_hot_labels_equal_class_numbers():
    z, batch = problem("categorical", EXAMPLES, TOKENS, CLASSES, mask=TOKEN_MASK)
    rows = dict(batch, y=jax.nn.one_hot(batch["y"], CLASSES))
    loss = categorical("y", mask="mask")
    assert_trees_close(loss(z, rows), loss(z, batch), tol=1e-15)
    assert_trees_close(jax.grad(loss)(z, rows), jax.grad(loss)(z, batch), tol=1e-15)
    assert loss.label_shape(rows) == batch["y"].shape


def test_soft_labels_are_mixtures_of_hard_losses():
    z, batch = problem("categorical")
    other = (batch["y"] + 1) % CLASSES
    mixed = 0.7 * jax.nn.one_hot(batch["y"], CLASSES) + 0.3 * jax.nn.one_hot(other, CLASSES)
    loss = categorical("y")
    expected = 0.7 * loss(z, batch) + 0.3 * loss(z, {"y": other})
    assert_trees_close(loss(z, {"y": mixed}), expected)
    hessian = hessian_of(loss, z, {"y": mixed})
    product = matrix_of(lambda v: loss.hessian_product(z, {"y": mixed}, v), z)
    np.testing.assert_allclose(product, hessian, rtol=0, atol=1e-14)


def test_unknown_class_gives_nan_unless_masked():
    z, batch = problem("categorical", mask=MASK)
    for wrong in (-1, CLASSES):
        at = lambda i, wrong=wrong: dict(batch, y=batch["y"].at[i].set(wrong))
        assert np.isnan(categorical("y")(z, at(0)))
        assert np.isfinite(categorical("y", mask="mask")(z, at(1)))


@pytest.mark.parametrize("soft", [False, True])
def test_logit_of_minus_infinity_excludes_a_class(soft):
    z = normal(0, EXAMPLES, CLASSES).at[:, 2].set(-jnp.inf)
    y = jnp.array([0, 1, 0, 1, 0, 1])
    batch = {"y": jax.nn.one_hot(y, CLASSES) if soft else y}
    loss, short = categorical("y"), categorical("y")
    assert_trees_close(loss(z, batch), short(z[:, :2], {"y": y}))
    found = jax.grad(loss)(z, batch)
    assert_trees_close(found[:, :2], jax.grad(short)(z[:, :2], {"y": y}))
    np.testing.assert_array_equal(found[:, 2], 0)
    v = normal(3, EXAMPLES, CLASSES)
    expected = short.hessian_product(z[:, :2], {"y": y}, v[:, :2])
    assert_trees_close(loss.hessian_product(z, batch, v)[:, :2], expected)


# Precision.


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_large_logits_are_stable_in_float32(name):
    z = jnp.array([[1e4, -1e4], [-1e4, 1e4]], jnp.float32)
    y = jnp.array([0, 0]) if name == "categorical" else jnp.array([[1.0, 0.0], [1.0, 0.0]])
    loss, batch = FAMILIES[name]("y"), {"y": y}
    np.testing.assert_array_equal(loss(z, batch), np.float32(1e4))
    gradient = np.array([[0, 0], [-0.5, 0.5]], np.float32)
    np.testing.assert_array_equal(jax.grad(loss)(z, batch), gradient)
    ones = jnp.ones_like(z)
    for found in (
        loss.hessian_product(z, batch, ones),
        loss.root(z, batch, ones),
        loss.root_transpose(z, batch, ones),
    ):
        np.testing.assert_array_equal(found, 0)


def test_small_losses_are_accurate_in_float32():
    z = jnp.array([[20.0]], jnp.float32)
    found = bernoulli("y")(z, {"y": jnp.ones((1, 1))})
    np.testing.assert_allclose(found, np.log1p(np.exp(-20.0)), rtol=1e-6)


@every_family
def test_half_precision_outputs_are_reduced_in_float32(name):
    z, batch = problem(name, mask=MASK, w=WEIGHTS)
    # Their sum is 3, so that the shares are no numbers of bfloat16.
    loss = FAMILIES[name]("y", mask="mask", weights="w")
    half = z.astype(jnp.bfloat16)
    wide = half.astype(jnp.float32)
    assert loss(half, batch).dtype == jnp.float32
    assert loss(half, batch) == loss(wide, batch)
    for f in (loss.scores, lambda z, batch: loss.hessian_product(z, batch, z)):
        assert_trees_close(f(half, batch), f(wide, batch).astype(jnp.bfloat16), tol=0)


# Errors.


def told(error: Any, *words: str) -> Any:
    return pytest.raises(error, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_targets_are_never_broadcast(name):
    z = normal(0, EXAMPLES, 1)
    with told(ValueError, name, r"\[6, 1\]", r"\[6\]", r"\[\.\.\., 0\]"):
        FAMILIES[name]("y")(z, {"y": jnp.zeros(EXAMPLES)})


def test_labels_that_do_not_fit_the_logits_are_refused():
    z = normal(0, EXAMPLES, CLASSES)
    for y, word in (
        (jnp.zeros((EXAMPLES, 1), int), "dropped"),
        (jnp.zeros(EXAMPLES), "astype"),
        (jnp.zeros(EXAMPLES - 1, int), r"\[5\]"),
    ):
        with told(ValueError, "categorical", word):
            categorical("y")(z, {"y": y})
    with told(TypeError, "bool", "bernoulli"):
        categorical("y")(z, {"y": jnp.zeros(EXAMPLES, bool)})


def test_a_learned_variance_is_refused():
    z, y = normal(0, EXAMPLES, 2), {"y": jnp.zeros((EXAMPLES, 1))}
    for act in (
        lambda: gaussian("y")(z, y),
        lambda: gaussian("y")(z, {"y": jnp.zeros(EXAMPLES)}),
        lambda: gaussian("y")((z, z), y),
    ):
        with told((TypeError, ValueError), "variance", "not be the Fisher"):
            act()


@every_family
def test_outputs_that_are_not_one_floating_array_are_refused(name):
    _, batch = problem(name)
    loss = FAMILIES[name]("y")
    with told(TypeError, name, "a dict of 1", "has_aux"):
        loss({"a": jnp.zeros(2)}, batch)
    with told(TypeError, name, r"int64\[6, 3\]"):
        loss(jnp.zeros((EXAMPLES, CLASSES), int), batch)


def test_masks_and_weights_that_do_not_fit_are_refused():
    z, batch = problem("gaussian", mask=MASK, short=MASK[:-1], w=WEIGHTS)
    with told(TypeError, r"gaussian\(mask=\)", "float64", "weights"):
        gaussian("y", mask="w")(z, batch)
    with told(ValueError, r"gaussian\(mask=\)", r"\[5\]", r"\[6\]"):
        gaussian("y", mask="short")(z, batch)
    tokens = {"y": jnp.zeros((EXAMPLES, TOKENS), int), "w": jnp.ones((EXAMPLES, TOKENS, CLASSES))}
    with told(ValueError, r"categorical\(weights=\)", r"\[6, 4, 3\]", r"\[6, 4\]"):
        categorical("y", weights="w")(normal(0, EXAMPLES, TOKENS, CLASSES), tokens)


@pytest.mark.parametrize("option", ["targets", "mask", "weights"])
def test_missing_batch_entries_are_named_before_the_step(option):
    batch = {"x": jnp.zeros((2, 1)), "y": jnp.zeros((2, 1))}
    loss = gaussian(**{"targets": "y", option: "yy"})
    with told(ValueError, "gaussian", "'yy'", "'x', 'y'"):
        cx.Objective(loss, batch, model=lambda params, batch: params * batch["x"])


def test_array_in_place_of_a_batch_entry_is_refused():
    with told(TypeError, r"`bernoulli\(mask=\)`", "name it"):
        bernoulli("y", mask=MASK)


def test_a_likelihood_needs_a_model():
    with told(ValueError, "no `model`", "model=predict"):
        cx.Objective(gaussian("y"), {"y": jnp.zeros(2)})


def test_batch_entries_can_be_tuple_positions():
    z, batch = problem("categorical")
    assert_trees_close(categorical(1)(z, (z, batch["y"])), categorical("y")(z, batch), tol=0)
    with told(ValueError, "entry 2", "type tuple"):
        categorical(2)(z, (z, batch["y"]))


def test_likelihoods_are_hashable_and_comparable():
    assert categorical("y", mask="m") == categorical("y", mask="m") != categorical("y")
    assert isinstance(hash(gaussian("y")), int)
    assert isinstance(gaussian("y"), Likelihood)
