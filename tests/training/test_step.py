"""A training step against its equations, in float32 and over microbatches."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import changed

import curvax
from curvax.training.experiment import build
from curvax.training.step import objective

# A step.


def test_training_step_is_sgd_on_the_augmented_batch():
    config = changed(optimizer="sgd(0.1, momentum=0.9)")
    config.model.options.dropout = 0.0
    experiment = build(config)
    state, batches = experiment.init(), experiment.batches()

    def loss(params, batch):
        logits: Any = experiment.model.apply({"params": params}, batch["input"])
        return -jnp.mean(jnp.sum(batch["label"] * jax.nn.log_softmax(logits), -1))

    params = jax.tree.map(jnp.copy, state.params)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for number in range(3):
        batch = next(batches)
        key, _ = jax.random.split(jax.random.fold_in(state.key, number))
        grads = jax.grad(loss)(params, experiment.task.in_training(key, batch))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        state, _ = experiment.step(state, batch)
    # float32, and another order of the same sums
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, params)


@pytest.mark.parametrize("shared", [False, True])
def test_training_step_under_attack_is_sam_on_attacked_images(shared):
    text, pixels = "pgd(0.1, steps=2)", {"mean": (0.2,), "std": (0.4,)}
    config = changed(optimizer="sam_perturb(0.3) | sgd(0.1)", attack=text, share_attack=shared)
    config.model.options.dropout = 0.0
    config.data.update(pixels)
    experiment = build(config)
    state, batch = experiment.init(), next(experiment.batches())
    keys = jax.random.split(jax.random.fold_in(state.key, 0))
    clean = objective(
        experiment.model, experiment.task, {}, experiment.task.in_training(keys[0], batch), keys[1]
    )
    attack = curvax.pgd(0.1, steps=2, inputs="input", mean=0.2, std=0.4)
    if shared:
        _, grads, delta = attack.value_and_grad(clean, state.params)
        robust = attack.moved(clean, delta)
    else:
        robust = curvax.adversarial(clean, attack)
        _, grads = robust.value_and_grad(state.params)
    tx = curvax.sam_perturb(0.3)
    updates, _ = tx.update(grads, tx.init(state.params), state.params, value_fn=robust)
    expected = jax.tree.map(lambda p, u: p - 0.1 * u, state.params, updates)
    stepped, _ = experiment.step(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stepped.params, expected)


def test_batch_statistics_and_metrics_are_those_of_the_clean_pass():
    config = changed(optimizer="sam_perturb(0.5) | sgd(0.1)")
    config.model = {"name": "resnet8", "options": {"width": 4}}
    config.data.augment = []
    experiment = build(config)
    state, batch = experiment.init(), next(experiment.batches())
    inputs = experiment.task.in_test(batch)["input"]
    logits, new = experiment.model.apply(
        {"params": state.params, **state.model_state}, inputs, train=True, mutable=["batch_stats"]
    )
    accuracy = np.mean(np.argmax(logits, -1) == batch["label"])
    stepped, measured = experiment.step(state, batch)
    # float32, fused otherwise
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        stepped.model_state,
        new,
    )
    assert measured.metrics["accuracy"] == pytest.approx(accuracy)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    assert measured.metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measured.metrics["perturbed_loss"] > 1.01 * loss


def test_perturbations_are_float32_where_activations_are_bfloat16():
    """In bfloat16 ε of a hundredth of a parameter's size is rounded to a third of its digits."""
    config = changed(optimizer="sam_perturb(1e-3) | sgd(0.1)")
    config.model.options.dtype = "bfloat16"
    experiment = build(config)
    seen = []

    def apply(variables, x, **options):
        seen.extend(jax.tree.leaves(variables["params"]))
        return experiment.model.apply(variables, x, **options)

    model: Any = SimpleNamespace(apply=apply)

    def updates(params, batch, key):
        numbers = experiment.task.in_training(key, batch)
        value_fn = objective(model, experiment.task, {}, numbers, key)
        _, grads = value_fn.value_and_grad(params)
        tx = curvax.sam_perturb(1e-3)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    params, key = experiment.init().params, jax.random.key(0)
    found = jax.eval_shape(updates, params, next(experiment.batches()), key)
    assert len(seen) >= 2 * len(jax.tree.leaves(params))  # the gradient's pass and SAM's
    assert {x.dtype for x in (*seen, *jax.tree.leaves(found))} == {jnp.dtype(jnp.float32)}
    program = str(jax.make_jaxpr(updates)(params, next(experiment.batches()), key))
    assert "bf16[" in program


def test_microbatches_change_nothing_but_rounding():
    config = changed(batch=16)
    config.model.options.dropout = 0.0
    stepped = []
    for size in (None, 4):
        config.microbatch = size
        experiment = build(config)
        stepped.append(experiment.step(experiment.init(), next(experiment.batches())))
    (whole, of_whole), (parts, of_parts) = stepped
    # Adam's first step is the gradient over its own size: a gradient near 0 may turn by rounding
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), whole.params, parts.params
    )
    for name, figure in of_whole.metrics.items():
        np.testing.assert_allclose(figure, of_parts.metrics[name], rtol=1e-3, err_msg=name)


def test_a_schedule_free_method_is_evaluated_at_its_average():
    experiment = build(changed(optimizer="schedule_free(sgd(0.5), learning_rate=0.5)"))
    state, batches = experiment.init(), experiment.batches()
    assert state._replace(opt_state=()).evaluated is state.params
    for _ in range(3):
        state, _ = experiment.step(state, next(batches))
    (free,) = state.opt_state
    average = optax.contrib.schedule_free_eval_params(free, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.evaluated, average)
    plain = state._replace(params=average, opt_state=())
    assert experiment.test(state) == experiment.test(plain)
    assert experiment.test(state) != experiment.test(state._replace(opt_state=()))
    last = experiment.final_metrics(state)["lambda_max"]
    assert last == experiment.final_metrics(plain)["lambda_max"]
