"""Groups over several devices equal the same groups of examples under plain jit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_groups import (
    MASK,
    M,
    assert_like_jit,
    grouped,
    mapped_to_groups_of_two,
    on_groups_of_two,
    over_all,
    weighted,
    weighted_batch,
)
from device_problem import (
    DEVICES,
    FEATURES,
    PER_DEVICE,
    TOLERANCE,
    gsam_of,
    local,
    make_batch,
    make_params,
    one_step,
    perturbed,
    predict,
    run,
    sam_of,
    sgd_over,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.analysis import top_eigenpairs
from curvax.perturbation.ascent_rules import random_direction
from curvax.planning import collectives, hlo

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)

# A mesh whose last axis holds the devices of a group, or one axis with neighbours as a group.
GROUPED = ("grid", "grid unchecked", "row unchecked", "pmap")


STAGES = {
    "SAM": cx.sam_perturb(0.3),
    "GSAM": cx.sam_perturb(0.3) | cx.gsam_project(0.4),
    "SAM, second order": cx.sam_perturb(0.3, second_order=True),
    "random directions": cx.sam_perturb(0.3, ascent=random_direction(5)),
    "Fisher ascent": cx.sam_perturb(0.3, ascent=cx.fisher_ascent(0.1, solver=cx.cg(40, tol=1e-15))),
    "Fisher ascent, dense": cx.sam_perturb(0.3, ascent=cx.fisher_ascent(0.1, solver=cx.dense())),
    "Fisher ascent, by rows": cx.sam_perturb(
        0.3, ascent=cx.fisher_ascent(0.1, solver=cx.row_space())
    ),
}
LOOPS = {"SAM": sam_of, "GSAM": gsam_of}


@pytest.mark.parametrize("mapping", GROUPED)
@pytest.mark.parametrize("name", STAGES)
def test_groups_over_two_devices_equal_those_under_jit(name, mapping):
    stages = cx.per_group(M, STAGES[name])
    tx = stages | cx.pmean_updates(over_all(mapping)) | optax.sgd(0.1, momentum=0.9)
    params, batch = make_params(), make_batch()
    state = tx.init(params)
    halves: Any = dict(of=cx.gaussian("y"), model=predict) if "Fisher" in name else {}
    step: Any = partial(one_step, tx, **halves)
    found, state_found = on_groups_of_two(mapping, step, params, state, batch)
    # Under jit the groups are cut from the whole batch, with the same diagnostics.
    alone, state_alone = jax.jit(step)(params, state, batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, alone)
    figures, others = cx.diagnostics(state_found), cx.diagnostics(state_alone)
    assert figures.keys() == others.keys()
    for figure in figures:
        np.testing.assert_allclose(figures[figure], others[figure], rtol=1e-6, err_msg=figure)
    if name in LOOPS:
        reference = local(LOOPS[name], DEVICES // 2)
        expected = sgd_over(lambda p: reference(p, batch), params, steps=1)
        jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


WEIGHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "SAM": (grouped(cx.sam_perturb(0.3)), {}),
    "one by one": (grouped(cx.sam_perturb(0.3), sequential=True), {}),
    "micro-batches": (grouped(cx.sam_perturb(0.3) | cx.gsam_project(0.4)), {"microbatch": 2}),
    "second order": (grouped(cx.sam_perturb(0.3, second_order=True)), {"microbatch": 2}),
    "LookSAM": (
        lambda axes: (
            cx.per_group(M, cx.sam_perturb(0.3, every=2) | cx.keep_orthogonal(mean_over=axes))
            | cx.pmean_updates(axes)
            | optax.sgd(0.1)
        ),
        {"steps": 3},
    ),
}


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("case", WEIGHED)
def test_groups_of_devices_count_by_the_weight_of_their_examples(case, mapping):
    tx_of, options = WEIGHED[case]
    assert_like_jit(tx_of, mapping, weighted_batch(), of=weighted, weight="w", **options)


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
def test_ascent_synced_over_all_groups_counts_them_by_weight(mapping):
    axes = over_all(mapping)
    tx = cx.per_group(M, cx.sam_perturb(0.3, sync_over=axes)) | cx.pmean_updates(axes)
    tx = tx | optax.sgd(0.1)
    params, batch = make_params(), weighted_batch()
    step = partial(one_step, tx, of=weighted, weight="w")
    found, _ = on_groups_of_two(mapping, step, params, tx.init(params), batch)
    # The weighted mean over groups of what they found is that over all examples.
    g = jax.grad(weighted)(params, batch)
    g_p = jax.grad(weighted)(perturbed(params, g, 0.3), batch)
    expected = jax.tree.map(lambda p, u: p - 0.1 * u, params, g_p)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_within_a_group_send_no_more_bytes(microbatch, mapping):
    tx = grouped(cx.sam_perturb(0.3, second_order=True))(over_all(mapping))
    params, batch = make_params(), make_batch()

    def sent(**options):
        step = partial(one_step, tx, **options)
        mapped, operands = mapped_to_groups_of_two(mapping, step, params, tx.init(params), batch)
        program = hlo.read(mapped.lower(*operands).compile())
        return collectives.count(program)["all-reduce"].bytes

    assert sent(microbatch=microbatch) == sent()


NEWTON = cx.hessian_matvec(mean_over=()) | cx.pmean_updates(())
OWN: dict[str, Any] = {
    "moments": (
        cx.hutchinson_diag(mean_over=()) | cx.ema_rms(0.9) | cx.scale_by_power(1.0, eps=1.0)
    ),
    "kept directions": cx.sam_perturb(0.3, every=2) | cx.keep_orthogonal(mean_over=()),
    "solutions": NEWTON | cx.damp(10.0) | cx.solve(cx.cg(40, tol=1e-6)),
    "dampings": cx.levenberg_marquardt(
        NEWTON | cx.damp() | cx.solve(cx.cg(40, tol=1e-8)) | optax.scale_by_learning_rate(1.0),
        10.0,
        mean_over=(),
    ),
    "eigenvalues": cx.record(
        top=lambda signal, params, objective: top_eigenpairs(
            objective, params, k=1, end="largest", mean_over=()
        ).values[0]
    ),
}


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("m", [PER_DEVICE, M])
def test_updates_local_to_groups_are_averaged_afterwards(m, name, mapping):
    tx_of = lambda axes: cx.per_group(m, OWN[name]) | cx.pmean_updates(axes) | optax.sgd(0.1)
    assert_like_jit(tx_of, mapping, make_batch(), steps=3)


@pytest.mark.parametrize("mapping", ["grid", "grid unchecked"])
def test_mean_over_the_group_axis_counts_groups_by_weight(mapping):
    groups = cx.per_group(M, cx.sam_perturb(0.3))

    def tx_of(axes):
        return groups | cx.pmean_updates(axes[:1]) | optax.sgd(0.1)

    assert_like_jit(tx_of, mapping, weighted_batch(), of=weighted, weight="w")


ROWS = [[i, i + 1] for i in range(0, DEVICES, 2)]
SHARED: dict[str, Any] = {
    "alone": lambda x: x,
    "grid": lambda x: jax.lax.pmean(x, "group"),
    "grid unchecked": lambda x: jax.lax.pmean(x, "group"),
    "pmap": lambda x: jax.lax.pmean(x, "batch", axis_index_groups=ROWS),
}
"""Means over the devices of a group."""


def centred(params, batch, mapping):
    """The loss of a net whose hidden units are centred over a group, as batch norm does."""
    hidden = batch["x"] @ params["w1"]
    centre = SHARED[mapping](jnp.mean(hidden, axis=0, keepdims=True))
    errors = (jnp.tanh(hidden - centre) @ params["w2"] - batch["y"]) ** 2
    return jnp.sum(batch["w"] * errors) / jnp.sum(batch["w"])


@pytest.mark.parametrize("mapping", ["grid", "grid unchecked", "pmap"])
def test_batch_norm_shared_in_a_group_is_refused_with_weights(mapping):
    tx = grouped(cx.sam_perturb(0.3))(over_all(mapping))
    params, batch = make_params(), weighted_batch()
    step = partial(one_step, tx, of=partial(centred, mapping=mapping), weight="w")
    with pytest.raises(ValueError, match="count by the weights of their examples"):
        on_groups_of_two(mapping, step, params, tx.init(params), batch)
    batch["w"] = jnp.ones_like(batch["w"])
    step = partial(one_step, tx, of=partial(centred, mapping=mapping))
    found, _ = on_groups_of_two(mapping, step, params, tx.init(params), batch)
    alone = partial(one_step, tx, of=partial(centred, mapping="alone"))
    expected, _ = jax.jit(alone)(params, tx.init(params), batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


def shared_figure(params, batch):
    return weighted(params, batch), jax.lax.pmean(jnp.mean(batch["y"] * params["w2"][0]), "batch")


def shared_constant(params, batch):
    """Batch norm's centre held fixed: no derivative passes through it."""
    hidden = batch["x"] @ params["w1"]
    centre = jax.lax.pmean(jnp.mean(hidden, axis=0, keepdims=True), "batch")
    errors = (jnp.tanh(hidden - jax.lax.stop_gradient(centre)) @ params["w2"] - batch["y"]) ** 2
    return jnp.sum(batch["w"] * errors) / jnp.sum(batch["w"])


