"""Activations inside a model against those computed by hand from captured intermediates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.analysis import activation_norms, active_fraction, attention_maps
from curvax.analysis.activations.intermediates import intermediates
from curvax.flax_bridge import named_modules, nnx_loss
from curvax.models import build

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 8, 1)))


def objective_of(model, x, **options):
    loss = lambda outputs, batch: jnp.mean(outputs)
    return cx.Objective(loss, {"x": x}, model=lambda p, b: model(p, b["x"]), **options)


def drawn(model, x):
    """Random parameters of a linen model, without running it."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)


def linen(name, x=IMAGES, **options):
    model = build(name, 3, **options)
    return objective_of(lambda p, x: model.apply({"params": p}, x), x), drawn(model, x), model


# Recognition.

UNITS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "silu": jax.nn.swish,
    "hard_silu": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "gelu": jax.nn.gelu,
    "gelu exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu by hand": lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / 2**0.5)),
    "silu by hand": lambda x: x * jax.nn.sigmoid(x),
    "gelu in bfloat16": lambda x: jax.nn.gelu(x.astype(jnp.bfloat16)).astype(x.dtype),
}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, jax.checkpoint, jax.vmap],
    ids=["plain", "jit", "checkpoint", "vmap"],
)
def test_activation_is_found_with_its_input_and_output(name, wrap):
    f = wrap(UNITS[name])
    found = intermediates(lambda x: jnp.sin(f(x @ jnp.ones((3, 2)))), X)
    ((*_, kind),) = found
    assert kind == name.split()[0]
    (seen,) = found.values()
    tol = 1e-2 if "bfloat16" in name else 1e-12
    np.testing.assert_allclose(np.asarray(seen.before, float), X @ np.ones((3, 2)), rtol=tol)
    expected = UNITS[name](X @ jnp.ones((3, 2)))
    np.testing.assert_allclose(np.asarray(seen.after, float), expected, rtol=tol, atol=1e-12)


@pytest.mark.parametrize(
    "f",
    [
        jnp.tanh,
        jax.nn.sigmoid,
        jax.nn.softplus,
        jax.nn.log_softmax,
        jax.nn.standardize,
        lambda x: jax.nn.glu(jnp.concatenate([x, 2 * x], axis=1)),
        lambda x: x * jnp.tanh(x.T @ x)[0][None],
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(2 * x)),
    ],
    ids=["tanh", "sigmoid", "softplus", "log_softmax", "standardize", "glu", "gate", "ratio"],
)
def test_other_functions_are_not_taken_for_activations(f):
    assert not intermediates(f, X)


def test_unrolled_and_scanned_loops_have_the_same_activations():
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3, 3)))

    def layer(x, w):
        with jax.named_scope("layer"):
            return jax.nn.gelu(jax.nn.relu(x @ w)), None

    def unrolled(x):
        for n in range(3):
            with jax.named_scope(f"layer_{n}"):
                x = jax.nn.gelu(jax.nn.relu(x @ weights[n]))
        return x

    scanned = intermediates(lambda x: jax.lax.scan(layer, x, weights)[0], X)
    apart = intermediates(unrolled, X)
    kinds = [(f"layer_{n}", kind) for n in range(3) for kind in ("relu", "gelu")]
    assert list(scanned) == list(apart) == kinds
    for x, y in zip(jax.tree.leaves(scanned), jax.tree.leaves(apart)):
        np.testing.assert_allclose(x, y, rtol=1e-12)


# Linen.


def test_linen_activations_equal_captured_intermediates():
    objective, params, model = linen("mixer_tiny", depth=2, scan=False)
    _, state = model.apply({"params": params}, IMAGES, capture_intermediates=True)
    shares = active_fraction(objective, params)
    norms = activation_norms(objective, params)
    names = [f"block_{n}/{kind}_mlp/gelu" for n in (0, 1) for kind in ("token", "channel")]
    assert list(shares) == list(norms) == names
    for name in names:
        block, mlp, _ = name.split("/")
        (h,) = state["intermediates"][block][mlp]["Dense_0"]["__call__"]
        np.testing.assert_allclose(shares[name], np.mean(h > 0))
        a = nn.gelu(h).reshape(len(h), -1)
        np.testing.assert_allclose(norms[name], np.mean(np.linalg.norm(a, axis=1)))


@pytest.mark.parametrize("options", [{}, {"remat": True}])
def test_scanned_layers_have_the_names_of_unrolled_ones(options):
    small = dict(depth=2, width=8, mlp_width=12)
    objective, params, _ = linen("vit_tiny", **small, **options)
    other, _, _ = linen("vit_tiny", **small, scan=False)
    layers = {f"block_{n}": jax.tree.map(lambda x, n=n: x[n], params["block"]) for n in (0, 1)}
    apart = {name: x for name, x in params.items() if name != "block"} | layers
    for measure in (active_fraction, activation_norms, attention_maps):
        found, expected = measure(objective, params), measure(other, apart)
        assert list(found) == list(expected)
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9)


