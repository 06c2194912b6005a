"""`curvax train`: trains the model of a config."""

import argparse
from collections.abc import Sequence

from curvax.cli.command import FIELDS, Command, add_config, add_processes

_DESCRIPTION = """\
Train a model and leave a run folder: config, metrics as JSON lines and TensorBoard events,
checkpoints, the final table and curves. Without a config, a small MLP-Mixer is trained on 512
handwritten digits, 40 % of them wrongly labelled, with AdamW and with GSAM, and a summary says what
that showed.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_processes(parser)


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands
    from curvax.training.runtime import distributed

    with distributed.together():
        config = commands.configure(arguments.config, overrides)
    methods = commands.methods(config) if config.train_baselines else [config.optimizer]
    commands.start(config, commands.RunSpec("train", methods), arguments.runs)


TRAIN = Command("train", "train a model", _DESCRIPTION, _add_arguments, _run, FIELDS)
