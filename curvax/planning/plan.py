"""The table and JSON of `curvax plan`: the cost of each variant, and its ratio to the first."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from curvax.planning.compiled_cost import CompiledCost
from curvax.planning.topologies import GIB, Topology

Costs = Mapping[str, CompiledCost]


def figures(cost: CompiledCost, base: CompiledCost, topology: Topology) -> dict[str, float]:
    """A column of the table: memory, FLOPs and collectives as far as they are known."""
    found = {"memory, MB": cost.needed / 1e6}
    if chip := topology.chip:
        found["% of the HBM"] = 100 * cost.needed / chip.memory
    found["memory × base"] = cost.needed / base.needed
    if cost.factors:
        found["Kronecker factors, MB"] = cost.factors / 1e6
    if cost.memory is None:
        return found
    memory = cost.memory
    found |= {f"  {name}, MB": size / 1e6 for name, size in memory._asdict().items()}
    found["GFLOP"] = cost.flops / 1e9
    found["GFLOP on all devices"] = len(topology.devices) * cost.flops / 1e9
    found["FLOPs × base"] = cost.flops / base.flops
    if chip:
        found["ms at the peak of bf16"] = 1e3 * cost.flops / chip.peak
    for kind, collective in cost.collectives.items():
        found[f"{kind}, times"] = collective.times
        found[f"{kind}, MB"] = collective.bytes / 1e6
    found["sent, × parameters"] = cost.sent / cost.parameters
    found["sent × base"] = cost.sent / base.sent if base.sent else math.nan
    return found


def table(costs: Costs, topology: Topology) -> Table:
    """A row for each number, a column for each variant; the first is the baseline."""
    base = next(iter(costs.values()))
    columns = [figures(cost, base, topology) for cost in costs.values()]
    page = Table("a step, on each device", *map(escape, costs))
    for heading in dict.fromkeys(name for column in columns for name in column):
        page.add_row(heading, *(_text(column.get(heading, math.nan)) for column in columns))
    page.caption = f"{topology.name}: {len(topology.devices)} devices"
    if topology.chip:
        page.caption += f" with {topology.chip.memory / GIB:.4g} GiB of HBM for a program"
    return page


def _text(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.4g}"


def summary(costs: Costs, tried: Mapping[str, Costs], topology: Topology) -> str:
    """Sentences about the variants that do not fit, and their cost under each change tried.

    Args:
        costs: variant ↦ cost.
        tried: variant that does not fit ↦ change ↦ cost.
        topology: the machine.
    """
    lines = []
    for name, changes in tried.items():
        needed = costs[name].needed / GIB
        lines.append(
            f"{name} needs {needed:.3g} GiB of each device and does not fit. Compiled too:"
        )
        for change, cost in changes.items():
            verdict = "fits" if cost.fits else "does not fit"
            lines.append(f"  {change}  needs {cost.needed / GIB:.3g} GiB and {verdict}")
    if not tried:
        lines.append(f"Each of these fits {topology.name}." if topology.chip else "")
    return "\n".join(lines)


def as_json(costs: Costs, tried: Mapping[str, Costs], topology: Topology) -> dict[str, Any]:
    """All costs, with the numbers of the table."""
    base = next(iter(costs.values()))
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "arms": {
            name: {**cost.as_json(), "figures": figures(cost, base, topology)}
            for name, cost in costs.items()
        },
        "tried": {
            name: {change: cost.as_json() for change, cost in changes.items()}
            for name, changes in tried.items()
        },
    }
