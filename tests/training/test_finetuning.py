"""Runs that start from trained weights: the weights, their sharding, and resized images."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mapped_run
import numpy as np
import pytest
import tiny_run
from scipy.ndimage import map_coordinates

from curvax.cli import main
from curvax.training import loop, pretrained, tasks
from curvax.training.augment import transforms
from curvax.training.checkpoints import Checkpoints
from curvax.training.compare import comparison
from curvax.training.config.configs import load, override
from curvax.training.evaluation import trained_runs
from curvax.training.experiment import build, outline
from curvax.training.runtime.errors import ConfigError

TINY = str(Path(tiny_run.__file__))
MAPPINGS = ("jit", "fsdp", "shard_map", "pmap")


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run."""
    root = tmp_path_factory.mktemp("first")
    assert main.main(["train", TINY, f"--runs={root}"]) == 0
    (folder,) = root.iterdir()
    return folder


def config_of(start, *fields):
    return override(tiny_run.get_config(), [f"--init_from={start}", *fields])


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((tree, expected)))


def results(folder):
    (file,) = folder.glob("*/seed0/results.json")
    return json.loads(file.read_text())


# Checkpoints of curvax.


def test_every_seed_starts_from_the_weights_with_its_own_key(first):
    (subject,) = trained_runs.load([first])
    trained = subject.state.params
    experiment = build(config_of(first))
    one, other = experiment.init(), experiment.with_seed(1).init()
    for state in (one, other):
        assert int(state.step) == 0
        assert_same(state.params, trained)
        assert_same(state.opt_state, experiment.optimizer.init(trained))
    assert jax.random.key_data(one.key).tolist() != jax.random.key_data(other.key).tolist()


def test_init_from_is_relative_to_the_current_folder(first, monkeypatch):
    monkeypatch.chdir(first.parent)
    (subject,) = trained_runs.load([first])
    assert_same(build(config_of(first.name)).init().params, subject.state.params)


def test_new_head_is_initialised_as_from_scratch(first):
    found = build(config_of(first, "--new_head=true")).init().params
    drawn = build(tiny_run.get_config()).init().params
    (subject,) = trained_runs.load([first])
    assert_same(found.pop("head"), drawn["head"])
    assert_same(found, {k: v for k, v in subject.state.params.items() if k != "head"})


