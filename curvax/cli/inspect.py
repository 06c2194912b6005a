"""`curvax inspect`: measures the loss around trained runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curvax.cli.command import RUN_FIELDS, Command, add_runs_folder, positive, positive_number

_DESCRIPTION = """\
Measure the loss around the newest checkpoints of runs of one task, side by side: spectrum of the
Hessian, whole and block by block, sharpness, landscapes, activations, attention, neural tangent
kernel. The result is a folder with one page, report.html, its figures, and all numbers in
inspect.json.

RUN is a folder that `curvax train` or `curvax compare` left, which stands for the first seed of
each of its methods; or the folder of a method in it; or that of one seed of a method. The others
are compared with the first.

  curvax inspect runs/digits-train-20260101-120000
  curvax inspect runs/A/0-sgd/seed* runs/B/1-sam-sgd/seed0 --budget 15
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs_folder(parser)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="runs to measure")
    parser.add_argument(
        "--budget",
        type=positive_number,
        default=5.0,
        metavar="MINUTES",
        help="for loading and measuring, by default 5; the page names what did not fit",
    )
    parser.add_argument(
        "--examples",
        type=positive,
        default=256,
        metavar="N",
        help="training examples that the loss is taken on, by default the first 256",
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.inspection import commands

    options = arguments.budget, arguments.examples, arguments.runs
    commands.inspect(arguments.folders, *options, overrides)


INSPECT = Command("inspect", "measure trained runs", _DESCRIPTION, _add_arguments, _run, RUN_FIELDS)
