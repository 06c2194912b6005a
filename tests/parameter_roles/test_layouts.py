"""Layouts from the module, and the same ones from names and shapes alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from curvax.compat import as_pure
from curvax.flax_bridge import Layout, layout
from curvax.models import build

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)


def shapes(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def read(model, *inputs, **options):
    return layout(model, shapes(model, *inputs), *inputs, **options)


def without_depth(leaf):
    """The `ParamInfo` of one layer of a stack, as an unrolled layer would have it."""
    own = [axis for axis in range(len(leaf.shape)) if axis not in leaf.depth]
    place = lambda axes: tuple(own.index(axis) for axis in axes)
    return leaf._replace(
        shape=tuple(leaf.shape[axis] for axis in own),
        window=place(leaf.window),
        inputs=place(leaf.inputs),
        outputs=place(leaf.outputs),
        depth=(),
    )


def stack(module, length, **options):
    return nn.scan(
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        **options,
    )


@pytest.mark.parametrize("known", [True, False], ids=["traced", "by-names"])
@pytest.mark.parametrize("name", ["vit_tiny", "mixer_tiny"])
def test_scanned_and_unrolled_models_have_the_same_layout(name, known):
    inputs = (IMAGE,) if known else ()
    scanned, unrolled = (build(name, 3, depth=3, scan=scan) for scan in (True, False))
    stacked = layout(scanned, shapes(scanned, IMAGE), *inputs)
    separate = layout(unrolled, shapes(unrolled, IMAGE), *inputs)
    expected = {}
    for path, leaf in stacked.items():
        assert leaf.depth == ((0,) if path[0] == "block" else ())
        copies = range(3) if leaf.depth else [0]
        for n in copies:
            own = (f"block_{n}", *path[1:]) if leaf.depth else path
            expected[own] = without_depth(leaf)._replace(block=leaf.block.replace("*", str(n)))
    assert dict(separate) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {}),
        ("resnet8", {"norm": "group", "residual": False}),
        ("resnet50", {"sizes": (1, 2), "width": 4}),
        ("wrn10_1", {"norm": "none"}),
        ("pyramidnet11_6", {}),
        ("shakeshake8_2", {"norm": "none"}),
        ("efficientnet_b0", {"width": 0.25, "depth": 0.1}),
        ("vit_tiny", {"pool": "token", "remat": True}),
        ("mixer_tiny", {}),
    ],
)
def test_layout_by_names_equals_that_by_the_module(name, options):
    model = build(name, 3, **options)
    variables = shapes(model, IMAGE)
    told = layout(model, variables, IMAGE)
    assert "other" not in {leaf.kind for leaf in told.values()}
    assert layout(model, variables) == told
    assert layout(model, variables["params"], IMAGE) == told
    assert layout(variables["params"]) == told


def test_layout_of_a_vision_transformer_leaf_by_leaf():
    facts = read(build("vit_tiny", 3, pool="token"), IMAGE)
    get = lambda path: facts[tuple(path.split("/"))]
    assert get("embedding/kernel")[:6] == ("convolution", (2, 2, 1, 64), (0, 1), (2,), (3,), ())
    assert get("embedding/kernel").block == "embedding"
    for name in ("query", "key", "value"):
        leaf = get(f"block/attention/{name}/kernel")
        assert leaf == ("attention", (4, 64, 4, 16), (), (1,), (2, 3), (0,), "block_*/attention")
    leaf = get("block/attention/out/kernel")
    assert leaf == ("attention", (4, 4, 16, 64), (), (1, 2), (3,), (0,), "block_*/attention")
    leaf = get("block/mlp/Dense_0/kernel")
    assert leaf == ("dense", (4, 64, 128), (), (1,), (2,), (0,), "block_*/mlp")
    assert get("block/norm1/scale") == ("norm", (4, 64), (), (), (1,), (0,), "block_*")
    assert get("block/norm1/bias").kind == "norm"
    assert get("block/mlp/Dense_0/bias") == ("bias", (4, 128), (), (), (1,), (0,), "block_*/mlp")
    for name in ("pos_embedding", "cls"):
        assert (get(name).kind, get(name).block) == ("embedding", "embedding")
    assert get("head/kernel") == ("dense", (64, 3), (), (0,), (1,), (), "head")


def test_convolutions_of_a_resnet_alone_have_windows():
    facts = read(build("resnet50", 3, sizes=(1, 1), width=4), IMAGE)
    for path, leaf in facts.items():
        conv = path[-1] == "kernel" and path[-2].startswith("conv")
        assert facts(path, np.empty(leaf.shape)) == ((0, 1) if conv else None)


class Net(nn.Module):
    """One layer under an uninformative name."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="after")(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "input_shape", "window", "inputs", "outputs"),
    [
        (nn.Conv(4, 3), (2, 9, 5), (0,), (1,), (2,)),
        (nn.Conv(4, (3,), use_bias=False), (2, 9, 5), (0,), (1,), (2,)),
        (nn.Conv(4, (1, 3)), (2, 9, 9, 5), (0, 1), (2,), (3,)),
        (nn.Conv(4, (3, 3, 3)), (2, 5, 5, 5, 2), (0, 1, 2), (3,), (4,)),
        (nn.Conv(4, (3, 3), feature_group_count=4), (2, 9, 9, 4), (0, 1), (2,), (3,)),
        (nn.ConvTranspose(4, (3, 3)), (2, 9, 9, 5), (0, 1), (2,), (3,)),
        (nn.ConvTranspose(4, (3,), transpose_kernel=True), (2, 9, 5), (0,), (2,), (1,)),
        (nn.DenseGeneral(4, axis=(-3, -2, -1)), (2, 3, 3, 5), (), (0, 1, 2), (3,)),
        (nn.DenseGeneral((3, 4)), (2, 5), (), (0,), (1, 2)),
        (nn.DenseGeneral(4, batch_dims=(0,)), (2, 3, 5), (), (1,), (2,)),
    ],
)
def test_layout_by_the_module_separates_layers_of_equal_rank(
    layer, input_shape, window, inputs, outputs
):
    facts = read(Net(layer.clone(name="stem")), jnp.zeros(input_shape))
    leaf = facts["layer", "kernel"]
    assert (leaf.window, leaf.inputs, leaf.outputs, leaf.depth) == (window, inputs, outputs, ())
    assert leaf.kind == ("convolution" if window else "dense")


