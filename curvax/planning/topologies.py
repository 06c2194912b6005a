"""Machines that are not at hand: the devices of a TPU topology, or virtual CPU devices.

A topology's devices can be compiled for and never run. TPU topologies are answered by `libtpu`,
which needs no TPU.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

GIB = 2**30

# Without these libtpu asks the network which machine it is on, tells what it did not hear, and
# refuses to be loaded twice, as beside a training; the type is any that it knows.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class TopologyError(ValueError):
    """A topology that there is not, or that nothing here can answer for."""


class Chip(NamedTuple):
    """What one device of a generation has."""

    memory: float  # bytes of HBM that a program may use
    peak: float  # FLOP/s in bfloat16
    example: str  # a topology of it
    options: Mapping[str, Any] = MappingProxyType({})  # to ask libtpu with


# HBM as libtpu 0.0.42.1 says in its error when a program needs more, which is a little below what
# is built in. Peaks from docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, by chip; a chip of v3
# is two devices, and one of v4 a single one when its cores work together ("megacore"), as JAX has
# it on the machine.
CHIPS = {
    "v3": Chip(15.48 * GIB, 123e12 / 2, "v3:4x8"),
    "v4": Chip(30.75 * GIB, 275e12, "v4:4x4x4", {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, 197e12, "v5e:16x16"),
    "v5p": Chip(95.74 * GIB, 459e12, "v5p:4x4x8"),
    "v6e": Chip(31.25 * GIB, 918e12, "v6e:16x16"),
}


class Topology(NamedTuple):
    """A machine to compile for."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None  # None for CPUs, whose memory is the machine's

    def compile(self, lowered: Any) -> Any:
        """What was lowered for these devices, compiled; JAX's cache cannot read theirs again."""
        if self.chip is None:
            return lowered.compile()
        enabled = jax.config.values["jax_enable_compilation_cache"]
        _switch_cache(False)
        try:
            return lowered.compile()
        finally:
            _switch_cache(enabled)


def find(name: str) -> Topology:
    """The topology of that name.

    Args:
        name: a TPU generation and its chips in each direction, as "v5e:16x16", or "cpu:8" for so
            many virtual CPU devices, which must be asked for before JAX has made its devices.

    Raises:
        TopologyError: an unknown name or shape, no `libtpu`, or too few CPU devices.
    """
    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed, nor taken from others
    kind, _, shape = name.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return Topology(name, _cpu(int(shape)), None)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise TopologyError(_unknown(name, "There is no such topology."))
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"The topology `{name}` is answered by `libtpu`, which is not installed: "
            "pip install 'curvax[tpu]'. Without it `cpu:8` plans for eight virtual CPU devices."
        )
    chip = CHIPS[kind]
    return Topology(name, _tpu(name, chip), chip)


def _tpu(name: str, chip: Chip) -> Sequence[Any]:
    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **chip.options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise TopologyError(_unknown(name, f"libtpu refuses it: {error}.")) from error
    return found.devices


def _cpu(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # there are devices already, perhaps enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TopologyError(
            f"`cpu:{count}` needs {count} CPU devices, and JAX has made {len(devices)} already. "
            f"Set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts."
        )
    return devices[:count]


def _switch_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # asks the switch anew


def _unknown(name: str, why: str) -> str:
    known = ", ".join(f"`{chip.example}`" for chip in CHIPS.values())
    return (
        f"`{name}` is no topology to plan for. {why} A TPU generation and its chips in each "
        f"direction make one, as {known}; `cpu:8` is eight virtual CPU devices."
    )
