"""Test error over ρ for several m, and how m-sharpness ranks models by their generalisation gap.

    python -m pytest tests/evidence/test_generalisation.py -m evidence

writes tests/evidence/error_over_rho.md, m_sharpness.md and m_sharpness.png. Foret et al., SAM,
arXiv:2010.01412, section 4.1 and Figure 3, with perceptrons on digits.
"""

import functools
import itertools

import evidence_tables
import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from repository import EVIDENCE
from scipy.stats import spearmanr

flax = pytest.importorskip("flax", reason="the models are Flax's: pip install 'curvax[train]'")
sklearn = pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
from noisy_images import SIZE, Trainer, images, kept  # noqa: E402

from curvax.analysis import m_sharpness  # noqa: E402
from curvax.models import build  # noqa: E402
from curvax.plotting.canvas import clean, legend  # noqa: E402
from curvax.training.compare.summary import summarise  # noqa: E402

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_generalisation.py -m evidence"
BATCH, SEEDS = 128, 5
GROUPS = {4: "4", 16: "16", 64: "64", BATCH: f"{BATCH} (batch)"}
RHOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SIZES = {4: "4", 16: "16", 64: "64", SIZE: f"{SIZE} (all)"}
RADII = (0.05, 0.2)
NOISE = {0.4: "40 % wrong labels", 0.0: "right labels"}
CHANCE = 2.0  # nats; log 10 is 2.3


@functools.lru_cache
def trainer(m):
    model = build("mlp", classes=10)
    sgd = lambda schedule: optax.sgd(schedule, momentum=0.9)
    return Trainer(model, sgd, 0.05, m=m, batch=BATCH, epochs=80)


@kept
def outcome(noise, m, rho, seed):
    """Errors, generalisation gap and sharpness of one model."""
    train, test, like_train = images("digits", seed, noise=noise)
    trained = trainer(m)
    params = trained.trained(train, seed, rho)
    (error, loss), (other_error, _) = (trained.scores(params, x) for x in (train, like_train))
    objective = trained.objective(train)
    found = {
        f"{radius} {size}": m_sharpness(objective, params, radius, size, chunk=8).value
        for radius, size in itertools.product(RADII, SIZES)
    }
    return {
        "test_error": 100 * float(trained.scores(params, test)[0]),
        "gap": 100 * float(other_error - error),
        "loss": float(loss),
        "sharpness": jax.tree.map(float, found),
    }


def errors(noise, m, rho):
    """Test errors in %, [SEEDS]; of SGD at ρ = 0."""
    return np.array([outcome(noise, m, rho, seed)["test_error"] for seed in range(SEEDS)])


def models(noise, seed):
    """All models of one seed but those that learnt nothing."""
    settings = [(BATCH, 0.0), *itertools.product(GROUPS, RHOS)]
    found = [outcome(noise, m, rho, seed) for m, rho in settings]
    return [model for model in found if model["loss"] < CHANCE]


def correlations(noise, radius, size):
    """Spearman's of m-sharpness and generalisation gap over the models of a seed, [SEEDS]."""
    ranked = lambda seed: spearmanr(
        [(model["sharpness"][f"{radius} {size}"], model["gap"]) for model in models(noise, seed)]
    )
    return np.array([ranked(seed).statistic for seed in range(SEEDS)])


def interval(values, digits=1):
    found = summarise(values)
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"


SETTING = (
    f"perceptrons 64-128-64-10 on {SIZE} of scikit-learn's digits, batch {BATCH}, SGD with "
    "momentum 0.9, learning rate 0.05 with a cosine to zero, 80 epochs. Mean over "
    f"{SEEDS} seeds ± half width of the 95 % interval."
)


def test_smaller_groups_lower_the_test_error_at_one_radius():
    rows = []
    for noise, label in NOISE.items():
        rows.append([label, "0 (SGD)", *[interval(errors(noise, BATCH, 0.0))] * len(GROUPS)])
        for rho in RHOS:
            rows.append([label, rho, *(interval(errors(noise, m, rho)) for m in GROUPS)])
    evidence_tables.write(
        "error_over_rho",
        "Test error of SAM over ρ, by how many examples share a perturbation",
        f"Made by `{COMMAND}`: error in % on clean test images of {SETTING} Every m examples of a "
        "batch have a perturbation of their own: `per_group(m, sam_perturb(rho)) | sgd`. 90 % is "
        "chance.",
        ["training labels", "ρ", *(f"m = {name}" for name in GROUPS.values())],
        rows,
    )
    sgd = errors(0.4, BATCH, 0.0)
    for rho in (0.05, 0.1, 0.2):
        means = [errors(0.4, m, rho).mean() for m in GROUPS]
        assert means == sorted(means)
        assert means[-1] < sgd.mean()


def test_m_sharpness_ranks_models_by_their_gap_better_at_smaller_m():
    found = {
        (noise, radius): {size: correlations(noise, radius, size) for size in SIZES}
        for noise, radius in itertools.product(NOISE, RADII)
    }
    rows = [
        [NOISE[noise], sum(len(models(noise, seed)) for seed in range(SEEDS)), radius]
        + [interval(values, digits=2) for values in by_size.values()]
        for (noise, radius), by_size in found.items()
    ]
    evidence_tables.write(
        "m_sharpness",
        "Rank correlation of m-sharpness with the generalisation gap",
        f"Made by `{COMMAND}`: Spearman's, over {len(GROUPS) * len(RHOS) + 1} models a seed: SGD "
        f"and SAM at {len(RHOS)} ρ and {len(GROUPS)} m, but for those with a training loss above "
        f"{CHANCE} nats. {SETTING[0].upper()}{SETTING[1:]} The gap is the error on test images "
        "with as many wrong labels less the error on the training images; sharpness is that of "
        "groups of m training images within a radius that is the same for all models.",
        ["labels", "models", "radius", *(f"m = {name}" for name in SIZES.values())],
        rows,
    )
    draw(found[0.4, 0.2], found[0.0, 0.2])
    for noise in NOISE:
        smallest, *_, whole = (values.mean() for values in found[noise, 0.2].values())
        assert smallest > max(whole, 0.5)


def draw(noisy, clean_labels):
    figure = Figure((7.6, 2.9), layout="constrained")
    left, right = (clean(ax) for ax in figure.subplots(1, 2))
    for m, name in GROUPS.items():
        runs = [summarise(errors(0.4, m, rho)) for rho in RHOS]
        learnt = [(rho, x.mean) for rho, x in zip(RHOS, runs) if x.mean < 50]
        left.plot(*zip(*learnt), ".-", label=f"m = {name}")
    left.axhline(errors(0.4, BATCH, 0.0).mean(), color="0.5", linestyle="--", label="SGD")
    left.set(xscale="log", xlabel="ρ", ylabel=f"test error, % ({NOISE[0.4]})")
    left.set_xticks(RHOS, [f"{rho:g}" for rho in RHOS])
    left.minorticks_off()
    for values, label in ((noisy, NOISE[0.4]), (clean_labels, NOISE[0.0])):
        means, _, bars = zip(*(summarise(x) for x in values.values()))
        right.errorbar(range(len(SIZES)), means, bars, fmt=".-", capsize=3, label=label)
    right.set_xticks(range(len(SIZES)), SIZES.values())
    right.set(
        xlabel="m (radius 0.2)",
        ylabel="rank correlation of m-sharpness\nwith the generalisation gap",
    )
    for ax in (left, right):
        legend(ax)
    figure.savefig(EVIDENCE / "m_sharpness.png", dpi=110)
