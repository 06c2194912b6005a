"""`curvax evaluate`: test sets, the matching of classes, scores and errors."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import photographs
import pytest
import tiny_run
from image_archives import write_idx
from ml_collections import ConfigDict

from curvax.cli import main
from curvax.training.data import convert, decode, labelled_images
from curvax.training.data.archives import DataError
from curvax.training.data.image_folders import listing
from curvax.training.evaluation import imagenet_real, test_sets, topk, trained_runs
from curvax.training.evaluation.corruptions import CORRUPTIONS

NAMES = [f"n{number:02}" for number in range(12)]
CONFIG = """
from curvax.training.config import defaults

def get_config():
    config = defaults()
    config.model.name = "mixer_tiny"
    config.model.options.update(
        depth=1, scan=False, width=8, token_width=4, channel_width=8, patch=4
    )
    config.data.update(name="records", image_size=16)
    config.optimizer = "adamw(1e-2)"
    config.update(batch=16, epochs=1, eval_batch=8, hessian_examples=0)
    return config
"""


def write_pictures(root, count, names=NAMES, seed=0):
    """Class folders of pieces of the photographs, of one every third class."""
    images = list(photographs.photographs().values())
    for name in names:
        (root / name).mkdir(parents=True)
        number = NAMES.index(name) if name in NAMES else int(name)
        pieces = photographs.pieces(images[number % 3], count, 100 * seed + number)
        for i, piece in enumerate(pieces):
            (root / name / f"{name}_{i}.JPEG").write_bytes(photographs.jpeg(piece))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of 12 classes, `pictures/train` and `pictures/val`, their records and a run."""
    place = tmp_path_factory.mktemp("place")
    write_pictures(place / "pictures/train", 4)
    write_pictures(place / "pictures/val", 3, seed=1)
    assert main.main(["convert", str(place / "pictures"), str(place / "records")]) == 0
    (place / "small.py").write_text(CONFIG)
    fields = [f"--data.path={place / 'records'}", f"--runs={place / 'runs'}"]
    assert main.main(["train", str(place / "small.py"), *fields]) == 0
    return place


@pytest.fixture(scope="module")
def run(place):
    return next((place / "runs").iterdir())


@pytest.fixture(scope="module")
def subject(run):
    return trained_runs.load([run])[0]


@pytest.fixture(scope="module")
def ahead(subject):
    return topk.make_rank(subject.experiment)


def evaluate(run, *options):
    """The results of the command on the data of its options, or what it exits with."""
    code = main.main(["evaluate", str(run), *map(str, options)])
    return code or results_of(run, *(each for each in options if isinstance(each, Path)))


def results_of(run, *data):
    """The results in the run's folder of images and labels, or of its own test set."""
    ((_, entry),) = json.loads((run / "evaluate.json").read_text()).items()
    return entry["results"][", ".join(str(each.resolve()) for each in data) or "own"]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, images):
    return model.apply(variables, images)


def logits_of(subject, root):
    """Naively, one image at a time: {file: logits of all classes}."""
    model, state = subject.experiment.model, subject.state
    found = {}
    for _, path in listing(root).images:
        pixels = decode.central_crop(path.read_bytes(), 16) / 127.5 - 1
        variables = {"params": state.params, **state.model_state}
        found[path] = np.asarray(apply(model, variables, pixels[None].astype(np.float32)))[0]
    return found


def shares(logits, right, among=None):
    """(top-1, top-5) by sorting."""
    kept = range(12) if among is None else among
    hits = []
    for path, scores in logits.items():
        best = sorted(kept, key=lambda k: -scores[k])
        hits.append([best[0] in right(path), bool(set(best[:5]) & set(right(path)))])
    return tuple(np.mean(hits, axis=0))


def own_class(path):
    return {NAMES.index(path.parent.name)}


# The run's own test set, and other images


def test_the_own_test_set_scores_as_at_the_end_of_the_run(run):
    results = evaluate(run)
    figures = json.loads(next(run.glob("*/seed0/results.json")).read_text())
    assert results["test"]["examples"] == 36
    assert results["test"]["classes"] == 12
    assert results["test"]["top1"] == pytest.approx(figures["test_accuracy"])
    assert results["test"]["top5"] == pytest.approx(figures["test_top5"])


def test_class_folders_and_records_score_as_single_images(place, run, subject):
    pictures = place / "pictures/val"
    expected = shares(logits_of(subject, pictures), own_class)
    folder, kept = (evaluate(run, "--data", p)[p.name] for p in (pictures, place / "records"))
    for found in (folder, kept):
        assert (found["top1"], found["top5"]) == pytest.approx(expected)
        assert found["examples"] == 36


