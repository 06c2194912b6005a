"""The processes of one run: who is first, and what all agree on. Mostly there is one."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

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
        ValueError: some of the three are given and others are not, one of them cannot be, or JAX
            cannot join the others. Where they do not come within five minutes, it ends the process.
    """
    given = (coordinator, count, number)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            "A process is told all three of `--coordinator HOST:PORT`, `--processes N` and "
            f"`--process I`, and got {coordinator}, {count} and {number}. Where TPU pods, Slurm or "
            "MPI start the processes, `--distributed` alone will do."
        )
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ValueError(
            f"`--coordinator` is where process 0 listens, HOST:PORT, and was `{coordinator}`. Give "
            "its host and a free port, as in `10.0.0.1:8476`."
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise ValueError(f"Processes are numbered from 0 to {count - 1}, and this is {number}.")
    try:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ValueError(_not_joined(coordinator, error)) from error


def _not_joined(coordinator: str | None, error: Exception) -> str:
    if coordinator is None:
        return (
            f"`--distributed` joins what a TPU pod, Slurm or MPI started, and JAX found no such "
            f"group here ({error}). Start the processes with one of these, or tell each "
            "`--coordinator HOST:PORT`, `--processes N` and `--process I`."
        )
    return (
        f"This process could not join the others at {coordinator} ({error}). Process 0 listens "
        "there: give a host of its own and a port that is free."
    )


def leave(status: int) -> NoReturn:
    """Ends this process at once, so that JAX's runtime tells the others that it is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """The value of every process, anything that JSON can hold, in the order of their numbers.

    Raises:
        ProcessLost: another one is gone.
    """
    if _alone():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    try:
        lengths = multihost_utils.process_allgather(np.int32(text.size))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: text.size] = text
        rows = multihost_utils.process_allgather(padded)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(
            f"{_lost(error)} before the run began. See what that one said, and start all again."
        ) from error
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths)]


def agreed(value: Any) -> Any:
    """The first process's value, for all; errors as in `gathered`."""
    return gathered(value)[0]


class Refused(ValueError):
    """What all processes of a run decline to do, so that all of them end in order."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes well in every process or ends all of them. To one alone errors are themselves.

    Raises:
        Refused: the error of this process, or else that of another one.
    """
    if _alone():
        yield
        return
    own = None
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        own = error
    reasons = gathered(own and str(own))
    if own is not None:
        raise Refused(str(own)) from own
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise Refused(f"Process {number} of {len(reasons)} did not begin: {reason}")


def require_same(options: Mapping[str, Any]) -> None:
    """Passes processes that were all told the same.

    Args:
        options: by name, values that JSON can hold.

    Raises:
        Refused: naming the first option that differs.
    """
    first, *others = gathered(options)
    for number, other in enumerate(others, start=1):
        for name in first | other:
            mine, theirs = first.get(name), other.get(name)
            if mine != theirs:
                raise Refused(
                    f"All processes of a run are told the same, and `{name}` is {mine!r} in "
                    f"process 0 and {theirs!r} in process {number}. Start them with the same "
                    "options, but for `--process`."
                )


def resume_hint(folder: Path) -> str:
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
        f"{_lost(error)} while it trained. What was saved is whole: start all processes again "
        f"with `curvax resume {folder}`."
    )


def _lost(error: Exception) -> str:
    reason = str(error).partition("\n")[0][:200]
    return f"process {jax.process_index()} of {jax.process_count()} lost another one ({reason})"


def _alone() -> bool:
    """Whether there are no others; asks for no devices before it must."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1
