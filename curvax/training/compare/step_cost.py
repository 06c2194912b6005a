"""The cost of a step: FLOPs, temporary memory and time, and ratios to the baseline's.

FLOPs and memory are the compiler's counts for the compiled step. They include the body of a scan
once, so compare models with unrolled layers. The methods are timed in turn in one process, so that
other load on the machine affects all of them alike.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from curvax.training.experiment import Experiment
from curvax.training.loop import Report
from curvax.training.runtime import run_dir

_TIMING = 0.05  # least seconds of one timing, far above the clock's resolution


class Cost(NamedTuple):
    """The cost of one training step."""

    flops: float
    temporary_bytes: float
    seconds: np.ndarray  # [rounds]


def measure(
    experiments: Mapping[str, Experiment],
    rounds: int = 30,
    report: Report = lambda *_: None,
) -> dict[str, Cost]:
    """Compiles a step of every variant, and times each once per round, in turn."""
    steps = [_Step(experiment) for experiment in experiments.values()]
    timings = np.empty((len(steps), rounds))
    for turn in range(rounds):
        timings[:, turn] = [step.time() for step in steps]
        report(turn + 1, {})
    return {
        name: Cost(step.flops, step.temporary_bytes, seconds)
        for name, step, seconds in zip(experiments, steps, timings)
    }


class _Step:
    """A compiled training step, repeated on one batch."""

    def __init__(self, experiment: Experiment):
        self.state = experiment.init()
        self.batch = experiment.parallelism.place(next(experiment.batches()))
        self.step = experiment.step
        compiled = self.step.lower(self.state, self.batch).compile()  # what `self.step` runs
        self.flops = float(compiled.cost_analysis()["flops"])
        self.temporary_bytes = float(compiled.memory_analysis().temp_size_in_bytes)
        self.repeats = 1
        self.time()  # the first call is slower
        self.repeats = math.ceil(_TIMING / self.time())

    def time(self) -> float:
        """Seconds per step, averaged over `repeats` steps."""
        began = time.perf_counter()
        for _ in range(self.repeats):
            self.state, measured = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, measured))
        return (time.perf_counter() - began) / self.repeats


class Ratio(NamedTuple):
    """A cost divided by the baseline's; times are divided round by round."""

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
    """A row for each number, a column for each method; the first is the baseline."""
    base = next(iter(costs.values()))
    page = Table("a step", *map(escape, costs))
    rows: dict[str, Callable[[Cost, Ratio], str]] = {
        "milliseconds": lambda cost, _: f"{1e3 * np.median(cost.seconds):.3g}",
        "× base, median": lambda _, r: f"{r.median:.3f}",
        f"range of {len(base.seconds)} pairs": lambda _, r: f"{r.least:.2f} to {r.greatest:.2f}",
        "GFLOP": lambda cost, _: f"{cost.flops / 1e9:.4g}",
        "FLOPs × base": lambda _, r: f"{r.flops:.3f}",
        "temporary MB": lambda cost, _: f"{cost.temporary_bytes / 1e6:.3g}",
        "memory × base": lambda _, r: f"{r.temporary_bytes:.3f}",
    }
    for heading, cell in rows.items():
        page.add_row(heading, *(cell(cost, ratio(cost, base)) for cost in costs.values()))
    return page


def write(folder: Path, costs: dict[str, Cost]) -> None:
    """Writes bench.json: costs, all timings, and ratios to the first method."""
    base = next(iter(costs.values()))
    page = {
        name: {
            **cost._asdict(),
            "seconds": cost.seconds.tolist(),
            "ratio": ratio(cost, base)._asdict(),
        }
        for name, cost in costs.items()
    }
    run_dir.write_json(folder / "bench.json", page)
