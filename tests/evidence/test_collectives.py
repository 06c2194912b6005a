"""What methods send over the devices, counted in the compiled step, in units of the parameters.

CPU programs are counted in every run, those of TPUs need libtpu:

    python -m pytest tests/evidence/test_collectives.py -m evidence

writes tests/evidence/collectives.md.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import evidence_tables
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax.planning import collectives, hlo, topologies

DEVICES, PER_DEVICE = 8, 4
WEIGHTS = {"in": (64, 96), "hidden": (96, 96), "out": (96, 64)}
pytestmark = pytest.mark.usefixtures("single_precision")

NO_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install 'curvax[tpu]'"
)
ON_TPU = [pytest.mark.evidence, NO_LIBTPU]
MACHINES = pytest.mark.parametrize("machine", ["cpu:8", pytest.param("v5e:2x4", marks=ON_TPU)])


def predict(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jnp.tanh(hidden @ params["hidden"]) @ params["out"]


def one_step(tx, params, state, batch):
    objective = cx.Objective(cx.categorical("y"), batch, model=predict)
    value, grads = objective.value_and_grad(params)
    updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
    return optax.apply_updates(params, updates), state


class Step(NamedTuple):
    """A compiled step of one method on eight devices."""

    program: hlo.Program
    sent: float  # bytes of all collectives, in units of the parameters
    temporaries: float  # bytes of memory on a device, in units of the parameters


find = functools.cache(topologies.find)


def mesh_of(machine, groups):
    """All devices along "batch"; or so many in each group, along a second axis."""
    devices = np.array(find(machine).devices)
    if groups == 1:
        return Mesh(devices, ("batch",))
    return Mesh(devices.reshape(-1, groups), ("batch", "group"))


def compiled(tx, machine, mapping="shard_map", groups=1):
    """The compiled step of a method under jit, shard_map or pmap."""
    mesh = mesh_of(machine, groups)
    split = P(mesh.axis_names)
    step = functools.partial(one_step, tx)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WEIGHTS.items()}
    shape = (DEVICES, PER_DEVICE) if mapping == "pmap" else (DEVICES * PER_DEVICE,)
    batch = {
        "x": jax.ShapeDtypeStruct((*shape, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct(shape, jnp.int32),
    }
    state = params, jax.eval_shape(tx.init, params)
    if mapping == "pmap":
        mapped = jax.pmap(
            step,
            axis_name="batch",
            in_axes=(None, None, 0),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    else:
        if mapping == "shard_map":
            step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), split), out_specs=P())
        mapped = jax.jit(step)
        state, batch = laid_out(mesh, state, P()), laid_out(mesh, batch, split)
    made = find(machine).compile(mapped.lower(*state, batch))
    program, temporaries = hlo.read(made), made.memory_analysis().temp_size_in_bytes
    sent = sum(x.bytes for x in collectives.count(program).values())
    return Step(program, sent / size(*WEIGHTS), temporaries / size(*WEIGHTS))


def laid_out(mesh, tree, spec):
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(lambda x: struct(x.shape, x.dtype), tree)


def size(*names):
    """Bytes of some of the parameters."""
    return 4 * sum(math.prod(WEIGHTS[name]) for name in names)


SGD = optax.sgd(0.1)
OVER: Any = dict(mean_over="batch")
CG_STEPS = 3
METHODS = {
    "local SAM": (cx.sam(SGD, 0.1, **OVER), 1),
    "synced SAM": (cx.sam(SGD, 0.1, sync_over="batch", **OVER), 2),
    "GSAM, projected on each device": (cx.gsam(SGD, 0.1, 0.3, **OVER), 1),
    "AdaHessian": (cx.adahessian(0.1, **OVER), 2),
    "natural gradient": (
        cx.natural_gradient(damping=1.0, solver=cx.cg(CG_STEPS), **OVER),
        CG_STEPS + 1,
    ),
}
# In addition to the parameters only diagnostics are sent, a few numbers.
NEARLY = functools.partial(pytest.approx, rel=2e-3)


@MACHINES
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_sends_no_more_than_it_must(method, mapping, machine):
    tx, times = METHODS[method]
    assert compiled(tx, machine, mapping).sent == NEARLY(times)


@MACHINES
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_sam_needs_one_copy_of_the_parameters_more_than_sgd(mapping, machine):
    plain, sam = (
        compiled(tx, machine, mapping).temporaries
        for tx in (cx.pmean_updates("batch") | SGD, METHODS["local SAM"][0])
    )
    assert sam <= plain + 1.01


@MACHINES
def test_sam_under_jit_sends_two_gradients(machine):
    assert compiled(cx.sam(SGD, 0.1), machine, "jit").sent == NEARLY(2)


def test_adahessian_under_jit_sends_each_term_of_the_product_on_cpus():
    # The gradient is one product for each layer, and its tangent two, but one where the layer's
    # input is data.
    expected = 3 - size("in") / size(*WEIGHTS)
    assert compiled(cx.adahessian(0.1), "cpu:8", "jit").sent == NEARLY(expected)


@MACHINES
def test_cg_iteration_sends_one_product(machine):
    program = compiled(METHODS["natural gradient"][0], machine).program
    (loop,) = program.loops()
    body = program.computations[loop.called[-1]]
    sent = [each.bytes for each in body if each.opcode in ("all-reduce", "all-reduce-start")]
    assert sum(sent) == NEARLY(size(*WEIGHTS))
    assert program.trips(loop) == CG_STEPS


GROUPS = {
    "one on each device": (PER_DEVICE, {}),
    "two on each device": (PER_DEVICE // 2, {}),
    "two on each device, one by one": (PER_DEVICE // 2, {"sequential": True}),
}


@MACHINES
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_within_a_device_send_one_gradient(groups, machine):
    m, options = GROUPS[groups]
    tx = cx.per_group(m, cx.sam_perturb(0.1), **options) | cx.pmean_updates("batch") | SGD
    assert compiled(tx, machine).sent == NEARLY(1)


@MACHINES
@pytest.mark.parametrize("m", [PER_DEVICE // 2, PER_DEVICE])
def test_groups_within_a_device_send_one_gradient_under_jit(m, machine):
    tx = cx.per_group(m, cx.sam_perturb(0.1)) | SGD
    assert compiled(tx, machine, "jit").sent == NEARLY(1)


ACROSS: dict[str, Any] = {
    "shard_map": (("batch", "group"), 2),
    "pmap": ("batch", 1),
    "jit": ((), 1),
}
"""The axes that a mapping averages over where two devices make a group, and a group's devices."""