def test_predictions_are_restricted_to_the_classes_of_the_test_set(subject, ahead, tmp_path):
    names = NAMES[2:9]
    root = write_pictures(tmp_path / "r", 3, names, seed=2)
    (root / "README.txt").write_text("about")
    (benchmark,) = test_sets.of_path(root, subject.experiment)
    found = topk.evaluate(subject.experiment, subject.state, benchmark, ahead)
    logits = logits_of(subject, root)
    assert found.classes == 7
    assert (found.top1, found.top5) == pytest.approx(shares(logits, own_class, range(2, 9)))
    assert shares(logits, own_class) != pytest.approx((found.top1, found.top5))


def test_class_folders_can_be_named_by_numbers(subject, ahead, tmp_path):
    numbers = [str(number) for number in range(12)]
    root = write_pictures(tmp_path / "v2", 3, numbers, seed=3)
    (benchmark,) = test_sets.of_path(root, subject.experiment)
    found = topk.evaluate(subject.experiment, subject.state, benchmark, ahead)
    expected = shares(logits_of(subject, root), lambda path: {int(path.parent.name)})
    assert (found.top1, found.top5) == pytest.approx(expected)


def test_records_of_some_classes_are_matched_by_their_names(place, run, subject, tmp_path):
    names = NAMES[:1:-2]
    root = write_pictures(tmp_path / "some", 2, names, seed=4)
    parts = convert.find_parts(root)
    convert.convert(parts, tmp_path / "other")
    found = evaluate(run, "--data", tmp_path / "other")["other"]
    among = [NAMES.index(name) for name in names]
    assert found["classes"] == len(names)
    expected = shares(logits_of(subject, root), own_class, among)
    assert (found["top1"], found["top5"]) == pytest.approx(expected)


def test_records_of_numbers_are_matched_where_the_run_has_no_names(subject, tmp_path):
    """As ImageNet-V2's, which in the order of their names are 0, 1, 10, 100."""
    numbers = [str(number) for number in range(12)]
    convert.convert(
        convert.find_parts(write_pictures(tmp_path / "v2", 1, numbers)), tmp_path / "made"
    )
    data = subject.experiment.data
    unnamed = dataclasses.replace(subject.experiment, data=data._replace(names=[]))
    (benchmark,) = test_sets.of_path(tmp_path / "made", unnamed)
    pictures: Any = benchmark.examples
    for number in range(12):
        example = pictures.store.read(number)
        assert example.name == f"{example.label}_0.JPEG"


def test_hidden_folders_are_ignored(place, subject, tmp_path):
    shutil.copytree(place / "pictures/val", tmp_path / "c/fog/1")
    (tmp_path / "c/.cache/1").mkdir(parents=True)
    (tmp_path / "c/fog/.git").mkdir()
    found = [each.name for each in test_sets.of_path(tmp_path / "c", subject.experiment)]
    assert found == ["fog/1"]


def test_corruption_folders_are_scored_each_and_on_average(place, run, tmp_path, capsys):
    pictures = place / "pictures/val"
    for strength in ("1", "2"):
        shutil.copytree(pictures, tmp_path / "c/fog" / strength)
    write_pictures(tmp_path / "c/snow/1", 3, seed=5)
    results = evaluate(run, "--data", tmp_path / "c")
    printed = capsys.readouterr().out
    one, two, snow = (results[name]["top1"] for name in ("fog/1", "fog/2", "snow/1"))
    assert one == two == evaluate(run, "--data", pictures)["val"]["top1"]
    assert results["fog"]["top1"] == pytest.approx(one)
    assert results["mean"]["top1"] == pytest.approx((2 * one + snow) / 3)
    assert all(word in printed for word in ("fog", "snow", "mean", f"{snow:.1%}"))


def test_images_of_the_right_size_are_not_resized(subject, tmp_path):
    (tmp_path / "exact/n00").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    photographs.Image.fromarray(pixels).save(tmp_path / "exact/n00/x.png")
    (benchmark,) = test_sets.of_path(tmp_path / "exact", subject.experiment)
    np.testing.assert_array_equal(benchmark.examples.gather(np.arange(1))["input"][0], pixels)


