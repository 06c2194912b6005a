"""Roles of the parameters of Haiku, Equinox and nnx, by their names and classes."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import curvax as cx
from curvax import Signal, compat, spatial_average
from curvax.arithmetic import trees
from curvax.models import build
from curvax.parameter_roles.layouts import layout_of_tree

KEY = jax.random.key(0)


def normal(tree):
    """The tree with random entries in its arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])


def arrays(module):
    return normal(eqx.filter(module, eqx.is_inexact_array))


def tree_of(shapes):
    """A tree of arrays from one of shapes."""
    is_shape = lambda x: isinstance(x, tuple)
    return normal(jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, float), shapes, is_leaf=is_shape))


def averaged(params):
    """|D| after `spatial_average()`, for D the parameters themselves."""
    stage = spatial_average()
    signal, _ = stage.update(Signal(params, diagonal=params), stage.init(params), params)
    return signal.diagonal


def assert_windows(params, windows):
    """Each leaf named in `windows` is averaged along its axes, and no other."""
    for (path, found), x in zip(
        jax.tree.leaves_with_path(averaged(params)), jax.tree.leaves(params), strict=True
    ):
        axes = windows.get(jax.tree_util.keystr(path, simple=True, separator="/"), ())
        expected = jnp.abs(x).mean(axes, keepdims=True) if axes else jnp.abs(x)
        np.testing.assert_allclose(found, jnp.broadcast_to(expected, x.shape), rtol=1e-13)


HAIKU: dict[str, Any] = {
    "resnet/~/initial_conv": ({"w": (7, 7, 3, 4)}, (0, 1)),
    "net/conv1_d": ({"w": (5, 2, 4), "b": (4,)}, (0,)),
    "conv2_d": ({"w": (3, 3, 2, 4), "b": (4,)}, (0, 1)),
    "conv2_d_1": ({"w": (1, 3, 2, 4), "b": (4, 1, 1)}, (0, 1)),
    "conv3_d": ({"w": (2, 3, 3, 2, 4), "b": (4,)}, (0, 1, 2)),
    "conv2_d_transpose": ({"w": (3, 3, 4, 2), "b": (4,)}, (0, 1)),
    "depthwise_conv2_d": ({"w": (3, 3, 1, 4), "b": (4,)}, (0, 1)),
    "layer_stack/conv2_d": ({"w": (6, 3, 3, 2, 4), "b": (6, 4)}, (1, 2)),
    "layer_stack/linear": ({"w": (6, 3, 4), "b": (6, 4)}, ()),
    "linear": ({"w": (3, 4), "b": (4,)}, ()),
    "batch_norm": ({"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)}, ()),
    "embed": ({"embeddings": (7, 4)}, ()),
}


@pytest.mark.parametrize("module", HAIKU)
def test_haiku_windows_are_known_by_module_names(module):
    shapes, window = HAIKU[module]
    assert_windows(tree_of({module: shapes}), {f"{module}/w": window} if "w" in shapes else {})


def test_haiku_parameters_have_their_roles():
    shapes = {module: shapes for module, (shapes, _) in HAIKU.items()}
    facts = layout_of_tree(tree_of(shapes))
    assert facts["conv2_d_transpose", "w"][:5] == ("convolution", (3, 3, 4, 2), (0, 1), (3,), (2,))
    stacked = facts["layer_stack/conv2_d", "w"]
    assert (stacked.inputs, stacked.outputs, stacked.depth) == ((3,), (4,), (0,))
    assert facts["linear", "w"][:5] == ("dense", (3, 4), (), (0,), (1,))
    for path, kind in (
        (("linear", "b"), "bias"),
        (("batch_norm", "offset"), "norm"),
        (("embed", "embeddings"), "embedding"),
    ):
        assert facts[path].kind == kind


class Net(eqx.Module):
    stem: eqx.nn.Conv2d
    line: eqx.nn.Conv1d
    up: eqx.nn.ConvTranspose3d
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    words: eqx.nn.Embedding
    blocks: eqx.Module
    act: object

    def __init__(self, key):
        self.stem = eqx.nn.Conv2d(2, 4, (3, 2), key=key)
        self.line = eqx.nn.Conv1d(2, 4, 5, use_bias=False, key=key)
        self.up = eqx.nn.ConvTranspose3d(4, 2, (3, 1, 2), key=key)
        self.norm = eqx.nn.LayerNorm((4, 3, 3))
        self.head = eqx.nn.Linear(4, 3, key=key)
        self.words = eqx.nn.Embedding(7, 4, key=key)
        make = lambda key: eqx.nn.Conv2d(4, 4, 3, key=key)
        self.blocks = eqx.filter_vmap(make)(jax.random.split(key, 4))
        self.act = jax.nn.relu


def test_equinox_windows_are_known_by_layer_classes():
    params = arrays(Net(KEY))
    windows = {"stem/weight": (2, 3), "line/weight": (2,), "up/weight": (2, 3, 4)}
    assert_windows(params, windows | {"blocks/weight": (3, 4)})
    assert_windows({"conv": params.stem}, {"conv/weight": (2, 3)})
    assert_windows(params.stem, {"weight": (2, 3)})


def test_equinox_module_has_a_layout():
    for facts in (cx.layout(Net(KEY)), layout_of_tree(arrays(Net(KEY)))):
        assert facts["stem", "weight"][:5] == ("convolution", (4, 2, 3, 2), (2, 3), (1,), (0,))
        assert facts["blocks", "weight"].depth == (0,)
        assert facts["head", "weight"][:5] == ("dense", (3, 4), (), (1,), (0,))
        kinds = {path: leaf.kind for path, leaf in facts.items()}
        assert kinds["stem", "bias"] == kinds["head", "bias"] == "bias"
        assert kinds["norm", "weight"] == kinds["norm", "bias"] == "norm"
        assert kinds["words", "weight"] == "embedding"


def test_filter_normalised_follows_the_output_axis_of_each_library():
    """The same filters, ‖d_i‖ = ‖θ_i‖ for output i, in (3, 3, 2, 4) and in (4, 2, 3, 3)."""
    conv = arrays(eqx.nn.Conv2d(2, 4, 3, key=KEY))
    moved = jax.tree.map(lambda x: jnp.flip(x) ** 3, conv)
    haiku = lambda c: {"conv2_d": {"w": c.weight.transpose(2, 3, 1, 0), "b": c.bias[:, 0, 0]}}
    found = cx.filter_normalised(moved, conv)
    other = cx.filter_normalised(haiku(moved), haiku(conv))
    assert jax.tree.all(jax.tree.map(jnp.allclose, haiku(found), other))
    length = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))
    np.testing.assert_allclose(length(found.weight), length(conv.weight))
    np.testing.assert_array_equal(found.bias, 0.0)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.stem = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)


