"""The folder of a run: its place, its lock, its logs and damaged files."""

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from short_runs import CONFIG
from tensorboardX.proto.event_pb2 import Event

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
    """The error output of a command that must fail."""
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


# The lock.


def test_run_in_progress_is_locked_until_its_process_ends(begun, capsys):
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


def test_run_is_locked_while_it_trains_and_the_lock_file_is_hidden(begun, capsys, monkeypatch):
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
def test_missing_file_locks_are_tolerated(number, tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_dir.fcntl, "flock", fail)
    if number == errno.ENOLCK:
        with run_dir.locked(tmp_path), run_dir.locked(tmp_path):
            pass
    else:
        with pytest.raises(OSError, match=os.strerror(number)), run_dir.locked(tmp_path):
            pass


# Its place, and how to resume.


@pytest.mark.parametrize("command", ["train", "compare", "bench"])
def test_unwritable_run_root_is_refused_before_preparation(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands.RunSpec, "prepare", None)
    (tmp_path / "file").touch()
    said = complaint(capsys, command, TINY, "--runs", tmp_path / "file" / "runs")
    assert f"no folder can be made in {tmp_path / 'file'} (Not a directory)" in said
    assert "`--runs DIR`" in said


def test_check_root_creates_nothing(tmp_path):
    run_dir.check_root(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("end", "status"), [(KeyboardInterrupt(), 130), (Stopped("it was asked to terminate."), 143)]
)
def test_stopped_run_says_how_to_resume(end, status, begun, capsys, monkeypatch):
    def stop(*_, **__):
        raise end

    monkeypatch.setattr(comparison, "run", stop)
    said = complaint(capsys, "resume", begun, status=status)
    assert f"`curvax resume {begun}` goes on from " in said


# Damaged files.


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


def test_fields_added_after_a_run_have_their_defaults(tmp_path):
    folder = run_dir.create(tmp_path, "train", CONFIG)
    file = folder / "config.json"
    old = json.loads(file.read_text())
    del old["init_from"], old["data"]["labels"], old["data"]["image_size"]
    file.write_text(json.dumps(old))
    read = run_dir.read_config(folder)
    assert (read.init_from, read.data.labels, read.data.image_size) == (None, None, None)
    assert (read.batch, read.data.label_noise) == (CONFIG.batch, CONFIG.data.label_noise)
