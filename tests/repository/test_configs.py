"""Every config that comes with curvax: its docstring, its settings, and that it builds."""

import re

import jax
import numpy as np
import pytest
from repository import ROOT

from curvax import models
from curvax.models.efficientnet import B0
from curvax.training import parallelism
from curvax.training.augment import preprocessing
from curvax.training.compare import commands, comparison
from curvax.training.config import configs as config
from curvax.training.config import recipe
from curvax.training.data import datasets, flights
from curvax.training.experiment import build, outline
from curvax.training.runtime.errors import ConfigError

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "svhn_extra": (32, 32, 3),
}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    """Images of the right shape instead of archives that are not here."""

    def load(name, path, seed):
        del path, seed
        classes = 100 if name == "cifar100" else 10
        count = 4000 if name == "mnist" else 1000
        labels = np.arange(count, dtype=np.int32) % classes
        split = datasets.Split(np.zeros((count, *SHAPES[name]), np.float32), labels)
        return datasets.Dataset(split, split, classes)

    def load_flights(name, path):
        del name, path
        inputs = np.zeros((1000, 9), np.float32)
        inputs[-1, 3:] = np.array((16, 3, 104, 4037, 19, 7)) - 1
        split = datasets.Split(inputs, np.zeros((1000, 1), np.float32))
        return datasets.Dataset(split, split, 1)

    monkeypatch.setattr(preprocessing, "in_memory", load)
    monkeypatch.setattr(flights, "load", load_flights)
    preprocessing._measured.cache_clear()
    yield
    preprocessing._measured.cache_clear()  # moments of the stand-ins are not cached for others


def arms_of(loaded):
    """The config of each method, the base first."""
    return comparison.variants(loaded, commands.methods(loaded))


@pytest.mark.parametrize("name", config.names())
def test_config_docstring_has_paper_command_result_and_cost(name):
    said = config.docstring(name)
    assert len(said.splitlines()[0]) <= 100
    for part in ("\nPaper: ", "\nCommand: curvax ", "\nExpected: ", "\nCost: "):
        assert part in said
    assert name == "digits" or name in said.replace(":", " ").split()


# Networks of 20 to 272 layers, built in their smallest form, which also takes a step of SAM. Their
# full sizes are tested with the models.
SMALLEST = {
    "cifar10_pyramidnet": {"depth": 11},
    "cifar10_shakeshake": {"depth": 8, "width": 4},
    "finetune_efficientnet": {"width": 0.25, "depth": 0.1, "blocks": B0[:2]},
}


