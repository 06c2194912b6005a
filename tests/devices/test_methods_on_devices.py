"""Under pmap and shard_map on eight devices every method equals a float64 loop over the shards."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_problem import (
    DEVICES,
    MAPPINGS,
    PER_DEVICE,
    TOLERANCE,
    adahessian_loop,
    by_shard,
    gsam_of,
    local,
    loss,
    make_batch,
    make_params,
    mean,
    mesh,
    one_step,
    perturbed,
    pieces,
    predict,
    run,
    sam_of,
    sgd_over,
    shards,
    step_alone,
    synced,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.perturbation.ascent_rules import random_direction
from curvax.planning import collectives, hlo

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


CASES = {
    "sam": (cx.sam(optax.sgd(0.1), 0.3, mean_over="batch"), local(sam_of)),
    "sam synced": (cx.sam(optax.sgd(0.1), 0.3, sync_over="batch", mean_over="batch"), synced),
    "gsam": (cx.gsam(optax.sgd(0.1), 0.3, 0.4, mean_over="batch"), local(gsam_of)),
    "groups of 2": (
        cx.per_group(2, cx.sam_perturb(0.3) | cx.gsam_project(0.4))
        | cx.pmean_updates("batch")
        | optax.sgd(0.1),
        local(gsam_of, 2 * DEVICES),
    ),
    "groups of 2, one by one": (
        cx.per_group(2, cx.sam_perturb(0.3), sequential=True)
        | cx.pmean_updates("batch")
        | optax.sgd(0.1),
        local(sam_of, 2 * DEVICES),
    ),
}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("case", CASES)
def test_sharpness_methods_equal_the_loop_over_shards(case, mapping):
    tx, gradient = CASES[case]
    params, batch = make_params(), make_batch()
    expected = sgd_over(lambda p: gradient(p, batch), params)
    found, _ = run(mapping, tx, params, batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


def exact_sam_of(params, piece, others=None, rho=0.3):
    """∇ of θ ↦ L(θ + ε̂(θ)), by JAX's own reverse mode through ε̂; `others` share the ascent."""

    def worst(p):
        everyone = [piece] if others is None else others
        return loss(perturbed(p, mean([jax.grad(loss)(p, x) for x in everyone]), rho), piece)

    return jax.grad(worst)(params)


def exact_synced(params, batch):
    everyone = pieces(batch)
    return mean([exact_sam_of(params, piece, everyone) for piece in everyone])


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("synced_ascent", [False, True])
def test_second_order_terms_equal_autodiff_through_the_ascent(mapping, synced_ascent):
    sync = "batch" if synced_ascent else None
    tx = cx.sam(optax.sgd(0.1), 0.3, second_order=True, sync_over=sync, mean_over="batch")
    gradient = exact_synced if synced_ascent else local(exact_sam_of)
    params, batch = make_params(), make_batch()
    expected = sgd_over(lambda p: gradient(p, batch), params, steps=1)
    found, _ = run(mapping, tx, params, batch, steps=1)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_synced_random_ascent_draws_one_direction(mapping):
    rule = random_direction(5)
    tx = cx.sam(optax.sgd(0.1), 0.3, ascent=rule, sync_over="batch", mean_over="batch")
    params, batch = make_params(), make_batch()
    found, _ = run(mapping, tx, params, batch)
    alone, state = params, tx.init(params)
    for _ in range(2):
        alone, state = step_alone(tx, alone, state, batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, alone)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_keep_orthogonal_counts_devices_by_weight(mapping):
    def weighted(params, batch):
        errors = (predict(params, batch) - batch["y"]) ** 2
        return jnp.sum(batch["w"] * errors) / jnp.sum(batch["w"])

    options: Any = dict(of=weighted, weight="w")
    params, batch = make_params(), make_batch()
    batch["w"] = 0.5 + 3 * jax.random.uniform(jax.random.key(7), batch["y"].shape)
    tx = cx.sam_perturb(0.3, every=2) | cx.keep_orthogonal(mean_over="batch")
    found, _ = run(
        mapping, tx | cx.pmean_updates("batch") | optax.sgd(0.1), params, batch, **options
    )
    # Under jit the groups of a device's examples, whose weights `per_group` heeds.
    grouped = cx.per_group(PER_DEVICE, cx.sam_perturb(0.3, every=2) | cx.keep_orthogonal())
    tx = grouped | optax.sgd(0.1)
    alone, state = params, tx.init(params)
    for _ in range(2):
        alone, state = step_alone(tx, alone, state, batch, **options)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, alone)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", ["groups", "shards"])
