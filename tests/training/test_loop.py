"""Runs that are killed, resumed, stopped by full disks, signals and numbers that are not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from short_runs import CONFIG, assert_same_bits, changed

from curvax.training import checkpoints, loop, tasks
from curvax.training.checkpoints import CheckpointError, Checkpoints
from curvax.training.experiment import build
from curvax.training.runtime import run_dir
from curvax.training.runtime.preemption import Stopped
from curvax.training.step import watched_names

STEPS = 12  # 3 epochs of 64 examples in batches of 16


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


# Resuming.

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


# Stopping.


@pytest.mark.parametrize("at", [4, STEPS])
def test_termination_signal_saves_before_it_stops(at, experiment, reference, tmp_path):
    """The next step is the last one; at the end of a run the signal stops before another begins."""
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
