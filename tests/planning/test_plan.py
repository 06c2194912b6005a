"""`curvax plan`: the bytes of a config's step, memory savers, tables and errors."""

import functools
import json
from pathlib import Path

import jax
import pytest

from curvax.cli import main
from curvax.planning import collectives, compiled_cost, memory_savers, topologies
from curvax.planning import plan as plans
from curvax.training import experiment
from curvax.training.config import defaults

DEVICES, PER_DEVICE = 8, 4
pytestmark = pytest.mark.usefixtures("single_precision")


find = functools.cache(topologies.find)


def small(optimizer="adamw(1e-3)", mapping="shard_map", model="mlp", **numbers):
    """A config of a small model on digits."""
    config = defaults(rho=0.1, **numbers)
    config.model.name = model
    if model == "mlp":
        config.model.options.widths = [64]
    config.update(optimizer=optimizer, parallelism=mapping, batch=DEVICES * PER_DEVICE)
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
    "sam_perturb(rho, ascent=momentum(0.9), sync_over=axes) | adamw(1e-3)": {
        "shard_map": 1,
        "pmap": 1,
        "jit": 1,
    },
}
"""By text and parallelism: the bytes that a step sends, in units of the parameters."""


@pytest.mark.parametrize(
    ("text", "mapping"), [(text, mapping) for text in SENT for mapping in SENT[text]]
)
def test_the_training_step_of_a_config_sends_no_more_than_its_method(text, mapping, tmp_path):
    machine = find("cpu:8")
    outline = experiment.outline(small(text, mapping), machine.devices)
    reading = compiled_cost.read(outline, machine, tmp_path)
    assert reading.sent / reading.parameters == pytest.approx(SENT[text][mapping], rel=0.01)
    assert reading.memory is not None
    assert reading.memory.total == reading.needed
    again = compiled_cost.read(outline, machine, tmp_path)
    assert again == reading


@pytest.mark.parametrize("mapping", ["jit", "shard_map"])
def test_a_training_step_along_earlier_gradients_costs_one_gradient(mapping, tmp_path):
    """Its logged loss and scores are those of the perturbed pass."""
    machine = find("cpu:8")
    flops = {}
    for text in (
        "pmean_updates(axes) | adamw(1e-3)",
        "sam_perturb(rho, ascent=momentum(0.9), sync_over=axes) | adamw(1e-3)",
    ):
        config = small(text, mapping)
        config.batch = 64 * DEVICES
        outline = experiment.outline(config, machine.devices)
        flops[text] = compiled_cost.read(outline, machine, tmp_path).flops
    base, momentum = flops.values()
    assert momentum <= 1.15 * base


def test_kfac_sends_gradient_factors_and_their_inverses(tmp_path):
    """The factors of 65 and 64, and of 65 and 10, dimensions of an MLP 64-64-10."""
    machine = find("cpu:8")
    outline = experiment.outline(small("kfac(like, mean_over=axes)", "shard_map"), machine.devices)
    reading = compiled_cost.read(outline, machine, tmp_path)
    assert reading.factors == 4 * (65**2 + 64**2 + 65**2 + 10**2)
    assert reading.sent == pytest.approx(reading.parameters + 2 * reading.factors, rel=0.01)
    costs = {"adamw": reading._replace(factors=0), "kfac": reading}
    rows = plans.table(costs, machine).columns
    at = list(rows[0].cells).index("Kronecker factors, MB")
    assert [list(column.cells)[at] for column in rows[1:]] == ["", "0.05058"]


GROUPED = "per_group(2, sam_perturb(rho)) | pmean_updates(axes) | adamw(0.001)"


