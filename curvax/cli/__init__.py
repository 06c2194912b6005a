"""The command line of curvax: `curvax train`, `compare`, `inspect`, `plan` and the others."""

from curvax.cli.main import main

__all__ = ["main"]
