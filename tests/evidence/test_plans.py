"""Plans by the TPU compiler: weak scaling, and the papers' ImageNet runs on two topologies.

    python -m pytest tests/evidence/test_plans.py -m evidence

writes tests/evidence/scaling.md and tests/evidence/plans.md. A step of the latter compiles for
minutes, a ResNet-152 for ten and more; costs are cached in ~/.cache/curvax/plans.
"""

import functools
import importlib.util
import itertools
import math
import os

import evidence_tables
import jax
import jax.numpy as jnp
import pytest
from looped_programs import LOOPS

from curvax.planning import compiled_cost, flops, hlo, memory_savers, topologies
from curvax.training import experiment
from curvax.training.compare.comparison import replace
from curvax.training.config import defaults
from curvax.training.config.configs import load

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs pip install 'curvax[tpu]'"
    ),
]
COMMAND = "python -m pytest tests/evidence/test_plans.py -m evidence"
PER_DEVICE = 16
SHAPES = {"2x4": 8, "4x8": 32, "8x16": 128, "16x16": 256}


PAPERS = {
    "ViT-B/16": "imagenet_vit:b16",
    "ViT-S/16": "imagenet_vit:s16",
    "Mixer-B/16": "imagenet_mixer:b16",
    "ResNet-152": "imagenet_resnet:152",
}
TOPOLOGIES = ["v5e:16x16", "v3:4x8"]
LAID_OUT = ("ViT-B/16", "v5e:16x16", "SAM")
"""Compiled with the model's blocks in other ways too."""
KEPT = os.environ.get("CURVAX_PLANS") == "kept"
AVERAGED = "pmean_updates(axes) | "


