"""Runs: what a step does, that a run can be killed and resumed, and how it stops when it must."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.flatten_util import ravel_pytree
from tensorboardX.proto.event_pb2 import Event

import curvax
from curvax.training import checkpoints, loop, run_data, scoring, selection_metric, tasks
from curvax.training.checkpoints import CheckpointError, Checkpoints
from curvax.training.compare import comparison, report
from curvax.training.compare.summary import summarise
from curvax.training.data import labelled_images
from curvax.training.data.datasets import Split
from curvax.training.experiment import build
from curvax.training.runtime import preemption, run_dir
from curvax.training.runtime.preemption import Stopped
from curvax.training.step import objective, watched_names

CONFIG = tiny_run.get_config()
STEPS = 12  # 3 epochs of 64 examples in batches of 16


def changed(**fields):
    return comparison.replace(CONFIG, **fields)


@pytest.fixture(scope="module")
def experiment():
    return build(CONFIG)


@pytest.fixture(scope="module")
def reference(experiment, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    loop.fit(experiment, folder)
    return folder


def last_state(experiment, folder):
    state, place = Checkpoints(folder / "checkpoints").restore(experiment.shapes)
    return state, place


def assert_same_bits(state, expected):
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), state, expected)


def assert_same_run(experiment, folder, reference):
    (state, place), (expected, expected_place) = (
        last_state(experiment, each) for each in (folder, reference)
    )
    assert int(state.step) == STEPS
    assert place == expected_place
    assert_same_bits(state, expected)
    assert (folder / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    figures, wanted = (json.loads((f / "results.json").read_text()) for f in (folder, reference))
    assert figures | {"seconds": 0} == wanted | {"seconds": 0}


# A step.


def test_training_step_is_sgd_on_the_augmented_batch():
    config = changed(optimizer="sgd(0.1, momentum=0.9)")
    config.model.options.dropout = 0.0
    experiment = build(config)
    state, batches = experiment.init(), experiment.batches()

    def loss(params, batch):
        logits: Any = experiment.model.apply({"params": params}, batch["input"])
        return -jnp.mean(jnp.sum(batch["label"] * jax.nn.log_softmax(logits), -1))

    params = jax.tree.map(jnp.copy, state.params)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for number in range(3):
        batch = next(batches)
        key, _ = jax.random.split(jax.random.fold_in(state.key, number))
        grads = jax.grad(loss)(params, experiment.task.in_training(key, batch))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        state, _ = experiment.step(state, batch)
    # float32, and another order of the same sums
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, params)


def test_batch_statistics_and_metrics_are_those_of_the_clean_pass():
    config = changed(optimizer="sam_perturb(0.5) | sgd(0.1)")
    config.model = {"name": "resnet8", "options": {"width": 4}}
    config.data.augment = []
    experiment = build(config)
    state, batch = experiment.init(), next(experiment.batches())
    inputs = experiment.task.in_test(batch)["input"]
    logits, new = experiment.model.apply(
        {"params": state.params, **state.model_state}, inputs, train=True, mutable=["batch_stats"]
    )
    accuracy = np.mean(np.argmax(logits, -1) == batch["label"])
    stepped, measured = experiment.step(state, batch)
    # float32, fused otherwise
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        stepped.model_state,
        new,
    )
    assert measured.metrics["accuracy"] == pytest.approx(accuracy)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    assert measured.metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measured.metrics["perturbed_loss"] > 1.01 * loss


def test_perturbations_are_float32_where_activations_are_bfloat16():
    """In bfloat16 ε of a hundredth of a parameter's size is rounded to a third of its digits."""
    config = changed(optimizer="sam_perturb(1e-3) | sgd(0.1)")
    config.model.options.dtype = "bfloat16"
    experiment = build(config)
    seen = []

    def apply(variables, x, **options):
        seen.extend(jax.tree.leaves(variables["params"]))
        return experiment.model.apply(variables, x, **options)

    model: Any = SimpleNamespace(apply=apply)

    def updates(params, batch, key):
        numbers = experiment.task.in_training(key, batch)
        value_fn = objective(model, experiment.task, {}, numbers, key)
        _, grads = value_fn.value_and_grad(params)
        tx = curvax.sam_perturb(1e-3)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    params, key = experiment.init().params, jax.random.key(0)
    found = jax.eval_shape(updates, params, next(experiment.batches()), key)
    assert len(seen) >= 2 * len(jax.tree.leaves(params))  # the gradient's pass and SAM's
    assert {x.dtype for x in (*seen, *jax.tree.leaves(found))} == {jnp.dtype(jnp.float32)}
    program = str(jax.make_jaxpr(updates)(params, next(experiment.batches()), key))
    assert "bf16[" in program


