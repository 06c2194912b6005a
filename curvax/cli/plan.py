"""`curvax plan`: compiles a step for other machines."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curvax.cli.command import FIELDS, Command, add_config, add_methods

_DESCRIPTION = """\
Compile the training step of each method for machines that are not at hand, and report its memory,
FLOPs and collectives on each device, also as ratios to the first method. Loop bodies count as often
as they run. Nothing is trained, and no data is read.

A TOPOLOGY is a TPU generation and its chips in each direction, as v3:4x8, v4:4x4x4, v5e:16x16,
v5p:4x4x8 or v6e:16x16, which takes `pip install 'curvax[tpu]'` and no TPU; or cpu:8 for eight
virtual CPU devices. If a step does not fit, changes that may help are compiled too. A compilation
takes minutes; its result is cached.

  curvax plan digits_vit --topology cpu:8
  curvax plan imagenet_vit:b16 --topology v5e:16x16
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_methods(parser)
    parser.add_argument("--topology", required=True, help="the machine to compile for")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compile each also with the model's blocks scanned, unrolled and recomputed",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="the folder of results, by default ~/.cache/curvax/plans",
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.planning import commands as planning
    from curvax.training.compare import commands

    config = commands.configure(arguments.config, overrides)
    methods = arguments.optimizers or commands.methods(config)
    options = {"variants": arguments.variants, "cache": arguments.cache, "root": arguments.runs}
    planning.plan_for(config, methods, arguments.topology, **options)


PLAN = Command(
    "plan", "memory and cost on other machines", _DESCRIPTION, _add_arguments, _run, FIELDS
)
