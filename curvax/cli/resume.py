"""`curvax resume`: continues an interrupted run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curvax.cli.command import RUN_FIELDS, Command, add_processes

_DESCRIPTION = """\
Continue an interrupted `train` or `compare` from its newest checkpoints. Parameters, optimiser
state, random keys and position in the data are restored, and the run ends bit for bit as it would
have without the interruption. On other devices it differs by rounding and, under shard_map and
pmap, by what is computed per device: dropout, and batch norm and SAM's perturbation outside of
groups.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the run folder")
    add_processes(parser)


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands

    commands.resume(arguments.folder, overrides)


RESUME = Command("resume", "continue a run", _DESCRIPTION, _add_arguments, _run, RUN_FIELDS)
