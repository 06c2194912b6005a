"""Comparisons: intervals, baselines, verdicts, names of variants and grids."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from short_runs import CONFIG, changed

from curvax.training import loop, selection_metric, tasks
from curvax.training.compare import comparison, report
from curvax.training.compare.commands import RunSpec
from curvax.training.compare.summary import summarise
from curvax.training.config import configs
from curvax.training.experiment import build
from curvax.training.runtime import run_dir

# Comparisons.


def test_confidence_interval_is_students():
    summary = summarise([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653 in any table
    assert summary == pytest.approx((2.0, 1.0, 4.302653 / 3**0.5), rel=1e-6)
    assert np.isnan(summarise([1.0]).half_width)


def test_options_of_a_run_have_other_names_than_fields_of_its_config():
    """Processes compare both in one dictionary: a name in both would hide a difference."""
    assert not configs.flat(CONFIG).keys() & set(RunSpec._fields)


def outcome(accuracy):
    return run_dir.Outcome({"test_accuracy": accuracy, "seconds": 1.0}, [])


def test_better_baseline_is_chosen_seed_by_seed():
    short, long = [outcome(0.5), outcome(0.8)], [outcome(0.6), outcome(0.7)]
    arms = {"base": short, "longer": long, "sam": short}
    found = comparison.with_better_baseline(arms, selection_metric.CLASSIFICATION)
    assert [run.metrics["test_accuracy"] for run in found["base, better of both"]] == [0.6, 0.8]
    gain = comparison.score(found, selection_metric.CLASSIFICATION)["sam"].gain
    assert gain.mean == pytest.approx(-0.05)


def test_diverged_run_leaves_the_comparison_of_the_others(tmp_path):
    texts = ["sgd(0.1)", "scale(1e30) | sgd(1e30)"]
    experiments = {name: build(arm) for name, arm in comparison.variants(CONFIG, texts).items()}
    quiet = lambda name, steps: lambda step, figures: None
    with pytest.raises(loop.NotFinite):
        comparison.run(experiments, 1, tmp_path / "strict", quiet)
    outcomes = comparison.run(experiments, 1, tmp_path / "lenient", quiet, may_diverge=True)
    scores = comparison.score(outcomes, selection_metric.CLASSIFICATION)
    assert scores["sgd"].reached.mean == outcomes["sgd"][0].metrics["test_accuracy"]
    assert np.isnan(scores["scale | sgd"].reached.mean)
    assert "scale | sgd diverged." in report.gains(scores, selection_metric.CLASSIFICATION)
    assert "diverged" in report.as_text(report.score_table(scores, selection_metric.CLASSIFICATION))


@pytest.mark.parametrize(
    ("base", "method", "said", "unsaid"),
    [
        (
            {"test_accuracy": 0.6, "lambda_max": 60.0, "memorised": 0.9, "wrong_labels": 0.4},
            {"test_accuracy": 0.8, "lambda_max": 4.0, "memorised": 0.1, "wrong_labels": 0.4},
            [
                "64 images of digits, 40% of them",
                "`b` learnt 10%",
                "20.0 points ahead",
                "15.0 times flatter",
            ],
            "behind",
        ),
        (
            {"test_accuracy": 0.8, "lambda_max": 4.0},
            {"test_accuracy": 0.75, "lambda_max": 6.0},
            ["64 images of digits.", "5.0 points behind", "1.5 times sharper"],
            "learnt",
        ),
        (
            {"test_accuracy": 0.8, "lambda_max": -4.0},
            {"test_accuracy": 0.8},
            ["0.0 points ahead"],
            "eigenvalue",
        ),
    ],
)
def test_verdict_states_the_differences_in_words(base, method, said, unsaid):
    config = changed()
    records = [{"step": 1, "test/accuracy": 0.77}, {"step": 2, "train/loss": 1.0}]
    run = lambda figures: [run_dir.Outcome(figures | {"train_examples": 64, "steps": 2}, records)]
    words = report.verdict(config, tasks.build(config), {"a": run(base), "b": run(method)})
    assert all(part in words for part in [*said, "77.0% at its best epoch", "compare tiny_run"])
    assert unsaid not in words


def test_variants_are_named_by_their_differences():
    texts = ["adamw(1e-3)", "sam_perturb(0.1) | adamw(1e-3)", "sam_perturb(0.2) | adamw(1e-3)"]
    arms = comparison.variants(CONFIG, texts, fair=True)
    assert list(arms) == [
        "adamw", "adamw, 2 × epochs", "sam_perturb(0.1) | adamw", "sam_perturb(0.2) | adamw"
    ]  # fmt: skip
    assert [arm.epochs for arm in arms.values()] == [3, 6, 3, 3]
    assert [arm.optimizer for arm in arms.values()] == [texts[0], *texts]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (
            ["per_group(4, sam_perturb(0.1)) | sgd(1.0)", "per_group(4, sgd(0.1)) | sgd(1.0)"],
            ["per_group(sam_perturb(0.1)) | sgd", "per_group(sgd(0.1)) | sgd"],
        ),
        (
            ["per_group(4, sam_perturb(0.1)) | sgd(1)", "per_group(4, sam_perturb(0.2)) | sgd(1)"],
            ["per_group(sam_perturb(0.1)) | sgd", "per_group(sam_perturb(0.2)) | sgd"],
        ),
        (
            ["adamw(cosine(1e-3))", "adamw(cosine(2e-3))", "adamw(1e-3, b2=0.9)"],
            ["adamw(cosine(0.001))", "adamw(cosine(0.002))", "adamw(0.001, b2=0.9)"],
        ),
        (
            ["sam_perturb(r) | sgd(r)", "sam_perturb(r, ascent=momentum(0.9)) | sgd(r)"],
            ["sam_perturb | sgd", "sam_perturb(ascent=momentum(0.9)) | sgd"],
        ),
        (["sgd(1.0)", "sgd(1.00)"], ["sgd(1.0)", "sgd(1.00)"]),
    ],
)
def test_equal_outlines_are_told_apart_by_their_arguments(texts, names):
    assert comparison.labels(texts) == names


def test_a_folder_of_an_earlier_name_is_taken_by_its_number(tmp_path):
    (tmp_path / "1-per_group-sam_perturb-sgd" / "seed0").mkdir(parents=True)
    run: Any = SimpleNamespace(config=CONFIG)
    experiments = {"adamw": run, "other": run}
    places = [place for _, _, place in comparison.run_folders(experiments, 1, tmp_path)]
    assert [place.parent.name for place in places] == ["0-adamw", "1-per_group-sam_perturb-sgd"]


def test_grid_has_every_point_with_the_last_field_fastest():
    arms = comparison.grid({"m": CONFIG}, {"rho": ["0", "0.1"], "data.label_noise": ["0.2", "0.4"]})
    settings = [(arm.rho, arm.data.label_noise) for arm in arms.values()]
    assert settings == [(0.0, 0.2), (0.0, 0.4), (0.1, 0.2), (0.1, 0.4)]
