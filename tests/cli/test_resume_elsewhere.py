"""Resuming, evaluating and inspecting a run with its data in another path or on other devices."""

import json
import shutil

import jax
import mapped_run
import numpy as np
import pytest
from image_archives import make_images, write_idx

from curvax.cli import main
from curvax.training import pretrained
from curvax.training.compare.commands import OVERRIDABLE
from curvax.training.evaluation import trained_runs

DEVICES = 4
WHERE = ("resume", "evaluate", "inspect")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with `data` and a run of four steps on four devices, all its checkpoints kept."""
    root = tmp_path_factory.mktemp("whole")
    (root / "data").mkdir()
    for part, count in (("train", 16), ("t10k", 12)):
        write_idx(root / "data", part, make_images(count, 28, 28), np.arange(count) % 10)
    fields = ["--data.name=mnist", f"--data.path={root / 'data'}", "--data.num_train=16"]
    fields += [
        "--model.options.dropout=0.0",
        "--data.label_noise=0",
        "--batch=8",
        "--epochs=2",
        "--keep_checkpoints=9",
        "--checkpoint_every=1",
    ]
    begin = ["train", f"{mapped_run.__file__}:shard_map", *fields, f"--devices={DEVICES}"]
    with jax.enable_x64(False):
        assert main.main([*begin, f"--runs={root / 'runs'}"]) == 0
    return root


@pytest.fixture(autouse=True)
def _as_users_have_it(single_precision):
    pass


@pytest.fixture
def moved(whole, tmp_path):
    """The run and its data on another machine, where the data have another path."""
    (run,) = (whole / "runs").iterdir()
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(whole / "data", tmp_path / "new")
    rewritten(tmp_path / "run", path=str(tmp_path / "old"))
    return tmp_path / "run", tmp_path / "new"


def rewritten(run, **fields):
    """Changes the `data` of a run's config."""
    config = json.loads((run / "config.json").read_text())
    config["data"] |= fields
    (run / "config.json").write_text(json.dumps(config))


def seed(run):
    (folder,) = run.glob("*/seed0")
    return folder


def cut_short(run, at):
    """Removes checkpoints and results after a step."""
    (seed(run) / "results.json").unlink()
    for kept in (seed(run) / "checkpoints").glob("[0-9]*/"):
        if int(kept.name) > at:
            shutil.rmtree(kept)


def only_devices(monkeypatch, count):
    """Limits JAX to this number of devices."""
    found = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(jax, "device_count", lambda: count)


def weights(run):
    return pretrained.arrays(seed(run))


def scores(run):
    ((_, entry),) = json.loads((run / "evaluate.json").read_text()).items()
    return entry["results"]["own"]


@pytest.mark.parametrize("command", WHERE)
def test_missing_data_raises_with_the_path_option(command, moved, capsys):
    run, _ = moved
    assert main.main([command, str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run.parent / 'old'} does not exist" in said
    assert "`--data.path=PATH`" in said


def test_run_resumes_with_its_data_in_another_path(whole, moved):
    run, data = moved
    config = (run / "config.json").read_text()
    cut_short(run, at=2)
    assert main.main(["resume", str(run), f"--data.path={data}"]) == 0
    (first,) = (whole / "runs").iterdir()
    found, expected = weights(run), weights(first)
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (run / "config.json").read_text() == config


@pytest.mark.parametrize(
    "fields", [["--devices=1"], ["--devices=2", "--parallelism=jit", "--fsdp=True"]]
)
def test_run_resumes_on_another_number_of_devices(fields, whole, moved):
    """The groups are the same; sums in another order make the difference."""
    run, data = moved
    cut_short(run, at=2)
    assert main.main(["resume", str(run), f"--data.path={data}", *fields]) == 0
    (first,) = (whole / "runs").iterdir()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, weights(run), weights(first))


def test_run_is_evaluated_with_its_data_in_another_path(moved):
    run, data = moved
    assert main.main(["evaluate", str(run), f"--data.path={data}", "--eval_batch=4"]) == 0
    figures = json.loads((seed(run) / "results.json").read_text())
    assert scores(run)["test"]["top1"] == pytest.approx(figures["test_accuracy"])


@pytest.mark.parametrize(("there", "taken"), [(8, 4), (3, 2), (1, 1)])
def test_run_is_inspected_on_the_available_devices(there, taken, moved, monkeypatch):
    """As many of the run's four devices as exist and divide its batch of eight."""
    run, data = moved
    only_devices(monkeypatch, there)
    (subject,) = trained_runs.load([run], [f"--data.path={data}"])
    assert subject.experiment.parallelism.mesh.size == taken
    figures = json.loads((seed(run) / "results.json").read_text())
    tested = subject.experiment.test(subject.state)
    assert tested["loss"] == pytest.approx(figures["test_loss"], rel=1e-5)


def test_unavailable_devices_are_refused(moved, monkeypatch, capsys):
    run, data = moved
    only_devices(monkeypatch, 3)
    assert main.main(["resume", str(run), f"--data.path={data}"]) == 2
    assert "first of the 3 devices of a single process, and was 4" in capsys.readouterr().err
    assert main.main(["resume", str(run), f"--data.path={data}", "--devices=none"]) == 2
    assert "8 examples do not divide over 3 devices" in capsys.readouterr().err
    assert main.main(["evaluate", str(run), f"--data.path={data}", "--devices=9"]) == 2
    assert "was 9" in capsys.readouterr().err


@pytest.mark.parametrize("command", WHERE)
@pytest.mark.parametrize("other", ["--epochs=9", "--data.seq_len=5", "--devics=1", "--option"])
def test_fields_other_than_hardware_and_paths_are_refused(command, other, moved, capsys):
    run, data = moved
    assert main.main([command, str(run), f"--data.path={data}", other]) == 2
    said = capsys.readouterr().err
    assert f"is fixed except for hardware and paths, and got `{other}`" in said
    assert all(f"`--{field}`" in said for field in OVERRIDABLE)


@pytest.mark.parametrize("command", WHERE)
def test_help_lists_the_fields_that_can_change(command, capsys):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    said = capsys.readouterr().out
    assert all(f"--{field}=" in said for field in OVERRIDABLE)
