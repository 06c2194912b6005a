"""`curvax compare`: trains several methods over seeds."""

import argparse
from collections.abc import Sequence

from curvax.cli.command import (
    FIELDS,
    Command,
    add_config,
    add_methods,
    add_processes,
    positive,
    positive_number,
)

_DESCRIPTION = """\
Train the same model on the same data with several methods, for the same number of epochs or, with
--budget, for the same time, and over several seeds. The table has mean, standard deviation and 95 %
interval of the test score (accuracy, loss or squared error) and of the largest eigenvalue of the
Hessian at the end. The first method is the baseline from which gains are counted.

  curvax compare digits --seeds 3 --fair
  curvax compare digits --optimizers "adamw(cosine(1e-2))" "sam_perturb(0.2) | adamw(cosine(1e-2))"
  curvax compare digits --seeds 3 --budget 10
  curvax compare digits --sweep rho=0.05,0.1,0.2,0.5 --sweep alpha=0,0.2,0.4
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_methods(parser)
    add_processes(parser)
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="runs of each method, by default 1"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--fair", action="store_true", help="also train the baseline for twice the epochs"
    )
    either.add_argument(
        "--budget",
        type=positive_number,
        metavar="SECONDS",
        help="train each method for the epochs whose steps take so long, instead of the config's; "
        "the steps are timed first, compilation is apart",
    )
    either.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=A,B,C",
        help="score a grid of settings on 10 %% of the training set, held out of training",
    )


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands, grid_search
    from curvax.training.runtime import distributed

    with distributed.together():
        config = commands.configure(arguments.config, overrides)
        fields = grid_search.read_fields(arguments.sweep)
    if fields:
        methods = arguments.optimizers or [config.optimizer]
        spec = commands.RunSpec("sweep", methods, arguments.seeds, fields=fields)
    else:
        methods = arguments.optimizers or commands.methods(config)
        spec = commands.RunSpec("compare", methods, arguments.seeds, arguments.fair)
    commands.start(config, spec, arguments.runs, budget=arguments.budget)


COMPARE = Command("compare", "compare methods", _DESCRIPTION, _add_arguments, _run, FIELDS)
