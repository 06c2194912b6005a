"""Finite differences of gradients: their step, the rounding that it follows, exact cases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusing_layers import call, halving_kernel, kernel
from small_problems import flat, quick_jit

import curvax as cx
from curvax.curvature.finite_differences import differences, largest_singular_value
from curvax.curvature.working_precision import rounding

# Differences follow the precision.

SIZES = (20, 32, 32, 5)


def network() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [
        jax.random.normal(key, (n, m), jnp.float64) / np.sqrt(n)
        for key, n, m in zip(keys, SIZES, SIZES[1:])
    ]
    return [{"w": kernel, "b": jnp.zeros(kernel.shape[1])} for kernel in kernels]


def network_loss(params: Any, dtype: Any) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), (64, SIZES[0])).astype(dtype)
    label = jax.random.randint(jax.random.key(2), (64,), 0, SIZES[-1])
    for number, p in enumerate(params):
        x = x @ p["w"].astype(dtype) + p["b"].astype(dtype)[None]
        x = x if number == 2 else jnp.tanh(x)
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
    return optax.losses.softmax_cross_entropy_with_integer_labels(x, label).mean()


# Of the parameters, of the products, and a bound a little above what the docstring states.
KINDS = {
    "float64": (jnp.float64, jnp.float64, 2e-10),
    "float32": (jnp.float32, jnp.float32, 8e-5),
    "float16 in float32": (jnp.float32, jnp.float16, 2.5e-2),
    "bfloat16 in float32": (jnp.float32, jnp.bfloat16, 9e-2),
    "bfloat16 in float64": (jnp.float64, jnp.bfloat16, 9e-2),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, 9e-2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_step_of_finite_differences_follows_the_precision_of_the_products(kind):
    stored, computed, bound = KINDS[kind]
    params = jax.tree.map(lambda x: x.astype(stored), network())
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    loss = lambda p: network_loss(p, computed)
    signs = cx.rademacher(jax.random.key(3), wide)
    gradient = jax.grad(network_loss)(wide, jnp.float64)
    product = quick_jit(lambda p, v: cx.hvp(loss, p, mode="finite-differences")(v))
    exact = quick_jit(lambda p, v: cx.hvp(lambda q: network_loss(q, jnp.float64), p)(v))
    for v in (signs, gradient):
        found, expected = flat(product(params, v)), flat(exact(wide, v))
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


def test_rounding_is_that_of_operations_between_parameters_and_results():
    w, half, preset = jnp.ones((3, 3), jnp.float32), jnp.bfloat16, jax.lax.DotAlgorithmPreset
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    data = jnp.sin(jnp.ones((3, 3), half))
    rounded = lambda w: w.astype(half).astype(jnp.float32)
    scanned = lambda w: jax.lax.scan(lambda c, _: (rounded(c), None), w, length=2)[0]
    # Rounded on the way around, two turns before the end.
    turn = lambda c, x: ((c[1], jnp.sin(c[2].astype(jnp.float32)), c[0].astype(half)), x)
    carried = lambda w: jax.lax.scan(turn, (w, w, jnp.zeros_like(w, half)), None, length=3)[0][0]
    summed = lambda w: jax.lax.scan(
        lambda c, x: (c + w * x.astype(c.dtype), jnp.cos(w).astype(half)), w, jnp.stack([data])
    )[0]
    branched = lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w, rounded, w)
    cases: list[tuple[Callable[[jax.Array], Any], float]] = [
        (lambda w: w @ w, eps(jnp.float32)),
        (lambda w: w.astype(half) @ w.astype(half), eps(half)),
        (lambda w: jax.jit(lambda w: jnp.sum(w.astype(jnp.float16)))(w), eps(jnp.float16)),
        (scanned, eps(half)),
        (branched, eps(half)),
        (lambda w: kernel(w.astype(half)).astype(jnp.float32), eps(half)),
        (lambda w: call(halving_kernel, w), eps(half)),
        (lambda w: jax.lax.reduce_precision(w, 8, 5), 2.0**-5),
        (lambda w: jnp.dot(w, w, precision=preset.TF32_TF32_F32), 2.0**-10),
        (lambda w: jnp.dot(w, w, precision=preset.BF16_BF16_F32_X3), eps(jnp.float32)),
        (carried, eps(half)),
        # What does not depend on the parameters, and what nothing depends on.
        (lambda w: w @ jnp.cos(data).astype(jnp.float32), eps(jnp.float32)),
        (summed, eps(jnp.float32)),
        (lambda w: (w.astype(half), w)[1], eps(jnp.float32)),
        (lambda w: jax.jit(lambda w: (w.astype(half), w))(w)[1], eps(jnp.float32)),
    ]
    for f, expected in cases:
        assert rounding(f, w) == expected
    assert rounding(lambda w: w.astype(jnp.float32), w.astype(half)) == eps(half)


def test_finite_differences_are_exact_for_a_quadratic_and_skip_integers():
    f = lambda p: {"square": p["a"] ** 2, "count": jnp.array([1, 2])}
    p, v = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([3.0, 0.5])}
    found = differences(f, p)(v)
    np.testing.assert_allclose(found["square"], 2 * p["a"] * v["a"], rtol=1e-9)
    assert found["count"].dtype == jax.dtypes.float0


def test_largest_singular_value_is_estimated_from_the_leaves():
    a, b = jax.random.normal(jax.random.key(0), (6,)), jax.random.normal(jax.random.key(1), (4,))
    one = jnp.zeros((5, 7)).at[2, 3].set(-2.0)
    wide = jax.random.normal(jax.random.key(2), (40, 30))
    largest = lambda *leaves: largest_singular_value(leaves)
    np.testing.assert_allclose(
        largest(jnp.outer(a, b)), jnp.linalg.norm(a) * jnp.linalg.norm(b), rtol=1e-12
    )
    np.testing.assert_allclose(largest(one, jnp.ones(3)), 2.0)
    np.testing.assert_allclose(largest(), 0.0)
    np.testing.assert_allclose(largest(wide), jnp.linalg.norm(wide, 2), rtol=0.2)