def test_groups_of_a_sharded_batch_need_one_all_reduce(kind, case):
    if case == "groups":
        tx = cx.per_group(PER_DEVICE, cx.sam_perturb(0.3)) | optax.sgd(0.1)
    else:
        tx = by_shard(jax.random.key(3))
    params, batch = make_params(), make_batch()
    grid = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(grid):
        sharded = jax.device_put(batch, jax.NamedSharding(grid, P("batch")))
        replicated = jax.device_put((params, tx.init(params)), jax.NamedSharding(grid, P()))
        compiled = jax.jit(partial(one_step, tx)).lower(*replicated, sharded).compile()
        found, _ = compiled(*replicated, sharded)
    alone, _ = step_alone(tx, params, tx.init(params), batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, alone)
    # Counts are gathered to take the last; the batch and the parameters are not.
    gathered = collectives.count(hlo.read(compiled)).get("all-gather", (0, 0))
    assert gathered[1] < params["w1"].nbytes < batch["y"].nbytes


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_adahessian_equals_the_loop_over_shards(mapping):
    params, batch, key = make_params(), make_batch(), jax.random.key(3)
    tx = cx.adahessian(0.1, b2=0.99, key=key, mean_over="batch")
    found, state = run(mapping, tx, params, batch)
    expected = adahessian_loop(params, batch, key, shared=True)
    # g / |d| amplifies the rounding of a small d.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)
    np.testing.assert_array_equal(state[0].key, jax.random.key_data(key))


@pytest.mark.parametrize("mapping", [*MAPPINGS, "jit"])
def test_one_probe_per_shard_gives_the_same_run_on_any_number_of_devices(mapping):
    params, batch, key = make_params(), make_batch(), jax.random.key(3)
    tx = by_shard(key)
    if mapping == "jit":
        state, found = tx.init(params), params
        step = jax.jit(partial(one_step, tx))
        for _ in range(2):
            found, state = step(found, state, batch)
    else:
        found, _ = run(mapping, tx, params, batch)
    expected = adahessian_loop(params, batch, key, shared=False)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_several_shards_per_device_equal_those_on_one_device(mapping):
    params, batch = make_params(), make_batch()
    tx = by_shard(jax.random.key(3), shards=2 * DEVICES)
    found, _ = run(mapping, tx, params, batch, steps=1)
    alone, _ = step_alone(tx, params, tx.init(params), batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, alone)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_groups_draw_their_own_probes_on_any_device(mapping):
    params, batch = make_params(), make_batch()
    tx = (
        cx.per_group(2, cx.hutchinson_diag(jax.random.key(3), mean_over="batch"))
        | cx.pmean_updates("batch")
        | cx.scale_by_power(1.0, eps=1e-4)
        | optax.sgd(0.1)
    )
    found, _ = run(mapping, tx, params, batch)
    alone, state = step_alone(tx, params, tx.init(params), batch)
    alone, _ = step_alone(tx, alone, state, batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, alone)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_keeps_the_averaged_diagonal_on_devices(mapping):
    params, batch = make_params(), make_batch()
    tx = cx.every(2, cx.hutchinson_diag(mean_over="batch"))
    state = tx.init(params)

    def diagonal(params, state, batch):
        objective = cx.Objective(loss, batch)
        _, grads = objective.value_and_grad(params)
        _, state = (tx | cx.pmean_updates("batch")).update(
            grads, (state, optax.EmptyState()), params, value_fn=objective
        )
        return state[0].diagonal

    if mapping == "pmap":
        step = jax.pmap(diagonal, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
        found = step(params, state, shards(batch))
    else:
        checked = mapping == "shard_map"
        step = jax.jit(
            jax.shard_map(
                diagonal,
                mesh=mesh(),
                in_specs=(P(), P(), P("batch")),
                out_specs=P(),
                check_vma=checked,
            )
        )
        found = step(params, state, batch)
    z = cx.rademacher(jax.random.fold_in(jax.random.key(0), 0), params)
    expected = jax.tree.map(jnp.multiply, z, cx.hvp(cx.Objective(loss, batch), params)(z))
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)
