"""The largest Hessian eigenvalue and the bulk ratio where SGD and SAM end, at one learning rate.

    python -m pytest tests/evidence/test_flatness.py -m evidence

writes tests/evidence/flatness.md. Chen, Hsieh & Gong, When Vision Transformers Outperform ResNets,
arXiv:2106.01548, Tables 1 and 3, and Foret et al., SAM, arXiv:2010.01412, section 4.2, with small
models on noisy digits and Fashion-MNIST.
"""

import functools
import os
from typing import Any, NamedTuple

import evidence_tables
import numpy as np
import optax
import pytest

flax = pytest.importorskip("flax", reason="the models are Flax's: pip install 'curvax[train]'")
sklearn = pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
from noisy_images import BATCH, LIKELIHOOD, NOISE, SIZE, Trainer, images, kept  # noqa: E402

from curvax.analysis import DatasetLoss, top_eigenpairs  # noqa: E402
from curvax.models import build  # noqa: E402
from curvax.training.compare.summary import summarise  # noqa: E402
from curvax.training.data.archives import DataError  # noqa: E402
from curvax.training.data.labelled_images import load  # noqa: E402

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_flatness.py -m evidence"
SEEDS = int(os.environ.get("CURVAX_SEEDS", "5"))
EPOCHS, RHO = 60, 0.2
PATCHES = {"digits": 2, "fashion_mnist": 7}


def momentum(schedule):
    return optax.sgd(schedule, momentum=0.9)


class Setting(NamedTuple):
    """A kind of model and the base that its paper trains it with."""

    model: str
    options: dict[str, Any]
    base: str
    rate: float


BASES = {"SGD, momentum 0.9": momentum, "AdamW": optax.adamw}
BLOCKS = {"depth": 2, "scan": False}
MODELS = {
    "ResNet": Setting("resnet8", {"norm": "group", "width": 8}, "SGD, momentum 0.9", 0.01),
    "ViT": Setting("vit_tiny", BLOCKS, "AdamW", 1e-3),
    "Mixer": Setting("mixer_tiny", BLOCKS, "AdamW", 1e-3),
    "Mixer by SGD": Setting("mixer_tiny", BLOCKS, "SGD, momentum 0.9", 0.05),
}
BY_HEART = 0.05
"""A training loss below which the base has learnt all labels, the wrong ones too. The Hessian of
the cross entropy vanishes with its loss and is no measure of sharpness then."""


@functools.lru_cache
def trainer(source, name):
    setting = MODELS[name]
    patch = {"patch": PATCHES[source]} if "depth" in setting.options else {}
    model = build(setting.model, classes=10, **setting.options, **patch)
    return Trainer(model, BASES[setting.base], setting.rate, epochs=EPOCHS)


@kept
def end(source, name, rho, seed):
    """Where one training ends."""
    train, test, _ = images(source, seed)
    trained = trainer(source, name)
    params = trained.trained(train, seed, rho)
    error, loss = trained.scores(params, train)
    # One batch, but with its loop in Python: XLA's own runs convolutions slowly on CPUs.
    whole = DatasetLoss(LIKELIHOOD, [train], model=trained.predict)
    pairs = top_eigenpairs(whole, params, 5, end="largest", tol=0.01)
    return {
        "lambda_max": float(pairs.values[0]),
        "ratio": float(pairs.values[0] / pairs.values[4]),
        "residual": float(pairs.residuals.max() / pairs.values[0]),
        "loss": float(loss),
        "error": 100 * float(error),
        "test_error": 100 * float(trained.scores(params, test)[0]),
    }


def ends(source, name, rho, figure):
    """That measure at the end of each seed, [SEEDS]."""
    return np.array([end(source, name, rho, seed)[figure] for seed in range(SEEDS)])


FIGURES = {"lambda_max": "λ_max", "ratio": "λ₁/λ₅", "test_error": "test error, %"}


@pytest.fixture(scope="module")
def record():
    rows: list[list[Any]] = []
    yield rows.append
    evidence_tables.write(
        "flatness",
        "Where SGD or AdamW and where SAM over it ends: the largest eigenvalue and the bulk ratio",
        f"Made by `{COMMAND}`: {SIZE} images, {100 * NOISE:.0f} % wrongly labelled, batch {BATCH}, "
        f"{EPOCHS} epochs, learning rates with a cosine to zero, the same for base and SAM; "
        "Hessians of the whole training set, by Lanczos with residuals below 1 % of λ_max. Means "
        "over seeds ± half width of the 95 % interval; the last line of a model is the "
        "paired difference SAM - base. `resnet8` of width 8 with group norm (batch norm obscures "
        "the Hessian), `vit_tiny` and `mixer_tiny` of two blocks; bases as in the papers. Neither "
        "learning rate nor ρ was tuned. Where a base learns all the wrong labels (SGD's Mixer) the "
        "Hessian vanishes with the loss, and its λ_max falls below SAM's. SAM's training losses "
        "are larger, and a part of what λ_max falls by goes with the loss. Where the interval of a "
        "difference holds 0 these seeds do not tell, as of λ₁/λ₅ in most rows; and a larger test "
        "error under SAM is of a network that it has not fitted in these epochs. "
        "`CURVAX_EVIDENCE=FOLDER` keeps each training, so that they can be computed one by one.",
        ["data", "model", "method", "seeds", *FIGURES.values(), "training loss"],
        rows,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", PATCHES)
def test_sam_ends_at_a_smaller_largest_eigenvalue_than_its_base(source, name, record):
    try:
        load(source)
    except DataError as error:
        pytest.skip(str(error))
    setting = MODELS[name]
    columns = [*FIGURES, "loss"]
    base, sam = ([ends(source, name, rho, column) for column in columns] for rho in (0.0, RHO))
    method = f"{setting.base}, {setting.rate:g}"
    for label, values in ((method, base), (f"SAM, ρ {RHO:g}", sam)):
        record([source, name, label, len(values[0]), *map(interval, values)])
    differences = [after - before for before, after in zip(base, sam)]
    record([source, name, "difference", len(base[0]), *map(interval, differences)])
    if base[-1].mean() > BY_HEART:
        assert (differences[0] < 0).all()


def interval(values):
    found = summarise(values)
    spread = "" if len(values) < 2 else f" ± {found.half_width:.3g}"
    return f"{found.mean:.3g}{spread}"
