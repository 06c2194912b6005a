"""Plans by the TPU compiler: weak scaling, and the papers' ImageNet runs on two topologies.

    python -m pytest tests/test_plans.py -m evidence

writes tests/evidence/scaling.md and tests/evidence/plans.md. A step of the latter compiles for
minutes, a ResNet-152 for ten and more; readings are kept in ~/.cache/curvax/plans.
"""

import importlib.util

import evidence_tables
import pytest

from curvax.planning import readings, topologies
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
