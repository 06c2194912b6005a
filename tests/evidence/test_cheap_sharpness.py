"""Gain of SAM and of cheaper ascents over the base, on networks with wrong labels.

    python -m pytest tests/evidence/test_cheap_sharpness.py -m evidence

writes tests/evidence/cheap_sharpness_mixer.md and its like for the other tasks, one of them with
`-k mixer`. ρ, or λ of the trajectory loss, is chosen on a tenth of the training set that is held
out, by the mean of three seeds; then every pipe trains with five seeds. The steps are timed before,
in turn, so only the first minutes need a quiet machine.
"""

import os
import time

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import TASKS, experiment_of, shown, trained

from curvax.training.experiment import Experiment

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_cheap_sharpness.py -m evidence"
SEEDS, CHOOSING, TURNS = 5, 3, 60
PERIOD = 5
"""Steps after which every pipe has done all that it does."""
TRAJECTORY = "trajectory loss (SAF)"
STRENGTHS = (5.0, 10.0, 20.0)
PIPES = {
    "SAM": "sam_perturb({rho}) | {base}",
    TRAJECTORY: "trajectory_loss(examples, outputs, strength={rho}) | {base}",
    "ascent on half of the batch": "sam_perturb({rho}, fraction=0.5) | {base}",
    "ascent on a quarter": "sam_perturb({rho}, fraction=0.25) | {base}",
    "ascent on an eighth": "sam_perturb({rho}, fraction=0.125) | {base}",
    "along the last gradient": "sam_perturb({rho}, ascent=momentum(0.0)) | {base}",
    "along an average, β = 0.9": "sam_perturb({rho}, ascent=momentum(0.9)) | {base}",
    "LookSAM, every fifth step": "sam_perturb({rho}, every=5) | keep_orthogonal(0.7) | {base}",
    "SAM at every fifth step": "sam_perturb({rho}, every=5) | {base}",
}


def text_of(task: str, pipe: str, rho: float) -> str:
    return PIPES[pipe].format(rho=rho, base=TASKS[task].base)


def seconds(experiments: dict[str, Experiment]) -> dict[str, float]:
    """Of a step on average over a period, from medians of steps in turn."""
    running = {name: [e, e.init(), e.batches()] for name, e in experiments.items()}
    clock: dict[str, list[float]] = {name: [] for name in experiments}
    for _ in range(TURNS + PERIOD):
        for name, run in running.items():
            experiment, state, batches = run
            batch = experiment.parallelism.place(next(batches))
            began = time.perf_counter()
            run[1], _ = experiment.step(state, batch)
            jax.block_until_ready(run[1].params)
            clock[name].append(time.perf_counter() - began)
    by_phase = {name: np.reshape(times[PERIOD:], (-1, PERIOD)) for name, times in clock.items()}
    return {name: float(np.median(times, axis=0).mean()) for name, times in by_phase.items()}


def held_out_accuracy(experiment: Experiment) -> float:
    return float(np.mean([trained(experiment.with_seed(seed))[0] for seed in range(CHOOSING)]))


@pytest.mark.parametrize("task", TASKS)
def test_gain_of_cheap_ascents(task):
    timed = {pipe: experiment_of(task, text_of(task, pipe, 0.2), False) for pipe in PIPES}
    clock = seconds({"base": experiment_of(task, TASKS[task].base, False), **timed})
    alone = experiment_of(task, TASKS[task].alone, False)
    runs = {"base": [trained(alone.with_seed(seed)) for seed in range(SEEDS)]}
    sweeps = {"base": ""}
    chosen = {"base": "–"}
    for pipe in PIPES:
        swept = STRENGTHS if pipe == TRAJECTORY else TASKS[task].radii
        texts = {rho: text_of(task, pipe, rho) for rho in swept}
        sweep = {rho: held_out_accuracy(experiment_of(task, t, True)) for rho, t in texts.items()}
        best = max(sweep, key=lambda rho: sweep[rho])
        final = experiment_of(task, texts[best], False)
        runs[pipe] = [trained(final.with_seed(seed)) for seed in range(SEEDS)]
        sweeps[pipe] = ", ".join(f"{rho:g}: {100 * score:.1f}" for rho, score in sweep.items())
        chosen[pipe] = f"{best:g}"
    mean = {name: 100 * np.mean([score for score, _ in found]) for name, found in runs.items()}
    full = mean["SAM"] - mean["base"]
    rows = [
        (
            name,
            chosen[name],
            f"{clock[name] / clock['base']:.2f}",
            shown([100 * score for score, _ in found], 1),
            f"{100 * (mean[name] - mean['base']) / full:.0f} %",
            shown([value for _, value in found], 1),
            sweeps[name],
        )
        for name, found in runs.items()
    ]
    evidence_tables.write(
        f"cheap_sharpness_{task}",
        f"SAM and cheaper ascents: {TASKS[task].config}",
        f"Made by `{COMMAND} -k {task}` with jax {jax.__version__} on a CPU of {os.cpu_count()} "
        f"cores: 40 % wrong labels, `{TASKS[task].alone}` alone "
        f"and `{TASKS[task].base}` behind the ascents. Accuracy on clean test images in % and "
        f"λ_max of the training loss, means of {SEEDS} seeds ± half of the 95 % interval; the gain "
        "over the base in units of SAM's; the time of a step in units of the base's, a mean over "
        f"{PERIOD} steps from medians of {TURNS // PERIOD} in turn. The sweep: accuracy on "
        f"held-out images by ρ, or by λ of the trajectory loss, mean of {CHOOSING} seeds.",
        ["pipe", "ρ or λ", "time of a step", "accuracy", "gain", "λ_max", "sweep"],
        rows,
    )
    assert all(np.isfinite(found).all() for found in runs.values())
