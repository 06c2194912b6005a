"""The processes of a run: joining them, exchanging small values, failing together.

With a single process all of this does nothing.
"""

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

from curvax.training.runtime.errors import EXPECTED, ConfigError

HEARTBEAT = 30
"""Seconds without a heartbeat after which a process counts as lost, and the others stop."""


def join(coordinator: str | None, count: int | None, number: int | None) -> None:
    """Makes this process one of several, by JAX's distributed runtime.

    All arguments are None on TPU pods and under Slurm or MPI, where JAX finds them itself. If the
    other processes do not join within five minutes, the runtime ends this one.

    Args:
        coordinator: `host:port` of process 0.
        count: number of processes.
        number: this process's number, from 0.

    Raises:
        ConfigError: only some of the three are given, one is invalid, or JAX cannot join the
            others.
    """
    given = (coordinator, count, number)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ConfigError(
            "A process needs all three of `--coordinator HOST:PORT`, `--processes N` and "
            f"`--process I`, and got {coordinator}, {count} and {number}. If a TPU pod, Slurm or "
            "MPI starts the processes, `--distributed` alone is enough."
        )
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ConfigError(
            f"`--coordinator` is where process 0 listens, HOST:PORT, and was `{coordinator}`. Give "
            "its host and a free port, as in `10.0.0.1:8476`."
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise ConfigError(f"Processes are numbered from 0 to {count - 1}, and this is {number}.")
    try:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(_not_joined(coordinator, error)) from error


def _not_joined(coordinator: str | None, error: Exception) -> str:
    if coordinator is None:
        return (
            "`--distributed` joins processes that a TPU pod, Slurm or MPI started, and JAX found "
            f"none of these here ({error}). Start the processes with one of them, or give each "
            "`--coordinator HOST:PORT`, `--processes N` and `--process I`."
        )
    return (
        f"This process could not join the others at {coordinator} ({error}). Process 0 listens "
        "there: give its own host and a port that is free."
    )


def leave(status: int) -> NoReturn:
    """Ends this process at once, so that JAX's runtime reports it as lost to the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first() -> bool:
    """Whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, in the order of their numbers.

    Raises:
        ProcessLost: another process has died.
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
            f"{_lost(error)} before the run began. See the output of that process, and start all "
            "again."
        ) from error
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths)]


def agreed(value: Any) -> Any:
    """The value of the first process; errors as in `gathered`."""
    return gathered(value)[0]


class Refused(ValueError):
    """An error that all processes raise, so that all of them end in order."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs the block on all processes; if one fails, all raise.

    With a single process errors propagate unchanged.

    Raises:
        Refused: the error of this process, or else that of another one.
    """
    if _alone():
        yield
        return
    own = None
    try:
        yield
    except EXPECTED as error:
        own = error
    reasons = gathered(own and str(own))
    if own is not None:
        raise Refused(str(own)) from own
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise Refused(f"Process {number} of {len(reasons)} did not begin: {reason}")


def require_same(options: Mapping[str, Any]) -> None:
    """Checks that all processes have the same options.

    Args:
        options: name ↦ JSON value.

    Raises:
        Refused: an option differs; the message names the first.
    """
    first, *others = gathered(options)
    for number, other in enumerate(others, start=1):
        for name in first | other:
            mine, theirs = first.get(name), other.get(name)
            if mine != theirs:
                raise Refused(
                    f"All processes of a run have the same options, and `{name}` is {mine!r} in "
                    f"process 0 and {theirs!r} in process {number}. Start them with the same "
                    "options, except for `--process`."
                )


def resume_hint(folder: Path) -> str:
    """The message that every process but the first prints when it starts.

    On CPUs the communication library (Gloo) may abort this process from a thread of its own as soon
    as another one dies, before an error can be reported.
    """
    return (
        f"Process {jax.process_index()} of {jax.process_count()}. If it ends early, another one "
        f"was lost: start all again with `curvax resume {folder}`."
    )


class ProcessLost(ConnectionError):
    """A run that cannot continue because one of its processes died."""


def lost(error: Exception, folder: Path) -> Exception:
    """The error to raise for an error of JAX's runtime.

    With several processes it means that another one was lost, except for a lack of memory. With a
    single process the error is returned unchanged.
    """
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
        return error
    return ProcessLost(
        f"{_lost(error)} during training. Saved checkpoints are intact: start all processes again "
        f"with `curvax resume {folder}`."
    )


def _lost(error: Exception) -> str:
    reason = str(error).partition("\n")[0][:200]
    return f"process {jax.process_index()} of {jax.process_count()} lost another one ({reason})"


def _alone() -> bool:
    """Whether there are no other processes; does not initialise the devices needlessly."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1
