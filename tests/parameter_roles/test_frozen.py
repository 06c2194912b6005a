"""Frozen leaves behind a stage that moves them: a warning where the pipe shows it, else none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax import (
    Objective,
    gsam,
    hessian_free,
    natural_gradient,
    partition,
    per_group,
    sam,
    sam_perturb,
)

PARAMS = {"body": {"w": jnp.asarray([1.0, 2.0])}, "head": {"w": jnp.asarray([3.0])}}
LABELS = {"body": "frozen", "head": "trained"}
PARTS = {"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}
FREEZE = {"body": True, "head": False}
BASES = {
    "partition": lambda: optax.partition(PARTS, LABELS),
    "masked": lambda: optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), FREEZE)),
    "ours": lambda: partition(PARTS, LABELS),
}
if hasattr(optax, "selective_transform"):
    BASES["selective"] = lambda: optax.selective_transform(optax.sgd(0.1), freeze_mask=FREEZE)
if hasattr(optax, "freeze"):
    BASES["freeze"] = lambda: optax.chain(optax.sgd(0.1), optax.freeze(FREEZE))
MASK = {"body": False, "head": True}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "make",
    [
        lambda base, **options: sam(base, 0.1, **options),
        lambda base, **options: gsam(base, 0.1, 0.2, **options),
        lambda base, **options: per_group(1, sam_perturb(0.1, **options)) | base,
    ],
    ids=["sam", "gsam", "per_group"],
)
def test_perturbed_frozen_leaves_warn_and_masked_ones_do_not(base, make):
    with pytest.warns(UserWarning, match="`body/w`.*mask=") as told:
        make(BASES[base]()).init(PARAMS)
    assert len(told) == 1
    make(BASES[base](), mask=MASK).init(PARAMS)


@pytest.mark.parametrize("make", [natural_gradient, hessian_free])
def test_leaves_frozen_behind_an_adapted_damping_warn_and_left_out_ones_do_not(make):
    options = {"adaptive": True} if make is natural_gradient else {}
    freeze = optax.masked(optax.set_to_zero(), FREEZE)
    with pytest.warns(UserWarning, match="judges a step in which `body/w` move.*partition"):
        (make(**options) | freeze).init(PARAMS)
    apart = {"trained": make(**options), "frozen": optax.set_to_zero()}
    partition(apart, LABELS).init(PARAMS)
    (make(**options) | optax.trace(0.9)).init(PARAMS)


@pytest.mark.parametrize(
    "base",
    [
        optax.adamw(0.1, mask=FREEZE),
        optax.partition({"trained": optax.adam(0.1), "frozen": optax.sgd(0.1)}, LABELS),
        optax.masked(optax.sgd(0.1), FREEZE),
        optax.set_to_zero(),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    ],
)
def test_bases_without_frozen_leaves_do_not_warn(base):
    sam(base, 0.1).init(PARAMS)
    jax.jit(sam(base, 0.1).init)(PARAMS)


def test_masked_sam_gives_the_step_of_the_head_alone():
    def loss(p):
        return jnp.sum(jnp.sin(p["body"]["w"])) * jnp.sum(p["head"]["w"] ** 2)

    tx = sam(optax.partition({**PARTS, "trained": optax.sgd(0.1)}, LABELS), 0.1, mask=MASK)
    value, grads = Objective(loss).value_and_grad(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss, value=value)
    head = lambda w: loss({**PARAMS, "head": {"w": w}})
    moved = PARAMS["head"]["w"] + 0.1 * jnp.sign(jax.grad(head)(PARAMS["head"]["w"]))
    np.testing.assert_allclose(updates["head"]["w"], -0.1 * jax.grad(head)(moved))
    np.testing.assert_array_equal(updates["body"]["w"], 0.0)
