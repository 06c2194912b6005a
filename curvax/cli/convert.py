"""`curvax convert`: makes records from folders of images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curvax.cli.command import Command

_DESCRIPTION = """\
Convert folders of JPEGs, one for each class, to array_record files, which `data.name=records` and
`data.name=imagenet` read. IMAGES holds the class folders, or `train` and `val` around them. Every
image is decoded once, and those that cannot be decoded are named.

  curvax convert imagenet records/imagenet
  curvax train my_config --data.name=records --data.path=records/mine
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of class folders")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the new folder of records")
    parser.add_argument(
        "--validation", type=Path, metavar="IMAGES", help="class folders of the validation set"
    )
    parser.add_argument(
        "--skip", action="store_true", help="leave out images that cannot be decoded"
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.data import convert
    from curvax.training.runtime.errors import ConfigError

    if overrides:
        raise ConfigError(f"`curvax convert` has no option {overrides[0]}.")
    convert.command(arguments.images, arguments.out, arguments.validation, arguments.skip)


CONVERT = Command("convert", "image folders to records", _DESCRIPTION, _add_arguments, _run)
