"""PyramidNet and Shake-Shake: naive twins with a written-out backward pass, and their noise."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from model_twins import Layers, random_variables, run, with_statistics

import curvax
from curvax.models import build
from curvax.models.shaking import scaled, shake_drop, shake_shake

KEY = jax.random.key(3)


def images(n: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (n, 8, 8, 1))


@jax.custom_vjp
def noisy(x, alpha, beta):
    """α x, with the backward pass β of the papers."""
    return alpha * x


noisy.defvjp(lambda x, alpha, beta: (alpha * x, beta), lambda beta, g: (beta * g, None, None))


class Keys(nn.Module):
    """The first key of the module of this name."""

    block: str

    @nn.compact
    def __call__(self):
        return Drawn(name=self.block)()


class Drawn(nn.Module):
    @nn.compact
    def __call__(self):
        return self.make_rng("dropout")


def key_of(block):
    return Keys(block).apply({}, rngs={"dropout": KEY})


def uniforms(key, n, least):
    keys = jax.random.split(key)
    draw = lambda key, low: low + (1 - low) * jax.random.uniform(key, (n, 1, 1, 1))
    return [draw(key, low) for key, low in zip(keys, least, strict=True)]


class Pyramid(Layers):
    """PyramidNet of depth 11 with 16 + 2 k channels in its blocks k = 1, 2, 3."""

    def __call__(self, x):
        x = self.norm(self.conv(x, "conv"), "norm_stem")
        for k in (1, 2, 3):
            block, stride = f"stage{k - 1}_block0", min(k, 2)
            h = self.conv(self.norm(x, f"{block}/norm1"), f"{block}/conv1")
            h = self.conv(jax.nn.relu(self.norm(h, f"{block}/norm2")), f"{block}/conv2", stride)
            h = self.conv(jax.nn.relu(self.norm(h, f"{block}/norm3")), f"{block}/conv3")
            h = self.shaken(self.norm(h, f"{block}/norm4"), 1 - k / 6, block)
            n, side, _, channels = x.shape
            if stride == 2:
                x = x.reshape(n, side // 2, 2, side // 2, 2, channels).mean((2, 4))
            lacking = 4 * (16 + 2 * k) - channels
            x = h + jnp.concatenate([x, jnp.zeros((*h.shape[:-1], lacking))], -1)
        return self.dense(jax.nn.relu(self.norm(x, "norm")).mean((1, 2)), "head")

    def shaken(self, h, keep, block):
        if not self.train:
            return keep * h
        of_kept, of_noise = jax.random.split(key_of(block))
        b = jax.random.bernoulli(of_kept, keep, (len(h), 1, 1, 1))
        alpha, beta = uniforms(of_noise, len(h), (-1, 0))
        return noisy(h, b + alpha - b * alpha, b + beta - b * beta)


class TwoBranches(Layers):
    """Shake-Shake of depth 8."""

    def __call__(self, x):
        x = self.norm(self.conv(x, "conv"), "norm")
        for n in range(3):
            block, stride = f"stage{n}_block0", min(n + 1, 2)
            a, b = (self.branch(x, block, name, stride) for name in "ab")
            alpha = beta = 0.5
            if self.train:
                alpha, beta = uniforms(key_of(block), len(x), (0, 0))
            mixed = noisy(a, alpha, beta) + noisy(b, 1 - alpha, 1 - beta)
            moved = jnp.zeros_like(x).at[:, :-1, :-1].set(x[:, 1:, 1:])
            halves = [
                self.conv(side[:, ::stride, ::stride], f"{block}/conv_shortcut_{name}")
                for side, name in ((x, "a"), (moved, "b"))
            ]
            x = mixed + self.norm(jnp.concatenate(halves, -1), f"{block}/norm_shortcut")
        return self.dense(jax.nn.relu(x).mean((1, 2)), "head")

    def branch(self, x, block, name, stride):
        h = self.conv(jax.nn.relu(x), f"{block}/conv1_{name}", stride)
        h = self.conv(jax.nn.relu(self.norm(h, f"{block}/norm1_{name}")), f"{block}/conv2_{name}")
        return self.norm(h, f"{block}/norm2_{name}")


NETS: dict[str, Any] = {"pyramidnet11_6": Pyramid, "shakeshake8_2": TwoBranches}


def apply(model, variables, x, train, key=KEY):
    options = {"train": train, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
    return model.apply(variables, x, **options)[0]


def drawn(model, params, x, key):
    """The outputs in training of a model without batch statistics."""
    return model.apply({"params": params}, x, train=True, rngs={"dropout": key})


@partial(jax.jit, static_argnums=0)
def outputs_and_grads(outputs, variables):
    """The outputs, and the gradient of a loss of them."""

    def loss(params):
        logits = outputs({**variables, "params": params})
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(loss, has_aux=True)(variables["params"])[::-1]


@pytest.mark.parametrize("name", NETS)
def test_outputs_and_gradient_in_training_equal_those_of_the_naive_twin(name):
    x, model = images(), build(name, 2)
    variables = random_variables(model, x)
    found = outputs_and_grads(lambda v: apply(model, v, x, train=True), variables)
    expected = outputs_and_grads(lambda v: NETS[name](v, True, 1e-5)(x), variables)
    assert np.ptp(expected[0], axis=0).min() > 0.01
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_outputs_in_evaluation_equal_those_of_the_naive_twin(name):
    x, model = images(), build(name, 2)
    variables = with_statistics(random_variables(model, x))
    expected = jax.jit(lambda v: NETS[name](v, False, 1e-5)(x))(variables)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(run(model, variables, x), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "option"), [("shakeshake8_2", "remat"), ("pyramidnet11_6", "true_gradient")]
)
def test_option_changes_no_value_and_the_true_gradient_alone_changes_the_gradient(name, option):
    x, plain = images(), build(name, 2, norm="none")
    params = random_variables(plain, x)["params"]
    (values, grads), (same, others) = (
        outputs_and_grads(lambda v, m=m: drawn(m, v["params"], x, KEY), {"params": params})
        for m in (plain, build(name, 2, norm="none", **{option: True}))
    )
    np.testing.assert_allclose(same, values, rtol=1e-10)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), grads, others)
    largest = max(jax.tree.leaves(differences))
    assert largest < 1e-10 if option == "remat" else largest > 0.1


@pytest.mark.parametrize("name", NETS)
def test_both_passes_of_sam_have_the_same_noise(name):
    """At ρ = 0 they are at the same point, and only another draw could tell them apart."""
    x, model = images(), build(name, 2, norm="none")
    whole = random_variables(model, x)["params"]
    params = {"conv": whole["conv"]}  # few leaves, before all blocks
    batch, keys = {"input": x, "label": jnp.arange(3) % 2}, []
    compiled = jax.jit(lambda params, x, key: drawn(model, whole | params, x, key))

    def predict(params, batch, key):
        keys.append(jax.random.key_data(key))
        return compiled(params, batch["input"], key)

    def both(rho, key):
        loss = curvax.Objective(curvax.categorical("label"), batch, model=predict, key=key)
        value, grads = loss.value_and_grad(params)
        sam = curvax.sam_perturb(rho) | optax.identity()
        perturbed, _ = sam.update(grads, sam.init(params), params, value_fn=loss, value=value)
        return grads, perturbed

    first, again = both(jnp.array(0.0), KEY)
    assert len(keys) == 2
    np.testing.assert_array_equal(keys[0], keys[1])
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    for rho, key in ((0.1, KEY), (0.0, jax.random.key(4))):
        pairs = zip(*map(jax.tree.leaves, (both(jnp.array(rho), key)[1], first)), strict=True)
        assert max(float(np.abs(a - b).max()) for a, b in pairs) > 1e-4


def coefficients(function, *branches):
    """Values and derivatives by each branch, of branches of ones, for each image."""
    out, back = jax.vjp(lambda *x: function(KEY, *x), *branches)
    numbers = np.stack([np.asarray(x) for x in (out, *back(jnp.ones_like(out)))])
    np.testing.assert_array_equal(numbers, np.broadcast_to(numbers[:, :, :1, :1], numbers.shape))
    return numbers[:, :, 0, 0]


def test_shake_drop_replaces_dropped_branches_by_noise():
    ones = jnp.ones((4000, 2, 3))
    value, slope = coefficients(partial(shake_drop, keep=0.7, true_gradient=False), ones)
    kept = slope == 1
    # five standard errors of means of 4000 draws, or of 1200
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / 4000)
    np.testing.assert_allclose(value[kept], 1, rtol=1e-12)
    alpha, beta = value[~kept], slope[~kept]
    assert abs(alpha.mean()) < 5 * np.sqrt(1 / 3 / 1200)
    assert abs(beta.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 1200)
    assert -1 <= alpha.min() < -0.99
    assert 0.99 < alpha.max() < 1
    assert 0 <= beta.min() < 0.01
    assert abs(np.corrcoef(alpha, beta)[0, 1]) < 5 / np.sqrt(1200)
    same, itself = coefficients(partial(shake_drop, keep=0.7, true_gradient=True), ones)
    np.testing.assert_array_equal(same, itself)
    np.testing.assert_allclose(same, value, rtol=1e-12)


def test_shake_shake_mixes_with_weights_of_sum_one():
    a, b = jnp.ones((4000, 2, 3)), jnp.zeros((4000, 2, 3))
    alpha, beta, rest = coefficients(partial(shake_shake, true_gradient=False), a, b)
    np.testing.assert_allclose(beta + rest, 1, rtol=1e-12)
    for of in (alpha, beta):
        assert 0 <= of.min() < 0.01
        assert 0.99 < of.max() < 1
        assert abs(of.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 4000)
    assert abs(np.corrcoef(alpha, beta)[0, 1]) < 5 / np.sqrt(4000)
    same, itself, _ = coefficients(partial(shake_shake, true_gradient=True), a, b)
    np.testing.assert_array_equal(same, itself)


def test_products_are_of_the_loss_with_constant_noise():
    """Hessian and Gauss-Newton matrix of y = tanh(w₂ (β h + c)), c = (α - β) h(w₀) constant."""
    x, label = jnp.array([[0.3, -1.0], [0.8, 0.5]]), jnp.array([1, 0])
    alpha, beta = jnp.array([[0.9], [0.2]]), jnp.array([[0.1], [0.7]])
    start = jnp.asarray(np.random.default_rng(0).normal(size=8))
    hidden = lambda w: jnp.tanh(x @ w[:4].reshape(2, 2))
    outputs = lambda w, h: jnp.tanh(h @ w[4:].reshape(2, 2))
    constant = (alpha - beta) * hidden(start)
    likelihood = curvax.categorical("label")

    def matrix(product, model):
        loss = curvax.Objective(likelihood, {"label": label}, model=lambda w, batch: model(w))
        return jax.jit(jax.vmap(product(loss, start)))(jnp.eye(8))

    for product in (curvax.hvp, curvax.ggnvp):
        found = matrix(product, lambda w: outputs(w, scaled(hidden(w), alpha, beta)))
        expected = matrix(product, lambda w: outputs(w, beta * hidden(w) + constant))
        evaluated = matrix(product, lambda w: outputs(w, alpha * hidden(w)))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found, found.T, rtol=1e-10, atol=1e-14)
        assert np.abs(found - evaluated).max() > 1e-3


def test_batch_norm_of_a_pyramid_synced_over_an_axis_sees_the_whole_batch():
    x, options = images(4), {"shake_drop": 0.0}
    whole, local = (build("pyramidnet11_6", 2, sync_over=s, **options) for s in (None, "devices"))
    variables = random_variables(whole, x)
    shards = jax.jit(jax.vmap(partial(apply, local, variables, train=True), axis_name="devices"))
    expected = jax.jit(partial(apply, whole, variables, train=True))(x)
    np.testing.assert_allclose(shards(x.reshape(2, 2, 8, 8, 1)).reshape(4, 2), expected, rtol=1e-9)


def test_plain_pyramid_and_evaluation_draw_nothing():
    x = images()
    shaken, plain = (build("pyramidnet11_6", 2, norm="none", shake_drop=p) for p in (0.5, 0.0))
    variables = random_variables(plain, x)
    a, b = (run(plain, variables, x, train=train) for train in (True, False))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.abs(run(shaken, variables, x) - b).max() > 1e-3  # its expectation, without a key
