"""The processes of one run: who is first, and what all agree on. Mostly there is one."""

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
    """
    jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)


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
