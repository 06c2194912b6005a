"""Weights in published formats and our own: the loaded model has the outputs of the original."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from curvax.models import build
from curvax.training import pretrained
from curvax.training.runtime.errors import ConfigError

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, SIDE, CLASSES = 8, 2, 2, 12, 4, 12, 5
PLACES = (SIDE // PATCH) ** 2
VIT = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "mlp_width": HIDDEN, "patch": PATCH}
MIXER = {
    "width": WIDTH, "depth": DEPTH, "token_width": 6, "channel_width": HIDDEN, "patch": PATCH,
}  # fmt: skip
IMAGES = np.random.default_rng(3).standard_normal((2, SIDE, SIDE, 3))


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def norm(name):
    return {f"{name}/scale": (WIDTH,), f"{name}/bias": (WIDTH,)}


def dense(name, inputs, outputs):
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def mlp(name, inputs, hidden):
    return dense(f"{name}/Dense_0", inputs, hidden) | dense(f"{name}/Dense_1", hidden, inputs)


def embedding(name):
    return {f"{name}/kernel": (PATCH, PATCH, 3, WIDTH), f"{name}/bias": (WIDTH,)}


def vit_file(attention, norms, hidden, positions, *, token):
    """A ViT under the names of its authors: those of the parts of a block differ."""
    shapes = embedding("embedding") | norm("Transformer/encoder_norm")
    for n in range(DEPTH):
        at, each = f"Transformer/encoderblock_{n}", WIDTH // HEADS
        shapes |= norm(f"{at}/{norms[0]}") | norm(f"{at}/{norms[1]}")
        shapes |= mlp(f"{at}/{hidden}", WIDTH, HIDDEN)
        for part in ("query", "key", "value"):
            shapes[f"{at}/{attention}/{part}/kernel"] = (WIDTH, HEADS, each)
            shapes[f"{at}/{attention}/{part}/bias"] = (HEADS, each)
        shapes[f"{at}/{attention}/out/kernel"] = (HEADS, each, WIDTH)
        shapes[f"{at}/{attention}/out/bias"] = (WIDTH,)
    shapes |= {positions[0]: (1, positions[1], WIDTH)} | dense("head", WIDTH, CLASSES)
    return drawn(shapes | ({"cls": (1, 1, WIDTH)} if token else {}))


def vision_transformer(*, token=True):
    """In vision_transformer the class token has a position of its own, the first."""
    parts = "MultiHeadDotProductAttention_1", ("LayerNorm_0", "LayerNorm_2"), "MlpBlock_3"
    places = "Transformer/posembed_input/pos_embedding", PLACES + token
    return vit_file(*parts, places, token=token)


def big_vision(*, token=False):
    parts = "MultiHeadDotProductAttention_0", ("LayerNorm_0", "LayerNorm_1"), "MlpBlock_0"
    return vit_file(*parts, ("pos_embedding", PLACES), token=token)


def mixer():
    shapes = embedding("stem") | norm("pre_head_layer_norm") | dense("head", WIDTH, CLASSES)
    for n in range(DEPTH):
        at = f"MixerBlock_{n}"
        shapes |= norm(f"{at}/LayerNorm_0") | norm(f"{at}/LayerNorm_1")
        shapes |= mlp(f"{at}/token_mixing", PLACES, 6)
        shapes |= mlp(f"{at}/channel_mixing", WIDTH, HIDDEN)
    return drawn(shapes)


def under(arrays, prefix):
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def patches(arrays, images):
    grid = SIDE // PATCH
    cut = images.reshape(len(images), grid, PATCH, grid, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    flat = cut.reshape(len(images), PLACES, -1)
    return flat @ arrays["kernel"].reshape(-1, WIDTH) + arrays["bias"]


def normalised(arrays, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * arrays["scale"] + arrays["bias"]


def through_mlp(arrays, x):
    h = np.asarray(jax.nn.gelu(x @ arrays["Dense_0/kernel"] + arrays["Dense_0/bias"]))
    return h @ arrays["Dense_1/kernel"] + arrays["Dense_1/bias"]


def attended(arrays, x):
    q, k, v = (
        np.einsum("ntc,chd->nthd", x, arrays[f"{part}/kernel"]) + arrays[f"{part}/bias"]
        for part in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("nthd,nshd->nhts", q, k) / np.sqrt(WIDTH // HEADS))
    mixed = np.einsum("nhts,nshd->nthd", scores / scores.sum(-1, keepdims=True), v)
    return np.einsum("nthd,hdc->ntc", mixed, arrays["out/kernel"]) + arrays["out/bias"]


def logits_of_vit(arrays, images):
    """The outputs of the authors' model, in NumPy from the names of its weights."""
    x, token = patches(under(arrays, "embedding"), images), "cls" in arrays
    names = {name.split("/")[2] for name in arrays if name.startswith("Transformer/encoderblock_0")}
    first, second, attention, hidden = (
        next(name for name in sorted(names, reverse=last) if name.startswith(kind))
        for kind, last in (("LayerN", False), ("LayerN", True), ("Multi", False), ("Mlp", False))
    )
    cls = np.broadcast_to(arrays["cls"], (len(x), 1, WIDTH)) if token else x[:, :0]
    if "pos_embedding" in arrays:
        x = np.concatenate([cls, x + arrays["pos_embedding"]], 1)
    else:
        x = np.concatenate([cls, x], 1) + arrays["Transformer/posembed_input/pos_embedding"]
    for n in range(DEPTH):
        block = under(arrays, f"Transformer/encoderblock_{n}")
        x = x + attended(under(block, attention), normalised(under(block, first), x))
        x = x + through_mlp(under(block, hidden), normalised(under(block, second), x))
    x = normalised(under(arrays, "Transformer/encoder_norm"), x)
    return (x[:, 0] if token else x.mean(1)) @ arrays["head/kernel"] + arrays["head/bias"]


