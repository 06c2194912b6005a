"""A plan: what a step of each arm needs of a device, beside the first arm's, and what may help."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from curvax.planning.compiled_cost import Reading
from curvax.planning.topologies import GIB, Topology

Readings = Mapping[str, Reading]


def figures(reading: Reading, base: Reading, topology: Topology) -> dict[str, float]:
    """The numbers of a table's column: memory, FLOPs, collectives; without those unknown."""
    found = {"memory, MB": reading.needed / 1e6}
    if chip := topology.chip:
        found["% of the HBM"] = 100 * reading.needed / chip.memory
    found["memory × base"] = reading.needed / base.needed
    if reading.memory is None:
        return found
    memory = reading.memory
    found |= {f"  {name}, MB": size / 1e6 for name, size in memory._asdict().items()}
    found["GFLOP"] = reading.flops / 1e9
    found["GFLOP on all devices"] = len(topology.devices) * reading.flops / 1e9
    found["FLOPs × base"] = reading.flops / base.flops
    if chip:
        found["ms at the peak of bf16"] = 1e3 * reading.flops / chip.peak
    for kind, collective in reading.collectives.items():
        found[f"{kind}, times"] = collective.times
        found[f"{kind}, MB"] = collective.bytes / 1e6
    found["sent, × parameters"] = reading.sent / reading.parameters
    found["sent × base"] = reading.sent / base.sent if base.sent else math.nan
    return found


def table(readings: Readings, topology: Topology) -> Table:
    """A row for each figure, a column for each arm; the first is the base."""
    base = next(iter(readings.values()))
    columns = [figures(reading, base, topology) for reading in readings.values()]
    page = Table("a step, on each device", *map(escape, readings))
    for heading in dict.fromkeys(name for column in columns for name in column):
        page.add_row(heading, *(_text(column.get(heading, math.nan)) for column in columns))
    page.caption = f"{topology.name}: {len(topology.devices)} devices"
    if topology.chip:
        page.caption += f" with {topology.chip.memory / GIB:.4g} GiB of HBM for a program"
    return page


def _text(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.4g}"


def words(readings: Readings, tried: Mapping[str, Readings], topology: Topology) -> str:
    """What does not fit, and what became of it under each change of the config.

    Args:
        tried: for each arm that does not fit its readings by change.
    """
    lines = []
    for name, changes in tried.items():
        needed = readings[name].needed / GIB
        lines.append(
            f"{name} needs {needed:.3g} GiB of each device and does not fit. Compiled too:"
        )
        for change, reading in changes.items():
            verdict = "fits" if reading.fits else "does not fit"
            lines.append(f"  {change}  needs {reading.needed / GIB:.3g} GiB and {verdict}")
    if not tried:
        lines.append(f"Each of these fits {topology.name}." if topology.chip else "")
    return "\n".join(lines)


def as_json(
    readings: Readings, tried: Mapping[str, Readings], topology: Topology
) -> dict[str, Any]:
    """Everything that was read, with the table's figures."""
    base = next(iter(readings.values()))
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "arms": {
            name: {**reading.as_json(), "figures": figures(reading, base, topology)}
            for name, reading in readings.items()
        },
        "tried": {
            name: {change: reading.as_json() for change, reading in changes.items()}
            for name, changes in tried.items()
        },
    }