def group_of_two(mapping):
    over, groups = ACROSS[mapping]
    tx = cx.per_group(2 * PER_DEVICE, cx.sam_perturb(0.1)) | cx.pmean_updates(over) | SGD
    return tx, groups


@MACHINES
@pytest.mark.parametrize("mapping", ACROSS)
def test_groups_of_devices_send_three_gradients(mapping, machine):
    # The ascent's gradient within a group, the second gradient within it, and then over all.
    tx, groups = group_of_two(mapping)
    assert compiled(tx, machine, mapping, groups).sent == NEARLY(3)


TABLE = ("cpu:8", "v3:2x2", "v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")
COMMAND = "python -m pytest tests/evidence/test_collectives.py -m evidence"


@pytest.mark.evidence
@NO_LIBTPU
def test_methods_send_the_same_bytes_on_every_tpu_generation():
    rows: list[tuple[str, str, Any, Any]] = []  # method, mapping, (pipe, groups), times
    for method, (tx, times) in METHODS.items():
        rows += [(method, mapping, (tx, 1), times) for mapping in ("shard_map", "pmap")]
    for m, which in ((PER_DEVICE // 2, "half a device"), (PER_DEVICE, "one device")):
        tx = cx.per_group(m, cx.sam_perturb(0.1))
        rows.append(
            (f"groups of {which}", "shard_map", (tx | cx.pmean_updates("batch") | SGD, 1), 1)
        )
        rows.append((f"groups of {which}", "jit", (tx | SGD, 1), 1))
    rows += [("groups of two devices", mapping, group_of_two(mapping), 3) for mapping in ACROSS]
    rows.append(("SAM of the whole batch", "jit", (cx.sam(SGD, 0.1), 1), 2))
    rows.append(("AdaHessian", "jit", (cx.adahessian(0.1), 1), None))
    table = []
    for method, mapping, (tx, groups), times in rows:
        found = [compiled(tx, machine, mapping, groups).sent for machine in TABLE]
        table.append([method, mapping, *found])
        if times is None:  # what the compiler has not added up before
            assert max(found) < 3
        else:
            assert found == [NEARLY(times)] * len(found), (method, mapping)
    evidence_tables.write(
        "collectives",
        "What a step sends over eight devices, in units of the parameters",
        f"Made by `{COMMAND} -k generation`: bytes of all collectives in the compiled step of a "
        f"perceptron of three layers, those of a loop times its trips; {CG_STEPS} steps of "
        "conjugate gradients; the rest over a whole number are diagnostics. A group's ascent is "
        "averaged within it.",
        ["method", "mapping", *TABLE],
        table,
    )
