"""Steps on eight devices of which two make a group, and their comparison with plain jit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from device_problem import (
    PER_DEVICE,
    TOLERANCE,
    make_batch,
    make_params,
    one_step,
    shards,
    step_alone,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax as cx

M = 2 * PER_DEVICE


def over_all(mapping):
    return ("batch", "group") if mapping.startswith("grid") else "batch"


def mapped_to_groups_of_two(mapping, step, params, state, batch):
    """A step of eight devices, two of which make a group, and its arguments."""
    if mapping == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
        return mapped, (params, state, shards(batch))
    grid = mapping.startswith("grid")
    names, shape = (("batch", "group"), (4, 2)) if grid else (("batch",), (8,))
    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)),
        in_specs=(P(), P(), P(names)),
        out_specs=P(),
        check_vma=not mapping.endswith("unchecked"),
    )
    return jax.jit(mapped), (params, state, batch)


def on_groups_of_two(*arguments):
    mapped, operands = mapped_to_groups_of_two(*arguments)
    return mapped(*operands)


def assert_like_jit(tx_of, mapping, batch, *, steps=1, tolerance=TOLERANCE, **options):
    """Asserts the parameters and diagnostics of jit, where the groups are cut from the batch."""
    tx, alone = tx_of(over_all(mapping)), tx_of(())
    params = make_params()
    found, state = params, tx.init(params)
    expected, state_alone = params, alone.init(params)
    step = partial(one_step, tx, **options)
    mapped, (_, _, parts) = mapped_to_groups_of_two(mapping, step, params, state, batch)
    for _ in range(steps):
        found, state = mapped(found, state, parts)
        expected, state_alone = step_alone(alone, expected, state_alone, batch, **options)
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), found, expected)
    there, here = cx.diagnostics(state), cx.diagnostics(state_alone)
    assert there.keys() == here.keys()
    for figure in there:
        np.testing.assert_allclose(there[figure], here[figure], rtol=1e-6, err_msg=figure)


def weighted(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
    errors = (hidden @ params["w2"] - batch["y"]) ** 2
    return jnp.sum(batch["w"] * errors) / jnp.sum(batch["w"])


def weighted_batch():
    batch = make_batch()
    return batch | {"w": 0.5 + 3 * jax.random.uniform(jax.random.key(7), batch["y"].shape)}


def grouped(stages, **options):
    per_group = cx.per_group(M, stages, **options)
    return lambda axes: per_group | cx.pmean_updates(axes) | optax.sgd(0.1)


MASK = {"w1": True, "b1": False, "w2": True}
