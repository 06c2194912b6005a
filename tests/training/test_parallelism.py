"""One training step under jit, FSDP, shard_map and pmap: the same numbers and checkpoints."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import mapped_run
import numpy as np
import pytest
from mapped_run import DEVICES, GROUPS, changed

from curvax.devices.axes import Neighbours
from curvax.training import loop, parallelism
from curvax.training.checkpoints import CheckpointError, Checkpoints
from curvax.training.config.configs import load
from curvax.training.experiment import build, outline
from curvax.training.loop import NotFinite
from curvax.training.runtime.errors import ConfigError

MAPPINGS = ("jit", "fsdp", "shard_map", "pmap")
DRY = {"dropout": 0.0}  # which draws for each device anew
AVERAGED = DRY | {"norm": False}  # what whole batches of devices or of jit would not share
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # SAM, GSAM, dropout and batch norm for each 4 of the 8 examples of a device.
    "groups": ({"optimizer": f"{GROUPS} | sgd(lr)"}, {}),
    "groups of two devices": ({"optimizer": f"{GROUPS} | sgd(lr)", "m": 16}, DRY),
    "AdaHessian": (
        {
            "optimizer": "hutchinson_diag(shards=8, mean_over=axes) | pmean_updates(axes) "
            "| ema_rms(0.9) | ema(0.9) | scale_by_power(1.0, eps=1e-2) | scale_by_learning_rate(lr)"
        },
        AVERAGED,
    ),
    "trajectory loss": (  # a step is an epoch
        {
            "optimizer": "trajectory_loss(examples, outputs, lag=1, sync_over=axes) "
            "| pmean_updates(axes) | sgd(lr)",
            "batch": 128,
        },
        AVERAGED,
    ),
    "attack": ({"optimizer": "pmean_updates(axes) | sgd(lr)", "attack": "pgd(0.1)"}, AVERAGED),
    "natural gradient": (
        {"optimizer": "natural_gradient(1.0, damping=1.0, solver=cg(3), mean_over=axes)"},
        AVERAGED,
    ),
}
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


@pytest.fixture(autouse=True)
def _as_users_have_it(single_precision):
    pass


def config_of(mapping, method="groups", **fields):
    settings, options = METHODS[method]
    config = changed(mapped_run.get_config(mapping), **settings | fields)
    config.model.options.update(options)
    return config


def reader_of(mapping):
    """The experiment under a parallelism, or on one device alone."""
    return build(config_of("jit", devices=1) if mapping == "one device" else config_of(mapping))


def stepped(experiment, count=2):
    """The state after some steps, and the metrics of the last."""
    state, batches = experiment.init(), experiment.batches()
    for _ in range(count):
        state, measured = experiment.step(state, experiment.parallelism.place(next(batches)))
    return state, measured


def assert_close(found, expected, **tolerance):
    found, expected = jax.device_get((found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.fixture(scope="module", params=METHODS)
def alone(request):
    """A method, and the result of two steps of it on one device."""
    with jax.enable_x64(False):
        state, measured = stepped(build(config_of("jit", request.param, devices=1)))
        return request.param, jax.device_get((state.params, measured.metrics))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_parallelism_takes_the_same_steps(mapping, alone):
    method, (params, figures) = alone
    config = config_of(mapping, method)
    experiment = build(config)
    state, measured = stepped(experiment)
    # AdaHessian's quotients turn a rounding of 1e-7 into some 1e-4 of a step of 1e-2.
    assert_close(state.params, params, atol=1e-5, rtol=1e-4)
    assert figures.keys() == measured.metrics.keys()
    for name in figures:
        np.testing.assert_allclose(
            measured.metrics[name], figures[name], rtol=2e-3, atol=1e-5, err_msg=name
        )
    assert measured.finite.all()


def test_an_attack_that_shares_the_first_pass_moves_the_same_images_on_devices():
    ascent = "sam_perturb(rho, sync_over=axes) | pmean_updates(axes) | sgd(lr)"
    fields = {"optimizer": ascent, "attack": "pgd(0.1, steps=2)", "share_attack": True}
    one, many = (
        stepped(build(config_of(mapping, "attack", **fields)))[0].params
        for mapping in ("jit", "shard_map")
    )
    assert_close(many, one, atol=1e-5, rtol=1e-4)


def test_fsdp_shards_parameters_and_moments():
    experiment = build(config_of("fsdp"))
    state = experiment.init()
    divides = lambda x: x.ndim and x.dtype == jnp.float32 and max(x.shape) % DEVICES == 0
    whole = [x for x in jax.tree.leaves(state) if divides(x)]
    assert whole
    for x in whole:
        (shard, *_) = x.addressable_shards
        assert shard.data.size * DEVICES == x.size
        longest = max(n for n in x.shape if n % DEVICES == 0)
        assert longest // DEVICES in shard.data.shape
    stepped_once, _ = experiment.step(
        state, experiment.parallelism.place(next(experiment.batches()))
    )
    kinds = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree)]
    assert kinds(stepped_once) == kinds(experiment.shapes)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_outline_lowers_to_the_program_of_the_built_step(mapping):
    config = config_of(mapping, optimizer="sam_perturb(rho) | pmean_updates(axes) | sgd(lr)")
    sketch = outline(config, jax.devices()[:DEVICES])
    planned = sketch.step.lower(sketch.state, sketch.batch)
    built = build(config)
    state, batch = built.init(), built.parallelism.place(next(built.batches()))
    assert planned.as_text() == built.step.lower(state, batch).as_text()
    assert planned.compile().memory_analysis().alias_size_in_bytes > 0
    assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(batch)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), sketch.batch
    )
    assert int(sketch.step(state, batch)[0].step) == 1


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_updates_local_to_devices_are_refused(mapping):
    with pytest.raises(ValueError, match=r"pmean_updates\(axes\)"):
        build(config_of(mapping, optimizer="sam_perturb(rho) | sgd(lr)"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run under each parallelism, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    with jax.enable_x64(False):
        for mapping in MAPPINGS:
            loop.fit(build(config_of(mapping, keep_checkpoints=9)), folder / mapping)
    return folder


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_run_resumes_bit_for_bit_from_its_middle(mapping, runs, tmp_path):
    experiment = build(config_of(mapping))
    until = Checkpoints(runs / mapping / "checkpoints", read_only=True)
    end, _ = until.restore(experiment.shapes)
    assert int(end.step) == experiment.steps
    middle = tmp_path / "checkpoints"
    (runs / mapping / "checkpoints" / "2").rename(middle.parent / "2")
    middle.mkdir()
    (middle.parent / "2").rename(middle / "2")
    loop.fit(experiment, tmp_path)
    again, _ = Checkpoints(middle, read_only=True).restore(experiment.shapes)
    same = lambda a, b: np.testing.assert_array_equal(_raw(a), _raw(b))
    jax.tree.map(same, again, end)


@pytest.mark.parametrize("mapping", [*MAPPINGS, "one device"])
def test_checkpoint_is_read_under_any_parallelism(mapping, runs):
    written = build(config_of("fsdp"))
    expected, place = Checkpoints(runs / "fsdp" / "checkpoints", read_only=True).restore(
        written.shapes
    )
    reader = reader_of(mapping)
    found, found_place = Checkpoints(runs / "fsdp" / "checkpoints", read_only=True).restore(
        reader.shapes
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_raw(a), _raw(b)), found, expected)
    assert found_place == place
    layout = jax.tree.map(lambda x: x.sharding, found)
    assert layout == reader.parallelism.layout(found)


@pytest.mark.parametrize("mapping", ["shard_map", "pmap", "one device"])
def test_run_resumes_under_another_parallelism(mapping, runs, tmp_path):
    """From step 4 of a run with sharded parameters to the end, which is that of the first run."""
    shutil.copytree(runs / "fsdp" / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    reader = reader_of(mapping)
    loop.fit(reader, tmp_path)
    end = lambda folder: Checkpoints(folder / "checkpoints", read_only=True).restore(reader.shapes)
    (found, place), (expected, expected_place) = end(tmp_path), end(runs / "fsdp")
    assert (int(found.step), place) == (reader.steps, expected_place)
    assert_close(found.params, expected.params, atol=1e-5, rtol=1e-4)


def _raw(x):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_nan_on_one_device_stops_all_at_its_step(mapping, monkeypatch, tmp_path):
    experiment = build(config_of(mapping))
    batches = experiment.batches

    class Spoilt:
        def __init__(self):
            self.inner, self.count = batches(), 0

        def __next__(self):
            batch, self.count = next(self.inner), self.count + 1
            if self.count == 3:
                batch["input"][-1] = np.nan  # an example of the last device
            return batch

        def get_state(self):
            return self.inner.get_state()

    monkeypatch.setattr(type(experiment), "batches", lambda self: Spoilt())
    with pytest.raises(NotFinite, match="step 3: the loss is NaN"):
        loop.fit(experiment, tmp_path)
    kept = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert int(kept.restore(experiment.shapes)[0].step) == 2


def test_mesh_has_devices_in_the_order_of_their_processes():
    devices = jax.devices()[:DEVICES]
    mesh = parallelism.build(mapped_run.get_config("shard_map"), devices[::-1]).mesh
    assert mesh.devices.ravel().tolist() == devices


def test_parallelism_errors_give_settings_that_fit():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": 68}, "do not divide over 8 devices.*fewer devices, as with `--devices=4`"),
        ({"parallelism": "xmap"}, "`parallelism` is one of jit, shard_map, pmap"),
        ({"devices": 9}, "selects the first of the 8 .* was 9 .* `--devices=none` uses all"),
        ({"m": 12}, "a batch of 64 and the 8 of each of 8 devices .* `--m=4`"),
        ({"m": 32, "batch": 48}, "With `--batch=48` use for instance `--m=6`"),
        ({"m": 128}, "With `--batch=64` use for instance `--m=64`"),
        (
            {"m": 128, "parallelism": "jit"},
            "a batch of 64 evenly. With .* use .* `--m=64`",
        ),
        ({"optimizer": "per_group(12, sgd(lr))"}, r"use for instance `per_group\(4, \.\.\.\)`"),
    ]
    for fields, said in cases:
        with pytest.raises(ConfigError, match=said):
            parallelism.build(changed(mapped_run.get_config("shard_map"), **fields))
    with pytest.raises(ConfigError, match="`fsdp` lets the compiler divide"):
        parallelism.build(changed(mapped_run.get_config("pmap"), fsdp=True))


@pytest.mark.parametrize("mapping", ["jit", "shard_map", "pmap"])
def test_methods_without_groups_take_any_batch(mapping):
    config = changed(mapped_run.get_config(mapping), m=128, optimizer="sgd(lr)")
    assert parallelism.build(config).group is None


@pytest.mark.parametrize("text", ["per_group(m, sgd(lr))", "per_group(16, sgd(lr))", "sgd(lr)"])
def test_groups_over_devices_follow_the_text_or_else_the_config(text):
    fields = {"optimizer": text, "m": 4 if "16" in text else 16}
    found = [
        parallelism.build(changed(mapped_run.get_config(mapping), **fields)).group
        for mapping in ("jit", "shard_map", "pmap")
    ]
    assert found == [None, "group", Neighbours("batch", 2)]


@pytest.mark.parametrize(
    ("mapping", "over", "fits"),
    [
        ("jit", "batch", False),
        ("shard_map", "batch", False),
        ("shard_map", ["batch", "group"], True),
        ("pmap", "batch", True),
    ],
)
def test_batch_norm_can_be_synced_where_the_parallelism_has_axes(mapping, over, fits):
    config = config_of(mapping, "groups of two devices")
    config.model.options["sync_over"] = over
    if fits:
        state, _ = stepped(build(config))
        assert int(state.step) == 2
    else:
        with pytest.raises(ConfigError, match=r"`model\.options\.sync_over` takes"):
            build(config)


def test_config_variant_follows_a_colon():
    loaded = load(f"{mapped_run.__file__}:fsdp")
    assert loaded.fsdp
    assert loaded.name == "mapped_run_fsdp"
    with pytest.raises(ConfigError, match="There is no config"):
        load("digitz:b16")


def test_damaged_checkpoint_raises_with_the_newest_good_one(runs, tmp_path):
    experiment = build(config_of("shard_map"))
    loop.fit(build(config_of("shard_map", epochs=1)), tmp_path)
    (largest,) = sorted(
        (p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )[-1:]
    largest.write_bytes(largest.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="newest good checkpoint is that of step 0"):
        Checkpoints(tmp_path / "checkpoints").restore(experiment.shapes)
