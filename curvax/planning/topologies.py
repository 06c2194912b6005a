"""Machines to compile for: the devices of a TPU topology, or virtual CPU devices.

Programs are compiled for these devices and never run. TPU topologies come from `libtpu`, which
needs no TPU.
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

from curvax.training.runtime.errors import ConfigError

GIB = 2**30

# Without these libtpu queries the network for the machine it is on, logs that it got no answer, and
# refuses to be loaded while another process uses it. Any known accelerator type will do.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Chip(NamedTuple):
    """One device of a TPU generation."""

    memory: float  # bytes of HBM that a program may use
    peak: float  # FLOP/s in bfloat16
    example: str  # a topology's name
    options: Mapping[str, Any] = MappingProxyType({})  # for libtpu


# HBM: the limit in libtpu 0.0.42.1's out-of-memory error, a little below the built-in size. Peaks,
# per chip: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}. A v3 chip is two devices; a v4 chip
# is one device with its cores combined ("megacore"), as JAX presents it on the machine.
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
    chip: Chip | None  # None for CPUs, whose memory is not limited

    def compile(self, lowered: Any) -> Any:
        """Compiles a program lowered for these devices.

        Without JAX's compilation cache, which cannot read such programs back.
        """
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
        name: a TPU generation and its chips in each direction, as "v5e:16x16"; or "cpu:8" for
            eight virtual CPU devices, which must be requested before JAX initialises its devices.

    Raises:
        ConfigError: an unknown name or shape, no `libtpu`, or too few CPU devices.
    """
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to other processes
    kind, _, shape = name.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return Topology(name, _cpu(int(shape)), None)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(_unknown(name, "There is no such topology."))
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"The topology `{name}` needs `libtpu`, which is not installed: "
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
        raise ConfigError(_unknown(name, f"libtpu refuses it: {error}.")) from error
    return found.devices


def _cpu(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has devices already, perhaps enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"`cpu:{count}` needs {count} CPU devices, and JAX has made {len(devices)} already. "
            f"Set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts."
        )
    return devices[:count]


def _switch_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # makes JAX read the setting again


def _unknown(name: str, why: str) -> str:
    known = ", ".join(f"`{chip.example}`" for chip in CHIPS.values())
    return (
        f"`{name}` is not a topology to plan for. {why} A TPU generation and its chips in each "
        f"direction make one, as {known}; `cpu:8` is eight virtual CPU devices."
    )