def test_microbatches_change_nothing_but_rounding():
    config = changed(batch=16)
    config.model.options.dropout = 0.0
    stepped = []
    for size in (None, 4):
        config.microbatch = size
        experiment = build(config)
        stepped.append(experiment.step(experiment.init(), next(experiment.batches())))
    (whole, of_whole), (parts, of_parts) = stepped
    # Adam's first step is the gradient over its own size: a gradient near 0 may turn by rounding
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), whole.params, parts.params
    )
    for name, figure in of_whole.metrics.items():
        np.testing.assert_allclose(figure, of_parts.metrics[name], rtol=1e-3, err_msg=name)


# Kept and resumed.

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tiny_run
from jax.flatten_util import ravel_pytree
from tensorboardX.proto.event_pb2 import Event
from pathlib import Path
from curvax.training import loop
from curvax.training.experiment import build

settle = loop._Trainer.settle
def settle_or_die(self, step, names):
    figures = settle(self, step, names)
    if step == 8:
        self.log.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return figures
loop._Trainer.settle = settle_or_die
loop.fit(build(tiny_run.get_config()), Path(sys.argv[1]))
"""


def test_a_killed_run_resumes_bit_for_bit(experiment, reference, tmp_path):
    script = KILLED.format(tests=str(Path(tiny_run.__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path)]
    died = subprocess.run(command, env=os.environ | {"JAX_ENABLE_X64": "1"}, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert max(record["step"] for record in run_dir.records(tmp_path)) == 7
    assert int(last_state(experiment, tmp_path)[0].step) == 6
    loop.fit(experiment, tmp_path)
    assert_same_run(experiment, tmp_path, reference)


def test_checkpoint_keeps_keys_of_the_optimiser_state(tmp_path):
    experiment = build(changed(optimizer="adahessian(lr, key=seed)", seed=7))
    state = experiment.init()
    keys = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.uint32]
    assert len(keys) == 1
    Checkpoints(tmp_path).save(state, {"next": [1, 2]})
    restored, place = Checkpoints(tmp_path).restore(
        build(changed(optimizer="adahessian(lr)")).init()
    )
    assert_same_bits(restored, state)
    assert place == {"next": [1, 2]}


def test_a_checkpoint_with_typed_keys_of_an_earlier_version_is_read(tmp_path):
    experiment = build(changed(optimizer="adahessian(lr, key=seed)", seed=7))
    state = experiment.init()
    typed = lambda x: jax.random.wrap_key_data(x) if x.dtype == jnp.uint32 else x
    Checkpoints(tmp_path).save(state._replace(opt_state=jax.tree.map(typed, state.opt_state)), {})
    restored, _ = Checkpoints(tmp_path).restore(experiment.shapes)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(restored) == kinds(state)
    assert_same_bits(restored, state)


def test_checkpoint_keeps_empty_arrays(tmp_path):
    experiment = build(changed())
    empty = {"seen": jnp.zeros((0, 3)), "ids": jnp.zeros(0, jnp.int32)}
    state = experiment.init()._replace(model_state=empty)
    Checkpoints(tmp_path).save(state, {})
    restored, _ = Checkpoints(tmp_path).restore(state)
    assert_same_bits(restored, state)
    assert restored.model_state["seen"].shape == (0, 3)
    assert restored.model_state["ids"].dtype == jnp.int32


def test_leaves_of_colliding_names_are_refused_by_name(tmp_path):
    twice = {"a.b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}
    state = build(changed()).init()._replace(model_state=twice)
    with pytest.raises(CheckpointError, match=r"`model_state\.a\.b`.*disk is not the cause"):
        Checkpoints(tmp_path).save(state, {})


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OSError(28, "No space left on device"), "Make room"),
        (OSError(122, "Disk quota exceeded"), "Make room"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), "Make room"),
        (PermissionError(13, "Permission denied"), "Make the folder writable"),
        (ValueError("Unsupported type: <class 'str'> for key: ('a',)."), "disk is not the cause"),
    ],
)
def test_checkpoint_error_gives_its_cause(error, cure, tmp_path, monkeypatch):
    def fail(self, step, **_):
        raise error

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
    state = build(changed()).init()
    with pytest.raises(CheckpointError, match=cure) as told:
        Checkpoints(tmp_path).save(state, {})
    assert ("Make room" in str(told.value)) == (cure == "Make room")
    assert str(error.args[-1])[:20] in str(told.value)


def test_finished_run_is_read_and_not_trained(experiment, reference, monkeypatch):
    monkeypatch.setattr(loop, "_Trainer", None)
    outcome = loop.fit(experiment, reference)
    assert outcome.metrics["steps"] == STEPS
    assert outcome.records[-1]["step"] == STEPS


def test_full_disk_stops_the_run_without_loss(experiment, reference, tmp_path, monkeypatch):
    free, room = shutil.disk_usage, iter([True, True, True])  # checkpoints 0, 3 and 6

    def usage(path):
        return free(path) if next(room, False) else free(path)._replace(free=1000)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "disk_usage", usage)
        with pytest.raises(CheckpointError, match=r"step 9 .*disk is full.* step 6 "):
            loop.fit(experiment, tmp_path)
    loop.fit(experiment, tmp_path)
    assert_same_run(experiment, tmp_path, reference)


def test_disk_that_fills_while_writing_leaves_the_older_checkpoints(
    experiment, reference, tmp_path, monkeypatch
):
    def fail(self, step, **_):
        (Path(self.directory) / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            loop.fit(experiment, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    loop.fit(experiment, tmp_path)
    assert_same_run(experiment, tmp_path, reference)


def test_unreadable_checkpoint_is_named_and_the_one_before_can_be_used(
    experiment, reference, tmp_path
):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    newest = tmp_path / "checkpoints" / str(STEPS)
    for file in newest.rglob("d/*"):
        file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"step 12 .*cannot be read .*not those .* step 9 "):
        loop.fit(experiment, tmp_path)
    assert newest.is_dir()
    shutil.rmtree(newest)
    loop.fit(experiment, tmp_path)
    assert_same_run(experiment, tmp_path, reference)


def test_reopened_log_drops_later_records(tmp_path):
    log = run_dir.Log(tmp_path)
    for step in range(1, 6):
        log.write(step, "train", {"loss": 1 / step, "gap": float("nan")})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tra')
    again = run_dir.Log(tmp_path, since=3)
    again.write(4, "test", {"loss": 7.0})
    again.close()
    wanted = [{"step": s, "train/loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "test/loss": 7.0}]
    assert again.records == wanted
    assert run_dir.records(tmp_path) == wanted


def events(path):
    """The records of an event file: length (uint64), its checksum, the message, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_events_have_every_step_and_the_restart(tmp_path):
    for since in (0, 2):
        log = run_dir.Log(tmp_path, since=since)
        for step in range(since + 1, since + 4):
            log.write(step, "train", {"loss": 1.0 / step})
        log.close()
    first, second = sorted(tmp_path.glob("events.*"), key=lambda path: path.suffix)
    scalars = [(e.step, v.tag, v.simple_value) for e in events(first) for v in e.summary.value]
    assert scalars == [(s, "train/loss", pytest.approx(1 / s)) for s in (1, 2, 3)]
    starts = [e.step for e in events(second) if e.HasField("session_log")]
    assert starts == [3]