def test_nnx_windows_are_known_by_names_with_or_without_variables():
    state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
    windows = {"conv1/kernel": (0, 1), "stem/kernel": (0, 1)}
    assert_windows(normal(compat.as_pure(state)), windows)
    held = {f"{path}/value": axes for path, axes in windows.items()}
    assert_windows(normal(state), held)


@pytest.mark.parametrize(
    "tree",
    [
        {"conv": {"w": (4, 2, 3, 3), "b": (4,)}},
        {"conv": {"weight": (4, 2, 3, 3)}},
        {"conv": {"w": (3, 3, 3, 3)}},
        {"convs": {"w": (3, 2, 4)}},
        {"stem": {"kernel": (3, 3, 2, 4)}},
        {"conv_of_unknown_depth": {"kernel": (6, 3, 3, 2, 4)}},
        {"layer1": {"weight": (64, 3, 7, 7)}},
        {"layers_0": {"kernel": (3, 2, 4), "bias": (4,)}},
        {"layers": {"2": {"kernel": (5, 2, 4)}}},
        {"layers": {"2": {"kernel": {"value": (3, 3, 4, 4)}}}},
        {"mixer": {"short_filter": {"kernel": (4, 1, 32), "bias": (32,)}}},
        {"dw": {"kernel": (4, 1, 32)}, "q": {"kernel": (32, 4, 8)}, "o": {"kernel": (4, 8, 32)}},
        {"net/my_filter": {"w": (4, 1, 32), "b": (32,)}},
        {"downsample": {"kernel": (4, 16, 32), "bias": (32,)}, "head": {"kernel": (32, 4)}},
        {"attention": {"query_conv": {"w": (3, 8, 8)}}},
        {"kernel": (3, 1, 4)},
    ],
)
def test_ambiguous_window_is_not_averaged_and_warns_once(tree):
    params, stage = tree_of(tree), spatial_average()
    with pytest.warns(UserWarning, match="does not average over a window"):
        state = stage.init(params)
    with pytest.warns(UserWarning, match=r"layout=curvax\.layout") as told:
        cx.adahessian(0.1).init(params)
    assert len(told) == 1
    signal, _ = stage.update(Signal(params, diagonal=params), state, params)
    assert jax.tree.all(jax.tree.map(lambda x, d: (jnp.abs(x) == d).all(), params, signal.diagonal))
    cx.adahessian(0.1, block=None).init(params)
    cx.adahessian(0.1, block=lambda path, leaf: (0, 1) if leaf.ndim > 3 else None).init(params)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny", {}),
        ("vit_tiny", {"scan": False}),
        ("mixer_tiny", {}),
        ("resnet8", {"norm": "none"}),
        ("resnet50", {"sizes": (1, 1), "width": 4}),
    ],
)
def test_known_models_do_not_warn(name, options):
    model = build(name, 3, **options)
    spatial_average().init(jax.eval_shape(model.init, KEY, jnp.zeros((2, 8, 8, 1)))["params"])