def normed_in_turn(params, batch):
    """Layers that share a centre, of which the first has none that depends on the parameters."""

    def layer(hidden, _):
        centre = jax.lax.pmean(jnp.mean(hidden, axis=0, keepdims=True), "batch")
        return jnp.tanh((hidden - centre) @ params["w1"] @ params["w1"].T), None

    hidden, _ = jax.lax.scan(layer, batch["x"], length=3)
    errors = (hidden @ params["w1"] @ params["w2"] - batch["y"]) ** 2
    return jnp.sum(batch["w"] * errors) / jnp.sum(batch["w"])


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_weights_refuse_shared_statistics_in_the_derivative_alone(mapping):
    tx = cx.sam_perturb(0.3) | cx.pmean_updates("batch") | optax.sgd(0.1)
    params, batch = make_params(), weighted_batch()
    stepped = lambda of, **options: run(mapping, tx, params, batch, 1, of=of, weight="w", **options)
    expected = stepped(weighted)
    found = stepped(shared_figure, has_aux=True)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)
    stepped(shared_constant)
    with pytest.raises(ValueError, match="count by the weights of their examples"):
        stepped(normed_in_turn)


def test_model_parallel_loss_accepts_weights():
    """Hidden units along the last axis of a mesh, over which the batch does not vary."""
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)

    def divided(params, batch):
        output = jax.lax.psum(jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"], "model")
        return jnp.sum(batch["w"] * (output - batch["y"]) ** 2) / jnp.sum(batch["w"])

    def whole(params, batch):
        output = jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]
        return jnp.sum(batch["w"] * (output - batch["y"]) ** 2) / jnp.sum(batch["w"])

    def gradient(params, batch):
        _, grads = cx.Objective(divided, batch, weight="w").value_and_grad(params)
        weight = jnp.sum(batch["w"])
        return jax.tree.map(
            lambda g: jax.lax.psum(weight * g, "batch") / jax.lax.psum(weight, "batch"), grads
        )

    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (FEATURES, 4)),
        "w2": jax.random.normal(keys[1], (4,)),
    }
    kinds = {"w1": P(None, "model"), "w2": P("model")}
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(kinds, P("batch")), out_specs=kinds)
    batch = weighted_batch()
    found, expected = jax.jit(mapped)(params, batch), jax.grad(whole)(params, batch)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


