"""Pseudo-labels: the classes predicted by a run, seed by seed, and unsuitable runs."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from image_archives import make_images, write_idx

from curvax.cli import main
from curvax.training.compare import comparison
from curvax.training.config.configs import override
from curvax.training.data import labelled_images
from curvax.training.evaluation import trained_runs
from curvax.training.experiment import build
from curvax.training.runtime.errors import ConfigError

TINY = str(Path(tiny_run.__file__))
FEW = ("--epochs=2", "--hessian_examples=0")


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of one method over two seeds."""
    root = tmp_path_factory.mktemp("first")
    methods = ("--optimizers", "adamw(cosine(lr))", "--seeds=2")
    assert main.main(["compare", TINY, *methods, *FEW, f"--runs={root}"]) == 0
    (folder,) = root.iterdir()
    return folder


def config_of(labels, **fields):
    config = override(tiny_run.get_config(), [f"--data.labels={labels}"])
    return comparison.replace(config, eval_batch=24, **fields)


def split_of(experiment) -> Any:
    """Its training set, which is in memory."""
    return experiment.data.train


def true_labels(seed):
    """The true labels in the order of the training set, without label noise."""
    config = tiny_run.get_config()
    config.data.label_noise = 0.0
    return split_of(build(comparison.replace(config, seed=seed))).labels


def predicted(folder, seed, inputs):
    """By the run's model on normalised images."""
    (subject,) = trained_runs.load([folder / "0-adamw" / f"seed{seed}"])
    of_all: Any = labelled_images.load("digits", seed=0).train
    mean, std = labelled_images.moments(of_all.inputs)
    x = labelled_images.normalise(inputs, mean, std)
    logits: Any = subject.experiment.model.apply({"params": subject.state.params}, x)
    return np.argmax(logits, -1)


@pytest.mark.parametrize("hold_out", [False, True])
def test_pseudo_labels_are_the_top_classes_of_the_run_with_the_same_seed(first, hold_out):
    experiment = build(config_of(first), hold_out=hold_out)
    found = {}
    for seed in (0, 1):
        ours = experiment.with_seed(seed)
        train, wrong = split_of(ours), ours.data.wrong
        expected = predicted(first, seed, train.inputs)
        np.testing.assert_array_equal(train.labels, expected)
        assert train.labels.dtype == np.int32
        if not hold_out:
            np.testing.assert_array_equal(wrong, expected != true_labels(seed))
            assert wrong.any()
            assert not wrong.all()
        found[seed] = expected
    assert (found[0] != found[1]).any()


def test_pseudo_labels_are_made_with_data_in_another_path(tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("train", "t10k"):
        write_idx(tmp_path / "data", part, make_images(80, 28, 28), np.arange(80) % 10)
    fields = ["--data.name=mnist", f"--data.path={tmp_path / 'data'}"]
    assert main.main(["train", TINY, *fields, *FEW, f"--runs={tmp_path / 'runs'}"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    labels = lambda: split_of(build(override(config_of(run), fields))).labels
    before, kept = labels(), run / "config.json"
    kept.write_text(kept.read_text().replace(str(tmp_path / "data"), str(tmp_path / "gone")))
    np.testing.assert_array_equal(labels(), before)


def test_training_on_pseudo_labels_reports_the_share_of_wrong_ones(first, tmp_path, capsys):
    arguments = ["train", TINY, f"--data.labels={first}", "--train_baselines=true", *FEW]
    assert main.main([*arguments, f"--runs={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    wrong = build(config_of(first)).data.wrong
    assert f"64 images of digits, {wrong.mean():.0%} of them wrongly labelled" in said
    assert "of the wrong labels" in said
    (folder,) = tmp_path.iterdir()
    assert main.main(["resume", str(folder)]) == 0


def complaint(capsys, *arguments):
    assert main.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_unsuitable_source_of_labels_is_refused_before_a_folder_is_made(first, tmp_path, capsys):
    arguments = ("train", TINY, *FEW, f"--runs={tmp_path / 'runs'}")
    refused = {
        (f"--data.labels={first}", "--data.label_noise=0.5"): "`data.label_noise` of",
        (f"--data.labels={first}", "--data.num_train=32"): "is `64` where here it is `32`",
        (f"--data.labels={first}", "--seed=5"): "predicted by a run of seed 5, and",
        (f"--data.labels={first}/0-adamw/seed1",): "is of seed1",
        (f"--data.labels={tmp_path / 'gone'}",): "gone does not exist",
        (f"--data.labels={tmp_path}",): "has these: none",
        (f"--data.labels={first}", "--task=autoencoder"): "`data.label_noise` is for labelled",
    }
    for options, said in refused.items():
        assert said in complaint(capsys, *arguments, *options)
    seeds = ("compare", TINY, "--seeds=3", *arguments[2:], f"--data.labels={first}")
    assert "of seed0, seed1" in complaint(capsys, *seeds)
    assert not (tmp_path / "runs").exists()


def test_unfinished_run_several_methods_and_grid_search_are_refused(first, tmp_path):
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "0-adamw/seed0/results.json").unlink()
    with pytest.raises(ConfigError, match="curvax resume"):
        build(config_of(copy))
    build(config_of(f"{first}/0-adamw/seed0"))
    shutil.copytree(copy / "0-adamw", copy / "1-sgd")
    with pytest.raises(ConfigError, match="0-adamw, 1-sgd"):
        build(config_of(copy))
    plan = copy / "run.json"
    plan.write_text(plan.read_text().replace('"fields": {}', '"fields": {"lr": ["1"]}'))
    with pytest.raises(ConfigError, match="is a sweep"):
        build(config_of(copy / "1-sgd"))


def test_resuming_without_the_run_behind_the_labels_raises(first, tmp_path, capsys):
    copy = shutil.copytree(first, tmp_path / "copy")
    arguments = ["train", TINY, f"--data.labels={copy}", *FEW, f"--runs={tmp_path / 'runs'}"]
    assert main.main(arguments) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    copy.rename(tmp_path / "moved")
    assert "resuming or inspecting a run" in complaint(capsys, "resume", str(folder))