def logits_of_mixer(arrays, images):
    x = patches(under(arrays, "stem"), images)
    for n in range(DEPTH):
        block = under(arrays, f"MixerBlock_{n}")
        tokens = normalised(under(block, "LayerNorm_0"), x).swapaxes(1, 2)
        x = x + through_mlp(under(block, "token_mixing"), tokens).swapaxes(1, 2)
        channels = normalised(under(block, "LayerNorm_1"), x)
        x = x + through_mlp(under(block, "channel_mixing"), channels)
    x = normalised(under(arrays, "pre_head_layer_norm"), x).mean(1)
    return x @ arrays["head/kernel"] + arrays["head/bias"]


def written(folder, arrays):
    np.savez(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


def load(path, model, variables, **options):
    return pretrained.over(variables, pretrained.read(path, model, variables, **options))


def variables_of(model, side=SIDE):
    x = jnp.zeros((1, side, side, 3))
    return jax.tree.map(lambda x: x.astype(float), jax.jit(model.init)(jax.random.key(9), x))


def logits(model, variables):
    return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(IMAGES)))


CASES: dict[str, tuple[Any, str, Any]] = {
    "vision_transformer, class token": (vision_transformer(), "vit_tiny", VIT | {"pool": "token"}),
    "vision_transformer, mean": (vision_transformer(token=False), "vit_tiny", VIT),
    "big_vision, class token": (big_vision(token=True), "vit_tiny", VIT | {"pool": "token"}),
    "big_vision, mean": (big_vision(), "vit_tiny", VIT),
    "vision_transformer, Mixer": (mixer(), "mixer_tiny", MIXER),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loaded_model_computes_the_outputs_of_the_authors_model(case, scan, tmp_path):
    arrays, name, options = CASES[case]
    model = build(name, CLASSES, **options, scan=scan)
    expected = (logits_of_mixer if name == "mixer_tiny" else logits_of_vit)(arrays, IMAGES)
    loaded = load(written(tmp_path, arrays), model, variables_of(model))
    np.testing.assert_allclose(logits(model, loaded), expected, rtol=1e-9, atol=1e-9)


def test_stacked_layers_of_a_big_vision_file_are_loaded(tmp_path):
    plain = big_vision()
    names = under(plain, "Transformer/encoderblock_0")
    rest = {k: v for k, v in plain.items() if "encoderblock" not in k}
    stacked = {
        f"Transformer/encoderblock/{name}": np.stack(
            [plain[f"Transformer/encoderblock_{n}/{name}"] for n in range(DEPTH)]
        )
        for name in names
    }
    file = {f"params/{name}": x for name, x in (rest | stacked).items()} | {
        "opt/count": np.ones(())
    }
    for scan in (True, False):
        model = build("vit_tiny", CLASSES, **VIT, scan=scan)
        loaded = load(written(tmp_path, file), model, variables_of(model))
        expected = logits_of_vit(plain, IMAGES)
        np.testing.assert_allclose(logits(model, loaded), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("root", ["", "params/", "opt/target/"])
def test_older_big_vision_files_are_loaded(root, tmp_path):
    file = vision_transformer()
    positions = file.pop("Transformer/posembed_input/pos_embedding")
    older = {f"{root}{name}": x for name, x in file.items()}
    older[f"{root}Transformer/pos_embedding"] = positions
    model = build("vit_tiny", CLASSES, **VIT, pool="token")
    loaded = load(written(tmp_path, older), model, variables_of(model))
    file["Transformer/posembed_input/pos_embedding"] = positions
    np.testing.assert_allclose(
        logits(model, loaded), logits_of_vit(file, IMAGES), rtol=1e-9, atol=1e-9
    )


def test_bfloat16_written_by_numpy_is_loaded(tmp_path):
    model = build("vit_tiny", CLASSES, **VIT)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in big_vision().items()}
    loaded = load(written(tmp_path, half), model, variables_of(model))
    np.testing.assert_array_equal(
        loaded["params"]["head"]["kernel"], half["head/kernel"].astype(float)
    )


def test_head_stays_new_with_another_number_of_classes(tmp_path):
    model = build("vit_tiny", 3, **VIT)
    variables = variables_of(model)
    variables["params"]["head"]["bias"] += 7.0
    file = big_vision() | drawn(dense("pre_logits", WIDTH, WIDTH))
    loaded = load(written(tmp_path, file), model, variables)
    assert loaded["params"]["head"] is not variables["params"]["head"]
    jax.tree.map(
        np.testing.assert_array_equal, loaded["params"]["head"], variables["params"]["head"]
    )
    np.testing.assert_array_equal(loaded["params"]["embedding"]["kernel"], file["embedding/kernel"])


def test_new_head_leaves_out_a_head_that_fits(tmp_path):
    model = build("vit_tiny", CLASSES, **VIT)
    variables = variables_of(model)
    file = written(tmp_path, big_vision() | drawn(dense("pre_logits", WIDTH, WIDTH)))
    with pytest.raises(ConfigError, match="`new_head` if only the head differs"):
        load(file, model, variables)
    loaded = load(file, model, variables, new_head=True)
    assert not np.any(loaded["params"]["head"]["kernel"])
    assert np.any(
        loaded["params"]["embedding"]["kernel"] != variables["params"]["embedding"]["kernel"]
    )


def test_positions_are_interpolated_between_fixed_corners():
    old = np.arange(9.0).reshape(1, 9, 1)  # a plane: 3 y + x
    new = pretrained.resized(old, 25)[0, :, 0].reshape(5, 5)
    y, x = np.mgrid[:5, :5] / 2
    np.testing.assert_allclose(new, 3 * y + x, rtol=1e-6, atol=1e-6)
    assert pretrained.resized(old, 9) is old
    with pytest.raises(ConfigError, match="not both of"):
        pretrained.resized(old, 8)


@pytest.mark.parametrize("token", [True, False])
def test_larger_image_size_changes_the_positions_alone(token, tmp_path):
    file = vision_transformer(token=token)
    model = build("vit_tiny", CLASSES, **VIT, pool="token" if token else "mean")
    loaded = load(written(tmp_path, file), model, variables_of(model, 2 * SIDE))["params"]
    own = file["Transformer/posembed_input/pos_embedding"][:, int(token) :]
    assert loaded["pos_embedding"].shape == (1, 4 * PLACES, WIDTH)
    np.testing.assert_allclose(loaded["pos_embedding"][0, 0], own[0, 0], rtol=1e-6)
    np.testing.assert_allclose(loaded["pos_embedding"][0, -1], own[0, -1], rtol=1e-6)
    np.testing.assert_array_equal(loaded["norm"]["scale"], file["Transformer/encoder_norm/scale"])


def test_missing_extra_and_misshaped_weights_are_named(tmp_path):
    file = big_vision(token=True)
    del file["Transformer/encoder_norm/bias"]
    file["embedding/bias"] = np.zeros(3)
    model = build("vit_tiny", CLASSES, **VIT, scan=False)
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, file), model, variables_of(model))
    assert "it lacks `params/norm/bias`" in str(error.value)
    assert "besides `params/cls`" in str(error.value)
    assert "`params/embedding/bias (3,) for (8,)`" in str(error.value)
    assert "VisionTransformer" in str(error.value)


def test_shallower_model_raises_with_the_extra_layers(tmp_path):
    model = build("vit_tiny", CLASSES, **VIT | {"depth": 1}, scan=False)
    with pytest.raises(ConfigError, match=r"besides `params/block_1/attention.* and 8 more"):
        load(written(tmp_path, big_vision()), model, variables_of(model))


def test_file_without_weights_is_refused(tmp_path):
    model = build("vit_tiny", CLASSES, **VIT)
    (tmp_path / "text.npz").write_text("no weights")
    for name, said in (("text.npz", "holds no weights"), ("absent.npz", "does not exist")):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name, model, variables_of(model))
    with pytest.raises(ConfigError, match="there are: none"):
        load(tmp_path, model, variables_of(model))


def test_folder_of_many_runs_raises_with_some_of_them(tmp_path):
    for number in range(10, 21):
        (tmp_path / f"{number}/checkpoints/4/state").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"10/checkpoints`, .*17/checkpoints` and 3 more"):
        pretrained.arrays(tmp_path)
