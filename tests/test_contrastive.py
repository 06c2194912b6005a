"""The contrastive loss: its loop over anchors, its limits, exact cases and errors."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

N, VIEWS, D = 6, 2, 4
LABELS = jnp.array([0, 1, 0, 2, 1, 0])
Z = jax.random.normal(jax.random.key(0), (N, VIEWS, D))
BATCH = {"label": LABELS}
TOLERANCE: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


def by_loop(z: Any, labels: Any, tau: float) -> float:
    """Eq. 2 of the paper, one anchor after the other; anchors without positives have 0."""
    n, views, d = z.shape
    units = [np.asarray(x, np.float64) for x in z.reshape(n * views, d)]
    units = [x / np.sqrt(x @ x) for x in units]
    classes = [int(labels[k // views]) for k in range(n * views)]
    losses = []
    for i, anchor in enumerate(units):
        others = [k for k in range(len(units)) if k != i]
        below = sum(np.exp(anchor @ units[a] / tau) for a in others)
        positives = [p for p in others if classes[p] == classes[i]]
        logs = [np.log(np.exp(anchor @ units[p] / tau) / below) for p in positives]
        losses.append(-sum(logs) / max(len(positives), 1))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_loss_is_its_loop_over_anchors(views, tau):
    z = jax.random.normal(jax.random.key(views), (N, views, D))
    labels = jnp.array([0, 1, 0, 1, 1, 0])
    loss = cx.supervised_contrastive("label", temperature=tau)
    np.testing.assert_allclose(loss(z, {"label": labels}), by_loop(z, labels, tau), **TOLERANCE)
    if views == 1:
        flat = loss(z[:, 0], {"label": labels})
        np.testing.assert_allclose(flat, by_loop(z, labels, tau), **TOLERANCE)


def test_without_targets_the_other_views_are_the_positives():
    """NT-Xent, also as a cross-entropy of the cosines with the other view as the class."""
    found = cx.supervised_contrastive(temperature=0.5)(Z, BATCH)
    np.testing.assert_allclose(found, by_loop(Z, range(N), 0.5), **TOLERANCE)
    unit = (Z / jnp.linalg.norm(Z, axis=-1, keepdims=True)).swapaxes(0, 1).reshape(2 * N, D)
    logits = jnp.where(jnp.eye(2 * N, dtype=bool), -jnp.inf, unit @ unit.T / 0.5)
    partner = (jnp.arange(2 * N) + N) % (2 * N)
    rows = jax.nn.log_softmax(logits)[jnp.arange(2 * N), partner]
    np.testing.assert_allclose(found, -rows.mean(), **TOLERANCE)


def test_gradient_is_that_of_the_written_out_loss():
    def written(z: jax.Array) -> jax.Array:
        u = (z / jnp.linalg.norm(z, axis=-1, keepdims=True)).reshape(-1, D)
        s = u @ u.T / 0.3
        same = jnp.repeat(LABELS, VIEWS)[:, None] == jnp.repeat(LABELS, VIEWS)[None]
        other = ~jnp.eye(len(u), dtype=bool)
        log_p = s - jnp.log(jnp.sum(jnp.where(other, jnp.exp(s), 0), axis=1))[:, None]
        positive = same & other
        return -jnp.mean(jnp.sum(jnp.where(positive, log_p, 0), 1) / positive.sum(1))

    loss = lambda z: cx.supervised_contrastive("label", temperature=0.3)(z, BATCH)
    np.testing.assert_allclose(jax.grad(loss)(Z), jax.grad(written)(Z), **TOLERANCE)


def cosines(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(cosines, which are others, which are positives), each [n·views, n·views]."""
    u = (z / jnp.linalg.norm(z, axis=-1, keepdims=True)).reshape(-1, D)
    other = ~jnp.eye(len(u), dtype=bool)
    labels = jnp.repeat(LABELS, VIEWS)
    return u @ u.T, other, other & (labels[:, None] == labels[None])


def mean_where(x: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(which, x, 0), axis=1) / which.sum(axis=1)


