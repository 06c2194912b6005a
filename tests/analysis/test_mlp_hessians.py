"""The Hessian of a perceptron by recursion, against the dense one of each example."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from small_problems import quick_jit

import curvax as cx
from curvax.analysis import mlp_block_hessians

LAYERS = ["first", "deep/second", "head"]
N, WIDTHS = 4, (5, 4, 3, 2)


def make_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    first, second, head = ({"kernel": draw(n, m), "bias": draw(m)} for n, m in pairwise(WIDTHS))
    del second["bias"]
    return {"first": first, "deep": {"second": second}, "head": head}


def make_batch():
    rng = np.random.default_rng(1)
    return {"x": jnp.asarray(rng.normal(size=(N, WIDTHS[0]))), "y": jnp.arange(N) % WIDTHS[-1]}


def perceptron(activation):
    def model(params, batch):
        dense = lambda x, p: x @ p["kernel"] + p.get("bias", jnp.zeros(1))[None]
        h = activation(dense(batch["x"], params["first"]))
        return dense(activation(dense(h, params["deep"]["second"])), params["head"])

    return model


def objective_of(activation=jax.nn.gelu, loss=None):
    loss = cx.categorical("y") if loss is None else loss
    return cx.Objective(loss, make_batch(), model=perceptron(activation))


def squared(z, batch):
    return jnp.mean(jnp.sum((z - jax.nn.one_hot(batch["y"], WIDTHS[-1])) ** 2, axis=1) ** 2)


def dense_block(objective, params, path, example):
    """∇² of one example's loss in the kernel at a path."""
    one = objective.on(jax.tree.map(lambda x: x[example : example + 1], objective.batch))
    outer, name = params, path.split("/")
    for step in name:
        outer = outer[step]
    flat, unravel = ravel_pytree(outer["kernel"])

    def at(v):
        changed = jax.tree.map(lambda x: x, params)
        inner = changed
        for step in name:
            inner = inner[step]
        inner["kernel"] = unravel(v)
        return one(changed)

    return np.asarray(quick_jit(jax.jacfwd(jax.jacfwd(at)))(flat))


@pytest.mark.parametrize(
    ("activation", "loss"),
    [(jax.nn.gelu, None), (jax.nn.relu, None), (jnp.tanh, squared)],
    ids=["gelu", "relu", "tanh, any loss"],
)
def test_every_block_of_every_example_is_the_dense_one(activation, loss):
    objective, params = objective_of(activation, loss), make_params()
    found = mlp_block_hessians(objective, params, LAYERS, "x", activation=activation)
    assert list(found) == LAYERS
    for path, block in found.items():
        for example in range(N):
            expected = dense_block(objective, params, path, example)
            np.testing.assert_allclose(block.matrix[example], expected, atol=1e-12)
            top = np.linalg.eigvalsh(expected)[-1]
            np.testing.assert_allclose(block.largest[example], top, atol=1e-11)


def test_mean_of_example_blocks_is_the_block_of_the_mean_loss():
    objective, params = objective_of(), make_params()
    found = mlp_block_hessians(objective, params, LAYERS, "x")["first"]
    flat, unravel = ravel_pytree(params["first"]["kernel"])
    loss = lambda v: objective(params | {"first": params["first"] | {"kernel": unravel(v)}})
    expected = jax.jacfwd(jax.jacfwd(loss))(flat)
    np.testing.assert_allclose(jnp.mean(found.matrix, axis=0), expected, atol=1e-12)


def test_the_factors_are_those_of_the_recursion():
    params, x = make_params(), np.asarray(make_batch()["x"])
    found = mlp_block_hessians(objective_of(), params, LAYERS, "x")
    h = x @ params["first"]["kernel"] + params["first"]["bias"][None]
    a = np.asarray(jax.nn.gelu(h))
    slopes = jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(h)
    first, second, head = found.values()
    np.testing.assert_allclose(first.input_norm, np.linalg.norm(x, axis=1))
    np.testing.assert_allclose(second.input_norm, np.linalg.norm(a, axis=1))
    np.testing.assert_allclose(first.slope_norm, np.linalg.norm(slopes, axis=1))
    np.testing.assert_allclose(first.active, np.mean(h > 0, axis=1))
    kernel = params["deep"]["second"]["kernel"]
    np.testing.assert_allclose(first.weight_norm, np.linalg.norm(kernel, 2))
    assert float(head.weight_norm) == 1
    assert not np.any(head.bend_norm)
    rest = second.hessian - slopes_of_second(params, a, head.hessian)
    off_diagonal = rest * (1 - jnp.eye(WIDTHS[2]))[None]
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-12)
    np.testing.assert_allclose(second.bend_norm, np.linalg.norm(rest, axis=(1, 2)), rtol=1e-9)


def slopes_of_second(params, a, above):
    """B Wᵀ H W B of the second layer."""
    h = a @ params["deep"]["second"]["kernel"]
    b = jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(h)
    k = params["head"]["kernel"]
    return jnp.einsum("no,oc,ncd,pd,np->nop", b, k, above, k, b)


def test_blocks_of_a_flax_perceptron_are_named_by_its_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(3, use_bias=False)(x.reshape(len(x), -1))
            return nn.Dense(2)(nn.relu(h))

    batch = make_batch()
    batch["x"] = batch["x"].reshape(N, WIDTHS[0], 1)
    params = Net().init(jax.random.key(0), batch["x"])["params"]
    model = lambda params, batch: Net().apply({"params": params}, batch["x"])
    objective = cx.Objective(cx.categorical("y"), batch, model=model)
    found = mlp_block_hessians(
        objective, params, ["Dense_0", "Dense_1"], lambda batch: batch["x"], activation=nn.relu
    )
    np.testing.assert_allclose(
        found["Dense_0"].matrix[1], dense_block(objective, params, "Dense_0", 1), atol=1e-5
    )


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (["first", "head"], {}, "cannot follow `first`"),
        (LAYERS, {"activation": jax.nn.relu}, "outputs differ from those of the `model`"),
        (["first", "deep", "head"], {}, "`deep` has no kernel"),
    ],
)
def test_layers_that_are_not_the_model_are_refused(layers, options, message):
    with pytest.raises(ValueError, match=message):
        mlp_block_hessians(objective_of(), make_params(), layers, "x", **options)
