"""The entry point of the command line: parses it, runs one command, and turns errors into codes."""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from curvax.cli.bench import BENCH
from curvax.cli.command import Parser
from curvax.cli.compare import COMPARE
from curvax.cli.configs import CONFIGS
from curvax.cli.convert import CONVERT
from curvax.cli.evaluate import EVALUATE
from curvax.cli.inspect import INSPECT
from curvax.cli.plan import PLAN
from curvax.cli.resume import RESUME
from curvax.cli.train import TRAIN
from curvax.training.runtime.errors import EXPECTED
from curvax.training.runtime.log_filters import silence_libtpu

_DESCRIPTION = """\
Curvature and sharpness in training, from the command line.

  curvax train                 a first run: AdamW and GSAM on digits with wrong labels
  curvax compare digits --seeds 3 --fair
  curvax inspect runs/digits-compare-20260101-120000
  curvax bench digits
  curvax train pydoc           AdamW, Sophia and AdaHessian on a text
  curvax configs               all configs that come with curvax
"""

_ERROR = 2
"""The exit code of errors; those of interruptions are 128 and the number of the signal."""

COMMANDS = (TRAIN, COMPARE, INSPECT, BENCH, PLAN, RESUME, EVALUATE, CONVERT, CONFIGS)


class _Failure(NamedTuple):
    message: str
    code: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments after `curvax`, by default those of the process.

    Returns:
        0; 2 after an error, which is printed in one paragraph; 130 after Ctrl-C, 143 after SIGTERM.
        In a run of several processes, one that fails alone exits here instead, so that the others
        notice.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    silence_libtpu()
    try:
        joined = _join(arguments)
        with _exits_alone() if joined else contextlib.nullcontext():
            arguments.run(arguments, overrides)
    except BaseException as error:
        found = _expected(error)
        if found is None or (arguments.traceback and found.code == _ERROR):
            raise
        return _fail(found)
    return 0


def _expected(error: BaseException) -> _Failure | None:
    """What is reported of an error; None for faults of the program, which end in a traceback."""
    match error:
        case KeyboardInterrupt():
            return _Failure(str(error) or "stopped.", 130)
        case InterruptedError():
            return _Failure(str(error), 143)
        case ModuleNotFoundError():
            cure = "The command line needs an extra: pip install 'curvax[train]'"
            return _Failure(f"{error}. {cure}", _ERROR)
    return _Failure(str(error), _ERROR) if isinstance(error, EXPECTED) else None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="curvax", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _join(arguments: argparse.Namespace) -> bool:
    """Makes this process one of several if the options say so, and returns whether they do."""
    given = [getattr(arguments, name, None) for name in ("coordinator", "processes", "process")]
    if any(value is not None for value in given) or getattr(arguments, "distributed", False):
        from curvax.training.runtime import distributed

        distributed.join(*given)
        return True
    return False


@contextlib.contextmanager
def _exits_alone() -> Iterator[None]:
    """Reports an error that only this process may have met, and ends the process.

    If the process returned normally, JAX's runtime would make it wait at exit for the other
    processes, which wait for it in their step. Errors that all processes meet together (a refused
    run, a stop, a loss that is not finite) go on to `main`.
    """
    from curvax.training.runtime import distributed

    try:
        yield
    except (distributed.Refused, InterruptedError, ArithmeticError, ModuleNotFoundError):
        raise
    except BaseException as error:
        if found := _expected(error):
            distributed.leave(_fail(found))
        traceback.print_exc()
        distributed.leave(1)


def _fail(failure: _Failure) -> int:
    print(f"curvax: {failure.message}", file=sys.stderr)
    return failure.code