def test_training_begins_with_the_scores_of_the_first_run(first, tmp_path):
    still = ("--optimizer=sgd(0.0)", "--epochs=1", f"--init_from={first}")
    assert main.main(["train", TINY, *still, f"--runs={tmp_path}"]) == 0
    (folder,) = tmp_path.iterdir()
    found, expected = results(folder), results(first)
    for name in ("test_accuracy", "test_loss", "train_loss", "lambda_max"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_resumed_run_needs_no_initial_weights(first, tmp_path, capsys):
    weights = shutil.copytree(first, tmp_path / "weights")
    begin = ["train", TINY, f"--init_from={weights}", f"--runs={tmp_path / 'runs'}"]
    assert main.main(begin) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    expected = results(folder)
    weights.rename(tmp_path / "moved")
    (seed,) = folder.glob("*/seed0")
    (seed / "results.json").unlink()
    shutil.rmtree(seed / "checkpoints/12")  # of 12; the one before is of step 9
    assert main.main(["resume", str(folder)]) == 0
    assert results(folder) | {"seconds": 0} == expected | {"seconds": 0}
    assert main.main(["evaluate", str(folder)]) == 0
    capsys.readouterr()
    shutil.rmtree(seed / "checkpoints")
    assert main.main(["resume", str(folder)]) == 2
    assert f"`{weights}` does not exist" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_a_folder_is_made(first, tmp_path, capsys):
    begin = ["train", TINY, f"--runs={tmp_path / 'runs'}"]
    refused = {
        (f"--init_from={tmp_path / 'absent.npz'}",): "absent.npz` does not exist",
        (f"--init_from={tmp_path}",): "there are: none",
        (f"--init_from={first}", "--model.options.depth=2"): "it lacks `params/block_1/",
        (
            f"--init_from={first}",
            "--model.options.patch=4",
        ): "other shapes have `params/block_0/token",
    }
    for options, said in refused.items():
        assert main.main([*begin, *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_outline_needs_no_weights():
    outline(config_of("absent.npz"), jax.devices()[:1])
    with pytest.raises(ConfigError, match="does not exist"):
        build(config_of("absent.npz"))
    build(config_of("absent.npz"), begins=False)


@pytest.fixture(scope="module")
def mapped_start(tmp_path_factory):
    """A run with batch statistics on eight devices."""
    folder = tmp_path_factory.mktemp("eight")
    config = comparison.replace(mapped_run.get_config(), epochs=1)
    experiment = build(config)
    loop.fit(experiment, folder)
    return folder, Checkpoints(folder / "checkpoints").restore(experiment.shapes)[0]


@pytest.mark.skipif(jax.device_count() < mapped_run.DEVICES, reason="needs eight devices")
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_initial_weights_have_the_sharding_of_every_parallelism(mapping, mapped_start):
    folder, trained = mapped_start
    config = comparison.replace(mapped_run.get_config(mapping), init_from=str(folder))
    experiment = build(config)
    state = experiment.init()
    assert_same((state.params, state.model_state), (trained.params, trained.model_state))
    assert any(np.ptp(leaf) > 0 for leaf in jax.tree.leaves(jax.device_get(state.model_state)))
    places = jax.tree.map(lambda x: x.sharding.spec, (state, experiment.shapes))
    assert places[0] == places[1]
    if mapping == "fsdp":
        _, measured = experiment.step(
            state, experiment.parallelism.place(next(experiment.batches()))
        )
        assert measured.finite.all()


# Published files.


def mixer_file(folder, classes, places=16, seed=0):
    """Weights of the tiny run's model under the names of its authors."""
    width, hidden = 8, {"token": 4, "channel": 8}
    block: Any = {f"LayerNorm_{n}/{x}": (width,) for n in (0, 1) for x in ("scale", "bias")}
    for kind, inputs in (("token", places), ("channel", width)):
        for n, (rows, columns) in enumerate([(inputs, hidden[kind]), (hidden[kind], inputs)]):
            block |= {f"{kind}_mixing/Dense_{n}/kernel": (rows, columns)}
            block |= {f"{kind}_mixing/Dense_{n}/bias": (columns,)}
    shapes = {f"MixerBlock_0/{name}": shape for name, shape in block.items()}
    shapes |= {"stem/kernel": (2, 2, 1, width), "stem/bias": (width,)}
    shapes |= {f"pre_head_layer_norm/{x}": (width,) for x in ("scale", "bias")}
    shapes |= {"head/kernel": (width, classes), "head/bias": (classes,)}
    rng = np.random.default_rng(seed)
    arrays: Any = {k: rng.standard_normal(x).astype(np.float32) for k, x in shapes.items()}
    np.savez(folder / "mixer.npz", **arrays)
    return folder / "mixer.npz", arrays


@pytest.mark.parametrize("classes", [10, 1000])
def test_published_weights_start_a_run_and_keep_a_head_that_fits(classes, tmp_path):
    path, arrays = mixer_file(tmp_path, classes)
    params = build(config_of(path)).init().params
    assert_same(params["embedding"]["kernel"], arrays["stem/kernel"])
    assert_same(
        params["block_0"]["token_mlp"]["Dense_1"]["kernel"],
        arrays["MixerBlock_0/token_mixing/Dense_1/kernel"],
    )
    expected = arrays["head/kernel"] if classes == 10 else np.zeros((8, 10))
    assert_same(params["head"]["kernel"], expected)


def test_image_size_of_the_weights_makes_them_fit(tmp_path, capsys):
    path, _ = mixer_file(tmp_path, 1000, places=36)  # 12×12 pixels
    begin = ["train", TINY, f"--init_from={path}", "--epochs=1", f"--runs={tmp_path / 'runs'}"]
    assert main.main(begin) == 2
    assert "(36, 4) for (16, 4)" in capsys.readouterr().err
    assert main.main([*begin, "--data.image_size=12"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert main.main(["evaluate", str(folder)]) == 0
    page = json.loads((folder / "evaluate.json").read_text())
    ((_, entry),) = page.items()
    assert entry["results"]["own"]["test"]["top1"] == pytest.approx(
        results(folder)["test_accuracy"]
    )


# Images resized.


def bilinear(image, side):
    """[H, W] at the centres of `side` × `side` pixels, by SciPy."""
    at = [(np.arange(side) + 0.5) * n / side - 0.5 for n in image.shape]
    return map_coordinates(image, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")


def test_resize_is_bilinear_between_the_centres_of_pixels():
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    batch = {"input": jnp.asarray(images), "label": jnp.zeros(2)}
    grown = transforms.resize(12)(jax.random.key(0), batch)["input"]
    for n, channel in np.ndindex(2, 3):
        expected = bilinear(images[n, ..., channel], 12)
        np.testing.assert_allclose(grown[n, ..., channel], expected, rtol=1e-5, atol=1e-6)
    assert transforms.resize(8)(jax.random.key(0), batch) is batch
    with pytest.raises(ValueError, match="side of its images"):
        transforms.resize(0)


def test_training_and_test_images_have_the_configured_size():
    plain, sized = (
        build(override(tiny_run.get_config(), ["--data.augment=[]", *more]))
        for more in ([], ["--data.image_size=12"])
    )
    batch = next(sized.batches())
    assert batch["input"].shape == (16, 8, 8, 1)  # bytes are few to move
    key = jax.random.key(0)
    for prepare in (lambda of: of.task.in_test(batch), lambda of: of.task.in_training(key, batch)):
        found, small = (np.asarray(prepare(of)["input"]) for of in (sized, plain))
        assert found.shape == (16, 12, 12, 1)
        expected = bilinear(small[0, ..., 0], 12)  # normalised before or after is the same
        np.testing.assert_allclose(found[0, ..., 0], expected, rtol=1e-4, atol=1e-5)
    assert sized.example.shape == (1, 12, 12, 1)


def test_outline_with_resized_images_equals_the_built_step():
    config = override(tiny_run.get_config(), ["--data.image_size=12"])
    sketch, built = outline(config, jax.devices()[:1]), build(config)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(sketch.state) == shapes(built.shapes)
    assert sketch.batch["input"].shape == (16, 8, 8, 1)
    assert shapes(sketch.state) != shapes(build(tiny_run.get_config()).shapes)


def test_crop_of_the_configured_size_is_not_resized_again():
    crop = ["--data.augment=['inception_crop(12)']"]
    configs = (
        override(tiny_run.get_config(), crop + more) for more in ([], ["--data.image_size=12"])
    )
    batch, key = next(build(tiny_run.get_config()).batches()), jax.random.key(0)
    plain, sized = (tasks.build(config).in_training(key, batch)["input"] for config in configs)
    np.testing.assert_array_equal(sized, plain)


@pytest.mark.parametrize("variant", ["cifar100-mixer_b16", "cifar10-resnet50", "cifar100"])
def test_finetune_config_takes_images_of_224_pixels(variant):
    config = load(f"finetune:{variant}")
    sketch = outline(config, jax.devices()[:1])
    assert sketch.batch["input"].shape == (512, 32, 32, 3)
    classes = 100 if "100" in variant else 10
    assert sketch.state.params["head"]["kernel"].shape[-1] == classes
    if variant == "cifar100":
        assert sketch.state.params["pos_embedding"].shape == (1, 14 * 14, 768)
        assert "cls" in sketch.state.params


def test_finetune_config_has_500_or_10_000_steps():
    sizes = {"cifar10": 50_000, "cifar100": 50_000, "flowers": 1020, "pets": 3680}
    for name, size in sizes.items():
        config = load(f"finetune:{name}")
        steps = 10_000 if "cifar" in name else 500
        assert config.epochs * (size // config.batch) == pytest.approx(steps, rel=0.01)
    with pytest.raises(ConfigError, match="one of cifar10, cifar100, flowers, pets"):
        load("finetune:cars")


def test_image_size_of_an_autoencoder_is_refused():
    fields = [
        "--task=autoencoder",
        "--data.image_size=12",
        "--data.label_noise=0",
        "--data.augment=[]",
    ]
    with pytest.raises(ValueError, match=r"`data\.image_size` is for labelled images"):
        build(override(tiny_run.get_config(), fields))


def test_pretrained_weights_replace_the_initial_ones():
    drawn = {"params": {"a": 1, "b": {"c": 2}}, "batch_stats": {}}
    assert pretrained.over(drawn, {"params": {"b": {"c": 3}}}) == {
        "params": {"a": 1, "b": {"c": 3}},
        "batch_stats": {},
    }