MEANS_WITHIN: dict[str, Any] = {
    "GSAM": lambda m, axes: cx.per_group(
        m, cx.gsam(optax.sgd(0.1, momentum=0.9), 0.3, 0.4, mean_over=axes)
    ),
    "before Adam": lambda m, axes: (
        cx.per_group(m, cx.sam_perturb(0.3) | cx.pmean_updates(axes)) | optax.adam(0.1)
    ),
    "in parts, before Adam": lambda m, axes: (
        cx.per_group(m, cx.restrict(cx.sam_perturb(0.3), MASK))
        | cx.partition(
            {
                True: cx.pmean_updates(axes) | optax.adam(0.1),
                False: cx.pmean_updates(axes) | optax.sgd(0.1),
            },
            MASK,
        )
        | optax.trace(0.9)
    ),
}


@pytest.mark.parametrize("mapping", ["grid", "grid unchecked", "pmap"])
@pytest.mark.parametrize("case", MEANS_WITHIN)
@pytest.mark.parametrize("m", [2, M])
def test_stages_within_a_group_can_average_over_devices(m, case, mapping):
    assert_like_jit(
        partial(MEANS_WITHIN[case], m), mapping, weighted_batch(), of=weighted, weight="w", steps=2
    )


def test_mean_over_some_axes_after_optax_chain_is_refused_without_vma_checks():
    """After `optax.chain` and with `check_vma=False` the axes already averaged over are unknown."""
    groups, params = cx.per_group(M, cx.sam_perturb(0.3)), make_params()

    def stepped(tx, mapping):
        step = partial(one_step, tx, of=weighted, weight="w")
        return on_groups_of_two(mapping, step, params, tx.init(params), weighted_batch())[0]

    own = groups | cx.pmean_updates(())
    chained = optax.chain(own, cx.pmean_updates("batch"), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"over \['batch'\] .* and cannot know over which axes"):
        stepped(chained, "grid unchecked")
    piped = groups | cx.pmean_updates("batch") | optax.sgd(0.1)
    expected = stepped(piped, "grid unchecked")
    jax.tree.map(
        partial(np.testing.assert_allclose, **TOLERANCE), stepped(chained, "grid"), expected
    )


