"""What matters in SAM and GSAM: when it acts, its base, α, λ and the schedule of ρ.

    python -m pytest tests/evidence/test_ablations_of_sharpness.py -m evidence

writes tests/evidence/early_and_late_sam.md, gsam_bases.md and gsam_ablations.md: the Mixer of
`digits`, 40 % wrong labels.
"""

import itertools

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import experiment_of, shown, trained

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_ablations_of_sharpness.py -m evidence"
SEEDS, CHOOSING = 5, 2
RHO, ALPHA, BASE = 0.3, 0.3, "adamw(cosine(1e-3))"
MADE = (
    f"Made by `{COMMAND} -k {{}}` with jax {jax.__version__}: the Mixer of `digits`, 40 % wrong "
    "labels. Accuracy on clean test images in % and λ_max of the training loss, means of "
    f"{SEEDS} seeds ± half of the 95 % interval. {{}}"
)


def steps():
    return experiment_of("mixer", BASE, False).steps


def measured(text):
    """(accuracy in %, λ_max) of each seed."""
    experiment = experiment_of("mixer", text, False)
    found = [trained(experiment.with_seed(seed)) for seed in range(SEEDS)]
    return [100 * score for score, _ in found], [value for _, value in found]


def row(name, text):
    accuracy, sharpness = measured(text)
    return name, shown(accuracy, 1), shown(sharpness, 1)


def test_sam_in_a_share_of_the_epochs():
    whole = steps()
    switched = lambda first, then, at: (
        f"sam_perturb(join_schedules([constant_schedule({first}), constant_schedule({then})], "
        f"[{at}])) | {BASE}"
    )
    rows = [row("never", BASE)]
    for share in (0.25, 0.5, 0.75):
        rows.append(row(f"in the first {share:.0%}", switched(RHO, 0.0, round(share * whole))))
    for share in (0.25, 0.5, 0.75):
        late = switched(0.0, RHO, whole - round(share * whole))
        rows.append(row(f"in the last {share:.0%}", late))
    rows.append(row("always", f"sam_perturb({RHO}) | {BASE}"))
    evidence_tables.write(
        "early_and_late_sam",
        "SAM in a share of the epochs",
        MADE.format("share", f"`{BASE}`, SAM with ρ = {RHO}, switched by a schedule of ρ."),
        ["SAM", "accuracy", "λ_max"],
        rows,
    )
    assert len(rows) == 8


BASES = {
    "SGD, momentum 0.9": ("sgd(cosine({rate}), momentum=0.9)", (0.01, 0.03, 0.1)),
    "Adam": ("adam(cosine({rate}))", (5e-4, 1e-3, 2e-3)),
    "AdaBelief": ("adabelief(cosine({rate}))", (5e-4, 1e-3, 2e-3)),
}
METHODS = {
    "alone": "",
    "SAM": f"sam_perturb({RHO}) | ",
    "GSAM": f"sam_perturb({RHO}) | gsam_project({ALPHA}) | ",
}


def held_out(text):
    experiment = experiment_of("mixer", text, True)
    return np.mean([trained(experiment.with_seed(seed))[0] for seed in range(CHOOSING)])


def test_sharpness_over_several_bases():
    rows = []
    for (base, (text, rates)), (method, before) in itertools.product(
        BASES.items(), METHODS.items()
    ):
        texts = {rate: before + text.format(rate=rate) for rate in rates}
        best = max(texts, key=lambda rate: held_out(texts[rate]))
        accuracy, sharpness = measured(texts[best])
        rows.append((base, method, f"{best:g}", shown(accuracy, 1), shown(sharpness, 1)))
    evidence_tables.write(
        "gsam_bases",
        "SAM and GSAM over several base optimisers",
        MADE.format(
            "bases",
            f"ρ = {RHO}, α = {ALPHA}; each learning rate is the best of three on held-out images, "
            f"mean of {CHOOSING} seeds.",
        ),
        ["base", "method", "learning rate", "accuracy", "λ_max"],
        rows,
    )
    assert len(rows) == len(BASES) * len(METHODS)


def test_parts_of_gsam():
    rate = "cosine(1e-3)"
    followed = f"rho_schedule({rate}, {RHO}, 0.05, lr_max=1e-3, lr_min=0.0)"
    texts = {"SAM": f"sam_perturb({RHO}) | {BASE}"}
    for alpha in (0.1, 0.2, 0.4, 0.7):
        texts[f"GSAM, α = {alpha}"] = f"sam_perturb({RHO}) | gsam_project({alpha}) | {BASE}"
    for lam in (0.1, 0.2, 0.4):
        texts[f"f_p + λ h, λ = {lam}"] = f"sam_perturb({RHO}) | penalize_gap({lam}) | {BASE}"
    texts["SAM, ρ follows the learning rate"] = f"sam_perturb({followed}) | {BASE}"
    texts["GSAM, α = 0.4, ρ follows the learning rate"] = (
        f"sam_perturb({followed}) | gsam_project(0.4) | {BASE}"
    )
    rows = [row(name, text) for name, text in texts.items()]
    evidence_tables.write(
        "gsam_ablations",
        "α and λ of the surrogate gap, and the schedule of ρ",
        MADE.format("parts", f"`{BASE}`, ρ = {RHO}, or falling from it to 0.05."),
        ["method", "accuracy", "λ_max"],
        rows,
    )
    assert len(rows) == len(texts)
