"""`Objective`: every form has the same value and gradient, in memory that does not grow."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import EXAMPLES, assert_trees_close, net, net_batch, net_loss, net_params

import curvax as cx
from curvax.curvature import hvp


def squared_error(outputs: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=1))


def loss_and_outputs(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    return net_loss(params, batch), {"top": jnp.max(batch["x"])}


def net_and_outputs(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    return net(params, batch), {"top": jnp.max(batch["x"])}


# Every way to state one loss.
FORMS = {
    "plain": lambda **options: cx.Objective(lambda params: net_loss(params, net_batch())),
    "batch": lambda **options: cx.Objective(net_loss, net_batch(), **options),
    "model": lambda **options: cx.Objective(squared_error, net_batch(), model=net, **options),
    "aux": lambda **options: cx.Objective(loss_and_outputs, net_batch(), has_aux=True, **options),
    "model and aux": lambda **options: cx.Objective(
        squared_error, net_batch(), model=net_and_outputs, has_aux=True, **options
    ),
}


@pytest.mark.parametrize("microbatch", [None, 2, EXAMPLES])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_objective_has_the_value_and_gradient_of_the_loss(form, microbatch):
    objective = FORMS[form](microbatch=microbatch)
    value, grads = jax.value_and_grad(net_loss)(net_params(), net_batch())
    out, gradient = objective.value_and_grad(net_params())
    aux = out[1] if objective.has_aux else None
    assert_trees_close(out[0] if objective.has_aux else out, value)
    assert_trees_close(gradient, grads)
    assert_trees_close(objective(net_params()), value)
    assert_trees_close(jax.grad(objective)(net_params()), grads)
    if aux is not None:
        rows = net_batch()["x"].reshape(EXAMPLES // (microbatch or EXAMPLES), -1)
        np.testing.assert_allclose(aux["top"], jnp.max(rows), rtol=1e-15)


def test_named_reductions_apply_to_each_aux_dtype():
    def loss(params: Any, batch: Any) -> Any:
        aux = {
            "mean": jnp.mean(batch["i"].astype(jnp.float32)),
            "count": batch["i"][0],
            "odd": batch["i"][-1] % 2 == 1,
            "key": jax.random.key(batch["i"][0]),
        }
        return params * 1.0, aux

    batch = {"i": jnp.arange(6)}
    names = {"mean": "mean", "count": "last", "odd": "last", "key": "last"}
    objective = cx.Objective(loss, batch, has_aux=True, microbatch=2, reduce_aux=names)
    (_, aux), _ = objective.value_and_grad(jnp.ones(()))
    expected = {
        "mean": jnp.float32(2.5), "count": jnp.array(4), "odd": jnp.array(True),
        "key": jax.random.key(4),
    }  # fmt: skip
    assert_trees_close(aux, expected, tol=0)


TOKENS = {
    "x": jnp.arange(1.0, 9.0),
    "mask": jnp.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]),
}


def masked_mean(scale: Any, batch: Any) -> jax.Array:
    return jnp.sum(batch["mask"] * jnp.sin(scale * batch["x"])) / jnp.sum(batch["mask"])


@pytest.mark.parametrize("weight", ["mask", lambda batch: jnp.sum(batch["mask"])])
def test_weighted_microbatches_equal_the_whole_batch(weight):
    scale = jnp.array(0.3)
    whole = jax.value_and_grad(masked_mean)(scale, TOKENS)
    parts = cx.Objective(masked_mean, TOKENS, microbatch=2, weight=weight)
    assert_trees_close(parts.value_and_grad(scale), whole)
    assert_trees_close(jax.grad(parts)(scale), whole[1])
    mean_of_means = cx.Objective(masked_mean, TOKENS, microbatch=2)
    assert abs(mean_of_means(scale) - whole[0]) > 1e-3


@pytest.mark.parametrize("sequential", [False, True])
def test_groups_are_averaged_by_weight(sequential):
    objective = cx.Objective(masked_mean, TOKENS, weight="mask")
    tx = cx.per_group(2, optax.identity(), sequential=sequential)
    scale = jnp.array(0.3)
    updates, _ = tx.update(scale, tx.init(scale), scale, value_fn=objective)
    assert_trees_close(updates, jax.grad(masked_mean)(scale, TOKENS))


def noisy(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """A loss whose value depends on the key."""
    return params * jax.random.uniform(key, (), jnp.float64) + 0 * jnp.sum(batch)


def noise_of(objective: cx.Objective) -> float:
    return float(objective(jnp.ones(())))


def keyed(**options: Any) -> cx.Objective:
    return cx.Objective(noisy, jnp.arange(8.0), key=jax.random.key(3), **options)


def test_whole_batch_is_evaluated_with_the_given_key():
    assert noise_of(keyed()) == jax.random.uniform(jax.random.key(3), (), jnp.float64)


def test_each_group_has_its_own_key():
    groups = keyed().groups(2)
    values = [noise_of(keyed().piece(group, i, 4)) for i, group in enumerate(groups)]
    assert len({*values, noise_of(keyed())}) == 5


def test_key_of_a_nested_piece_is_numbered_in_the_whole_batch():
    halves = keyed().piece(jnp.arange(4.0), 1, 2)
    assert noise_of(halves.piece(jnp.arange(1.0), 3, 4)) == noise_of(
        keyed().piece(jnp.arange(1.0), 7, 8)
    )


@pytest.mark.parametrize("m", [1, 2, 4])
def test_microbatches_have_the_keys_of_as_many_groups(m):
    groups = keyed().groups(m)
    values = [noise_of(keyed().piece(g, i, 8 // m)) for i, g in enumerate(groups)]
    np.testing.assert_allclose(noise_of(keyed(microbatch=m)), np.mean(values), rtol=1e-14)


def test_both_passes_of_sam_see_the_same_key():
    def dropped(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.mean((batch @ params * jax.random.bernoulli(key, 0.5, (8,))) ** 2)

    params, x = jnp.arange(1.0, 4.0), jax.random.normal(jax.random.key(1), (8, 3))
    objective = cx.Objective(dropped, x, key=jax.random.key(3))
    tx = cx.sam_perturb(0.5)
    _, grads = objective.value_and_grad(params)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
    clean = lambda p: dropped(p, x, jax.random.key(3))
    g = jax.grad(clean)(params)
    assert_trees_close(updates, jax.grad(clean)(params + 0.5 * g / jnp.linalg.norm(g)))


def test_groups_are_contiguous():
    batch = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    groups = cx.Objective(lambda p, b: p, batch).groups(3)
    np.testing.assert_array_equal(groups["b"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(groups["a"][1], batch["a"][3:])


def test_on_evaluates_the_same_loss_on_another_batch():
    objective = cx.Objective(net_loss, net_batch(8), microbatch=2)
    other = net_batch(4)
    assert_trees_close(objective.on(other)(net_params()), net_loss(net_params(), other))
    assert_trees_close(objective(net_params()), net_loss(net_params(), net_batch(8)))


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 4), (0.26, 2), (1e-6, 1), (1.0, 8)])
def test_first_takes_the_first_fraction_of_the_batch(fraction, count):
    part = cx.Objective(net_loss, net_batch(8)).first(fraction)
    start = jax.tree.map(lambda x: x[:count], net_batch(8))
    assert part.size == count
    assert_trees_close(part(net_params()), net_loss(net_params(), start))


@pytest.mark.parametrize("form", FORMS)
def test_through_composes_the_loss_with_a_map_of_parameters(form):
    cube = lambda params: jax.tree.map(lambda x: x**3 + x, params)
    objective = FORMS[form]().through(cube)
    direct = lambda params: net_loss(cube(params), net_batch())
    out, grads = objective.value_and_grad(net_params())
    value, expected = jax.value_and_grad(direct)(net_params())
    assert_trees_close(out[0] if objective.has_aux else out, value)
    assert_trees_close(grads, expected)


def test_losses_of_half_precision_models_are_float32():
    params = net_params(jnp.bfloat16)
    objective = cx.Objective(net_loss, net_batch(dtype=jnp.bfloat16))
    value, grads = objective.value_and_grad(params)
    assert value.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_microbatches_are_accumulated_in_float32():
    # A sum of bfloat16 numbers would stop growing at 256.
    ones = jnp.full(1024, 1 + 2**-7, jnp.bfloat16)
    objective = cx.Objective(lambda p, x: p * jnp.mean(x), ones, microbatch=1)
    _, gradient = objective.value_and_grad(jnp.ones((), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert gradient == 1 + 2**-7


# The gradient cache.


def test_objective_recognises_its_own_gradient():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    value, grads = objective.value_and_grad(params)
    given = objective.cached_gradient(params, grads)
    assert given is not None
    assert given.value is value
    assert objective.cached_gradient(params, jax.tree.map(lambda x: x, grads)) is not None
    assert objective.cached_gradient(params, jax.tree.map(lambda x: x + 0, grads)) is None
    assert objective.cached_gradient(net_params(), grads) is None
    assert objective.on(objective.batch).cached_gradient(params, grads) is None


def test_objective_keeps_no_gradient_alive():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    _, grads = objective.value_and_grad(params)
    refs = [weakref.ref(leaf) for leaf in jax.tree.leaves(grads)]
    del grads
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_objective_leaks_no_tracers():
    objective, tx = cx.Objective(net_loss, net_batch()), cx.adahessian(0.1)

    def step(params: Any) -> Any:
        _, grads = objective.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=objective)[0]

    # An objective that outlives a trace is used in the next one.
    with jax.checking_leaks():
        for _ in range(2):
            jax.eval_shape(step, net_params())


# Memory.

WIDTH = 64


def temporary_bytes(examples: int, microbatch: int | None, compute: Any) -> int:
    params = {"w": jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)}
    batch = jax.ShapeDtypeStruct((examples, 4), jnp.float32)

    def loss(params: Any, x: Any) -> jax.Array:
        return jnp.mean(jnp.tanh(jnp.sin(jnp.tanh(x @ params["w"]))))

    run = lambda params, x: compute(cx.Objective(loss, x, microbatch=microbatch), params)
    compiled = jax.jit(run).lower(params, batch).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


COMPUTATIONS = {
    "value_and_grad": lambda objective, params: objective.value_and_grad(params),
    "jax.grad": lambda objective, params: jax.grad(objective)(params),
    "hvp": lambda objective, params: hvp(objective, params)(params),
    "hutchinson_diag": lambda objective, params: updates_of(
        cx.hutchinson_diag() | cx.scale_by_power(1.0), objective, params
    ),
    "sam_perturb": lambda objective, params: updates_of(cx.sam_perturb(0.1), objective, params),
}


def updates_of(tx: cx.Stage, objective: cx.Objective, params: Any) -> Any:
    return tx.update(params, tx.init(params), params, value_fn=objective)[0]


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_memory_over_microbatches_does_not_grow_with_the_batch(computation):
    compute = COMPUTATIONS[computation]
    few, many = (temporary_bytes(n, 16, compute) for n in (64, 1024))
    assert many <= 1.05 * few + 1024
    assert temporary_bytes(1024, None, compute) > 5 * many


# Errors.

BATCH = net_batch(8)
REFUSED = {
    "micro-batches of nothing": (lambda: cx.Objective(net_loss, microbatch=2), "no batch"),
    "weight of nothing": (lambda: cx.Objective(net_loss, weight="y"), "no batch"),
    "model of nothing": (lambda: cx.Objective(squared_error, model=net), "no batch"),
    "an unknown weight": (
        lambda: cx.Objective(net_loss, BATCH, weight="mask"), "weight='mask'.*no entry of that name"
    ),
    "a raw key": (
        lambda: cx.Objective(noisy, jnp.ones(2), key=jax.random.PRNGKey(0)),
        r"`jax\.random\.wrap_key_data\(raw_key\)`",
    ),
    "a remainder": (
        lambda: cx.Objective(net_loss, BATCH, microbatch=3),
        r"3 does not divide its 8 examples.*\[1, 2, 4, 8\]",
    ),
    "empty micro-batches": (lambda: cx.Objective(net_loss, BATCH, microbatch=0), "0 does not"),
    "groups with a remainder": (
        lambda: cx.Objective(net_loss, BATCH).groups(5), r"`groups\(m\)`.*\[1, 2, 4, 8\]"
    ),
    "batch leaves that disagree": (
        lambda: cx.Objective(net_loss, {"x": jnp.ones(2), "y": jnp.ones(3)}).size,
        r"share one leading axis.*\(2,\), \(3,\)",
    ),
    "a scalar in the batch": (
        lambda: cx.Objective(net_loss, {"x": jnp.ones(2), "y": 3.0}).size, "share one leading axis"
    ),
    "the size of a plain callable": (
        lambda: cx.Objective(lambda p: p).size, r"write `Objective\(loss, batch\)`"
    ),
    "a loss per example": (
        lambda: cx.Objective(lambda p, b: p * b, jnp.ones(3))(1.0),
        r"float64\[3\].*`jnp\.mean`",
    ),
    "an integer loss": (
        lambda: cx.Objective(lambda p, b: jnp.sum(b), jnp.arange(3))(1.0), "floating scalar"
    ),
    "an aux that was not announced": (
        lambda: cx.Objective(loss_and_outputs, BATCH)(net_params()),
        r"`curvax\.Objective\(loss, batch, has_aux=True\)`",
    ),
    "an aux that does not come": (
        lambda: cx.Objective(net_loss, BATCH, has_aux=True)(net_params()), "drop `has_aux`"
    ),
    "a model's aux that does not come": (
        lambda: cx.Objective(squared_error, BATCH, model=net, has_aux=True)(net_params()),
        "expects the model to return a pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_objective_errors_say_what_to_write(wrong):
    act, message = REFUSED[wrong]
    with pytest.raises((TypeError, ValueError), match=message):
        act()
