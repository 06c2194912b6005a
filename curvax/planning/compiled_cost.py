"""A training step compiled for a topology ↦ what each device needs for it: memory, FLOPs, sends.

A reading is kept under the hash of the program before its compilation, the versions of the
compilers and the topology, since a compilation takes minutes and a reading is a few numbers.
"""

import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from curvax.planning import collectives, flops, hlo
from curvax.planning.collectives import Collective
from curvax.planning.topologies import GIB, Topology
from curvax.training.runtime import run_dir

FOLDER = Path("~/.cache/curvax/plans").expanduser()

_COMPILERS = ("jax", "jaxlib", "libtpu")
_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


class Memory(NamedTuple):
    """Bytes on one device, as the compiler lays them out."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, that take the place of arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Reading(NamedTuple):
    """What one step needs of each device. A step that does not fit has no more than `needed`."""

    parameters: int  # bytes of all parameters of the model
    needed: float  # bytes of memory
    fits: bool
    memory: Memory | None = None
    flops: float = float("nan")
    collectives: Mapping[str, Collective] = MappingProxyType({})
    seconds: float = 0.0  # that its compilation took

    def as_json(self) -> dict[str, Any]:
        memory = self.memory and self.memory._asdict()
        sent = {kind: each._asdict() for kind, each in self.collectives.items()}
        return {**self._asdict(), "memory": memory, "collectives": sent}

    @property
    def sent(self) -> int:
        """Bytes of all collectives."""
        return sum(each.bytes for each in self.collectives.values())


def read(
    outline: Any, topology: Topology, folder: Path = FOLDER, told: Callable[[str], None] = print
) -> Reading:
    """The reading of a step, from the folder if it was compiled before.

    Args:
        outline: `step`, jitted, and the shapes of its `state` and `batch`, laid out on the devices.
        topology: that it is for.
        folder: where readings are kept; made where it is missing.
        told: called with what is being done, before each part that takes long.

    Raises:
        JaxRuntimeError: the compiler fails for another reason than memory.
    """
    told("tracing")
    lowered = outline.step.lower(outline.state, outline.batch)
    file = _file(folder, lowered, topology)
    if reading := _kept(file):
        return reading
    told("compiling")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(outline.state.params))
    reading = _compile(lowered, size, topology)
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.write_text(file, json.dumps(reading.as_json()))
    return reading


def recall(outline: Any, topology: Topology, folder: Path = FOLDER) -> Reading | None:
    """The reading of a step if it was compiled before."""
    return _kept(_file(folder, outline.step.lower(outline.state, outline.batch), topology))


def _compile(lowered: Any, parameters: int, topology: Topology) -> Reading:
    began = time.perf_counter()
    try:
        compiled = topology.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        found = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        needed = float(found[1]) * _UNITS[found[2]]
        return Reading(parameters, needed, fits=False, seconds=time.perf_counter() - began)
    program = hlo.read(compiled)
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Reading(
        parameters,
        memory.total,
        topology.chip is None or memory.total <= topology.chip.memory,
        memory,
        flops.count(compiled, program),
        collectives.count(program),
        time.perf_counter() - began,
    )


def _file(folder: Path, lowered: Any, topology: Topology) -> Path:
    found = {name: _version(name) for name in _COMPILERS}
    key = hashlib.sha256(f"{topology.name} {found} {lowered.as_text()}".encode()).hexdigest()
    return folder / f"{key}.json"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _kept(file: Path) -> Reading | None:
    if not file.exists():
        return None
    fields = json.loads(file.read_text())
    memory = fields["memory"] and Memory(**fields["memory"])
    sent = {kind: Collective(**each) for kind, each in fields["collectives"].items()}
    return Reading(**{**fields, "memory": memory, "collectives": sent})
