"""Two processes of four devices over loopback: the numbers of one process, and faults."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import mapped_run
import numpy as np
import orbax.checkpoint as ocp
import photographs
import pytest
from processes import LIMIT, ended, start

from curvax.training import loop, pretrained
from curvax.training.checkpoints import Checkpoints
from curvax.training.compare.commands import RunSpec
from curvax.training.data import convert
from curvax.training.experiment import build
from curvax.training.runtime import distributed, run_dir

CONFIG = str(Path(mapped_run.__file__))


def carried_out(count, *arguments):
    """The output of the first process of a successful run."""
    results = ended(start(count, *arguments))
    assert [status for status, _ in results] == [0] * count, results
    return results[0][1]


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def wait_for(path_of, running):
    """Waits until a path exists."""
    for _ in range(10 * LIMIT):
        if any(path_of()):
            return
        assert all(each.poll() is None for each in running), ended(running)
        time.sleep(0.1)
    raise AssertionError("the run did not come that far")


def end_of(folder, mapping):
    """The final state of a run of any sharding, as one process reads it."""
    with jax.enable_x64(False):
        experiment = build(
            mapped_run.changed(mapped_run.get_config(mapping), devices=1, parallelism="jit")
        )
        kept = Checkpoints(only(folder, "*/*/seed0/checkpoints"), read_only=True)
        state = kept.restore(experiment.shapes)[0]
    return jax.device_get((state.step, state.params, state.model_state))


def weights(folder):
    """Of the newest checkpoint of the run there, by name."""
    return pretrained.arrays(only(folder, "*/*/seed0"))


def cut_short(whole, folder, at=None):
    """A copy of the run in `whole`, as it was at its last checkpoint but one, that of step `at`."""
    run = shutil.copytree(only(whole, "mapped_run*"), folder / "run")
    seed = only(run, "*/seed0")
    (seed / "results.json").unlink()
    *_, before, last = sorted((seed / "checkpoints").glob("[0-9]*/"), key=lambda p: int(p.name))
    assert at is None or before.name == str(at)
    shutil.rmtree(last)
    return run


@pytest.fixture(scope="module", params=["shard_map", "pmap", "fsdp"])
def undisturbed(request, tmp_path_factory):
    """A parallelism, and the folder of its run by two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    carried_out(2, "train", f"{CONFIG}:{request.param}", "--runs", folder)
    return request.param, folder


def test_two_processes_end_with_the_numbers_of_one(undisturbed, tmp_path):
    mapping, folder = undisturbed
    alone = tmp_path / "run" / "0-arm" / "seed0"
    alone.mkdir(parents=True)
    with jax.enable_x64(False):
        figures = loop.fit(build(mapped_run.get_config(mapping)), alone).metrics
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    jax.tree.map(close, end_of(folder, mapping), end_of(tmp_path, mapping))
    found = json.loads(only(folder, "*/*/seed0/results.json").read_text())
    for name in ("test_loss", "train_loss", "train_examples", "steps"):
        assert found[name] == pytest.approx(figures[name], rel=1e-3), name


def assert_told(status, said):
    """Asserts that a survivor ends with the command to resume in its log.

    JAX, curvax and Gloo race to report the cause, and Gloo aborts in a thread of its own: it
    aborted first in 2 of 10 kills of process 0.
    """
    assert status != 0
    assert "curvax resume " in said
    assert any(cause in said for cause in ("another task died", "lost another one", "gloo::"))


# Tests that do not depend on the parallelism: lost processes, weights and labels.
IN_ONE_MAPPING = pytest.mark.parametrize("undisturbed", ["shard_map"], indirect=True)


@IN_ONE_MAPPING
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_stops_the_run_and_resume_undoes_it(killed, undisturbed, tmp_path):
    mapping, whole = undisturbed
    running = start(2, "train", f"{CONFIG}:{mapping}", "--runs", tmp_path)
    wait_for(lambda: tmp_path.glob("*/*/seed0/checkpoints/4.sha256"), running)
    running[killed].kill()
    began = time.monotonic()
    results = ended(running)
    assert time.monotonic() - began < 60
    assert_told(*results[1 - killed])
    assert not list(tmp_path.glob("*/*/seed0/results.json"))
    carried_out(2, "resume", only(tmp_path, "mapped_run*"))
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, end_of(tmp_path, mapping), end_of(whole, mapping))