def methods(base, adahessian):
    """The texts of the methods over a base."""
    return {
        "base": AVERAGED + base,
        "SAM": f"sam_perturb(rho) | {AVERAGED}{base}",
        "GSAM": f"sam_perturb(rho) | gsam_project(alpha) | {AVERAGED}{base}",
        "AdaHessian": adahessian,
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


# Convolutions are left out: in a loop the compiler gives them other shapes and padding.
@pytest.mark.parametrize("name", list(WIDE)[:2])
@pytest.mark.parametrize("topology", ["v3:2x2", "v5e:2x2"])
def test_flops_of_a_tpu_loop_are_those_of_the_unrolled_program(name, topology):
    found = [compiled(name, topology, unroll) for unroll in (1, 5)]
    looped, expected = (flops.count(each, hlo.read(each)) for each in found)
    assert looped == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", WIDE)
def test_flops_of_a_tpu_program_are_those_of_xla(name):
    found = compiled(name, "v5e:2x2", 5)
    assert hlo.read(found).total(flops.of) == pytest.approx(found.cost_analysis()["flops"])


def small_vit(devices):
    """Every device has its own ascent, however many there are."""
    config = defaults(lr=3e-3, rho=0.2, alpha=0.6)
    config.model.update(name="vit_tiny", options={"patch": 4, "depth": 2, "dropout": 0.0})
    config.data.update(name="cifar10", mean=(0.5,) * 3, std=(0.5,) * 3)
    config.update(parallelism="shard_map", batch=PER_DEVICE * devices, epochs=300)
    return config


def paper_methods(config):
    """The texts of the methods of one of the papers' ImageNet configs, and AdaHessian's there."""
    own = [config.optimizer, *config.more_optimizers]
    (gsam,) = (text for text in own if "gsam_project" in text)
    (sam,) = (text for text in own if text != gsam)
    rate = "linear(lr, warmup=10000, end=lr_min)" if "lr_min" in config else "cosine(lr)"
    decay = "weight_decay=0.3, mask=kernels" if "lr_min" in config else "weight_decay=1e-4"
    adahessian = f"adahessian({rate}, {decay}, mean_over=axes)"
    return {"base": config.baseline, "SAM": sam, "GSAM": gsam, "AdaHessian": adahessian}


def read(config, machine):
    return compiled_cost.read(experiment.outline(config, machine.devices), machine)


def test_work_of_a_device_does_not_depend_on_the_number_of_devices():
    rows = []
    machines = {n: topologies.find(f"v5e:{shape}") for shape, n in SHAPES.items()}
    for name, text in methods("adamw(lr)", "adahessian(0.15, mean_over=axes)").items():
        found = {
            n: read(replace(small_vit(n), optimizer=text), machine)
            for n, machine in machines.items()
        }
        rows += [[name, n, *row(each)] for n, each in found.items()]
        base = found[8]
        for each in found.values():
            assert each.flops == pytest.approx(base.flops, rel=1e-3)
            assert each.sent == pytest.approx(base.sent, rel=1e-3)
            assert each.memory.arguments == base.memory.arguments
            assert each.memory.temporaries == pytest.approx(base.memory.temporaries, rel=0.02)
            assert times(each) == times(base)
    evidence_tables.write(
        "scaling",
        "Weak scaling in the compiled program: what one device of a TPU v5e does in a step",
        f"Made by `{COMMAND} -k number`: a `vit_tiny` of two blocks on 32×32 images, "
        f"{PER_DEVICE} examples on each device, under `shard_map`, base AdamW. Collectives are "
        "all-reduces, their bytes in units of the parameters.",
        ["method", "devices", *HEAD],
        rows,
    )


def paper_arms():
    """(model, topology, method), machine, config."""
    for topology, (model, name) in itertools.product(TOPOLOGIES, PAPERS.items()):
        paper, machine = load(name), topologies.find(topology)
        for method, text in paper_methods(paper).items():
            config = replace(paper, optimizer=text)
            yield (model, topology, method), machine, config
            if (model, topology, method) == LAID_OUT:
                ways = list(memory_savers.block_layouts(config).items())[
                    1:3
                ]  # the first is the config's own
                yield from (((model, topology, f"{method}, {w}"), machine, c) for w, c in ways)


def until_it_fits(arm, machine, config):
    """(variant, compiled cost) of a config and, where it does not fit, of the memory savers."""
    take = compiled_cost.recall if KEPT else compiled_cost.read
    for change, changed in {
        "": config,
        **memory_savers.candidates(config, len(machine.devices)),
    }.items():
        reading = take(experiment.outline(changed, machine.devices), machine)
        yield (*arm[:2], f"{arm[2]}, `{change}`" if change else arm[2]), reading
        if reading is None or reading.fits:
            break


def test_papers_imagenet_runs_fit_the_topologies():
    rows, unfit, flops_of = [], [], {}
    for arm, machine, config in paper_arms():
        found = list(until_it_fits(arm, machine, config))
        flops_of[arm] = found[0][1].flops if found[0][1] else math.nan
        unfit += [] if found[-1][1] is None or found[-1][1].fits else [arm]
        for each, reading in found:
            if reading is None:
                rows.append([*each, "not compiled"])
            else:
                share = f"{100 * reading.needed / machine.chip.memory:.0f} %"
                rows.append([*each, share, *row(reading), f"{reading.seconds:.0f}"])
    evidence_tables.write(
        "plans",
        "What one device needs for a step of the papers' ImageNet runs, by the TPU compiler",
        f"Made by `{COMMAND} -k papers`, which compiles what `curvax plan` compiles of the configs "
        f"{', '.join(f'`{name}`' for name in PAPERS.values())}: batch 4096, 224×224 images, "
        "activations in bf16, parameters in float32, groups of m = 128 examples on several "
        "devices, under `shard_map`. The base is AdamW, of ResNet-152 SGD with momentum; "
        "AdaHessian takes its place with the same schedule and decay, "
        "`adahessian(linear(lr, warmup=10000, end=lr_min), weight_decay=0.3, mask=kernels, "
        "mean_over=axes)`, of ResNet-152 `adahessian(cosine(lr), weight_decay=1e-4, "
        "mean_over=axes)`. Each trip of a loop counts; "
        "memory is that of the program that runs, the blocks of ViT and Mixer in a scan unless the "
        "row says otherwise. Where a step does not fit, the next rows have what `curvax plan` "
        "tries. Collectives are all-reduces, their bytes in units of "
        "the parameters: groups that lie on several devices send two more than a device's own. "
        "Seconds are of a machine with two cores, busy or not. `CURVAX_PLANS=kept` makes the "
        "table of what was compiled before.",
        ["model", "topology", "method", "of the HBM", *HEAD, "seconds to compile"],
        rows,
    )
    assert not unfit
    model, topology, method = LAID_OUT
    scanned, unrolled = (flops_of[model, topology, f"{method}{way}"] for way in ("", ", unrolled"))
    assert scanned == pytest.approx(unrolled, rel=0.01)


HEAD = ["memory, MB", "arguments", "temporaries", "GFLOP", "collectives", "sent, × parameters"]


def row(reading):
    """What one device needs and does."""
    if reading.memory is None:
        return [digits(1e-6 * reading.needed), "does not fit", "", "", "", ""]
    megabytes = [reading.needed, reading.memory.arguments, reading.memory.temporaries]
    sent = reading.sent / reading.parameters
    numbers = [*(1e-6 * x for x in megabytes), reading.flops / 1e9, times(reading), sent]
    return [digits(number) for number in numbers]


def digits(number):
    """Four of them, without an exponent."""
    return f"{float(f'{number:.4g}'):g}"


def times(reading):
    return sum(each.times for each in reading.collectives.values())
