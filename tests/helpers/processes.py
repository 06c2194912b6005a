"""Starts the processes of a run on this machine and waits for them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import curvax

WORKER = Path(__file__).with_name("process_run.py")
LIMIT = 300  # seconds for every process to end, on busy machines


def start(count, *arguments, worker=WORKER, own=lambda number: ()):
    """Starts the processes of a run with the tested code, whichever version is installed.

    Each receives the arguments, and those of `own(number)`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = lambda number: subprocess.Popen(
        [sys.executable, worker, *map(str, (port, count, number, *arguments, *own(number)))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(curvax.__file__).parents[1])},
    )
    return [begin(number) for number in range(count)]


def ended(running):
    """(exit status, output) of each."""
    try:
        said = [each.communicate(timeout=LIMIT)[0] for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    return [(each.returncode, text) for each, text in zip(running, said)]