# Stopped.


@pytest.mark.parametrize("at", [4, STEPS])
def test_termination_signal_saves_before_it_stops(at, experiment, reference, tmp_path):
    """The next step is the last one; at the end of a run it is heeded before another begins."""
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def send(step, figures):
        seen.append(step)
        if step == at:
            assert signal.getsignal(signal.SIGTERM) is not before
            signal.raise_signal(signal.SIGTERM)

    last = min(at + 1, STEPS)
    with pytest.raises(Stopped, match=f"after step {last}. .* that of step {last} in"):
        loop.fit(experiment, tmp_path, send)
    assert max(seen) == last
    assert signal.getsignal(signal.SIGTERM) is before
    loop.fit(experiment, tmp_path)
    assert_same_run(experiment, tmp_path, reference)


def test_termination_signal_between_two_runs_stops_the_second(monkeypatch):
    """The runtime stops all of them at the number after the last that any has reached."""
    asked: list[int] = []
    due = -1

    def reached(number):
        asked.append(number)
        return number == due

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    with preemption.Notice() as first:
        assert not any(first.given() for _ in range(3))
    due = asked[-1] + 1
    with preemption.Notice() as second:
        assert second.given()
    assert asked == list(range(asked[0], asked[0] + 4))


def test_an_infinite_update_stops_the_run_at_its_step(tmp_path):
    optimizer = "sgd(1e38)"  # the second step meets logits of 1e36 and multiplies again
    experiment = build(changed(optimizer=optimizer, log_every=5, checkpoint_every=100))
    with pytest.raises(loop.NotFinite, match=r"step 2: the update of .* that of step 0 in"):
        loop.fit(experiment, tmp_path)
    state, _ = last_state(experiment, tmp_path)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda logits, _: jnp.log(0.0 * jnp.sum(logits)), "the loss"),
        (lambda logits, _: jnp.sqrt(0.0 * jnp.sum(logits)), "the gradient of `block_0/.*/bias`"),
    ],
)
def test_first_nan_is_named(loss, what, monkeypatch):
    monkeypatch.setitem(tasks.LIKELIHOODS, "softmax", lambda *_, **__: loss)
    with pytest.raises(loop.NotFinite, match=f"step 1: {what} is NaN"):
        loop.fit(build(changed(optimizer="sgd(0.1)")))