def test_sequential_groups_are_no_candidate_where_a_group_fills_a_device():
    text = GROUPED.replace("(2,", "(m,")
    for m, turns in ((PER_DEVICE // 2, True), (PER_DEVICE, False), (2 * PER_DEVICE, False)):
        found = memory_savers.candidates(small(text, m=m), DEVICES)
        assert any("sequential" in change for change in found) == turns


@pytest.mark.parametrize("batch", [1, 2, 3, 9, 12, 15])
def test_candidate_microbatches_divide_the_batch_of_a_device(batch):
    config = small()
    config.batch = DEVICES * batch
    found = [each for each in memory_savers.candidates(config, DEVICES).values() if each.microbatch]
    assert [batch % each.microbatch for each in found] == [0] * (batch > 1)
    assert all(each.microbatch < batch for each in found)


def test_memory_savers_are_those_that_the_config_allows():
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
def test_block_layouts_are_those_of_the_model(model):
    ways = memory_savers.block_layouts(small(model=model))
    assert list(ways) == WAYS[model]
    for way, config in ways.items():
        assert config.model.options.get("remat", False) == ("remat" in way)
        assert config.model.options.get("scan", True) == ("unrolled" not in way)


def plan(tmp_path, *arguments):
    """The files that `curvax plan` wrote."""
    places = [f"--runs={tmp_path / 'runs'}", f"--cache={tmp_path / 'cache'}"]
    assert main.main(["plan", *arguments, *places]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return json.loads((folder / "plan.json").read_text()), (folder / "table.txt").read_text()


TINY = ["digits", "--model.options.depth=1", "--model.options.width=16", "--parallelism=shard_map"]
PAIR = ["--optimizers", "pmean_updates(axes) | sgd(0.1)", "sam(sgd(0.1), 0.1, mean_over=axes)"]


def test_plan_writes_a_table_and_its_numbers(tmp_path, capsys):
    found, table = plan(tmp_path, *TINY, "--topology=cpu:8", *PAIR)
    base, sam = found["arms"].values()
    assert found["devices"] == DEVICES
    assert sam["figures"]["FLOPs × base"] == pytest.approx(sam["flops"] / base["flops"])
    assert sam["figures"]["sent, × parameters"] == pytest.approx(1, abs=0.02)
    assert "FLOPs × base" in table
    assert "plan.json" in capsys.readouterr().out


def test_plan_compiles_the_program_that_pmap_runs(tmp_path):
    found, _ = plan(tmp_path, *TINY, "--parallelism=pmap", "--topology=cpu:8", *PAIR)
    for arm in found["arms"].values():
        assert arm["figures"]["sent, × parameters"] == pytest.approx(1, abs=0.02)
        assert arm["memory"]["aliased"] >= arm["parameters"]  # the state is donated


def test_plan_variants_compiles_every_block_layout(tmp_path):
    vit = ["digits_vit", "--model.options.depth=2", "--parallelism=shard_map"]
    found, table = plan(tmp_path, *vit, "--topology=cpu:8", *PAIR[:2], "--variants")
    assert [name.partition(", ")[2] for name in found["arms"]] == WAYS["vit_tiny"]
    scanned, recomputed, unrolled, _ = found["arms"].values()
    assert scanned["flops"] == pytest.approx(unrolled["flops"], rel=0.02)
    assert recomputed["flops"] > 1.2 * scanned["flops"]
    assert recomputed["memory"]["temporaries"] < scanned["memory"]["temporaries"]
    assert "unrolled" in table


def test_plan_tries_memory_savers_where_a_step_does_not_fit(tmp_path, monkeypatch):
    tight = topologies.Chip(memory=1, peak=1.0, example="none")
    machine = topologies.Topology("cpu:8", find("cpu:8").devices, tight)
    monkeypatch.setattr(topologies, "find", lambda name: machine)
    found, table = plan(tmp_path, *TINY, "--topology=cpu:8", *PAIR[:2])
    (tried,) = found["tried"].values()
    expected = ["--model.options.remat=True", "--microbatch=4", "--fsdp=True --parallelism=jit"]
    assert list(tried) == expected
    assert "does not fit" in table
    assert "Each of these fits" not in table


def test_truncated_cache_of_a_compiled_cost_is_replaced(monkeypatch, tmp_path):
    """A kill while writing leaves no file under the name of the cached cost."""
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


def test_plan_metrics_are_those_of_a_device_relative_to_the_baseline():
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


def test_compiler_out_of_memory_gives_the_needed_bytes(monkeypatch, tmp_path):
    words = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (30.5G) exceeds"

    def refuse(self, lowered):
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(topologies.Topology, "compile", refuse)
    machine = find("cpu:8")
    outline = experiment.outline(small(mapping="jit"), machine.devices)
    reading = compiled_cost.read(outline, machine, tmp_path)
    assert not reading.fits
    assert reading.needed == 30.5 * topologies.GIB
    assert compiled_cost.read(outline, machine, tmp_path).needed == reading.needed
