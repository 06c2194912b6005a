"""A training step and a topology ↦ memory, FLOPs and collectives of the compiled step, per device.

A compilation takes minutes and its result is a few numbers, so results are cached in a folder. The
key is a hash of the lowered program, the versions of the compilers and the topology.
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
    """Bytes on one device, by the compiler's memory analysis."""

    arguments: int
    outputs: int
    aliased: int  # outputs written over donated arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class CompiledCost(NamedTuple):
    """The cost of one step on each device.

    For a step whose compilation ran out of memory, only the first three fields are known.
    """

    parameters: int  # bytes of all parameters of the model
    needed: float  # bytes of memory
    fits: bool
    memory: Memory | None = None
    flops: float = float("nan")
    collectives: Mapping[str, Collective] = MappingProxyType({})
    seconds: float = 0.0  # of compilation
    factors: int = 0  # bytes of the Kronecker factors, which are averaged over the devices

    def as_json(self) -> dict[str, Any]:
        memory = self.memory and self.memory._asdict()
        sent = {kind: each._asdict() for kind, each in self.collectives.items()}
        return {**self._asdict(), "memory": memory, "collectives": sent}

    @property
    def sent(self) -> int:
        """Bytes of all collectives."""
        return sum(each.bytes for each in self.collectives.values())


def read(
    outline: Any, topology: Topology, folder: Path = FOLDER, report: Callable[[str], None] = print
) -> CompiledCost:
    """The cost of a step, read from the cache or compiled.

    Args:
        outline: the jitted `step`, and `state` and `batch` as sharded shapes on the devices.
        topology: the machine to compile for.
        folder: the cache; created if it is missing.
        report: called with "tracing" and "compiling" before these phases.

    Raises:
        JaxRuntimeError: the compiler fails for a reason other than memory.
    """
    report("tracing")
    lowered = outline.step.lower(outline.state, outline.batch)
    file = _file(folder, lowered, topology)
    if cost := _cached(file):
        return cost
    report("compiling")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(outline.state.params))
    cost = _compile(lowered, size, topology)._replace(factors=outline.factors)
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.write_text(file, json.dumps(cost.as_json()))
    return cost


def recall(outline: Any, topology: Topology, folder: Path = FOLDER) -> CompiledCost | None:
    """The cost of a step if it is in the cache, or None."""
    return _cached(_file(folder, outline.step.lower(outline.state, outline.batch), topology))


def _compile(lowered: Any, parameters: int, topology: Topology) -> CompiledCost:
    began = time.perf_counter()
    try:
        compiled = topology.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        found = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        needed = float(found[1]) * _UNITS[found[2]]
        return CompiledCost(parameters, needed, fits=False, seconds=time.perf_counter() - began)
    program = hlo.read(compiled)
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return CompiledCost(
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


def _cached(file: Path) -> CompiledCost | None:
    if not file.exists():
        return None
    fields = json.loads(file.read_text())
    memory = fields["memory"] and Memory(**fields["memory"])
    sent = {kind: Collective(**each) for kind, each in fields["collectives"].items()}
    return CompiledCost(**{**fields, "memory": memory, "collectives": sent})