@pytest.mark.parametrize("mapping", ["grid", "grid unchecked", "pmap"])
def test_ascent_from_averaged_updates_is_the_synced_ascent(mapping):
    axes, params, batch = over_all(mapping), make_params(), make_batch()
    rest = cx.pmean_updates(axes) | optax.sgd(0.1)

    def stepped(tx):
        state = tx.init(params)
        return on_groups_of_two(mapping, partial(one_step, tx), params, state, batch)[0]

    found = stepped(cx.pmean_updates(axes) | cx.sam_perturb(0.3) | rest)
    expected = stepped(cx.sam_perturb(0.3, sync_over=axes) | rest)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)


@pytest.mark.parametrize(
    ("mapping", "m", "said"),
    [
        ("shard_map", 2 * PER_DEVICE, "the last of the device axes"),
        ("pmap", 3 * PER_DEVICE, "32 examples, 4 on each of 8 devices, into groups of 12"),
        ("pmap", 6, "a multiple of 4, or divides it"),
        ("pmap", 16 * PER_DEVICE, "into groups of 64"),
    ],
)
def test_group_size_that_does_not_fit_devices_is_refused(mapping, m, said):
    tx = cx.per_group(m, cx.sam_perturb(0.3)) | cx.pmean_updates("batch")
    with pytest.raises(ValueError, match=said):
        run(mapping, tx, make_params(), make_batch(), steps=1)


def test_groups_span_axes_that_split_the_batch_alone():
    """Not along the last axis of a mesh where that is for the model."""
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)

    def stepped(m):
        tx = cx.per_group(m, cx.sam_perturb(0.3)) | cx.pmean_updates("batch") | optax.sgd(0.1)
        step = partial(one_step, tx)
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P())
        params, batch = make_params(), make_batch()
        found, _ = jax.jit(mapped)(params, tx.init(params), batch)
        return found, step(params, tx.init(params), batch)[0]

    whole = DEVICES * PER_DEVICE
    found, expected = stepped(whole)
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), found, expected)
    with pytest.raises(ValueError, match=r"axes \('batch',\) of the batch do not hold the 2"):
        stepped(whole // 2)