class Attending(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(3, qkv_features=9, use_bias=self.bias)(x)
        x = nn.DenseGeneral((3, 3), axis=-1, use_bias=self.bias)(x)
        x = nn.DenseGeneral(9, axis=(-2, -1), use_bias=self.bias, name="proj")(x)
        return nn.LayerNorm()(x), None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
def test_attention_does_not_warn(bias, scanned):
    kind = nn.scan(
        Attending, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    ) if scanned else Attending  # fmt: skip
    params = jax.eval_shape(kind(bias).init, KEY, jnp.zeros((2, 5, 9)), None)["params"]
    spatial_average().init(params)
    gemma = {"layer_0": {"attn": {"qkv_einsum": {"w": (3, 3, 8, 4)}, "attn_vec": {"w": (3, 4, 8)}}}}
    spatial_average().init(tree_of(gemma))
    maxtext = {"self_attention": {n: {"kernel": (4, 4, 3, 3)} for n in ("query", "key", "value")}}
    spatial_average().init(tree_of(maxtext))
    experts = {"moe": {"wi_0": (3, 3, 4, 8), "gate": {"kernel": (4, 3)}}}
    spatial_average().init(tree_of(experts))
    heads = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
    fused = {"wqkv": (8, 3, 4, 2), "wo": (4, 2, 8)}
    for tree in (heads, fused):
        spatial_average().init(tree_of({"self": {n: {"kernel": s} for n, s in tree.items()}}))
    query = {"conv_block": {"attention": {"query": {"kernel": (9, 3, 3)}, "mlp": {"w": (3, 4, 8)}}}}
    spatial_average().init(tree_of(query))
    spatial_average().init(arrays(eqx.nn.MultiheadAttention(2, 4, key=KEY)))


@pytest.mark.parametrize(
    ("tree", "biases"),
    [
        ({"bias": {"kernel": (2, 3), "bias": (3,)}}, {"bias/bias"}),
        ({"bias": {"kernel": (3,)}}, set()),
        ({"linear": {"w": (2, 3), "b": (3,)}}, {"linear/b"}),
        ({"lora": {"a": (2, 3), "b": (3, 2)}}, set()),
        ({"a": (3,), "b": (3,)}, set()),
        ({"first.bias": (3,), "first.weight": (3, 2)}, {"first.bias"}),
    ],
)
def test_asam_recognises_a_bias_by_its_own_name(tree, biases):
    """T = |w| + η, and 1 for a bias: ε̂ ∝ T² g."""
    params = tree_of(tree)
    rule = cx.asam(0.5)
    for path, w in jax.tree.leaves_with_path(params):
        names = trees.names(path)
        t = jnp.ones_like(w) if "/".join(names) in biases else jnp.abs(w) + 0.5
        np.testing.assert_allclose(rule.measure(names, jnp.ones_like(w), w, None), t)
        np.testing.assert_allclose(rule.scale(names, jnp.ones_like(w), w), t)


def test_asam_recognises_the_bias_of_an_nnx_state():
    rule = cx.asam(0.5)
    w = jnp.asarray([2.0, 3.0])
    paths = {"first/bias/value": [1.0, 1.0], "bias/kernel": [2.5, 3.5]}
    for label, t in paths.items():
        path = tuple(map(trees.Name, label.split("/")))
        np.testing.assert_allclose(rule.measure(path, jnp.ones(2), w, None), np.asarray(t))
