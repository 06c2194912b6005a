"""Kronecker factors by identities: where they are exact, and what leaves them unchanged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from kronecker_problems import N, assert_same, normal, regression
from small_problems import quick_jit

from curvax.curvature import fvp
from curvax.curvature.kronecker import kronecker_factors
from curvax.linalg import decompositions


def restricted(tree: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: x if k in names else jax.tree.map(jnp.zeros_like, x) for k, x in tree.items()}


# Exact cases.


@jax.custom_jvp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


dense.defjvps(lambda dx, y, x, k: dx @ k, lambda dk, y, x, k: x @ dk)


def deep_linear(p: Any, batch: Any) -> jax.Array:
    """Eight kernels, each by another way into a product, and four biases."""
    h = batch["x"] @ p["plain"] + p["plain_bias"][None]
    h = jnp.einsum("nd,dhk->nhk", h, p["heads"]) + p["heads_bias"][None]
    h = jnp.einsum("nhk,hko->no", h, p["joined"])
    h = h @ p["transposed"].T
    h = jax.jit(lambda x, k: x @ k)(h, p["called"]) + p["called_bias"].reshape(1, -1)
    h = dense(h, p["custom"])
    h = jax.checkpoint(lambda x, k, b: x @ k.reshape(3, 3) + b[None])(h, p["flat"], p["flat_bias"])
    h = jnp.transpose(lax.dot_general(0.5 * p["left"], h, (((0,), (1,)), ((), ()))))
    return h


def deep_linear_params() -> dict[str, jax.Array]:
    shapes = {
        "plain": (4, 3), "plain_bias": (3,), "heads": (3, 2, 2), "heads_bias": (2, 2),
        "joined": (2, 2, 3), "transposed": (4, 3), "called": (4, 3), "called_bias": (3,),
        "custom": (3, 3), "flat": (9,), "flat_bias": (3,), "left": (3, 2),
    }  # fmt: skip
    return {name: normal(n, *shape) for n, (name, shape) in enumerate(shapes.items())}


BLOCKS = [
    ("plain", "plain_bias"), ("heads", "heads_bias"), ("joined",), ("transposed",),
    ("called", "called_bias"), ("custom",), ("flat", "flat_bias"), ("left",),
]  # fmt: skip


def test_blocks_of_a_deep_linear_network_are_exact():
    params, batch = deep_linear_params(), {"x": normal(20, N, 4)}
    objective = regression(deep_linear, params, batch)
    v = jax.tree.map(lambda x: normal(x.size, *x.shape), params)

    def compare(params: Any) -> Any:
        factors, product = kronecker_factors(objective, params), fvp(objective, params)
        parts = [restricted(product(restricted(v, names)), names) for names in BLOCKS]
        return factors, factors(v), jax.tree.map(lambda *xs: sum(xs), *parts)

    factors, found, expected = quick_jit(compare)(params)
    assert_same(found, expected)
    treatments = {name: line.treatment for name, line in factors.report().items()}
    kinds = {name: "bias" if name.endswith("bias") else "kronecker" for name in params}
    assert treatments == kinds
    assert factors.factors_of("heads")[0].shape == (4, 4)  # three inputs and the bias
    assert factors.factors_of("joined")[0].shape == (4, 4)  # two axes of inputs


def dense_matrix(apply: Any, like: Any) -> jax.Array:
    """The matrix of a symmetric map of trees."""
    point, unravel = ravel_pytree(like)
    return jax.vmap(lambda e: ravel_pytree(apply(unravel(e)))[0])(jnp.eye(point.size))


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_solutions_and_powers_are_those_of_the_dense_matrix(bias):
    params = {
        "w": normal(0, 3, 2),
        "b": normal(1, 2),
        "scale": normal(2, 2),
        "table": normal(3, 5, 3),
    }
    batch = {"x": jnp.arange(N) % 4, "z": normal(4, N, 3)}

    def model(p: Any, batch: Any) -> jax.Array:
        h = p["table"][batch["x"]] + batch["z"]
        return jnp.tanh(h @ p["w"] + p["b"][None]) * p["scale"][None]

    objective = regression(model, params, batch)

    def compute(params: Any) -> Any:
        factors = kronecker_factors(objective, params, bias=bias)
        corrected = factors.corrected(objective, params)
        maps = [factors, lambda v: factors.solve(v, 0.1), lambda v: factors.power(v, -0.5, 0.1),
                lambda v: factors.power(v, 0.5), lambda v: factors.solve(v, 0.0),
                corrected, lambda v: corrected.solve(v, 0.1)]  # fmt: skip
        return [dense_matrix(f, params) for f in maps], factors.trace(), corrected.trace()

    (c, solve, power, root, pinv, e, e_solve), trace, e_trace = quick_jit(compute)(params)
    np.testing.assert_allclose(c, c.T, atol=1e-14)
    np.testing.assert_allclose(trace, np.trace(c), rtol=1e-12)
    np.testing.assert_allclose(e_trace, np.trace(e), rtol=1e-12)
    values, vectors = np.linalg.eigh(c + 0.1 * np.eye(len(c)))
    np.testing.assert_allclose(solve, vectors / values @ vectors.T, atol=1e-10)
    np.testing.assert_allclose(power, vectors / np.sqrt(values) @ vectors.T, atol=1e-10)
    np.testing.assert_allclose(root @ root, c, atol=1e-10)
    np.testing.assert_allclose(e_solve @ (e + 0.1 * np.eye(len(e))), np.eye(len(e)), atol=1e-10)
    np.testing.assert_allclose(pinv @ c @ pinv, pinv, atol=1e-7 * np.abs(pinv).max())


# Convolutions.

NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "same": dict(padding="SAME"),
    "strided": dict(window_strides=(2, 1), padding=((1, 0), (0, 2))),
    "dilated": dict(padding="VALID", rhs_dilation=(2, 1)),
    "transposed": dict(
        padding=((1, 1), (1, 1)), lhs_dilation=(2, 2), dimension_numbers=("NHWC", "OIHW", "NCHW")
    ),
    "grouped": dict(window_strides=(1, 2), padding="SAME", feature_group_count=2),
    "depthwise": dict(
        padding="SAME", feature_group_count=4, dimension_numbers=("NHWC", "OIHW", "NHWC")
    ),
}
CONVOLUTIONS = {
    name: dict(window_strides=(1, 1), dimension_numbers=NHWC) | options
    for name, options in CONVOLUTIONS.items()
}


def kernel_shape(name: str) -> tuple[int, ...]:
    options = CONVOLUTIONS[name]
    inputs = 4 // options.get("feature_group_count", 1)
    sizes = {"H": 2, "W": 3, "I": inputs, "O": 4}
    return tuple(sizes[letter] for letter in options["dimension_numbers"][1])


def convolve(name: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, **CONVOLUTIONS[name])


def readout(y: jax.Array) -> jax.Array:
    """Two linear outputs of an example."""
    r = normal(9, y[0].size, 2)
    return y.reshape(len(y), -1) @ r


def test_factors_of_convolutions_are_those_of_their_derivatives():
    params = {name: normal(n, *kernel_shape(name)) for n, name in enumerate(CONVOLUTIONS)}
    x = normal(8, 2, 4, 3, 4)
    model = lambda p, batch: sum(readout(convolve(k, batch["x"], p[k])) for k in p)
    objective = regression(model, params, {"x": x})

    def derivatives(name: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the results in the kernel, and of the two outputs in the results."""
        y, pull = jax.vjp(readout, convolve(name, x, kernel))
        back = [pull(jnp.zeros_like(y).at[:, k].set(1.0))[0] for k in range(2)]
        return jax.jacfwd(lambda k: convolve(name, x, k))(kernel), jnp.stack(back)

    def compute(params: Any) -> Any:
        factors = kronecker_factors(objective, params)
        found = {name: derivatives(name, kernel) for name, kernel in params.items()}
        corrected = factors.corrected(objective, params)
        jacobian, pulled = ({k: x[n] for k, x in found.items()} for n in range(2))
        return factors, corrected.trace(), jacobian, pulled

    factors, total, jacobian, pulled = quick_jit(compute)(params)
    for name in CONVOLUTIONS:
        groups = CONVOLUTIONS[name].get("feature_group_count", 1)
        _, kernel, out = CONVOLUTIONS[name]["dimension_numbers"]
        # ∂y[n, p, o] / ∂k[i, h, w, o'], with o = o' = (group, 0).
        j = np.moveaxis(jacobian[name], out.index("C"), 3)
        j = np.moveaxis(j, 4 + kernel.index("O"), 4)
        first = np.arange(groups) * (4 // groups)
        a = np.stack([j[..., o, o, :, :, :] for o in first])
        a = a.reshape(groups, -1, int(np.prod(a.shape[4:])))
        expected = np.einsum("gri,grj->gij", a, a) / a.shape[1]
        found, outputs = factors.factors_of(name)
        assert_same(np.reshape(found, expected.shape), expected)
        g = np.moveaxis(pulled[name], 1 + out.index("C"), 4).reshape(-1, groups, 4 // groups)
        expected = np.einsum("rgo,rgq->goq", g, g) / 2
        assert_same(np.reshape(outputs, expected.shape), expected)
    full = [
        np.einsum("knyxc,nyxc...->kn...", np.asarray(pulled[n]), np.asarray(jacobian[n]))
        for n in params
    ]
    trace = sum(np.sum(np.square(x)) for x in full) / 2
    np.testing.assert_allclose(total, trace, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_inverse_by_halves_is_the_inverse(size):
    """Of stacked matrices, also where a half has an odd size."""
    rows = normal(3, 2, size, 2 * size)
    matrices = rows @ jnp.swapaxes(rows, -1, -2) / size + 0.1 * jnp.eye(size)[None]
    found = quick_jit(lambda m: decompositions.inverses(m)[0])(matrices)
    np.testing.assert_allclose(found, np.linalg.inv(matrices), rtol=0, atol=1e-11)
    np.testing.assert_allclose(found, jnp.swapaxes(found, -1, -2), rtol=0, atol=1e-12)