class ConvStep(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(x.shape[-1], (3,), use_bias=self.bias, name="mix")(x), None


class ConvStack(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        x, _ = stack(ConvStep, 3)(self.bias, name="layer")(x, None)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_scanned_stack_of_convolutions_is_never_averaged_over_its_depth(bias):
    model, x = ConvStack(bias), jnp.zeros((1, 9, 4))
    leaf = read(model, x)["layer", "mix", "kernel"]
    assert leaf == ("convolution", (3, 3, 4, 4), (1,), (2,), (3,), (0,), "layer_*")
    by_names = layout(shapes(model, x)["params"])
    assert by_names(("layer", "mix", "kernel"), np.empty(leaf.shape)) is None


@pytest.mark.parametrize("bias", [True, False])
def test_scanned_convolution_is_recognised_by_its_stacked_neighbours(bias):
    conv = {"kernel": (3, 5, 4, 6)} | ({"bias": (3, 6)} if bias else {})
    norm = {} if bias else {"norm": {"scale": (3, 4)}}
    tree = {"layer": {"conv": conv, **norm}, "head": {"kernel": (6, 2), "bias": (2,)}}
    facts = layout(jax.tree.map(np.empty, tree, is_leaf=lambda x: isinstance(x, tuple)))
    expected = ("convolution", (3, 5, 4, 6), (1,), (2,), (3,), (0,), "layer_*")
    assert facts["layer", "conv", "kernel"] == expected


def test_ambiguous_kernel_has_no_role_by_names():
    tree = {"layer": {"conv": {"kernel": np.empty((3, 5, 4, 6))}}, "head": {"bias": np.empty(2)}}
    leaf = layout(tree)["layer", "conv", "kernel"]
    assert (leaf.kind, leaf.window, leaf.depth) == ("other", (), ())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
def test_attention_has_no_window_under_any_name(scanned, bias):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm(name="norm")(x)
            conv = nn.MultiHeadDotProductAttention(4, use_bias=bias, name="conv")
            return x + conv(h), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = stack(Step, 4)(name="step") if scanned else Step(name="step")
            return step(x, None)[0]

    # every size is 4: rank and shapes alone could be read in several ways
    model, x = Model(), jnp.zeros((1, 5, 4))
    params = shapes(model, x)["params"]
    for facts in (read(model, x), layout(params)):
        start = int(scanned)
        query = facts["step", "conv", "query", "kernel"]
        assert query.kind == "attention"
        assert (query.inputs, query.outputs) == ((start,), (start + 1, start + 2))
        out = facts["step", "conv", "out", "kernel"]
        assert (out.inputs, out.outputs) == ((start, start + 1), (start + 2,))
        assert not any(leaf.window for leaf in facts.values())


def test_layers_stacked_twice_or_along_any_axis_are_recognised():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.vmap(
                nn.Dense,
                variable_axes={"params": -1},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=-1,
                axis_size=3,
            )

            class Step(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return inner(5, name="expert")(x).mean(-1), None

            return stack(Step, 2)(name="step")(x, None)[0]

    facts = read(Model(), jnp.zeros((4, 5)))
    leaf = facts["step", "expert", "kernel"]
    assert leaf == ("dense", (2, 5, 5, 3), (), (1,), (2,), (0, 3), "step_*/expert_*")
    names = {f"step_{i}" for i in range(2)}
    names |= {f"step_{i}/expert_{j}" for i in range(2) for j in range(3)}
    assert set(facts.blocks()) == names


def test_blocks_of_scanned_and_unrolled_models_are_the_same_and_cover_all():
    options = {"depth": 3, "pool": "token"}
    scanned, unrolled = (build("vit_tiny", 3, scan=scan, **options) for scan in (True, False))

    def sizes(model):
        facts = read(model, IMAGE)
        found = {}
        for name, members in facts.blocks().items():
            own = (without_depth(facts[member.path]).shape for member in members)
            found[name] = sum(int(np.prod(shape)) for shape in own)
        return found

    assert sizes(scanned) == sizes(unrolled)
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes(scanned, IMAGE)["params"]))
    assert sum(n for name, n in sizes(scanned).items() if "/" not in name) == total
    parts = [f"block_{n}{part}" for n in range(3) for part in ("", "/attention", "/mlp")]
    assert set(sizes(scanned)) == {"embedding", "norm", "head", *parts}


def test_embeddings_and_boxed_parameters_are_recognised():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
            return nn.Dense(3, kernel_init=init)(nn.Embed(7, 4, name="words")(tokens))

    facts = read(Model(), jnp.zeros((2, 5), jnp.int32))
    assert facts["words", "embedding"][:5] == ("embedding", (7, 4), (), (0,), (1,))
    assert facts["Dense_0", "kernel"].kind == "dense"


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.conv = nnx.Conv(4, 4, 3, rngs=rngs, use_bias=False)
        self.gain = nnx.Param(jnp.ones(4))


class Twin(nnx.Module):
    def __init__(self, scanned):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(1, 4, (2, 2), rngs=rngs)
        self.table = nnx.Embed(7, 4, rngs=rngs)
        if scanned:
            split = nnx.split_rngs(splits=3)
            self.layers: Any = split(nnx.vmap(Block))(rngs)
        else:
            self.layers = getattr(nnx, "List", list)([Block(rngs) for _ in range(3)])
        self.head = nnx.LinearGeneral(4, (2, 3), rngs=rngs)


def test_stacked_nnx_module_has_the_layout_of_the_separate_one():
    twins = (nnx.eval_shape(partial(Twin, scanned)) for scanned in (True, False))
    stacked, separate = map(layout, twins)
    conv = stacked["layers", "conv", "kernel"]
    assert conv == ("convolution", (3, 3, 4, 4), (1,), (2,), (3,), (0,), "layers_*")
    for path, leaf in separate.items():
        twin = stacked[(path[0], *path[2:]) if path[0] == "layers" else path]
        assert without_depth(twin)._replace(block="") == leaf._replace(block="")
        assert twin.depth == ((0,) if path[0] == "layers" else ())
    assert separate["stem", "kernel"].window == (0, 1)
    assert separate["head", "kernel"].outputs == (1, 2)
    assert separate["table", "embedding"].kind == "embedding"
    assert separate["layers", "1", "attention", "query", "kernel"].block == "layers/1/attention"


def test_nnx_layout_has_the_paths_of_the_parameters():
    model = nnx.eval_shape(partial(Twin, True))
    facts, params = layout(model), nnx.state(model, nnx.Param)
    for tree in (params, as_pure(params)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            names = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
            assert facts[names].shape == leaf.shape


def test_layout_errors_name_the_cure():
    facts = layout({"Dense_0": {"kernel": np.empty((2, 3)), "bias": np.empty(3)}})
    with pytest.raises(KeyError, match="Dense_0/kernel"):
        facts["Dense_0", "kernal"]
    with pytest.raises(ValueError, match="shape \\(5, 2, 3\\)"):
        facts(("Dense_0", "kernel"), np.empty((5, 2, 3)))
    with pytest.raises(TypeError, match="A linen module keeps no parameters"):
        layout(nn.Dense(2))
    assert isinstance(facts, Layout)


def test_spatial_average_takes_a_layout():
    from curvax import Signal, spatial_average

    model = ConvStack(bias=True)
    x = jnp.zeros((1, 9, 4))
    params = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape),
        shapes(model, x)["params"],
    )
    stage = spatial_average(read(model, x))
    signal, _ = stage.update(Signal(params, params, params), stage.init(params), params)
    kernel = params["layer"]["mix"]["kernel"]
    averaged = signal.diagonal["layer"]["mix"]["kernel"]
    expected = jnp.broadcast_to(kernel.mean(1, keepdims=True), kernel.shape)
    np.testing.assert_allclose(averaged, expected)
    np.testing.assert_array_equal(signal.diagonal["head"]["kernel"], params["head"]["kernel"])
