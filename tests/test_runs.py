"""The folder of a run: where it goes, whose it is, and what is said of a damaged one."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import curvax
from curvax.cli import main
from curvax.training.compare import commands, comparison
from curvax.training.runtime import run_dir
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.preemption import Stopped

TINY = str(Path(tiny_run.__file__))
HOLDER = """
import sys, time
from pathlib import Path
from curvax.training.runtime import run_dir
with run_dir.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def complaint(capsys, *arguments, status=2):
    """What a command that must fail says."""
    assert main.main([str(each) for each in arguments]) == status
    said = capsys.readouterr().err
    assert said.startswith("curvax: ")
    assert "Traceback" not in said
    return said


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was stopped before its first step."""
    config = commands.configure(TINY, ["--epochs=1"])
    folder = run_dir.create(tmp_path, "train", config)
    run_dir.write_spec(folder, commands.RunSpec("train", [config.optimizer])._asdict())
    return folder


# Whose it is.


def test_a_run_under_way_is_refused_to_another_and_free_when_it_is_killed(begun, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(begun)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(curvax.__file__).parents[1])},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = complaint(capsys, "resume", begun)
        assert f"process {holder.pid} on {socket.gethostname()} holds it" in said
        assert "Wait until it ends, or stop it" in said
        assert not list(begun.glob("*/seed0/results.json"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run_dir.locked(begun):
        pass


def test_a_run_is_held_while_it_trains_and_what_holds_it_is_not_listed(begun, capsys, monkeypatch):
    train, refused = comparison.run, []

    def look(experiments, seeds, folder, *rest, **options):
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on "),
            run_dir.locked(folder),
        ):
            pass
        refused.append(folder)
        return train(experiments, seeds, folder, *rest, **options)

    monkeypatch.setattr(comparison, "run", look)
    (begun / ".lock").write_text("process 1 on a host that is gone")
    assert main.main(["resume", str(begun)]) == 0
    assert refused == [begun]
    assert list(begun.glob("*/seed0/results.json"))
    (listed,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("In ")]
    assert "config.json, curves.png" in listed
    assert ".lock" not in listed
    with run_dir.locked(begun):
        pass


@pytest.mark.skipif(run_dir.fcntl is None, reason="has no `flock`")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_no_obstacle(number, tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_dir.fcntl, "flock", fail)
    if number == errno.ENOLCK:
        with run_dir.locked(tmp_path), run_dir.locked(tmp_path):
            pass
    else:
        with pytest.raises(OSError, match=os.strerror(number)), run_dir.locked(tmp_path):
            pass


# Where it goes, and how to come back to it.


@pytest.mark.parametrize("command", ["train", "compare", "bench"])
def test_a_place_without_room_for_runs_is_met_before_the_preparation(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(commands.RunSpec, "prepare", None)
    (tmp_path / "file").touch()
    said = complaint(capsys, command, TINY, "--runs", tmp_path / "file" / "runs")
    assert f"no folder can be made in {tmp_path / 'file'} (Not a directory)" in said
    assert "`--runs DIR`" in said


def test_a_place_for_runs_is_looked_at_without_a_trace(tmp_path):
    run_dir.check_root(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("end", "status"), [(KeyboardInterrupt(), 130), (Stopped("it was asked to terminate."), 143)]
)
def test_a_run_that_is_stopped_says_how_to_go_on(end, status, begun, capsys, monkeypatch):
    def stop(*_, **__):
        raise end

    monkeypatch.setattr(comparison, "run", stop)
    said = complaint(capsys, "resume", begun, status=status)
    assert f"`curvax resume {begun}` goes on from " in said


# Damaged.


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("config.json", "{", "Expecting property name"),
        ("config.json", "{}", "it holds no config"),
        ("config.json", "[]", "it holds no config"),
        ("run.json", "", "Expecting value"),
        ("run.json", '{"x": 1}', "it names no command"),
        ("run.json", '{"command": "trian", "optimizers": []}', "it names no command"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, text, cause, begun, capsys):
    (begun / name).write_text(text)
    said = complaint(capsys, "resume", begun)
    assert f"{begun / name} is damaged ({cause}" in said
    assert "or train anew" in said