def test_a_high_temperature_pulls_to_the_mean_positive_from_the_mean_of_all():
    """τ (L - log A) → meanₐ c - meanₚ c as τ → ∞, with A others; so do the gradients."""

    def limit(z: jax.Array) -> jax.Array:
        c, other, positive = cosines(z)
        return jnp.mean(mean_where(c, other) - mean_where(c, positive))

    tau = 1e5  # the next term of the expansion is of order 1/τ
    loss = cx.supervised_contrastive("label", temperature=tau)
    excess = lambda z: tau * (loss(z, BATCH) - jnp.log(N * VIEWS - 1.0))
    np.testing.assert_allclose(excess(Z), limit(Z), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(excess)(Z), jax.grad(limit)(Z), atol=1e-5)


def test_a_low_temperature_sees_the_nearest_embedding_alone():
    """τ L → maxₐ c - meanₚ c as τ → 0; so do the gradients."""

    def limit(z: jax.Array) -> jax.Array:
        c, other, positive = cosines(z)
        return jnp.mean(jnp.max(jnp.where(other, c, -2), axis=1) - mean_where(c, positive))

    tau = 1e-4  # cosines differ by 1e-2 and more, and exp(-100) is no number beside 1
    loss = cx.supervised_contrastive("label", temperature=tau)
    scaled = lambda z: tau * loss(z, BATCH)
    np.testing.assert_allclose(scaled(Z), limit(Z), **TOLERANCE)
    np.testing.assert_allclose(jax.grad(scaled)(Z), jax.grad(limit)(Z), **TOLERANCE)


def test_order_of_examples_views_and_lengths_change_nothing():
    loss = cx.supervised_contrastive("label")
    order = jnp.array([3, 0, 5, 2, 1, 4])
    lengths = jnp.exp(jax.random.normal(jax.random.key(1), (N, VIEWS, 1)))
    changed = loss((lengths * Z)[order, ::-1], {"label": LABELS[order]})
    np.testing.assert_allclose(changed, loss(Z, BATCH), **TOLERANCE)


def test_equal_embeddings_have_the_logarithm_of_the_others_and_no_gradient():
    loss = lambda z: cx.supervised_contrastive("label")(z, BATCH)
    z = jnp.ones((N, VIEWS, D))
    np.testing.assert_allclose(loss(z), np.log(N * VIEWS - 1), **TOLERANCE)
    np.testing.assert_allclose(jax.grad(loss)(z), 0, atol=1e-12)


@pytest.mark.parametrize("padding", [jnp.nan, 7.0])
def test_masked_examples_are_not_seen(padding):
    mask = jnp.array([True, True, False, True, True, False])
    padded = jnp.where(mask[:, None, None], Z, padding)
    loss = cx.supervised_contrastive("label", mask="mask", temperature=0.5)
    of = lambda z: loss(z, BATCH | {"mask": mask})
    value, gradient = jax.value_and_grad(of)(padded)
    np.testing.assert_allclose(value, by_loop(Z[mask], LABELS[mask], 0.5), **TOLERANCE)
    assert (gradient[~mask] == 0).all()
    assert np.isfinite(gradient).all()
    nothing = BATCH | {"mask": jnp.zeros(N, bool)}
    with jax.debug_nans(True):
        assert (jax.grad(lambda z: loss(z, nothing))(Z) == 0).all()


def test_an_anchor_without_positives_has_loss_0_under_jit():
    loss = cx.supervised_contrastive("label", temperature=0.5)
    of = jax.jit(lambda z, labels: loss(z, {"label": labels}))
    value, gradient = jax.value_and_grad(of)(Z[:, 0], LABELS)
    np.testing.assert_allclose(value, by_loop(Z[:, :1], LABELS, 0.5), **TOLERANCE)
    assert np.isfinite(gradient).all()
    alone = jax.grad(of)(Z[:, 0], jnp.arange(N))
    assert (alone == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_embeddings_of_any_length_are_finite_in_float32(scale):
    z = (scale * Z).astype(jnp.float32)
    loss = lambda z: cx.supervised_contrastive("label", temperature=1e-3)(z, BATCH)
    value, gradient = jax.value_and_grad(loss)(z)
    assert value.dtype == gradient.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    expected = np.log(N * VIEWS - 1) if scale == 0 else loss(Z)
    np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_half_precision_is_computed_in_float32():
    z = Z.astype(jnp.bfloat16)
    value = cx.supervised_contrastive("label")(z, BATCH)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, by_loop(z.astype(float), LABELS, 0.1), rtol=1e-5)


