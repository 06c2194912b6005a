"""The config of a run: its fields (`configs`), the optimiser as text (`recipe`), and schedules.

A config file needs only `from curvax.training.config import defaults`, which is imported lazily,
since `recipe` alone works without ml_collections.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvax.training.config.configs import defaults

__all__ = ["defaults"]


def __getattr__(name: str) -> Any:
    if name != "defaults":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from curvax.training.config import configs

    return configs.defaults
