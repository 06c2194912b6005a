"""Axes of kernels for Optax's Muon: stacked and unrolled layers take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the model is Flax's: pip install 'curvax[flax]'")
import flax.linen as nn

import curvax
from curvax.flax_bridge import matrix_axes

X = jnp.ones((2, 3, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(x), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x = nn.Embed(5, 4)(jnp.zeros(x.shape[:2], int)) + nn.Conv(4, (3,))(x)
        return scan(name="block")(x)[0]


def test_kernels_are_matrices_and_other_leaves_are_not():
    variables = Stacked().init(jax.random.key(0), X)
    axes = matrix_axes(curvax.layout(Stacked(), variables, X))(variables["params"])
    number = optax.contrib.MuonDimensionNumbers
    attention = axes["block"]["MultiHeadDotProductAttention_0"]
    assert attention["query"] == {"bias": None, "kernel": number((1,), (2, 3))}
    assert attention["out"] == {"bias": None, "kernel": number((1, 2), (3,))}
    assert axes["block"]["Dense_0"] == {"bias": None, "kernel": number((1,), (2,))}
    assert axes["Conv_0"] == {"bias": None, "kernel": number((0, 1), (2,))}
    assert axes["Embed_0"] == {"embedding": None}
    assert axes["block"]["LayerNorm_0"] == {"bias": None, "scale": None}


def test_a_stack_takes_the_steps_of_its_layers():
    """Muon on the stack, and on every layer alone, by their gradients."""
    variables = Stacked().init(jax.random.key(0), X)
    params = variables["params"]
    axes = matrix_axes(curvax.layout(Stacked(), variables, X))
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=axes)
    grads = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    layer = lambda tree, n: jax.tree.map(lambda x: x[n], tree["block"])
    alone = {"params": layer(params, 0)}
    own = matrix_axes(curvax.layout(Block(), alone, X))
    single = optax.contrib.muon(0.1, muon_weight_dimension_numbers=own)
    for n in range(2):
        expected, _ = single.update(
            layer(grads, n), single.init(layer(params, n)), layer(params, n)
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), layer(updates, n), expected
        )


def test_parameters_outside_of_the_layout_are_refused():
    variables = Stacked().init(jax.random.key(0), X)
    axes = matrix_axes(curvax.layout(Stacked(), variables, X))
    with pytest.raises(KeyError, match="no parameter `other`"):
        axes({"other": jnp.ones(3)})
