"""`curvax configs`: lists the configs, or describes one."""

import argparse
from collections.abc import Sequence

from curvax.cli.command import Command

_DESCRIPTION = """\
List the configs that come with curvax, or print the description of one: paper, command, expected
result, cost.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the config to describe")


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.config import configs
    from curvax.training.runtime.errors import ConfigError

    if overrides:
        raise ConfigError(
            f"`curvax configs` takes only the name of a config, and got {' '.join(overrides)}."
        )
    if arguments.config:
        print(configs.docstring(arguments.config))
    else:
        for name in configs.names():
            print(f"{name:24}{configs.docstring(name).partition(chr(10))[0]}")


CONFIGS = Command("configs", "list the configs", _DESCRIPTION, _add_arguments, _run)