def test_process_lost_in_a_checkpoint_is_not_reported_as_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("KILLED", "1")
    survivor, _ = ended(start(2, "train", f"{CONFIG}:shard_map", "--runs", tmp_path))
    assert_told(*survivor)
    assert "could not be written" not in survivor[1]
    kept = {path.name for path in tmp_path.glob("*/*/seed0/checkpoints/*.sha256")}
    assert kept == {"0.sha256", "2.sha256"}


@pytest.mark.parametrize("what", ["save", "restore"])
def test_runtime_error_while_saving_is_not_reported_as_a_disk_error(what, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed")

    config = mapped_run.changed(mapped_run.get_config(), epochs=1)
    with jax.enable_x64(False):
        experiment = build(config)
        kept = Checkpoints(tmp_path)
        state, batches = kept.resume(experiment)
        monkeypatch.setattr(ocp.CheckpointManager, what, fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
            kept.resume(experiment) if what == "restore" else kept.save(state, batches.get_state())


@pytest.mark.parametrize("spoilt", [0, 1])
def test_error_in_one_process_ends_all(spoilt, monkeypatch, tmp_path):
    monkeypatch.setenv("SPOILT", str(spoilt))
    results = ended(start(2, "train", f"{CONFIG}:shard_map", "--runs", tmp_path))
    status, said = results[spoilt]
    assert status == 2
    assert "curvax: an image of this process is damaged" in said
    assert_told(*results[1 - spoilt])
    assert not list(tmp_path.glob("*/*/seed0/results.json"))


def test_nan_in_one_process_stops_both_at_the_same_step(monkeypatch, tmp_path):
    monkeypatch.setenv("POISONED", "1")
    said: list[list[str]] = []
    for status, text in ended(start(2, "train", f"{CONFIG}:shard_map", "--runs", tmp_path)):
        assert status not in (0, None)
        said.append(re.findall(r"step (\d+): the loss is NaN", text))
    assert all(said), "each process says at which step"
    (step,) = {int(number) for found in said for number in found}
    assert step > 2
    kept = only(tmp_path, "*/*/seed0/checkpoints").glob("[0-9]*/")
    assert max(int(path.name) for path in kept) == step - 1


@IN_ONE_MAPPING
def test_two_processes_start_from_weights_and_pseudo_labels(undisturbed, tmp_path):
    """A run at learning rate zero ends with the weights of the first, and has its labels."""
    mapping, whole = undisturbed
    first = only(whole, "*/*/seed0")
    still = ["--optimizer=pmean_updates(axes) | sgd(0.0)", "--epochs=1"]
    taken = [f"--init_from={first}", f"--data.labels={first}"]
    carried_out(2, "train", f"{CONFIG}:{mapping}", *still, *taken, "--runs", tmp_path)
    found, expected = weights(tmp_path), weights(whole)
    for name, x in expected.items():
        if name.startswith("params/"):
            np.testing.assert_array_equal(found[name], x)
    config = mapped_run.get_config(mapping)
    config.data.labels = str(first)
    wrong = build(config).data.wrong.mean()
    results = json.loads(only(tmp_path, "*/*/seed0/results.json").read_text())
    assert results["wrong_labels"] == pytest.approx(wrong)


def test_run_resumes_on_four_processes(undisturbed, tmp_path):
    """From the last checkpoint but one; sums in another order make the difference."""
    mapping, whole = undisturbed
    carried_out(4, "resume", cut_short(whole, tmp_path))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    jax.tree.map(close, end_of(tmp_path, mapping), end_of(whole, mapping))


@pytest.mark.parametrize(("count", "close"), [(2, 0.0), (4, 2e-4)])
def test_processes_resume_on_records_in_the_middle_of_an_epoch(count, close, records):
    """From step 14 of epochs of 3."""
    whole, root = records
    parted = root / f"by {count}"
    carried_out(count, "resume", cut_short(whole, parted, at=14))
    found, expected = weights(parted), weights(whole)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=10 * close, atol=close, err_msg=name)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The folder of a run by two processes on images in records, and that of its data."""
    root = photographs.write_parts(tmp_path_factory.mktemp("records"), 64, 5)
    convert.convert(convert.find_parts(root), root / "made")
    pictures = ["--data.name=records", f"--data.path={root / 'made'}", "--data.image_size=8"]
    pictures += ["--data.num_train=192", "--data.label_noise=0.0"]
    carried_out(2, "train", f"{CONFIG}:shard_map", *pictures, "--runs", root / "whole")
    return root / "whole", root


def test_sigterm_to_one_process_saves_in_both(tmp_path):
    running = start(2, "train", f"{CONFIG}:shard_map", "--runs", tmp_path)
    wait_for(lambda: tmp_path.glob("*/*/seed0/checkpoints/4.sha256"), running)
    running[1].send_signal(signal.SIGTERM)
    for status, said in ended(running):
        assert status == 143
        assert "asked to terminate after step" in said
        assert f"`curvax resume {only(tmp_path, 'mapped_run*')}` goes on from there" in said
    step = int(said.partition("after step ")[2].partition(".")[0])
    steps = {int(path.name) for path in tmp_path.glob("*/*/seed0/checkpoints/[0-9]*/")}
    assert step in steps


def test_only_connection_errors_are_reported_as_a_lost_process(monkeypatch, tmp_path):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer")
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert distributed.lost(gone, tmp_path) is gone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = distributed.lost(gone, tmp_path)
    assert "0 of 2 lost another one" in str(told)
    assert f"curvax resume {tmp_path}" in str(told)
    assert distributed.lost(full, tmp_path) is full


@pytest.mark.parametrize(
    ("own", "cause"),
    [
        (lambda number: [f"--epochs={number + 1}"], "`epochs` is 1 in process 0 and 2 in"),
        (lambda number: [f"--rho={['0.1', 'much'][number]}"], "`rho` has the type `float`"),
        (lambda number: ["--batch=0"], "`batch` is a whole number from 1"),
    ],
)
def test_different_or_wrong_arguments_in_one_process_end_all(own, cause, tmp_path):
    results = ended(start(2, "train", f"{CONFIG}:shard_map", "--runs", tmp_path, own=own))
    for status, said in results:
        assert status == 2
        assert [line for line in said.splitlines() if line.startswith("curvax: ")] != []
        assert cause in said.partition("curvax: ")[2]
        assert "Traceback" not in said
        assert "*** " not in said, "no stack of JAX's runtime"
    assert not list(tmp_path.iterdir())


def test_processes_that_resume_different_runs_are_refused(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    config = mapped_run.get_config("shard_map")
    for folder in folders:
        folder.mkdir()
        run_dir.write_json(folder / "config.json", config.to_dict())
        run_dir.write_spec(folder, RunSpec("train", ["sgd(0.1)"])._asdict())
    for status, said in ended(start(2, "resume", own=lambda number: [folders[number]])):
        assert status == 2
        assert "`folder` is 'a' in process 0 and 'b' in process 1" in said
        assert "*** " not in said, "no stack of JAX's runtime"


@pytest.mark.parametrize("coordinator", ["foo", "foo:", ":8476", "foo:port"])
def test_coordinator_without_host_or_port_is_refused(coordinator):
    with pytest.raises(ValueError, match=f"HOST:PORT, and was `{coordinator}`. Give"):
        distributed.join(coordinator, 1, 0)


def test_failure_to_join_raises_with_the_cure(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"10.0.0.1:8476 .*RPC server.* a port that is free"):
        distributed.join("10.0.0.1:8476", 2, 0)
    with pytest.raises(ValueError, match=r"found none of these here .*--coordinator HOST:PORT"):
        distributed.join(None, None, None)


def test_process_options_are_needed_together():
    with pytest.raises(ValueError, match="needs all three"):
        distributed.join("127.0.0.1:1", 2, None)
    with pytest.raises(ValueError, match="numbered from 0 to 1"):
        distributed.join("127.0.0.1:1", 2, 2)
