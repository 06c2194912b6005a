"""What a step costs, in FLOPs and memory of one gradient of the same model, as XLA counts them.

The small models are counted in every run; the ViT and the ResNet take minutes to compile:

    python -m pytest tests/evidence/test_costs.py -m "evidence or not evidence"

writes tests/evidence/costs.md.
"""

import functools

import jax
import optax
import pytest
from repository import EVIDENCE
from step_costs import EVERY_MODEL, LARGE, MODELS, Problem, ratio

import curvax as cx

pytestmark = pytest.mark.usefixtures("single_precision")
COMMAND = "python -m pytest tests/evidence/test_costs.py -m 'evidence or not evidence'"
TABLE = EVIDENCE / "costs.md"


@functools.cache
def problem(name):
    # float32 throughout: the FLOPs of a float64 model would be those of its conversions too.
    with jax.enable_x64(False):
        return Problem(name)


@EVERY_MODEL
@pytest.mark.parametrize("method", ["sam", "gsam"])
def test_sharpness_costs_a_second_gradient(name, method, record_row):
    p = problem(name)
    base = optax.sgd(0.1)
    tx = cx.sam(base, 0.1) if method == "sam" else cx.gsam(base, 0.1, 0.3)
    found = p.step(tx)
    extra = (found[1] - p.gradient[1]) / p.bytes
    record_row(name, method, ratio(found, p.gradient), found[1] / p.gradient[1], extra)
    # XLA also counts the sums of norms that leave the range of floats, a branch not taken.
    assert ratio(found, p.gradient) <= (2.02 if method == "sam" else 2.035)
    if name in LARGE:
        # What a small model holds in its gradient is mostly parameters.
        assert found[1] <= (1.03 if method == "sam" else 1.04) * p.gradient[1]


@EVERY_MODEL
def test_adahessian_costs_as_much_as_its_hessian_product(name, record_row):
    p = problem(name)
    found = p.step(cx.adahessian(0.1))
    record_row(name, "jvp of value_and_grad, by hand", ratio(p.bare_product, p.gradient))
    record_row(name, "adahessian", ratio(found, p.gradient), found[1] / p.gradient[1])
    # Beyond the product: drawing the probe and the arithmetic of the update.
    assert ratio(found, p.bare_product) <= 1.05
    assert ratio(found, p.gradient) <= 3.01


@EVERY_MODEL
def test_adahessian_that_keeps_the_loss_costs_at_most_3_4_gradients(name, record_row):
    p = problem(name)
    found = p.step(cx.adahessian(0.1), plain=True, keep_loss=True)
    record_row(name, "adahessian, jax.value_and_grad, loss kept", ratio(found, p.gradient))
    found = p.step(cx.adahessian(0.1), keep_loss=True)
    record_row(name, "adahessian, loss kept", ratio(found, p.gradient))
    assert ratio(found, p.gradient) <= 3.4


@EVERY_MODEL
def test_refreshed_steps_cost_a_product_and_kept_steps_one_gradient(name, record_row):
    p = problem(name)
    tx = cx.adahessian(0.1, every=5)
    refresh, kept = p.step(tx, at=0), p.step(tx, at=1)
    record_row(name, "adahessian, refreshed step", ratio(refresh, p.gradient))
    record_row(name, "adahessian, kept step", ratio(kept, p.gradient))
    # With remat the compiler cannot merge what the two gradients recompute.
    limit = 1.03 + ratio(p.bare_product, p.gradient) if "remat" in name else 3.5
    assert ratio(refresh, p.gradient) <= limit
    # Entries that are not finite are kept out of the averages.
    assert ratio(kept, p.gradient) <= 1.02


@pytest.fixture(scope="module")
def record_row():
    """Collects rows; written as a table once all models were counted."""
    rows = []

    def record(*row):
        rows.append(row)

    yield record
    if {row[0] for row in rows} >= set(MODELS):
        head = ["model", "step", "FLOPs", "temporary memory", "extra copies of the parameters"]
        lines = ["# Cost of a step, in units of one gradient of the same model", ""]
        lines += [
            f"Made by `{COMMAND}`. XLA counts the dearer branch of a conditional: here sums that "
            "are computed only where a norm leaves the range of floats.",
            "",
        ]
        lines += ["| " + " | ".join(head) + " |", "|---|---|---|---|---|"]
        for name, step, *numbers in rows:
            cells = [f"{x:.3f}" for x in numbers] + [""] * (3 - len(numbers))
            lines.append(f"| {name} | {step} | " + " | ".join(cells) + " |")
        TABLE.write_text("\n".join(lines) + "\n")