def test_temperature_may_be_traced():
    of = jax.jit(lambda tau: cx.supervised_contrastive("label", temperature=tau)(Z, BATCH))
    np.testing.assert_allclose(of(0.3), by_loop(Z, LABELS, 0.3), **TOLERANCE)


def objective(batch: Any, **options: Any) -> cx.Objective:
    predict = lambda w, batch: jnp.tanh(batch["x"] @ w)
    loss = cx.supervised_contrastive("label", temperature=0.5)
    return cx.Objective(loss, batch, model=predict, **options)


W = 0.5 * jax.random.normal(jax.random.key(2), (D, 3))


@pytest.mark.parametrize("product", [cx.hvp, cx.ggnvp])
def test_products_are_those_of_the_dense_matrices(product):
    whole = objective({"x": Z, "label": LABELS})
    model = lambda w: jnp.tanh(Z @ w.reshape(D, 3)).reshape(-1)
    loss = lambda z: cx.supervised_contrastive("label", temperature=0.5)(
        z.reshape(N, VIEWS, 3), BATCH
    )
    flat = W.reshape(-1)
    if product is cx.hvp:
        dense = jax.jit(jax.hessian(lambda w: loss(model(w))))(flat)
    else:
        jacobian = jax.jacobian(model)(flat)
        dense = jacobian.T @ jax.jit(jax.hessian(loss))(model(flat)) @ jacobian
    v = jnp.cos(jnp.arange(flat.size))
    found = jax.jit(lambda w: product(whole, w)(v.reshape(W.shape)))(W)
    np.testing.assert_allclose(found.reshape(-1), dense @ v, rtol=1e-10, atol=1e-10)


def test_micro_batches_have_the_negatives_of_their_own():
    batch = {"x": Z, "label": LABELS}
    pieces = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(3)]
    expected = np.mean([objective(piece)(W) for piece in pieces])
    np.testing.assert_allclose(objective(batch, microbatch=2)(W), expected, **TOLERANCE)


supervised: Any = cx.supervised_contrastive
ERRORS: list[tuple[Any, str]] = [
    (lambda: supervised("label", temperature=0.0), "must be positive and finite"),
    (lambda: supervised("label", temperature=-1.0), "is -1.0"),
    (lambda: supervised("label", temperature="0.1"), "number or a traced scalar"),
    (lambda: supervised(LABELS), "a key of the batch or a callable"),
    (lambda: supervised("label")(Z, {"label": LABELS[:5]}), "[6] for the embedd"),
    (
        lambda: supervised("label")(Z, {"label": jnp.repeat(LABELS, 2)}),
        "has the shape [12]",
    ),
    (
        lambda: supervised("label")(Z, {"label": jax.nn.one_hot(LABELS, 3)}),
        'lambda batch: batch["label"].argmax(-1)',
    ),
    (lambda: supervised("class")(Z, BATCH), "'class' of the batch, which does not"),
    (lambda: supervised("label")((Z, Z), BATCH), "one real floating array"),
    (lambda: supervised("label")(Z[0, 0], BATCH), "[n, views, d]"),
    (lambda: supervised()(Z[:, 0], BATCH), "have a single view"),
    (lambda: supervised("label")(Z[:, 0], BATCH), "class 2 has a single example"),
    (lambda: supervised()(Z[:1], {}), "a single one"),
    (
        lambda: supervised("label", mask="label")(Z, BATCH),
        "True where a target counts",
    ),
    (
        lambda: cx.empirical_fvp(objective({"x": Z, "label": LABELS}), W)(W),
        "no meaning for single examples",
    ),
    (lambda: cx.fvp(objective({"x": Z, "label": LABELS}), W), "does not define a distribution"),
]


@pytest.mark.parametrize(("make", "cause"), ERRORS, ids=[cause for _, cause in ERRORS])
def test_what_cannot_be_right_is_refused(make, cause):
    with pytest.raises((ValueError, TypeError), match=re.escape(cause)):
        make()


def test_a_masked_class_of_one_example_is_no_error():
    mask = LABELS != 2
    loss = cx.supervised_contrastive("label", mask="mask", temperature=0.5)
    found = loss(Z[:, 0], BATCH | {"mask": mask})
    expected = by_loop(Z[mask][:, :1], LABELS[mask], 0.5)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