@pytest.mark.parametrize("name", config.names())
def test_config_builds_with_its_method_and_its_baseline(name):
    loaded = config.load(name)
    assert loaded.is_locked
    if name in SMALLEST:
        loaded.model.options.update(SMALLEST[name])
        loaded.data.update(image_size=8, num_train=8, augment=["flip()"])
        loaded.update(batch=8, m=8)
    if loaded.data.name == "imagenet" or loaded.init_from:  # not here
        for arm in arms_of(loaded).values():
            outline(arm, jax.devices()[:1])
        return
    loaded.devices = 1
    for arm in arms_of(loaded).values():
        experiment = build(arm)
        assert experiment.steps == arm.epochs * (experiment.data.train.size // arm.batch)
    if name in SMALLEST:
        takes_a_step(experiment)


def takes_a_step(experiment):
    start = experiment.init()
    old = np.asarray(start.params["head"]["bias"])  # a step takes the buffers of the state
    state, measured = experiment.step(start, next(experiment.batches()))
    assert np.asarray(measured.finite).all()
    assert 0 < np.abs(state.params["head"]["bias"] - old).max() < 1


VARIANTS = {
    "imagenet_resnet": ("50", "101", "152"),
    "imagenet_adversarial": ("s16", "b32", "b16"),
    "imagenet_vit": ("s32", "s16", "b32", "b16"),
    "imagenet_mixer": ("s32", "s16", "s8", "b32", "b16"),
}


@pytest.mark.parametrize("name", [f"{n}:{v}" for n, found in VARIANTS.items() for v in found])
def test_model_variant_differs_in_its_model_alone(name):
    stem, _, size = name.partition(":")
    loaded, plain = config.load(name), config.load(stem)
    assert loaded.model.name.endswith(size)
    models.build(loaded.model.name, 1000, **loaded.model.options)
    loaded.name, loaded.model.name = plain.name, plain.model.name
    assert loaded.to_dict() == plain.to_dict()


ON_IMAGENET = ("imagenet_resnet", "imagenet_vit", "imagenet_mixer")
ON_CIFAR = (
    "cifar10_wrn", "cifar100_wrn", "cifar10_noise", "fashion_wrn", "svhn_wrn",
    "cifar10_pyramidnet", "cifar10_shakeshake",
)  # fmt: skip
FINETUNED = {"finetune": 512, "finetune_efficientnet": 1024}
GROUPS = dict.fromkeys(ON_IMAGENET, 128) | dict.fromkeys(ON_CIFAR, 256) | FINETUNED
ADAHESSIAN = ("imagenet_adahessian", "cifar10_resnet20")


@pytest.mark.parametrize("name", GROUPS)
def test_paper_configs_perturb_by_the_papers_m_on_any_number_of_devices(name):
    loaded = config.load(name)
    assert loaded.m == GROUPS[name]
    for text in (loaded.optimizer, *loaded.more_optimizers):
        assert text.startswith("per_group(m, sam_perturb(")
        assert text.endswith(f") | {loaded.baseline}")  # so the mean comes before the clipping
    together = {each: parallelism._devices_of_a_group(loaded, each) for each in (8, 32, 64, 256)}
    if name in ON_IMAGENET:
        assert together == {8: 1, 32: 1, 64: 2, 256: 8}
    else:  # the whole batch
        assert together == {each: each for each in together}
    assert (name in ON_IMAGENET) == (loaded.batch == 4096) == (loaded.parallelism == "shard_map")


@pytest.mark.parametrize("mapping", ["jit", "shard_map", "pmap"])
@pytest.mark.parametrize("name", [*GROUPS, *ADAHESSIAN])
def test_paper_methods_build_under_every_parallelism(name, mapping):
    loaded = config.load(name)
    with loaded.unlocked():
        loaded.model = {"name": "mlp", "options": {"widths": [4]}}  # the methods, in a second
    loaded.update(parallelism=mapping, init_from=None)
    for arm in arms_of(loaded).values():
        sketch = outline(arm, jax.devices()[:8])
        state, _ = sketch.step.eval_shape(sketch.state, sketch.batch)
        assert state.params.keys() == sketch.state.params.keys()


def test_paper_configs_have_the_papers_settings():
    wrn = config.load("cifar100_wrn")
    assert (wrn.model.name, wrn.epochs, wrn.batch) == ("wrn28_10", 200, 256)
    assert "cosine(0.1)" in wrn.baseline
    assert "add_decayed_weights(5e-4)" in wrn.baseline
    assert "clip_by_global_norm(5.0)" in wrn.baseline
    for name, decay, rho in (("pyramidnet272_200", 5e-4, 0.05), ("shakeshake26_96", 1e-3, 0.02)):
        loaded = config.load(f"cifar10_{name.rstrip('_0123456789')}")
        assert (loaded.model.name, loaded.batch, loaded.lr) == (name, 256, 0.02)
        assert (loaded.rho, loaded.epochs) == (rho, 1800)
        weight = re.search(r"add_decayed_weights\((.*?)\)", loaded.baseline)
        assert weight is not None
        assert float(weight[1]) == decay
    noise = config.load("cifar10_noise")
    assert (noise.model.name, noise.epochs, noise.rho) == ("resnet32", 200, 0.1)
    assert "adahessian(step_decay(0.15)" in config.load("cifar10_resnet20").optimizer
    resnet = config.load("imagenet_resnet")
    assert (resnet.lr, resnet.rho, resnet.epochs) == (1.0, 0.05, 100)
    for part in ("add_decayed_weights(1e-4)", "sgd(cosine(lr), momentum=0.9)"):
        assert part in resnet.baseline


def test_gsam_radius_and_learning_rate_are_those_of_big_vision():
    """ρ follows the learning rate from 0.6 to 0.1, and is never negative while it warms up."""
    vit = config.load("imagenet_vit")
    steps, names = 300 * (1_281_167 // 4096), config.numbers(vit)
    text = "linear(lr, warmup=warmup, end=lr_min)"
    rate = recipe.read(text, recipe.vocabulary(steps) | names)
    inside = vit.optimizer.partition("sam_perturb(")[2].partition(") | gsam_project")[0]
    rho = recipe.read(inside, recipe.vocabulary(steps) | names)
    assert f"adamw({text}, weight_decay=0.3, mask=kernels)" in vit.baseline
    for step in (0, 50, 5000, 10_000, 50_000, steps):
        lr = 3e-3 * (step / 1e4 if step < 1e4 else 1 - 0.99 * (step - 1e4) / (steps - 1e4))
        assert float(rate(step)) == pytest.approx(lr, rel=1e-4, abs=1e-9)
        expected = max(0.0, 0.1 + 0.5 * (lr - 3e-5) / (3e-3 - 3e-5))
        assert float(rho(step)) == pytest.approx(expected, rel=1e-4)
    assert vit.model.options.head_bias == -10.0
    assert (vit.alpha, vit.loss) == (0.6, "sigmoid")


COUNTS = dict.fromkeys(
    ("epochs", "batch", "microbatch", "devices", "eval_batch", "log_every", "test_every",
     "checkpoint_every", "keep_checkpoints", "data.image_size", "data.threads"), 1,
) | {"seed": 0, "hessian_examples": 0}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_counts_below_their_minimum_are_refused(name):
    given = lambda text: config.override(config.defaults(), [f"--{name}={text}"])
    config.check(given(COUNTS[name]))
    for text in (COUNTS[name] - 1, -7, "true"):
        with pytest.raises(ConfigError, match=rf"`{name}` is a whole number from [01], and"):
            config.check(given(text))


def test_count_without_a_default_cannot_be_none():
    config.check(config.defaults())
    with pytest.raises(ConfigError, match="`epochs` is a whole number from 1, and was None"):
        config.check(config.override(config.defaults(), ["--epochs=none"]))


def test_unset_fields_keep_their_types():
    plain = config.defaults()
    assert config.override(plain, ["--data.path=2024"]).data.path == "2024"
    assert plain.data.path is None
    with pytest.raises(ConfigError, match=r"`data\.mean` has the type `tuple`"):
        config.override(plain, ["--data.mean=0.5"])


def test_installed_package_finds_its_own_configs(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.py").write_text('"""Mine."""\n')
    monkeypatch.setattr(config.curvax, "__file__", str(tmp_path / "__init__.py"))
    assert config.names() == ["own"]
    assert config.docstring("own") == "Mine."


def test_the_documentation_lists_every_config():
    page = (ROOT / "docs" / "command_line.md").read_text()
    assert [name for name in config.names() if f"`{name}`" not in page] == []
