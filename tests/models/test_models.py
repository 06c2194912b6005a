"""The models against published parameter counts, naive twins, and their own other forms."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_twins import random_variables, run
from repository import ROOT

from curvax.models import build, names
from curvax.models.layers import drop_branch
from curvax.models.vit import sincos


def count(name: str, classes: int, size: int, **options) -> int:
    model = build(name, classes, **options)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))


def digits(n: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (n, 8, 8, 1))


# Exact counts: torchvision's ResNets, timm's Mixers, and the sums of He et al. and Zagoruyko and
# Komodakis layer by layer; of PyramidNet, Shake-Shake and EfficientNet those in the tests of
# google-research/sam.
PUBLISHED = [
    ("resnet18", 1000, 224, 11_689_512),
    ("resnet34", 1000, 224, 21_797_672),
    ("resnet50", 1000, 224, 25_557_032),
    ("resnet101", 1000, 224, 44_549_160),
    ("resnet152", 1000, 224, 60_192_808),
    ("resnet20", 10, 32, 269_722),
    ("resnet32", 10, 32, 464_154),
    ("wrn28_10", 10, 32, 36_479_194),
    ("mixer_s16", 1000, 224, 18_528_264),
    ("mixer_b16", 1000, 224, 59_880_472),
    ("pyramidnet272_200", 100, 32, 26_288_692),
    ("shakeshake26_96", 100, 32, 26_227_572),
    ("efficientnet_b0", 1000, 224, 5_288_548),
    ("efficientnet_b1", 1000, 240, 7_794_184),
    ("efficientnet_b2", 1000, 260, 9_109_994),
    ("efficientnet_b3", 1000, 300, 12_233_232),
    ("efficientnet_b4", 1000, 380, 19_341_616),
    ("efficientnet_b5", 1000, 456, 30_389_784),
    ("efficientnet_b6", 1000, 528, 43_040_704),
    ("efficientnet_b7", 1000, 600, 66_347_960),
]


@pytest.mark.parametrize(("name", "classes", "size", "expected"), PUBLISHED)
def test_models_have_the_published_number_of_parameters(name, classes, size, expected):
    assert count(name, classes, size) == expected


def test_the_documentation_has_these_numbers_of_parameters():
    page = (ROOT / "docs" / "api" / "models.md").read_text()
    rows = re.findall(r"\| `(\w+)` \|.*\| (\d+) \| ([\d ]+) \|", page)
    told = {(name, int(classes), int(count.replace(" ", ""))) for name, classes, count in rows}
    assert len(told) > 5
    assert told <= {(name, classes, count) for name, classes, _, count in PUBLISHED}


# Hinton and Salakhutdinov's 784-1000-500-250-30-250-500-1000-784, summed layer by layer.
def test_autoencoder_has_its_layers_and_the_shape_of_its_input():
    x, model = jnp.zeros((2, 28, 28, 1)), build("autoencoder")
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert outputs.shape == x.shape
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    expected = sum(a * b + b for a, b in itertools.pairwise(widths))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(variables)) == expected == 2_837_314


# Chen et al., arXiv:2106.01548, Table 5, in millions (some rounded, some cut off).
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet50", 25),
        ("resnet101", 44),
        ("resnet152", 60),
        ("vit_s16", 22),
        ("vit_b32", 88),
        ("vit_b16", 87),
        ("mixer_s16", 18),
        ("mixer_b32", 60),
        ("mixer_b16", 59),
    ],
)
def test_models_have_the_papers_number_of_parameters_in_millions(name, millions):
    assert abs(count(name, 1000, 224) / 1e6 - millions) < 1


def test_class_token_adds_one_vector():
    assert count("vit_s16", 10, 32, pool="token") == count("vit_s16", 10, 32) + 384


def tokens(n: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (n, 6), 0, 10)


@pytest.mark.parametrize(
    ("name", "inputs"), [("vit_tiny", digits), ("mixer_tiny", digits), ("lm_tiny", tokens)]
)
def test_scanned_and_unrolled_models_give_the_same_outputs(name, inputs):
    x = inputs()
    scanned, unrolled = (build(name, 10, scan=scan, depth=3, width=8) for scan in (True, False))
    stacked = random_variables(scanned, x)["params"]
    blocks = {
        f"block_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stacked["block"]) for n in range(3)
    }
    separate = {**{k: v for k, v in stacked.items() if k != "block"}, **blocks}
    expected = run(scanned, {"params": stacked}, x)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(run(unrolled, {"params": separate}, x), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixer_tiny", {"depth": 2}), ("vit_tiny", {"depth": 1, "scan": False}), ("wrn10_1", {})],
)
def test_remat_changes_no_gradient(name, options):
    x = digits()
    plain, remat = build(name, 3, **options), build(name, 3, remat=True, **options)
    variables = random_variables(plain, x)

    def loss(model, params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(logits**2)

    grads = [jax.jit(jax.grad(partial(loss, m)))(variables["params"]) for m in (plain, remat)]
    size = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads[0]))
    for a, b in zip(*map(jax.tree.leaves, grads)):
        np.testing.assert_allclose(a, b, atol=1e-12 * size)


def conv(x, layer, stride=1):
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + layer["bias"].reshape(1, 1, 1, -1)


@pytest.mark.parametrize("residual", [True, False])
def test_resnet_equals_its_naive_twin(residual):
    x, model = digits(), build("resnet8", 3, norm="none", residual=residual, width=4)
    p = random_variables(model, x)["params"]
    h = jax.nn.relu(conv(x, p["conv"]))
    for n in range(3):
        block, stride = p[f"stage{n}_block0"], min(n + 1, 2)
        out = conv(jax.nn.relu(conv(h, block["conv1"], stride)), block["conv2"])
        short = jnp.concatenate([h, 0 * h], axis=-1)[:, ::2, ::2] if n else h
        h = jax.nn.relu(out + short * residual)
    logits = h.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"].reshape(1, -1)
    np.testing.assert_allclose(run(model, {"params": p}, x), logits, rtol=1e-10)


@pytest.mark.parametrize("residual", [True, False])
def test_wide_resnet_equals_its_naive_twin(residual):
    x, model = digits(), build("wrn10_2", 3, norm="none", residual=residual)
    p = random_variables(model, x)["params"]
    h = conv(x, p["conv"])
    for n in range(3):
        block, stride = p[f"stage{n}_block0"], min(n + 1, 2)
        active = jax.nn.relu(h)
        out = conv(jax.nn.relu(conv(active, block["conv1"], stride)), block["conv2"])
        h = out + conv(active, block["conv_shortcut"], stride) if residual else out
    logits = jax.nn.relu(h).mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"].reshape(1, -1)
    np.testing.assert_allclose(run(model, {"params": p}, x), logits, rtol=1e-10)


def patches(x, layer, size=2):
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, (h // size) * (w // size), -1)
    return x @ layer["kernel"].reshape(-1, layer["kernel"].shape[-1]) + layer["bias"]


def layer_norm(x, layer):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def mlp(x, layers):
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]
    return dense(np.asarray(jax.nn.gelu(dense(x, layers["Dense_0"]))), layers["Dense_1"])


def attention(x, p, allowed=True):
    q, k, v = (np.einsum("ntc,chd->nthd", x, p[j]["kernel"]) + p[j]["bias"] for j in ATTENTION)
    scores = np.einsum("nthd,nshd->nhts", q, k) / np.sqrt(q.shape[-1])
    shares = jax.nn.softmax(np.where(allowed, scores, -np.inf), axis=-1)
    mixed = np.einsum("nhts,nshd->nthd", np.asarray(shares), v)
    return np.einsum("nthd,hdc->ntc", mixed, p["out"]["kernel"]) + p["out"]["bias"]


ATTENTION = ("query", "key", "value")


def twin(name: str, p, x):
    h = patches(x, p["embedding"]) + p.get("pos_embedding", 0)
    if "cls" in p:
        h = np.concatenate([np.repeat(p["cls"], len(h), axis=0), h], axis=1)
    for n in range(2):
        block = p[f"block_{n}"]
        inner = layer_norm(h, block["norm1"])
        if name == "vit_tiny":
            h = h + attention(inner, block["attention"])
        else:
            h = h + mlp(inner.swapaxes(1, 2), block["token_mlp"]).swapaxes(1, 2)
        last = block["mlp" if name == "vit_tiny" else "channel_mlp"]
        h = h + mlp(layer_norm(h, block["norm2"]), last)
    h = layer_norm(h, p["norm"])
    h = h[:, 0] if "cls" in p else h.mean(1)
    return h @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny", {}), ("vit_tiny", {"pool": "token"}), ("mixer_tiny", {})],
)
def test_patch_networks_equal_their_naive_twins(name, options):
    x, model = digits(), build(name, 3, scan=False, depth=2, width=16, **options)
    variables = random_variables(model, x)
    expected = twin(name, jax.tree.map(np.asarray, variables["params"]), np.asarray(x))
    np.testing.assert_allclose(run(model, variables, x), expected, rtol=1e-10)


def test_language_model_equals_its_naive_twin():
    x, model = tokens(), build("lm_tiny", 10, scan=False, depth=1, width=16)
    variables = random_variables(model, x)
    p = jax.tree.map(np.asarray, variables["params"])
    h = p["embedding"]["embedding"][x] + p["pos_embedding"]
    block, past = p["block_0"], np.tri(6, dtype=bool)[None, None]
    h = h + attention(layer_norm(h, block["norm1"]), block["attention"], past)
    h = h + mlp(layer_norm(h, block["norm2"]), block["mlp"])
    logits = layer_norm(h, p["norm"]) @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(run(model, variables, x), logits, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "classes", "layers"),
    [
        ("mlp", 3, ["layer0", "layer1", "head"]),
        (
            "autoencoder_tiny",
            None,
            ["encoder0", "encoder1", "code", "decoder0", "decoder1", "head"],
        ),
    ],
)
def test_dense_networks_equal_their_naive_twins(name, classes, layers):
    x, model = digits(), build(name, classes)
    variables = random_variables(model, x)
    params = jax.tree.map(np.asarray, variables["params"])
    h = np.asarray(x).reshape(len(x), -1)
    for layer in layers:
        h = h @ params[layer]["kernel"] + params[layer]["bias"]
        h = h if layer in ("code", "head") else np.tanh(h)
    np.testing.assert_allclose(run(model, variables, x).reshape(h.shape), h, rtol=1e-10)


def test_batch_statistics_change_in_training_alone():
    x, model = digits(8), build("resnet8", 3, sizes=(1,))
    variables = random_variables(model, x)
    _, new = run(model, variables, x, train=True, mutable=["batch_stats"])
    _, same = run(model, variables, x, mutable=["batch_stats"])
    stem = conv(x, {**variables["params"]["conv"], "bias": jnp.zeros(16)})
    expected = 0.1 * stem.mean((0, 1, 2))
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], expected, rtol=1e-10)
    old = jax.tree.leaves(variables["batch_stats"])
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(same), old, strict=True))


def test_batch_norm_synced_over_an_axis_sees_the_whole_batch():
    x, options = digits(8), {"sizes": (1,), "width": 4}
    whole, local = (build("resnet8", 3, sync_over=axis, **options) for axis in (None, "devices"))
    variables = random_variables(whole, x)
    train = lambda m: lambda x: m.apply(variables, x, train=True, mutable="batch_stats")[0]
    shards = jax.vmap(train(local), axis_name="devices")(x.reshape(4, 2, 8, 8, 1))
    np.testing.assert_allclose(shards.reshape(8, 3), train(whole)(x), rtol=1e-10)


def test_group_norm_keeps_examples_apart_and_no_norm_has_no_scale():
    x = digits(4)
    group, bare = build("resnet8", 3, norm="group"), build("wrn10_1", 3, norm="none")
    variables = random_variables(group, x)
    apart = jnp.concatenate([run(group, variables, x[n : n + 1], train=True) for n in range(4)])
    np.testing.assert_allclose(run(group, variables, x, train=True), apart, rtol=1e-10)
    paths = jax.tree.leaves_with_path(random_variables(bare, x))
    assert not any("norm" in jax.tree_util.keystr(path) for path, _ in paths)


def test_without_norm_every_block_starts_as_its_shortcut():
    x, model = digits(), build("resnet8", 3, norm="none")
    p = jax.jit(model.init)(jax.random.key(0), x)["params"]
    p = jax.tree.map(lambda leaf: leaf.astype(x.dtype), p)
    pooled = jax.nn.relu(conv(x, p["conv"]))[:, ::4, ::4].mean((1, 2))
    expected = pooled @ p["head"]["kernel"][:16]
    np.testing.assert_allclose(run(model, {"params": p}, x), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "form", "drop"),
    [
        ("vit_tiny", {"depth": 1}, {"dropout": 0.5}),
        ("mixer_tiny", {"scan": False, "depth": 2}, {"stochastic_depth": 0.5}),
        ("vit_tiny", {"remat": True, "depth": 2}, {"stochastic_depth": 0.5}),
        ("wrn10_1", {"norm": "group"}, {"dropout": 0.5}),
    ],
)
def test_dropout_follows_its_key_and_is_off_in_evaluation(name, form, drop):
    x = digits(8)
    plain, model = build(name, 3, **form), build(name, 3, **form, **drop)
    variables = random_variables(plain, x)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(run(model, variables, x), run(plain, variables, x))


def test_dropped_branches_are_dropped_whole_and_the_others_scaled():
    branch = 1.0 + jax.random.uniform(jax.random.key(0), (4000, 3, 2))
    ratio = drop_branch(jax.random.key(1), branch, 0.25) / branch
    per_example = ratio.reshape(4000, 6)
    np.testing.assert_allclose(per_example, np.broadcast_to(per_example[:, :1], (4000, 6)))
    kept = per_example[:, 0] > 0
    np.testing.assert_allclose(per_example[kept], 4 / 3, rtol=1e-6)
    # five standard errors of a mean of 4000 Bernoulli draws
    assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    np.testing.assert_array_equal(drop_branch(jax.random.key(1), branch, 0.0), branch)


def test_bfloat16_applies_to_activations_alone():
    x, model = digits(), build("vit_tiny", 3, depth=1, dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    logits, seen = run(model, variables, x, capture_intermediates=True)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(seen["intermediates"]["embedding"])}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["vit_tiny", "mixer_tiny"])
def test_logits_start_at_the_head_bias(name):
    model, x = build(name, 3, head_bias=-10.0, depth=1), digits()
    logits = jax.jit(lambda key: model.apply(model.init(key, x), x))(jax.random.key(0))
    np.testing.assert_array_equal(logits, np.full((2, 3), -10.0))


def test_sincos_positions_are_waves_of_their_coordinates():
    places = np.asarray(sincos(3, 5, 8)).reshape(3, 5, 8)
    y, x = 2, 4
    expected = [
        wave(at / wavelength)
        for at in (x, y)
        for wave in (math.sin, math.cos)
        for wavelength in (1, 10_000)
    ]
    np.testing.assert_allclose(places[y, x], expected, rtol=1e-6)
    model = build("vit_tiny", 3, positions="sincos", depth=1)
    assert "pos_embedding" not in random_variables(model, digits())["params"]


def test_families_with_two_numbers_can_be_built_by_name():
    model = build("wrn16_4", 10)
    assert (model.depth, model.widen) == (16, 4)
    pyramid, branches = build("pyramidnet110_270", 10), build("shakeshake20_32", 10)
    assert (pyramid.depth, pyramid.alpha) == (110, 270)
    assert (branches.depth, branches.width) == (20, 32)
    assert len(set(names())) == len(names()) >= 20


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("vit_b15", {}, ValueError, "`vit_b16`"),
        ("wrn27_10", {}, ValueError, "6n \\+ 4"),
        ("pyramidnet270_200", {}, ValueError, "9n \\+ 2"),
        ("pyramidnet11_6", {"shake_drop": 1.0}, ValueError, "\\[0, 1\\)"),
        ("shakeshake26_95", {}, ValueError, "even `width`"),
        ("efficientnet_b8", {}, ValueError, "`efficientnet_b7`"),
        ("efficientnet_b0", {"width": 0.0}, ValueError, "factors > 0"),
        ("vit_tiny", {"remap": True}, TypeError, "Did you mean `remat`"),
        ("resnet8", {"norm": "bach"}, ValueError, "Did you mean 'batch'"),
        ("vit_tiny", {"pool": "max"}, ValueError, "mean"),
        ("vit_tiny", {"heads": 5}, ValueError, "does not divide 64"),
        ("vit_tiny", {"positions": "sincos", "width": 6, "heads": 1}, ValueError, "4n"),
        ("mixer_tiny", {"dropout": 1.0}, ValueError, "\\[0, 1\\)"),
        ("lm_tiny", {"heads": 5}, ValueError, "does not divide 64"),
        ("mlp", {"activation": "than"}, ValueError, "Did you mean 'tanh'"),
        ("autoencoder", {}, ValueError, "`autoencoder` was built with 10"),
    ],
)
def test_build_errors_name_the_cure(name, options, error, message):
    with pytest.raises(error, match=message):
        build(name, 10, **options)


def test_list_option_builds_the_same_model_as_a_tuple():
    models = {build("mlp", 3, widths=widths) for widths in ([8, 4], (8, 4))}
    assert len(models) == 1


def test_a_head_without_classes_is_refused():
    with pytest.raises(ValueError, match="`vit_tiny` was built with None"):
        build("vit_tiny")


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="does not divide 7×8"):
        build("mixer_tiny", 3).init(jax.random.key(0), jnp.zeros((1, 7, 8, 1)))
