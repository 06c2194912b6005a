"""Plans by the TPU compiler: weak scaling, and the papers' ImageNet runs on two topologies.

    python -m pytest tests/test_plans.py -m evidence

writes tests/evidence/scaling.md and tests/evidence/plans.md. A step of the latter compiles for
minutes, a ResNet-152 for ten and more; readings are kept in ~/.cache/curvax/plans.
"""

import functools
import importlib.util

import evidence_tables
import jax
import jax.numpy as jnp
import pytest
from test_hlo import LOOPS

from curvax.planning import flops, hlo, readings, topologies
from curvax.training import experiment
from curvax.training.config import defaults

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs pip install 'curvax[tpu]'"
    ),
]
COMMAND = "python -m pytest tests/test_plans.py -m evidence"
PER_DEVICE = 16
SHAPES = {"2x4": 8, "4x8": 32, "8x16": 128, "16x16": 256}
METHODS = {
    "AdamW": "pmean_updates(axes) | adamw(1e-3)",
    "SAM": "sam_perturb(0.1) | pmean_updates(axes) | adamw(1e-3)",
    "GSAM": "sam_perturb(0.1) | gsam_project(0.4) | pmean_updates(axes) | adamw(1e-3)",
    "AdaHessian": "adahessian(0.15, mean_over=axes)",
}


WIDE = {
    "gradient of matrix products": [(128, 1024), (5, 1024, 1024)],
    "gradient of a scan in a scan": [(128, 1024), (5, 1024, 1024)],
    "gradient of convolutions": [(4, 32, 32, 128), (5, 3, 3, 128, 128)],
}


def compiled(name, topology, unroll):
    machine = topologies.find(topology)
    sharding = jax.sharding.SingleDeviceSharding(machine.devices[0])
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=sharding) for x in WIDE[name]]
    step = jax.jit(functools.partial(LOOPS[name][0], unroll=unroll))
    return machine.compile(step.lower(*shapes))


# Convolutions are no case: the compiler puts them into other shapes, with other padding, in a loop.
@pytest.mark.parametrize("name", list(WIDE)[:2])
@pytest.mark.parametrize("topology", ["v3:2x2", "v5e:2x2"])
def test_a_loop_counts_what_the_program_without_it_counts(name, topology):
    found = [compiled(name, topology, unroll) for unroll in (1, 5)]
    looped, expected = (flops.count(each, hlo.read(each)) for each in found)
    assert looped == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", WIDE)
def test_instructions_of_a_tpu_count_what_xla_counts(name):
    found = compiled(name, "v5e:2x2", 5)
    assert hlo.read(found).total(flops.of) == pytest.approx(found.cost_analysis()["flops"])


def small_vit(text, devices):
    config = defaults()
    config.model.update(name="vit_tiny", options={"patch": 4, "depth": 2, "dropout": 0.0})
    config.data.update(name="cifar10", mean=(0.5,) * 3, std=(0.5,) * 3)
    config.update(regime="shard_map", optimizer=text, batch=PER_DEVICE * devices)
    return config


def read(config, topology):
    machine = topologies.find(topology)
    return readings.read(experiment.outline(config, machine.devices), machine)


def test_a_device_does_the_same_whatever_their_number():
    rows = []
    for name, text in METHODS.items():
        found = {n: read(small_vit(text, n), f"v5e:{shape}") for shape, n in SHAPES.items()}
        for devices, each in found.items():
            sent = each.sent / each.parameters
            times = sum(collective.times for collective in each.collectives.values())
            megabytes = [1e-6 * each.memory.arguments, 1e-6 * each.memory.temporaries]
            rows.append([name, devices, each.flops / 1e9, *megabytes, times, sent])
        base = found[8]
        for each in found.values():
            assert each.flops == pytest.approx(base.flops, rel=1e-3)
            assert each.sent == pytest.approx(base.sent, rel=1e-3)
            assert each.memory.arguments == base.memory.arguments
            assert each.memory.temporaries == pytest.approx(base.memory.temporaries, rel=0.02)
            assert {k: c.times for k, c in each.collectives.items()} == {
                k: c.times for k, c in base.collectives.items()
            }
    evidence_tables.write(
        "scaling",
        "Weak scaling in the compiled program: what one device of a TPU v5e does in a step",
        f"Made by `{COMMAND} -k number`: a `vit_tiny` of two blocks on 32×32 images, "
        f"{PER_DEVICE} examples on each device, regime `shard_map`. Collectives are all-reduces, "
        "their bytes in units of the parameters.",
        ["method", "devices", "GFLOP", "arguments, MB", "temporaries, MB", "collectives", "sent"],
        rows,
    )