def test_data_of_the_same_name_in_two_paths_have_separate_results(place, run, tmp_path):
    before = evaluate(run, "--data", place / "pictures/val")
    other = write_pictures(tmp_path / "second/val", 2, seed=8)
    own = write_pictures(tmp_path / "test", 1, seed=9)
    found = [evaluate(run, "--data", data)[data.name]["examples"] for data in (other, own)]
    assert found == [24, 12]
    assert evaluate(run)["test"]["examples"] == 36
    assert results_of(run, place / "pictures/val") == before


def test_corruption_folders_of_the_same_name_have_separate_results(place, run, tmp_path):
    shutil.copytree(place / "pictures/val", tmp_path / "c/fog/1")
    write_pictures(tmp_path / "d/fog/1", 1, seed=10)
    found = [evaluate(run, "--data", tmp_path / name) for name in ("c", "d")]
    assert [each["mean"]["examples"] for each in found] == [36, 12]
    assert results_of(run, tmp_path / "c") == found[0]


def test_current_folder_is_called_by_its_name(place, run, monkeypatch):
    monkeypatch.chdir(place / "pictures/val")
    assert evaluate(run, "--data", Path())["val"]["examples"] == 36


# Sets of labels


@pytest.fixture
def validation(tmp_path):
    """Images named as ImageNet's: 12 of one class folder each, numbers 1 to 12."""
    root = write_pictures(tmp_path / "val", 1, seed=6)
    for number, name in enumerate(NAMES, start=1):
        (root / name / f"{name}_0.JPEG").rename(root / name / f"ILSVRC2012_val_{number:08}.JPEG")
    return root


def test_any_real_label_counts_and_images_without_labels_are_left_out(
    run, subject, validation, tmp_path
):
    rng = np.random.default_rng(0)
    sets = [rng.choice(12, size, replace=False).tolist() for size in (1, 2, 3, 0, 1, 4) * 2]
    (tmp_path / "real.json").write_text(json.dumps(sets))
    number = lambda path: int(path.stem.rpartition("_")[2]) - 1
    logits = logits_of(subject, validation)
    kept = {path: scores for path, scores in logits.items() if sets[number(path)]}
    expected = shares(kept, lambda path: set(sets[number(path)]))
    results = evaluate(run, "--data", validation, "--labels", tmp_path / "real.json")
    found = results["val, real.json"]
    assert found["examples"] == 10
    assert (found["top1"], found["top5"]) == pytest.approx(expected)
    assert expected != pytest.approx(shares(logits, own_class))
    (tmp_path / "second").mkdir()
    (tmp_path / "second/real.json").write_text(json.dumps([[0]] * 12))
    second = evaluate(run, "--data", validation, "--labels", tmp_path / "second/real.json")
    assert second["val, real.json"]["examples"] == 12
    assert results_of(run, validation, tmp_path / "real.json") == results


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[[1], [2]]", "has no number among the 2"),
        ("[[1], [12]]", "lists of classes from 0 to 11"),
        ('{"a": 1}', "lists of classes"),
        ("[[1", "cannot be read"),
        (json.dumps([[]] * 12), r"/real\.json gives none to any image of `val`"),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(subject, validation, tmp_path, content, words):
    (tmp_path / "real.json").write_text(content)
    (benchmark,) = test_sets.of_path(validation, subject.experiment)
    with pytest.raises(DataError, match=words):
        imagenet_real.with_labels(benchmark, tmp_path / "real.json")


# Faults


@pytest.mark.parametrize(
    ("names", "found"), [("123", "012"), ("123", "0"), (["n00", "n01"], ["0", "n01"])]
)
def test_mixed_names_and_numbers_of_classes_are_refused(names, found, tmp_path):
    write_pictures(tmp_path, 1, list(found))
    options = ConfigDict({"name": "records", "image_size": 8, "threads": None})
    data = SimpleNamespace(names=list(names), classes=len(names))
    trained: Any = SimpleNamespace(config=ConfigDict({"data": options}), data=data)
    with pytest.raises(DataError, match="has the class `0`"):
        list(test_sets.of_path(tmp_path, trained))


def test_unknown_classes_are_refused(run, tmp_path, capsys):
    write_pictures(tmp_path / "odd", 1, ["n03"])
    (tmp_path / "odd/n03").rename(tmp_path / "odd/cat")
    assert evaluate(run, "--data", tmp_path / "odd") == 2
    told = capsys.readouterr().err
    assert "has the class `cat`" in told
    assert "12 others (`n00`, `n01`, `n02` …)" in told


