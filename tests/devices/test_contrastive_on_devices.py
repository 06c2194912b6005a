"""The contrastive loss over eight devices, whose anchors see the embeddings of all of them.

The reference is F(θ₁, ..., θ₈), the loss of the whole batch as a function of the parameters that
each device has. A device's gradient is 8 ∂F/∂θ_d, so that the mean over devices is the sum of the
derivatives of F, and each device ascends along its own.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_problem import (
    DEVICES,
    FEATURES,
    HIDDEN,
    MAPPINGS,
    PER_DEVICE,
    make_params,
    mean,
    mesh,
    one_step,
    perturbed,
    pieces,
    run,
    sgd_over,
    step_alone,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.planning import collectives, hlo

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)

N, RHO = DEVICES * PER_DEVICE, 0.3
TOLERANCE: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)


def make_batch():
    x = jax.random.normal(jax.random.key(5), (N, 2, FEATURES))
    return {"x": x, "y": jnp.arange(N) % 5, "mask": jnp.arange(N) % 7 != 3}


def predict(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None, None])
    return hidden * params["w2"][None, None]


def loss_of(**options):
    chosen: dict[str, Any] = {"temperature": 0.5, "sync_over": "batch"} | options
    return cx.supervised_contrastive("y", **chosen)


def of_embeddings(z, y):
    """Eq. 2 of the paper, with matrices of all pairs of embeddings."""
    u = (z / jnp.linalg.norm(z, axis=-1, keepdims=True)).reshape(-1, HIDDEN)
    s, labels = u @ u.T / 0.5, jnp.repeat(y, z.shape[1])
    other = ~jnp.eye(len(u), dtype=bool)
    positive = other & (labels[:, None] == labels[None])
    log_p = s - jnp.log(jnp.sum(jnp.where(other, jnp.exp(s), 0), axis=1, keepdims=True))
    return -jnp.mean(jnp.sum(jnp.where(positive, log_p, 0), axis=1) / positive.sum(axis=1))


def whole(params, batch):
    return of_embeddings(predict(params, batch), batch["y"])


def of_devices(each, parts):
    """F of the parameters and the batch of each device."""
    z = jnp.concatenate([predict(params, part) for params, part in zip(each, parts)])
    return of_embeddings(z, jnp.concatenate([part["y"] for part in parts]))


def sgd(params, batch):
    return jax.grad(whole)(params, batch)


def synced(params, batch):
    return jax.grad(whole)(perturbed(params, sgd(params, batch), RHO), batch)


def local(params, batch, parts=None):
    """SAM whose devices ascend along their own ∂F/∂θ_d."""
    parts = pieces(batch) if parts is None else parts
    gradient = jax.grad(of_devices)
    moved = [perturbed(params, g, RHO) for g in gradient([params] * len(parts), parts)]
    sums = gradient(moved, parts)
    return jax.tree.map(lambda *g: sum(g), *sums)


def rows(batch, i, m):
    """The i-th m examples of every device."""
    return [jax.tree.map(lambda x: x[i * m : (i + 1) * m], part) for part in pieces(batch)]


def in_pieces(f, m):
    """The mean of f over the pieces of m examples that devices compute together."""
    return lambda params, batch: mean(
        [f(params, rows(batch, i, m)) for i in range(PER_DEVICE // m)]
    )


def of_parts(params, parts):
    return jax.tree.map(lambda *g: sum(g), *jax.grad(of_devices)([params] * DEVICES, parts))


SGD = optax.sgd(0.1)
MEAN = cx.pmean_updates("batch") | SGD
CASES: dict[str, Any] = {
    "sgd": (MEAN, sgd, {}),
    "sgd, micro-batches of 2": (MEAN, in_pieces(of_parts, 2), {"microbatch": 2}),
    "sam, each device its ascent": (cx.sam(SGD, RHO, mean_over="batch"), local, {}),
    "sam synced": (cx.sam(SGD, RHO, sync_over="batch", mean_over="batch"), synced, {}),
    "sam, groups of 2": (
        cx.per_group(2, cx.sam_perturb(RHO)) | MEAN,
        in_pieces(lambda params, parts: local(params, None, parts), 2),
        {},
    ),
    "sam, groups of 2 one by one": (
        cx.per_group(2, cx.sam_perturb(RHO), sequential=True) | MEAN,
        in_pieces(lambda params, parts: local(params, None, parts), 2),
        {},
    ),
}


def assert_close(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


EVERYWHERE = ("sgd", "sam, each device its ascent")


@cache
def expected_of(case):
    _, gradient, _ = CASES[case]
    return sgd_over(jax.jit(lambda p: gradient(p, make_batch())), make_params())


@pytest.mark.parametrize(
    ("case", "mapping"),
    [
        (case, mapping)
        for case in CASES
        for mapping in MAPPINGS
        if mapping == "shard_map" or case in EVERYWHERE
    ],
)
def test_methods_equal_those_of_the_whole_batch(case, mapping):
    tx, _, options = CASES[case]
    params, batch = make_params(), make_batch()
    found, _ = run(mapping, tx, params, batch, of=loss_of(), model=predict, **options)
    assert_close(found, expected_of(case))


@pytest.mark.parametrize("mapping", MAPPINGS[:2])
def test_a_mask_counts_the_examples_of_all_devices(mapping):
    params, batch = make_params(), make_batch()
    kept = jax.tree.map(lambda x: x[batch["mask"]], batch)
    expected = sgd_over(jax.jit(lambda p: sgd(p, kept)), params, steps=1)
    found, _ = run(mapping, MEAN, params, batch, 1, of=loss_of(mask="mask"), model=predict)
    assert_close(found, expected)


@pytest.mark.parametrize("mapping", MAPPINGS[:2])
def test_without_sync_each_device_has_its_own_loss(mapping):
    params, batch = make_params(), make_batch()
    each = jax.jit(sgd)
    expected = sgd_over(lambda p: mean([each(p, part) for part in pieces(batch)]), params, 1)
    found, _ = run(mapping, MEAN, params, batch, 1, of=loss_of(sync_over=()), model=predict)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_under_jit_are_one_batch(kind):
    params, batch = make_params(), make_batch()
    made = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    tx = cx.sam(SGD, RHO)
    with jax.set_mesh(made):
        split = jax.device_put(batch, NamedSharding(made, P("batch")))
        here = jax.device_put(params, NamedSharding(made, P()))
        step = jax.jit(partial(one_step, tx, of=loss_of(sync_over=None), model=predict))
        found, _ = step(here, tx.init(here), split)
    expected = sgd_over(jax.jit(lambda p: synced(p, batch)), params, steps=1)
    assert_close(jax.device_get(found), jax.device_get(expected))


def over(axes, check, names=("data", "group")):
    """The gradient, averaged over all devices of a mesh of two axes."""
    made = jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)

    def gradient(params, batch):
        objective = cx.Objective(loss_of(sync_over=axes), batch, model=predict)
        (value, grads) = objective.value_and_grad(params)
        return jax.lax.pmean((value, grads), names)

    mapped = jax.shard_map(
        gradient, mesh=made, in_specs=(P(), P(names)), out_specs=P(), check_vma=check
    )
    return jax.jit(mapped)(make_params(), make_batch())


@pytest.mark.parametrize("check", [True, False])
def test_several_axes_are_one_batch_and_one_of_them_a_part(check):
    params, batch = make_params(), make_batch()
    of_all = jax.jit(jax.value_and_grad(whole))(params, batch)
    assert_close(over(("data", "group"), check), of_all)
    halves = jax.jit(lambda p: mean([jax.value_and_grad(whole)(p, b) for b in pieces(batch, 2)]))
    assert_close(over("group", check), halves(params))


def mapped(f, mapping):
    """The mean over devices of f(objective, params)."""

    def of(params, batch):
        objective = cx.Objective(loss_of(), batch, model=predict)
        return jax.lax.pmean(f(objective, params), "batch")

    params, batch = make_params(), make_batch()
    if mapping == "pmap":
        split = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        return jax.pmap(of, "batch", in_axes=(None, 0), out_axes=None)(params, split)
    check = mapping == "shard_map"
    specs = (P(), P("batch"))
    return jax.jit(jax.shard_map(of, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check))(
        params, batch
    )


@pytest.mark.parametrize(
    ("product", "mapping"),
    [(cx.hvp, "pmap"), (cx.hvp, "shard_map"), (cx.ggnvp, "shard_map")],
)
def test_products_are_those_of_the_whole_batch(product, mapping):
    params, batch = make_params(), make_batch()
    v = jax.tree.map(lambda x: jnp.sin(3 * x + 1), params)
    alone = cx.Objective(loss_of(), batch, model=predict)
    expected = jax.jit(lambda p: product(alone, p)(v))(params)
    assert_close(mapped(lambda objective, p: product(objective, p)(v), mapping), expected)


def test_hutchinson_with_one_probe_is_that_of_the_whole_batch():
    params, batch = make_params(), make_batch()
    alone = cx.hutchinson_diag(mean_over=()) | cx.ema_rms(0.0) | cx.scale_by_power(1.0) | SGD
    many = (
        cx.hutchinson_diag(mean_over="batch")
        | cx.pmean_updates("batch")
        | cx.ema_rms(0.0)
        | cx.scale_by_power(1.0)
        | SGD
    )
    expected, _ = step_alone(alone, params, alone.init(params), batch, of=loss_of(), model=predict)
    found, _ = run("shard_map", many, params, batch, 1, of=loss_of(), model=predict)
    assert_close(found, expected)


@pytest.mark.parametrize("mapping", MAPPINGS[:2])
def test_hutchinson_with_a_probe_for_each_device_is_refused(mapping):
    tx = cx.hutchinson_diag(shards=DEVICES, mean_over="batch") | MEAN
    with pytest.raises(ValueError, match="contains what other devices drew"):
        run(mapping, tx, make_params(), make_batch(), of=loss_of(), model=predict)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_devices_without_sync_over_are_refused(mapping):
    with pytest.raises(ValueError, match=r"`supervised_contrastive` runs under the device axis"):
        run(mapping, MEAN, make_params(), make_batch(), of=loss_of(sync_over=None), model=predict)


def test_weights_of_devices_are_refused():
    with pytest.raises(ValueError, match="contains terms of other devices' examples"):
        run(
            "pmap", MEAN, make_params(), make_batch(), of=loss_of(), model=predict,
            weight=lambda batch: jnp.sum(batch["y"]),
        )  # fmt: skip


@pytest.mark.parametrize("mapping", MAPPINGS[:2])
def test_a_pass_gathers_the_embeddings_once_and_scatters_them_once(mapping):
    """SAM has two passes; the classes are gathered once, and gradients averaged once."""
    tx = cx.sam(SGD, RHO, mean_over="batch")
    params, batch = make_params(), make_batch()
    batch.pop("mask")
    step = partial(one_step, tx, of=loss_of(), model=predict)
    if mapping == "pmap":
        f = jax.pmap(step, "batch", in_axes=(None, None, 0), out_axes=None)
        batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    else:
        specs = (P(), P(), P("batch"))
        f = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=P()))
    program = hlo.read(f.lower(params, tx.init(params), batch).compile())
    found = collectives.count(program)
    embeddings, classes = 8 * N * 2 * HIDDEN, 8 * N
    assert found["all-gather"] == (3, 2 * embeddings + classes)
    assert found["reduce-scatter"] == (2, 2 * embeddings)
    assert found["all-reduce"].bytes < 1.5 * sum(x.nbytes for x in jax.tree.leaves(params))