def test_every_finite_flag_has_a_name(experiment):
    state = experiment.init()
    names = watched_names(state.params)
    _, measured = experiment.step(state, next(experiment.batches()))
    assert measured.finite.shape == (len(names),)
    assert names[-1] == "the update of `norm/scale`"


def test_fields_added_after_a_run_have_their_defaults(tmp_path):
    folder = run_dir.create(tmp_path, "train", CONFIG)
    file = folder / "config.json"
    old = json.loads(file.read_text())
    del old["init_from"], old["data"]["labels"], old["data"]["image_size"]
    file.write_text(json.dumps(old))
    read = run_dir.read_config(folder)
    assert (read.init_from, read.data.labels, read.data.image_size) == (None, None, None)
    assert (read.batch, read.data.label_noise) == (CONFIG.batch, CONFIG.data.label_noise)


# Data and scores.


def test_held_out_examples_come_from_the_training_set_alone():
    task = tasks.build(CONFIG)
    whole, parted = (run_data.load(CONFIG, task, hold_out) for hold_out in (False, True))
    rows = lambda split: {image.tobytes() for image in split.inputs}
    assert rows(parted.train) | rows(parted.test) == rows(whole.train)
    assert not rows(parted.train) & rows(parted.test)
    assert parted.test.size == 6
    assert isinstance(parted.test, Split)
    right = {i.tobytes(): label for i, label in zip(*labelled_images.load("digits").train)}
    assert all(right[i.tobytes()] == label for i, label in zip(*parted.test))
    assert np.mean(parted.wrong) == pytest.approx(0.25, abs=0.01)


def test_scores_do_not_depend_on_the_batch_size(experiment):
    state, test = experiment.init(), experiment.data.test
    noise = curvax.gaussian_probe(jax.random.key(0), state.params)
    moved = jax.tree.map(lambda p, z: p + 0.3 * z, state.params, noise)
    state = state._replace(params=moved)  # a head of zeros scores every chunk alike
    whole, parts = (
        scoring.average(experiment.scores, state, test, size, experiment.parallelism)
        for size in (test.size, 100)
    )
    assert whole == pytest.approx(parts, rel=1e-6)
    few = experiment.score(state, test.rows(slice(100)))
    assert abs(few["loss"] / whole["loss"] - 1) > 1e-3


def test_largest_eigenvalue_is_that_of_the_dense_hessian():
    key = jax.random.key(0)
    batch = {"input": jax.random.normal(key, (8, 4)), "label": jnp.arange(8) % 3}
    predict = lambda params, batch: jnp.tanh(batch["input"] @ params["w"]) @ params["v"]
    clean = lambda _, batch: curvax.Objective(curvax.categorical("label"), batch, model=predict)
    params = {"w": jax.random.normal(key, (4, 3)), "v": jax.random.normal(key, (3, 3))}
    flat, unravel = ravel_pytree(params)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = lambda x: cross_entropy(predict(unravel(x), batch), batch["label"]).mean()
    eigenvalues = np.linalg.eigvalsh(jax.hessian(loss)(flat))
    found = scoring.make_largest_eigenvalue(clean)(params, {}, batch)
    assert float(found) == pytest.approx(eigenvalues[np.argmax(np.abs(eigenvalues))], rel=3e-2)


# Comparisons.


