"""How a command is declared, and the arguments that several commands share."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = """\
fields:
  Any field of the config takes a value, with dots for nested fields:

    --epochs=30  --data.label_noise=0.2  --model.options.depth=4
    --optimizer="sam_perturb(0.1) | adamw(cosine(1e-3, warmup=100))"

  The optimiser's text is the method: parts joined by `|`, each a call of one of curvax's stages
  or methods or of an Optax transformation. `cosine`, `linear`, `constant` and `step_decay` span
  the whole run. The text may use the config's top-level numbers, such as `rho`, and four more
  names: `axes`, the device axes for `mean_over` and `pmean_updates` under any parallelism;
  `kernels`, the mask of all kernels for a weight decay; `layout`, the roles of the parameters for
  `spatial_average`; and `like`, the shapes of training for Kronecker factors, as in `kfac(like)`.

  CONFIG is a name that `curvax configs` lists, or a path to a .py file with a `get_config()`.
"""

RUN_FIELDS = """\
fields:
  The config of an existing run is fixed, except for hardware and paths, which may be set for this
  command:

    --data.path=/data/records  --data.threads=8  --devices=1  --parallelism=jit  --fsdp=True
    --eval_batch=64

  --data.path is where the run's training data are now. --devices=none uses all devices.
"""


class Command(NamedTuple):
    """One command of `curvax`: its help, its arguments, its function."""

    name: str
    summary: str  # its line in `curvax --help`
    description: str  # the text of `curvax NAME --help`
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], None]
    """(parsed arguments, the others as given: `--field=value`) ↦ None."""
    epilog: str | None = None  # below the arguments

    def add_to(self, commands: Any) -> None:
        """Adds the command to what `add_subparsers` gave."""
        parser = commands.add_parser(
            self.name, help=self.summary, description=self.description, epilog=self.epilog
        )
        parser.set_defaults(run=self.run)
        parser.add_argument("--traceback", action="store_true", help="show where an error arose")
        self.add_arguments(parser)


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its texts.

    It takes no abbreviations, which could be meant as config fields.
    """

    def __init__(self, **options: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the config, and the folder of new runs."""
    parser.add_argument(
        "config", nargs="?", default="digits", metavar="CONFIG", help="by default digits"
    )
    add_runs_folder(parser)


def add_runs_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the folder for new run folders, by default runs",
    )


def add_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="TEXT",
        help="the methods, the baseline first; by default those of the config",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run of several processes, which `main` acts on."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes that a TPU pod, Slurm or MPI started",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="this process's number, from 0")


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, and is {number}")
    return number


def positive_number(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, and is {text}")
    return number
