"""The processes of one run: who is first, and what all agree on. Mostly there is one."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 30
"""Seconds of silence after which a process counts as lost, and the others stop."""


def join(coordinator: str | None, count: int | None, number: int | None) -> None:
    """Makes this one of the processes of a run, by JAX's distributed runtime.

    Args:
        coordinator: `host:port` of process 0. On TPU pods and under Slurm JAX knows all three.
        count: of the processes.
        number: of this one, from 0.

    Raises:
        ValueError: some of the three are given and others are not, or the number is out of range.
    """
    given = (coordinator, count, number)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            "A process is told all three of `--coordinator HOST:PORT`, `--processes N` and "
            f"`--process I`, and got {coordinator}, {count} and {number}. Where TPU pods, Slurm or "
            "MPI start the processes, `--distributed` alone will do."
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise ValueError(f"Processes are numbered from 0 to {count - 1}, and this is {number}.")
    jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)


def leave(status: int) -> NoReturn:
    """Ends this process at once, so that JAX's runtime tells the others that it is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def agreed(text: str) -> str:
    """The first process's text, for all."""
    if jax.process_count() == 1:
        return text
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    padded = np.zeros(length, np.uint8)
    if first():
        padded[:] = np.frombuffer(text.encode(), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


def way_back(folder: Path) -> str:
    """What a process that is not the first says when it begins.

    Between CPUs the library that sends (Gloo) may abort this process as soon as another dies, in a
    thread of its own, before anybody can say what happened.
    """
    return (
        f"Process {jax.process_index()} of {jax.process_count()}. If it ends early, another one "
        f"was lost: start all again with `curvax resume {folder}`."
    )


class ProcessLost(ConnectionError):
    """A run that cannot go on since one of its processes is gone."""


def lost(error: Exception, folder: Path) -> Exception:
    """What an error of the runtime means to a run of several processes.

    To one alone it is itself, and so is a want of memory, which all meet.
    """
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
        return error
    return ProcessLost(
        f"process {jax.process_index()} of {jax.process_count()} lost another one in the middle of "
        f"a step ({str(error).partition(chr(10))[0][:200]}). What was saved is whole: start all "
        f"processes again with `curvax resume {folder}`."
    )