def test_confidence_interval_is_students():
    summary = summarise([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653 in any table
    assert summary == pytest.approx((2.0, 1.0, 4.302653 / 3**0.5), rel=1e-6)
    assert np.isnan(summarise([1.0]).half_width)


def outcome(accuracy):
    return run_dir.Outcome({"test_accuracy": accuracy, "seconds": 1.0}, [])


def test_better_baseline_is_chosen_seed_by_seed():
    short, long = [outcome(0.5), outcome(0.8)], [outcome(0.6), outcome(0.7)]
    arms = {"base": short, "longer": long, "sam": short}
    found = comparison.with_better_baseline(arms, selection_metric.CLASSIFICATION)
    assert [run.metrics["test_accuracy"] for run in found["base, better of both"]] == [0.6, 0.8]
    gain = comparison.score(found, selection_metric.CLASSIFICATION)["sam"].gain
    assert gain.mean == pytest.approx(-0.05)


def test_diverged_run_leaves_the_comparison_of_the_others(tmp_path):
    texts = ["sgd(0.1)", "scale(1e30) | sgd(1e30)"]
    experiments = {name: build(arm) for name, arm in comparison.variants(CONFIG, texts).items()}
    quiet = lambda name, steps: lambda step, figures: None
    with pytest.raises(loop.NotFinite):
        comparison.run(experiments, 1, tmp_path / "strict", quiet)
    outcomes = comparison.run(experiments, 1, tmp_path / "lenient", quiet, may_diverge=True)
    scores = comparison.score(outcomes, selection_metric.CLASSIFICATION)
    assert scores["sgd"].reached.mean == outcomes["sgd"][0].metrics["test_accuracy"]
    assert np.isnan(scores["scale | sgd"].reached.mean)
    assert "scale | sgd diverged." in report.gains(scores, selection_metric.CLASSIFICATION)
    assert "diverged" in report.as_text(report.score_table(scores, selection_metric.CLASSIFICATION))


@pytest.mark.parametrize(
    ("base", "method", "said", "unsaid"),
    [
        (
            {"test_accuracy": 0.6, "lambda_max": 60.0, "memorised": 0.9, "wrong_labels": 0.4},
            {"test_accuracy": 0.8, "lambda_max": 4.0, "memorised": 0.1, "wrong_labels": 0.4},
            [
                "64 images of digits, 40% of them",
                "`b` learnt 10%",
                "20.0 points ahead",
                "15.0 times flatter",
            ],
            "behind",
        ),
        (
            {"test_accuracy": 0.8, "lambda_max": 4.0},
            {"test_accuracy": 0.75, "lambda_max": 6.0},
            ["64 images of digits.", "5.0 points behind", "1.5 times sharper"],
            "learnt",
        ),
        (
            {"test_accuracy": 0.8, "lambda_max": -4.0},
            {"test_accuracy": 0.8},
            ["0.0 points ahead"],
            "eigenvalue",
        ),
    ],
)
def test_verdict_states_the_differences_in_words(base, method, said, unsaid):
    config = changed()
    records = [{"step": 1, "test/accuracy": 0.77}, {"step": 2, "train/loss": 1.0}]
    run = lambda figures: [run_dir.Outcome(figures | {"train_examples": 64, "steps": 2}, records)]
    words = report.verdict(config, tasks.build(config), {"a": run(base), "b": run(method)})
    assert all(part in words for part in [*said, "77.0% at its best epoch", "compare tiny_run"])
    assert unsaid not in words


def test_variants_are_named_by_their_differences():
    texts = ["adamw(1e-3)", "sam_perturb(0.1) | adamw(1e-3)", "sam_perturb(0.2) | adamw(1e-3)"]
    arms = comparison.variants(CONFIG, texts, fair=True)
    assert list(arms) == ["adamw", "adamw, 2 × epochs", *texts[1:]]
    assert [arm.epochs for arm in arms.values()] == [3, 6, 3, 3]
    assert [arm.optimizer for arm in arms.values()] == [texts[0], *texts]
    groups = ["per_group(4, sam_perturb(0.1)) | sgd(1.0)", "per_group(4, sgd(0.1)) | sgd(1.0)"]
    assert list(comparison.variants(CONFIG, groups)) == [
        "per_group(sam_perturb) | sgd",
        "per_group(sgd) | sgd",
    ]


def test_grid_has_every_point_with_the_last_field_fastest():
    arms = comparison.grid({"m": CONFIG}, {"rho": ["0", "0.1"], "data.label_noise": ["0.2", "0.4"]})
    settings = [(arm.rho, arm.data.label_noise) for arm in arms.values()]
    assert settings == [(0.0, 0.2), (0.0, 0.4), (0.1, 0.2), (0.1, 0.4)]