def test_attention_map_is_the_softmax_of_queries_and_keys():
    layer = nn.MultiHeadDotProductAttention(2, qkv_features=6)
    keys = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5, 4)))
    queries = jnp.asarray(np.random.default_rng(5).normal(size=(3, 7, 4)))
    model = lambda p, x: layer.apply({"params": p}, queries, x)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), queries, keys)["params"]
    params = jax.tree.map(lambda s: jnp.sin(jnp.arange(s.size) * 1.3).reshape(s.shape), shapes)
    (found,) = attention_maps(objective_of(model, keys), params).values()
    project = lambda x, p: np.einsum("ntc,chd->nthd", x, p["kernel"]) + np.asarray(p["bias"])
    q, k = project(queries, params["query"]), project(keys, params["key"])
    scores = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k) / 3**0.5)
    np.testing.assert_allclose(found, scores / scores.sum(-1, keepdims=True), rtol=1e-9)


# Other frameworks.


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.dense(self.attention(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = Block(rngs)
        self.rest = getattr(nnx, "List", list)([Block(rngs), Block(rngs)])

    def __call__(self, x):
        x = self.first(x)
        for block in self.rest:
            x = block(x)
        return jnp.mean(x, axis=(1, 2))


TOKENS = jnp.asarray(np.random.default_rng(6).normal(size=(3, 5, 4)))


def test_nnx_activations_are_named_by_their_modules():
    model = Net(nnx.Rngs(0))
    predict, params = nnx_loss(model, named_modules(lambda model, batch: model(batch["x"])))
    loss = lambda outputs, batch: jnp.mean(outputs)
    objective = cx.Objective(loss, {"x": TOKENS}, model=predict, has_aux=True)
    shares = active_fraction(objective, params)
    assert list(shares) == ["first/gelu", "rest/0/gelu", "rest/1/gelu"]
    x = TOKENS
    for name, block in zip(shares, (model.first, *model.rest)):
        h = block.dense(block.attention(x))
        np.testing.assert_allclose(shares[name], np.mean(h > 0), atol=1e-6)
        x = x + nnx.gelu(h)
    maps = attention_maps(objective, params)
    assert list(maps) == ["first/attention", "rest/0/attention", "rest/1/attention"]
    for weights in maps.values():
        assert weights.shape == (3, 2, 5, 5)
        np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
    assert "named_modules" not in Block.__call__.__qualname__


def test_nnx_modules_in_a_scan_are_named_by_their_stack():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

        def __call__(self, x):
            forward = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0),
                               out_axes=nnx.Carry)  # fmt: skip
            return jnp.mean(forward(x, self.blocks), axis=(1, 2))

    predict, params = nnx_loss(
        Stacked(nnx.Rngs(0)), named_modules(lambda model, batch: model(batch["x"]))
    )
    loss = lambda outputs, batch: jnp.mean(outputs)
    objective = cx.Objective(loss, {"x": TOKENS}, model=predict, has_aux=True)
    assert list(active_fraction(objective, params)) == [f"blocks_{n}/gelu" for n in range(3)]


def test_named_modules_restores_methods_when_the_model_raises():
    before = Block.__call__

    def fails(model, batch):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        named_modules(fails)(Net(nnx.Rngs(0)), None)
    assert Block.__call__ is before


def test_equinox_activations_are_found_without_module_names():
    model = eqx.nn.MLP(3, 1, 5, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    run = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    found = active_fraction(objective_of(run, X), params)
    h = X @ params.layers[0].weight.T + params.layers[0].bias[None]
    assert list(found) == ["relu", "relu_1"]
    np.testing.assert_allclose(found["relu"], np.mean(h > 0), atol=1e-6)


# Batches, devices, losses.


def dense(params, x):
    return jax.nn.relu(x @ params["w"])


WEIGHTS = {"w": jnp.asarray(np.random.default_rng(7).normal(size=(3, 6)))}


def test_active_fraction_agrees_over_microbatches_devices_and_a_plain_loss():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(16, 3)))
    expected = {"relu": float(np.mean(x @ WEIGHTS["w"] > 0))}
    loss = cx.Objective(lambda p, b: jnp.mean(dense(p, b["x"])), {"x": x})
    parts = objective_of(dense, x, microbatch=4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(params, x, **over):
        return active_fraction(objective_of(dense, x), params, **over)

    mapped = lambda run: jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )
    on_devices = mapped(lambda p, x: run(p, x, mean_over="data"))(WEIGHTS, x)
    for found in (active_fraction(loss, WEIGHTS), active_fraction(parts, WEIGHTS), on_devices):
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    with pytest.raises(ValueError, match="mean_over='data'"):
        mapped(run)(WEIGHTS, x)


def test_model_without_activations_raises_with_what_was_searched():
    with pytest.raises(ValueError, match=r"`active_fraction` looks for .* found nothing"):
        active_fraction(objective_of(lambda p, x: x @ p["w"], X), WEIGHTS)
    with pytest.raises(ValueError, match=r"`attention_maps` looks for .* found `relu`"):
        attention_maps(objective_of(dense, X), WEIGHTS)
