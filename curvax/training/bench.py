"""What a step costs: FLOPs, temporary memory and time, and their ratios to the base's.

FLOPs and memory are the compiler's own count for the compiled step. It counts the body of a scan
once, so compare models with unrolled layers. Clocks are read in turn, base and methods in one
process, so that whatever else the machine does meets all of them.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from curvax.training import runs
from curvax.training.experiment import Experiment

_READING = 0.05  # seconds that one reading takes at least, far above the clock's grain


class Cost(NamedTuple):
    """The cost of one training step."""

    flops: float
    temporary_bytes: float
    seconds: np.ndarray  # [rounds]


def measure(
    experiments: Mapping[str, Experiment],
    rounds: int = 30,
    report: Callable[[int], None] = lambda _: None,
) -> dict[str, Cost]:
    """Compiles a step of every arm and reads its clock once a round, all arms in turn."""
    steps = [_Step(experiment) for experiment in experiments.values()]
    readings = np.empty((len(steps), rounds))
    for turn in range(rounds):
        readings[:, turn] = [step.read() for step in steps]
        report(turn + 1)
    return {
        name: Cost(step.flops, step.temporary_bytes, seconds)
        for name, step, seconds in zip(experiments, steps, readings)
    }


class _Step:
    """A compiled training step that repeats itself on one batch."""

    def __init__(self, experiment: Experiment):
        self.state = experiment.init()
        self.batch = jax.device_put(next(experiment.batches()))
        self.compiled = experiment.step.lower(self.state, self.batch).compile()
        self.flops = float(self.compiled.cost_analysis()["flops"])
        self.temporary_bytes = float(self.compiled.memory_analysis().temp_size_in_bytes)
        self.repeats = 1
        self.read()  # the first call is not like the others
        self.repeats = math.ceil(_READING / self.read())

    def read(self) -> float:
        """Seconds of one step, over enough of them to fill a reading."""
        began = time.perf_counter()
        for _ in range(self.repeats):
            self.state, measured = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, measured))
        return (time.perf_counter() - began) / self.repeats


class Ratio(NamedTuple):
    """A cost in units of the base's; the times pair by pair."""

    flops: float
    temporary_bytes: float
    median: float
    least: float
    greatest: float


def ratio(cost: Cost, base: Cost) -> Ratio:
    times = cost.seconds / base.seconds
    return Ratio(
        cost.flops / base.flops,
        cost.temporary_bytes / max(base.temporary_bytes, 1.0),
        float(np.median(times)),
        float(times.min()),
        float(times.max()),
    )


def table(costs: dict[str, Cost]) -> Table:
    """One row for each method; the first is the base."""
    base = next(iter(costs.values()))
    rounds = len(base.seconds)
    page = Table(
        "method",
        "ms a step",
        "time × base",
        f"range of {rounds} pairs",
        "GFLOP",
        "FLOPs × base",
        "temporary MB",
        "memory × base",
    )
    for name, cost in costs.items():
        r = ratio(cost, base)
        page.add_row(
            name,
            f"{1e3 * np.median(cost.seconds):.3g}",
            f"{r.median:.2f}",
            f"{r.least:.2f} to {r.greatest:.2f}",
            f"{cost.flops / 1e9:.4g}",
            f"{r.flops:.2f}",
            f"{cost.temporary_bytes / 1e6:.3g}",
            f"{r.temporary_bytes:.2f}",
        )
    return page


def write(folder: Path, costs: dict[str, Cost]) -> None:
    """`bench.json`: every cost, every reading, and the ratios to the first."""
    base = next(iter(costs.values()))
    page = {
        name: {
            **cost._asdict(),
            "seconds": cost.seconds.tolist(),
            "ratio": ratio(cost, base)._asdict(),
        }
        for name, cost in costs.items()
    }
    runs.write_text(folder / "bench.json", json.dumps(page, indent=2) + "\n")
