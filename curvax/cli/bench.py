"""`curvax bench`: measures the cost of a training step."""

import argparse
from collections.abc import Sequence

from curvax.cli.command import FIELDS, Command, add_config, add_methods, positive

_DESCRIPTION = """\
Compile a training step of each method and report its FLOPs, temporary memory and time, also as
ratios to the first method. The methods are timed in turn in one process.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_methods(parser)
    parser.add_argument(
        "--pairs",
        type=positive,
        default=30,
        metavar="N",
        help="timings of each method, by default 30",
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands

    config = commands.configure(arguments.config, overrides)
    methods = arguments.optimizers or commands.methods(config)
    commands.measure_costs(config, methods, arguments.pairs, arguments.runs)


BENCH = Command("bench", "cost of a step", _DESCRIPTION, _add_arguments, _run, FIELDS)