def test_damaged_image_and_missing_folder_raise(run, tmp_path, capsys):
    root = write_pictures(tmp_path / "cut", 2)
    (root / "n05/n05_1.JPEG").write_bytes(b"cut")
    assert evaluate(run, "--data", root) == 2
    assert f"the file {root}/n05/n05_1.JPEG, cannot be used" in capsys.readouterr().err
    assert evaluate(run, "--data", tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    assert evaluate(tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err


# A run on images in memory


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    runs = tmp_path_factory.mktemp("digits")
    arguments = ["train", tiny_run.__file__, f"--runs={runs}", "--epochs=1"]
    assert (
        main.main(
            [*arguments, "--data.label_noise=0", "--data.num_train=256", "--hessian_examples=0"]
        )
        == 0
    )
    return next(runs.iterdir())


UNDER = {f"{name}/{strength}" for name in CORRUPTIONS for strength in range(1, 6)}


def test_digits_are_evaluated_under_corruptions(digits, capsys):
    results = evaluate(digits, "--corruptions")
    printed = capsys.readouterr().out
    assert UNDER | {"test", "mean", *CORRUPTIONS} == set(results)
    assert all(results[name]["examples"] == 797 for name in UNDER)
    assert all(results[name]["top5"] is None for name in UNDER)
    assert results["mean"]["top1"] == pytest.approx(np.mean([results[n]["top1"] for n in UNDER]))
    assert all(name in printed for name in CORRUPTIONS)
    page = json.loads((digits / "evaluate.json").read_text())
    figures = json.loads(next(digits.glob("*/seed0/results.json")).read_text())
    ((_, entry),) = page.items()
    assert entry["step"] == figures["steps"]
    assert entry["results"]["own"]["test"]["top1"] == pytest.approx(figures["test_accuracy"])


def test_digits_are_evaluated_under_an_attack(digits, capsys):
    results = evaluate(digits, "--attack", "pgd(16/255, steps=3)")
    under = results["test under PGD-3, linf ε = 0.06275"]
    assert under["top1"] < results["test"]["top1"]
    assert "PGD-3" in capsys.readouterr().out
    assert results == evaluate(digits)  # kept
    nothing = evaluate(digits, "--attack", "pgd(0.0)")["test under PGD-10, linf ε = 0"]
    assert nothing["top1"] == results["test"]["top1"]
    assert evaluate(digits, "--attack", "adamw(1e-3)") == 2
    assert "Unknown name `adamw`" in capsys.readouterr().err


def test_fashion_mnist_is_evaluated_under_corruptions(tmp_path):
    """Some of its images, as Debian installs them."""
    try:
        whole = labelled_images.load("fashion_mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    for kind, split, count in (("train", whole.train, 64), ("t10k", whole.test, 300)):
        write_idx(tmp_path, kind, split.inputs[:count, ..., 0], split.labels[:count])
    fields = ["--data.name=fashion_mnist", f"--data.path={tmp_path}", "--data.num_train=64"]
    arguments = ["train", tiny_run.__file__, f"--runs={tmp_path / 'runs'}", "--epochs=1", *fields]
    plain = ["--data.label_noise=0", "--hessian_examples=0", "--optimizer=sgd(0.1)"]
    assert main.main([*arguments, *plain]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    results = evaluate(run, "--corruptions")
    assert UNDER | {"test", "mean", *CORRUPTIONS} == set(results)
    assert all(results[name]["examples"] == 300 for name in UNDER)


def test_earlier_results_are_kept(digits):
    before = evaluate(digits, "--corruptions")
    assert evaluate(digits) == before


def test_image_folders_and_label_files_are_refused_for_runs_on_arrays(digits, tmp_path, capsys):
    root = write_pictures(tmp_path / "pictures", 1)
    assert evaluate(digits, "--data", root) == 2
    assert "trained on `digits`" in capsys.readouterr().err
    (tmp_path / "real.json").write_text("[[1]]")
    assert evaluate(digits, "--labels", tmp_path / "real.json") == 2
    assert "are found by the names of image files" in capsys.readouterr().err


def test_corruptions_of_records_are_refused(run, capsys):
    assert evaluate(run, "--corruptions") == 2
    assert "ImageNet-C" in capsys.readouterr().err


def test_model_with_nan_scores_zero(subject, ahead):
    state = subject.state._replace(
        params=jax.tree.map(lambda x: np.full_like(x, np.nan), subject.state.params)
    )
    found = topk.evaluate(subject.experiment, state, test_sets.of_run(subject.experiment), ahead)
    assert (found.top1, found.top5) == (0, 0)
