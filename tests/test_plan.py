"""What methods send over the devices, counted in the compiled step, in units of the parameters."""

import functools
import importlib.util
import json
import math
from pathlib import Path
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
from curvax.cli import main
from curvax.planning import collectives, compiled_cost, hlo, memory_savers, topologies
from curvax.planning import plan as plans
from curvax.training import experiment
from curvax.training.config import defaults
from curvax.training.runtime.errors import ConfigError

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


def compiled(tx, machine, regime="shard_map", groups=1):
    """The step of a method under a regime."""
    mesh = mesh_of(machine, groups)
    split = P(mesh.axis_names)
    step = functools.partial(one_step, tx)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WEIGHTS.items()}
    shape = (DEVICES, PER_DEVICE) if regime == "pmap" else (DEVICES * PER_DEVICE,)
    batch = {
        "x": jax.ShapeDtypeStruct((*shape, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct(shape, jnp.int32),
    }
    state = params, jax.eval_shape(tx.init, params)
    if regime == "pmap":
        mapped = jax.pmap(
            step,
            axis_name="batch",
            in_axes=(None, None, 0),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    else:
        if regime == "shard_map":
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
# Beside the parameters only figures travel, a few numbers.
NEARLY = functools.partial(pytest.approx, rel=2e-3)


@MACHINES
@pytest.mark.parametrize("regime", ["shard_map", "pmap"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_sends_no_more_than_it_must(method, regime, machine):
    tx, times = METHODS[method]
    assert compiled(tx, machine, regime).sent == NEARLY(times)


@MACHINES
@pytest.mark.parametrize("regime", ["shard_map", "pmap"])
def test_sam_keeps_one_copy_of_the_parameters_beside_the_gradients_own(regime, machine):
    plain, sam = (
        compiled(tx, machine, regime).temporaries
        for tx in (cx.pmean_updates("batch") | SGD, METHODS["local SAM"][0])
    )
    assert sam <= plain + 1.01


@MACHINES
def test_under_jit_the_gradient_of_sam_is_that_of_the_whole_batch(machine):
    assert compiled(cx.sam(SGD, 0.1), machine, "jit").sent == NEARLY(2)


def test_under_jit_each_term_of_a_hessian_product_is_sent_on_cpus():
    # The gradient is one product for each layer, and its tangent two, but one where the layer's
    # input is data.
    expected = 3 - size("in") / size(*WEIGHTS)
    assert compiled(cx.adahessian(0.1), "cpu:8", "jit").sent == NEARLY(expected)


@MACHINES
def test_the_loop_of_conjugate_gradients_sends_one_product(machine):
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
def test_groups_on_one_device_send_what_one_gradient_sends(groups, machine):
    m, options = GROUPS[groups]
    tx = cx.per_group(m, cx.sam_perturb(0.1), **options) | cx.pmean_updates("batch") | SGD
    assert compiled(tx, machine).sent == NEARLY(1)


@MACHINES
@pytest.mark.parametrize("m", [PER_DEVICE // 2, PER_DEVICE])
def test_under_jit_too(m, machine):
    tx = cx.per_group(m, cx.sam_perturb(0.1)) | SGD
    assert compiled(tx, machine, "jit").sent == NEARLY(1)


ACROSS: dict[str, Any] = {
    "shard_map": (("batch", "group"), 2),
    "pmap": ("batch", 1),
    "jit": ((), 1),
}
"""How a regime averages over all devices where two make a group, and how many along its axis."""


def group_of_two(regime):
    over, groups = ACROSS[regime]
    tx = cx.per_group(2 * PER_DEVICE, cx.sam_perturb(0.1)) | cx.pmean_updates(over) | SGD
    return tx, groups


@MACHINES
@pytest.mark.parametrize("regime", ACROSS)
def test_groups_of_devices_send_three_times(regime, machine):
    # The ascent's gradient within a group, the second gradient within it, and then over all.
    tx, groups = group_of_two(regime)
    assert compiled(tx, machine, regime, groups).sent == NEARLY(3)


TABLE = ("cpu:8", "v3:2x2", "v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")
COMMAND = "python -m pytest tests/test_plan.py -m evidence"


@pytest.mark.evidence
@NO_LIBTPU
def test_what_is_sent_on_every_generation():
    rows: list[tuple[str, str, Any, Any]] = []  # method, regime, (pipe, groups), times
    for method, (tx, times) in METHODS.items():
        rows += [(method, regime, (tx, 1), times) for regime in ("shard_map", "pmap")]
    for m, which in ((PER_DEVICE // 2, "half a device"), (PER_DEVICE, "one device")):
        tx = cx.per_group(m, cx.sam_perturb(0.1))
        rows.append(
            (f"groups of {which}", "shard_map", (tx | cx.pmean_updates("batch") | SGD, 1), 1)
        )
        rows.append((f"groups of {which}", "jit", (tx | SGD, 1), 1))
    rows += [("groups of two devices", regime, group_of_two(regime), 3) for regime in ACROSS]
    rows.append(("SAM of the whole batch", "jit", (cx.sam(SGD, 0.1), 1), 2))
    rows.append(("AdaHessian", "jit", (cx.adahessian(0.1), 1), None))
    table = []
    for method, regime, (tx, groups), times in rows:
        found = [compiled(tx, machine, regime, groups).sent for machine in TABLE]
        table.append([method, regime, *found])
        if times is None:  # what the compiler has not added up before
            assert max(found) < 3
        else:
            assert found == [NEARLY(times)] * len(found), (method, regime)
    evidence_tables.write(
        "collectives",
        "What a step sends over eight devices, in units of the parameters",
        f"Made by `{COMMAND} -k generation`: bytes of all collectives in the compiled step of a "
        f"perceptron of three layers, those of a loop times its trips; {CG_STEPS} steps of "
        "conjugate gradients; the rest over a whole number are figures. A group's ascent is "
        "averaged within it.",
        ["method", "regime", *TABLE],
        table,
    )


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "cpu:0", "cpu", "v5e:16by16"])
def test_an_unknown_topology_says_which_there_are(name):
    with pytest.raises(ConfigError, match=r"v3:4x8.*v5e:16x16.*cpu:8"):
        topologies.find(name)


def test_a_tpu_without_its_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'curvax\[tpu\]'"):
        topologies.find("v5e:16x16")


def test_too_few_cpu_devices_say_how_to_get_more():
    with pytest.raises(ConfigError, match="host_platform_device_count=1000"):
        topologies.find("cpu:1000")


def test_a_batch_that_does_not_go_over_a_topology_says_what_does(tmp_path, capsys):
    given = ["digits", "--batch=12", "--topology=cpu:8", f"--runs={tmp_path}"]
    assert main.main(["plan", *given]) == 2
    said = capsys.readouterr().err
    assert "12 examples do not divide over 8 devices" in said
    assert "Use a multiple as `batch`, or a smaller topology." in said
    assert "--devices" not in said


@pytest.mark.evidence
@NO_LIBTPU
def test_a_shape_that_a_tpu_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"libtpu refuses it: .*3x5"):
        topologies.find("v5e:3x5")


def small(optimizer="adamw(1e-3)", regime="shard_map", model="mlp", **numbers):
    """A config of a small model on digits."""
    config = defaults(rho=0.1, **numbers)
    config.model.name = model
    if model == "mlp":
        config.model.options.widths = [64]
    config.update(optimizer=optimizer, parallelism=regime, batch=DEVICES * PER_DEVICE)
    return config


SENT = {
    "pmean_updates(axes) | adamw(1e-3)": {"shard_map": 1, "jit": 1},
    "sam_perturb(rho) | pmean_updates(axes) | adamw(1e-3)": {"shard_map": 1, "jit": 2},
    "sam_perturb(rho) | gsam_project(0.4) | pmean_updates(axes) | adamw(1e-3)": {"shard_map": 1},
    "per_group(2, sam_perturb(rho)) | pmean_updates(axes) | adamw(1e-3)": {
        "shard_map": 1,
        "jit": 1,
    },
    "adahessian(0.15, mean_over=axes)": {"shard_map": 2},
}
"""By text and regime: what a step sends, in units of the parameters."""


@pytest.mark.parametrize(
    ("text", "regime"), [(text, regime) for text in SENT for regime in SENT[text]]
)
def test_the_training_step_of_a_config_sends_no_more_than_its_method(text, regime, tmp_path):
    machine = find("cpu:8")
    outline = experiment.outline(small(text, regime), machine.devices)
    reading = compiled_cost.read(outline, machine, tmp_path)
    assert reading.sent / reading.parameters == pytest.approx(SENT[text][regime], rel=0.01)
    assert reading.memory is not None
    assert reading.memory.total == reading.needed
    again = compiled_cost.read(outline, machine, tmp_path)
    assert again == reading


GROUPED = "per_group(2, sam_perturb(rho)) | pmean_updates(axes) | adamw(0.001)"


def test_groups_are_taken_one_by_one_where_they_were_at_once():
    changed = memory_savers.one_by_one(GROUPED)
    assert changed == GROUPED.replace("(rho))", "(rho), sequential=True)")
    assert not memory_savers.one_by_one(changed)
    assert not memory_savers.one_by_one("sam_perturb(rho) | adamw(1e-3)")
    on_lines = "\n  " + GROUPED.replace(" | ", "\n  | ") + "\n"
    assert memory_savers.one_by_one(on_lines) == changed


def test_groups_that_fill_a_device_have_no_turns_to_take():
    text = GROUPED.replace("(2,", "(m,")
    for m, turns in ((PER_DEVICE // 2, True), (PER_DEVICE, False), (2 * PER_DEVICE, False)):
        found = memory_savers.candidates(small(text, m=m), DEVICES)
        assert any("sequential" in change for change in found) == turns


@pytest.mark.parametrize("batch", [1, 2, 3, 9, 12, 15])
def test_micro_batches_divide_what_a_device_has(batch):
    config = small()
    config.batch = DEVICES * batch
    found = [each for each in memory_savers.candidates(config, DEVICES).values() if each.microbatch]
    assert [batch % each.microbatch for each in found] == [0] * (batch > 1)
    assert all(each.microbatch < batch for each in found)


def test_remedies_are_what_a_config_admits():
    found = memory_savers.candidates(small(GROUPED, m=2), DEVICES)
    names = [change.partition("=")[0] for change in found]
    assert names == ["--optimizer", "--microbatch", "--fsdp"]
    assert found["--microbatch=1"].microbatch == 1
    for changed in found.values():
        experiment.outline(changed, find("cpu:8").devices)
    assert "--model.options.remat=True" in memory_savers.candidates(
        small(model="vit_tiny"), DEVICES
    )


WAYS = {
    "mlp": ["as it is"],
    "resnet8": ["as it is", "remat"],
    "vit_tiny": ["scanned", "scanned, remat", "unrolled", "unrolled, remat"],
}


@pytest.mark.parametrize("model", WAYS)
def test_blocks_can_be_compiled_in_as_many_ways_as_the_model_has(model):
    ways = memory_savers.block_layouts(small(model=model))
    assert list(ways) == WAYS[model]
    for way, config in ways.items():
        assert config.model.options.get("remat", False) == ("remat" in way)
        assert config.model.options.get("scan", True) == ("unrolled" not in way)


def plan(tmp_path, *arguments):
    """What `curvax plan` left in its folder."""
    places = [f"--runs={tmp_path / 'runs'}", f"--cache={tmp_path / 'cache'}"]
    assert main.main(["plan", *arguments, *places]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return json.loads((folder / "plan.json").read_text()), (folder / "table.txt").read_text()


TINY = ["digits", "--model.options.depth=1", "--model.options.width=16", "--parallelism=shard_map"]
PAIR = ["--optimizers", "pmean_updates(axes) | sgd(0.1)", "sam(sgd(0.1), 0.1, mean_over=axes)"]


def test_the_command_leaves_a_table_and_its_numbers(tmp_path, capsys):
    found, table = plan(tmp_path, *TINY, "--topology=cpu:8", *PAIR)
    base, sam = found["arms"].values()
    assert found["devices"] == DEVICES
    assert sam["figures"]["FLOPs × base"] == pytest.approx(sam["flops"] / base["flops"])
    assert sam["figures"]["sent, × parameters"] == pytest.approx(1, abs=0.02)
    assert "FLOPs × base" in table
    assert "plan.json" in capsys.readouterr().out


def test_the_command_plans_the_program_that_pmap_runs(tmp_path):
    found, _ = plan(tmp_path, *TINY, "--parallelism=pmap", "--topology=cpu:8", *PAIR)
    for arm in found["arms"].values():
        assert arm["figures"]["sent, × parameters"] == pytest.approx(1, abs=0.02)
        assert arm["memory"]["aliased"] >= arm["parameters"]  # the state is handed on


def test_the_command_compiles_blocks_in_every_way_that_is_asked_for(tmp_path):
    vit = ["digits_vit", "--model.options.depth=2", "--parallelism=shard_map"]
    found, table = plan(tmp_path, *vit, "--topology=cpu:8", *PAIR[:2], "--variants")
    assert [name.partition(", ")[2] for name in found["arms"]] == WAYS["vit_tiny"]
    scanned, recomputed, unrolled, _ = found["arms"].values()
    assert scanned["flops"] == pytest.approx(unrolled["flops"], rel=0.02)
    assert recomputed["flops"] > 1.2 * scanned["flops"]
    assert recomputed["memory"]["temporaries"] < scanned["memory"]["temporaries"]
    assert "unrolled" in table


def test_where_a_step_does_not_fit_what_may_help_is_compiled(tmp_path, monkeypatch):
    tight = topologies.Chip(memory=1, peak=1.0, example="none")
    machine = topologies.Topology("cpu:8", find("cpu:8").devices, tight)
    monkeypatch.setattr(topologies, "find", lambda name: machine)
    found, table = plan(tmp_path, *TINY, "--topology=cpu:8", *PAIR[:2])
    (tried,) = found["tried"].values()
    expected = ["--model.options.remat=True", "--microbatch=4", "--fsdp=True --parallelism=jit"]
    assert list(tried) == expected
    assert "does not fit" in table
    assert "Each of these fits" not in table


def test_a_reading_that_was_cut_short_is_read_anew(monkeypatch, tmp_path):
    """A kill in the middle of writing leaves nothing under the reading's name."""
    machine = find("cpu:8")
    outline = experiment.outline(small("pmean_updates(axes) | sgd(0.1)"), machine.devices)
    whole = Path.write_text

    def cut(path, text, *options):
        whole(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt):
            compiled_cost.read(outline, machine, tmp_path)
    assert compiled_cost.read(outline, machine, tmp_path).flops > 0


def test_the_figures_of_a_plan_are_those_of_a_device_beside_the_base():
    topology = topologies.Topology(
        "v", range(4), topologies.Chip(memory=4000, peak=1e6, example="")
    )
    counted = ("all-reduce", 3, 600), ("all-gather", 1, 200)
    sends = {kind: collectives.Collective(times, size) for kind, times, size in counted}
    base, reading = (
        compiled_cost.CompiledCost(400, memory.total, True, memory, flops, sent)
        for memory, flops, sent in (
            (compiled_cost.Memory(500, 300, 200, 40, 10), 2e3, {"all-reduce": sends["all-reduce"]}),
            (compiled_cost.Memory(900, 700, 600, 200, 100), 5e3, sends),
        )
    )
    assert (base.needed, reading.needed) == (650, 1300)
    found = plans.figures(reading, base, topology)
    assert found == pytest.approx(
        {
            "memory, MB": 1300e-6,
            "% of the HBM": 32.5,
            "memory × base": 2,
            "  arguments, MB": 900e-6,
            "  outputs, MB": 700e-6,
            "  aliased, MB": 600e-6,
            "  temporaries, MB": 200e-6,
            "  code, MB": 100e-6,
            "GFLOP": 5e-6,
            "GFLOP on all devices": 20e-6,
            "FLOPs × base": 2.5,
            "ms at the peak of bf16": 5,
            "all-reduce, times": 3,
            "all-reduce, MB": 600e-6,
            "all-gather, times": 1,
            "all-gather, MB": 200e-6,
            "sent, × parameters": 2,
            "sent × base": 4 / 3,
        }
    )


def test_a_refusal_of_the_compiler_says_how_much_is_needed(monkeypatch, tmp_path):
    words = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (30.5G) exceeds"

    def refuse(self, lowered):
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(topologies.Topology, "compile", refuse)
    machine = find("cpu:8")
    outline = experiment.outline(small(regime="jit"), machine.devices)
    reading = compiled_cost.read(outline, machine, tmp_path)
    assert not reading.fits
    assert reading.needed == 30.5 * topologies.GIB
    assert compiled_cost.read(outline, machine, tmp_path).needed == reading.needed
