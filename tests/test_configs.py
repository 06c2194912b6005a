"""Every config that comes with curvax: what it says of itself, and that it can be run."""

from pathlib import Path

import numpy as np
import pytest

from curvax.training import commands, compare, config, data, preparation
from curvax.training.experiment import build

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    """Images of the right shape instead of archives that are not here."""

    def load(name, path, seed):
        del path, seed
        classes = 100 if name == "cifar100" else 10
        count = 4000 if name == "mnist" else 1000
        labels = np.arange(count, dtype=np.int32) % classes
        split = data.Split(np.zeros((count, *SHAPES[name]), np.float32), labels)
        return data.Dataset(split, split, classes)

    monkeypatch.setattr(preparation, "in_memory", load)


@pytest.mark.parametrize("name", config.names())
def test_a_config_opens_with_paper_command_result_and_cost(name):
    said = config.docstring(name)
    assert len(said.splitlines()[0]) <= 100
    for part in ("\nPaper: ", "\nCommand: curvax ", "\nExpected: ", "\nCost: "):
        assert part in said
    assert name == "digits" or name in said.split()


@pytest.mark.parametrize("name", config.names())
def test_a_config_builds_with_its_method_and_its_base(name):
    loaded = config.load(name)
    assert loaded.is_locked
    loaded.devices = 1
    methods = compare.arms(loaded, commands.methods(loaded))
    for arm in methods.values():
        experiment = build(arm)
        assert experiment.steps == arm.epochs * (experiment.material.train.size // arm.batch)


def test_the_configs_of_the_papers_have_their_settings():
    wrn = config.load("cifar100_wrn")
    assert (wrn.model.name, wrn.epochs, wrn.batch) == ("wrn28_10", 200, 256)
    assert "cosine(0.1)" in wrn.base
    assert "add_decayed_weights(5e-4)" in wrn.base
    assert "clip_by_global_norm(5.0)" in wrn.base
    noise = config.load("cifar10_noise")
    assert (noise.model.name, noise.epochs, noise.rho) == ("resnet32", 200, 0.1)
    assert "adahessian(step_decay(0.15)" in config.load("cifar10_resnet20").optimizer


def test_an_installed_package_finds_the_configs_inside_itself(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.py").write_text('"""Mine."""\n')
    monkeypatch.setattr(config.curvax, "__file__", str(tmp_path / "__init__.py"))
    assert config.names() == ["own"]
    assert config.docstring("own") == "Mine."


def test_the_readme_lists_every_config():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in config.names() if f"`{name}`" not in readme] == []
