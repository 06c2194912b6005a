"""A missing, wrong or already summed device axis raises instead of giving wrong numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.stages.perturbation import METRICS

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)
PARAMS = jnp.array([0.3, -0.7, 1.1])
BATCH = jax.random.normal(jax.random.key(0), (16, 3))


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def mapped(f, mapping, *, axes=("batch",), shape=(8,), spec=None, out=None):
    """f(params, batch) under pmap or shard_map, with replicated results."""
    out = P() if out is None else out
    if mapping == "pmap":
        g = jax.pmap(f, axis_name=axes[0], in_axes=(None, 0), out_axes=None)
        return lambda w, x: g(w, x.reshape(8, -1, 3))
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    specs = (P(), P(spec or axes[0]))
    checked = mapping == "shard_map"
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=checked))


def update(tx, loss=loss, grads=None, **options):
    def step(w, x):
        objective = cx.Objective(loss, x, **options)
        g = objective.value_and_grad(w)[1] if grads is None else grads(w, x)
        return tx.update(g, tx.init(w), w, value_fn=objective)[0]

    return step


EVERYWHERE = pytest.mark.parametrize("mapping", ["pmap", "shard_map", "shard_map unchecked"])
FORGETFUL = {
    "sam": cx.sam(optax.sgd(0.1)),
    "gsam": cx.gsam(optax.sgd(0.1), 0.1, 0.2),
    "look_sam": cx.look_sam(optax.sgd(0.1), 0.1),
    "entropy_sgd": cx.entropy_sgd(optax.sgd(0.1), steps=2),
    "adahessian": cx.adahessian(0.1),
    "hutchinson_diag": cx.hutchinson_diag() | cx.pmean_updates("batch"),
    "look_sam's kept part": cx.sam_perturb(0.1, every=2) | cx.keep_orthogonal(),
    "the step behind every": cx.every(2, cx.hutchinson_diag(mean_over="batch"))
    | cx.ema_rms(0.9)
    | optax.ema(0.9)
    | cx.scale_by_power(1.0)
    | cx.pmean_updates("batch"),
    "the step behind partition": cx.partition({"a": cx.sam_perturb(0.1)}, "a") | optax.adam(0.1),
    "adam's moments": cx.sam_perturb(0.1) | optax.adam(0.1),
}


@EVERYWHERE
@pytest.mark.parametrize("tx", FORGETFUL.values(), ids=FORGETFUL)
def test_missing_mean_over_a_device_axis_raises(tx, mapping):
    with pytest.raises(ValueError, match=r"mean_over='batch'|pmean_updates\('batch'\)"):
        mapped(update(tx), mapping)(PARAMS, BATCH)


def test_missing_mean_over_an_unnamed_axis_raises():
    step = jax.pmap(update(cx.sam(optax.sgd(0.1))), in_axes=(None, 0))
    with pytest.raises(ValueError, match=r"device axis.*no axis to average over was given"):
        step(PARAMS, BATCH.reshape(8, -1, 3))


@EVERYWHERE
def test_pmean_updates_over_no_axes_keeps_updates_local(mapping):
    tx = cx.sam_perturb(0.1) | cx.pmean_updates(()) | optax.adam(0.1)
    step = lambda w, x: lax.pmean(update(tx)(w, x), "batch")
    assert np.isfinite(mapped(step, mapping)(PARAMS, BATCH)).all()


@EVERYWHERE
@pytest.mark.parametrize(
    "tx",
    [
        cx.sam(optax.sgd(0.1), mean_over="data"),
        cx.adahessian(0.1, mean_over="data"),
        cx.sam(optax.sgd(0.1), sync_over="data", mean_over="batch"),
    ],
)
def test_unbound_axis_raises_with_the_bound_ones(tx, mapping):
    with pytest.raises(ValueError, match=r"'data'.*not bound.*'batch'"):
        mapped(update(tx), mapping)(PARAMS, BATCH)


@pytest.mark.parametrize(
    "tx", [cx.sam(optax.sgd(0.1), mean_over="batch"), cx.adahessian(0.1, mean_over="batch")]
)
def test_gradient_summed_by_shard_map_raises(tx):
    step = update(tx, grads=jax.grad(loss))
    with pytest.raises(ValueError, match=r"already summed.*value_and_grad"):
        mapped(step, "shard_map")(PARAMS, BATCH)


def averaged(w, x):
    return lax.pmean(loss(w, x), "batch") + 1e-3 * jnp.sum(w**2)


def averaged_in_disguise(w, x):
    inner = jax.checkpoint(lambda w: lax.psum(jax.jit(loss)(w, x), "batch"))
    return inner(w) / lax.axis_size("batch")


@EVERYWHERE
@pytest.mark.parametrize("bad", [averaged, averaged_in_disguise])
def test_loss_averaged_over_devices_raises(bad, mapping):
    tx = cx.sam(optax.sgd(0.1), mean_over="batch")
    with pytest.raises(ValueError, match="averages its own value over the axis 'batch'"):
        mapped(update(tx, bad), mapping)(PARAMS, BATCH)


def synchronised(w, x):
    """A loss behind batch norm over all devices, with a count of examples reduced as well."""
    h = x * w[None]
    mean = lax.pmean(jnp.mean(h, axis=0), "batch")
    var = lax.pmean(jnp.mean((h - mean[None]) ** 2, axis=0), "batch")
    return jnp.mean(jnp.tanh((h - mean[None]) / jnp.sqrt(var + 0.1)[None] + w[None]) ** 2)


def on_one_device(w, x):
    h = x * w[None]
    mean, var = jnp.mean(h, axis=0), jnp.var(h, axis=0)
    return jnp.mean(jnp.tanh((h - mean[None]) / jnp.sqrt(var + 0.1)[None] + w[None]) ** 2)


@EVERYWHERE
def test_synchronised_batch_norm_gives_the_step_of_the_whole_batch(mapping):
    tx = cx.sam_perturb(0.1, sync_over="batch") | cx.pmean_updates("batch")
    found = mapped(update(tx, synchronised), mapping)(PARAMS, BATCH)
    np.testing.assert_allclose(found, update(cx.sam_perturb(0.1), on_one_device)(PARAMS, BATCH))


def test_method_with_axes_runs_under_jit_without_them():
    tx = cx.sam(optax.sgd(0.1), sync_over="batch", mean_over="batch")
    plain = cx.sam(optax.sgd(0.1))
    np.testing.assert_array_equal(update(tx)(PARAMS, BATCH), update(plain)(PARAMS, BATCH))


def naive_groups(n):
    """SAM with one perturbation for each of n contiguous groups."""
    return np.mean([update(cx.sam_perturb(0.05))(PARAMS, x) for x in BATCH.reshape(n, -1, 3)], 0)


@pytest.mark.parametrize("mapping", ["shard_map", "shard_map unchecked"])
def test_ascent_synced_over_one_mesh_axis_makes_groups_of_devices(mapping):
    tx = cx.sam_perturb(0.05, sync_over="inner") | cx.pmean_updates(("outer", "inner"))
    axes = dict(axes=("outer", "inner"), shape=(2, 4), spec=("outer", "inner"))
    found = mapped(update(tx), mapping, **axes)(PARAMS, BATCH)
    np.testing.assert_allclose(found, naive_groups(2), rtol=1e-12)


def test_sam_runs_with_a_mesh_axis_left_to_the_compiler():
    tx = cx.sam(optax.identity(), mean_over="batch")
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    step = jax.jit(
        jax.shard_map(
            update(tx),
            mesh=mesh,
            in_specs=(P(), P("batch")),
            out_specs=P(),
            axis_names={"batch"},
        )
    )
    np.testing.assert_allclose(step(PARAMS, BATCH), naive_groups(4), rtol=1e-12)


def test_vmap_with_an_axis_name_averages_updates():
    tx = cx.sam_perturb(0.05) | cx.pmean_updates("batch")
    step = jax.vmap(update(tx), axis_name="batch", in_axes=(None, 0))
    found = step(PARAMS, BATCH.reshape(8, -1, 3))
    np.testing.assert_allclose(found, np.stack([naive_groups(8)] * 8), rtol=1e-12)


def weighted(w, x):
    mask = x[:, 0] > 0.2
    return jnp.sum(mask * jnp.tanh(x @ w) ** 2) / jnp.maximum(jnp.sum(mask), 1)


def unmasked(x):
    return jnp.sum(x[:, 0] > 0.2)


@EVERYWHERE
def test_devices_are_averaged_by_the_weight_of_their_batches(mapping):
    tx = cx.sam_perturb(0.1, sync_over="batch") | cx.pmean_updates("batch")
    found = mapped(update(tx, weighted, weight=unmasked), mapping)(PARAMS, BATCH)
    expected = update(cx.sam_perturb(0.1), weighted)(PARAMS, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def noisy(w, x, key):
    return jnp.mean(jnp.tanh(x @ w + jax.random.normal(key, (len(x),))) ** 2)


@EVERYWHERE
def test_dropout_keys_follow_the_part_of_the_batch(mapping):
    key = jax.random.key(5)
    tx = cx.pmean_updates("batch")
    expected = cx.Objective(noisy, BATCH, key=key, microbatch=2).value_and_grad(PARAMS)[1]
    found = mapped(update(tx, noisy, key=key), mapping)(PARAMS, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_dropout_keys_do_not_depend_on_the_number_of_devices():
    key = jax.random.key(5)
    options: Any = dict(key=key, microbatch=2)
    expected = cx.Objective(noisy, BATCH, **options).value_and_grad(PARAMS)[1]
    two = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    step = jax.shard_map(
        update(cx.pmean_updates("batch"), noisy, **options),
        mesh=two,
        in_specs=(P(), P("batch")),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(step)(PARAMS, BATCH), expected, rtol=1e-12)


@EVERYWHERE
@pytest.mark.parametrize("weight", [None, unmasked])
@pytest.mark.parametrize("grouped", [False, True])
def test_diagnostics_are_the_same_on_every_device(mapping, weight, grouped):
    stages = cx.sam_perturb(0.05)
    stages = cx.per_group(1, stages) if grouped else stages
    tx = stages | cx.pmean_updates("batch") | optax.sgd(0.1)
    f = weighted if weight else loss

    def step(w, x):
        objective = cx.Objective(f, x, weight=weight)
        _, g = objective.value_and_grad(w)
        _, state = tx.update(g, tx.init(w), w, value_fn=objective)
        return jnp.stack([x for _, x in sorted(cx.diagnostics(state).items())])[None]

    def gap_of(x):
        g = jax.grad(f)(PARAMS, x)
        length = jnp.linalg.norm(g)
        return f(PARAMS + 0.05 * g / jnp.where(length == 0, 1, length), x) - f(PARAMS, x)

    if mapping == "pmap":
        found = jax.pmap(step, axis_name="batch", in_axes=(None, 0))(PARAMS, BATCH.reshape(8, 2, 3))
        found = found[:, 0]
    else:
        found = mapped(step, mapping, out=P("batch"))(PARAMS, BATCH)
    np.testing.assert_array_equal(found, np.stack([found[0]] * 8))
    if weight is None:
        pieces = BATCH.reshape(16 if grouped else 8, -1, 3)
        expected = np.mean([gap_of(x) for x in pieces])
        np.testing.assert_allclose(found[0, sorted(METRICS).index("surrogate_gap")], expected, 1e-5)


@EVERYWHERE
@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_mean_of_local_hessian_products_is_the_whole_product(mode, mapping):
    v = jnp.array([1.0, 2.0, -1.0])

    def product(w, x):
        local = cx.hvp(cx.Objective(loss, x), w, mode=mode)(v)
        return lax.pmean(local, "batch")

    expected = jax.hessian(partial(loss, x=BATCH))(PARAMS) @ v
    np.testing.assert_allclose(mapped(product, mapping)(PARAMS, BATCH), expected, rtol=1e-12)


def test_state_without_a_mean_is_that_of_the_last_group():
    """A bit and an integer that differ from group to group have no mean."""

    def rule(signal, state, params=None, *, value_fn, **extra):
        del state, params, extra
        largest = jnp.max(value_fn.batch)
        return signal, (largest > 0, jnp.int32(100 * largest))

    seen = cx.stage(lambda params: (jnp.bool_(False), jnp.int32(0)), rule)

    def step(w, x):
        objective = cx.Objective(loss, x)
        tx = cx.per_group(1, seen) | cx.pmean_updates("batch")
        return tx.update(objective.value_and_grad(w)[1], tx.init(w), w, value_fn=objective)[1]

    bit, number = jax.tree.leaves(mapped(step, "shard_map")(PARAMS, BATCH))
    largest = jnp.max(BATCH[-1])
    assert (bool(bit), int(number)) == (bool(largest > 0), int(100 * largest))
    assert int(number) != int(100 * jnp.max(BATCH[1]))
