"""`curvax evaluate`: tests a trained run on other data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curvax.cli.command import RUN_FIELDS, Command

_DESCRIPTION = """\
Test the newest checkpoints of a run: top-1 and top-5 accuracy. Prints a table and keeps the
numbers, by data path, in evaluate.json of the run folder.

Without --data, the run's own test set is used. PATH is a folder of records or of class folders,
named as the classes that the run was trained on, a part of them, or their numbers; or such folders
within folders, as in ImageNet-C, which has one for each corruption and strength.

  curvax evaluate runs/imagenet-train-20260101-120000 --data imagenet-r
  curvax evaluate runs/imagenet-train-20260101-120000 --data records/imagenet --labels real.json
  curvax evaluate runs/digits-train-20260101-120000 --corruptions
  curvax evaluate runs/digits-train-20260101-120000 --attack "pgd(8/255, steps=10)"
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--data", type=Path, metavar="PATH", help="the test images")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="real.json of ImageNet-ReaL, or a file like it"
    )
    parser.add_argument(
        "--attack", metavar="TEXT", help="also test under an attack, as pgd(2/255, steps=10)"
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="also test the run's own images under noise, blur, lower contrast and pixelation",
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.evaluation import commands

    options = arguments.data, arguments.labels, arguments.corruptions
    commands.command(arguments.folder, *options, overrides, arguments.attack)


EVALUATE = Command("evaluate", "test on other data", _DESCRIPTION, _add_arguments, _run, RUN_FIELDS)
