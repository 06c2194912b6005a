"""Config fields that were renamed: the map from their old names, and configs that know both.

Run folders, config files and command lines written before the renaming still work. A stored
config.json is translated silently; an old name in a config file or on the command line is
translated with a `FutureWarning`.
"""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

RENAMED = {
    "regime": "parallelism",
    "base": "baseline",
    "others": "more_optimizers",
    "beside": "train_baselines",
    "start": "init_from",
    "keep": "keep_checkpoints",
    "data.side": "data.image_size",
    "data.area": "data.crop_area",
    "data.noise": "data.label_noise",
    "data.smoothing": "data.label_smoothing",
    "data.length": "data.seq_len",
    "data.size": "data.num_train",
}
"""Old dotted name ↦ current one."""


def current(name: str, *, warn: bool = True, stacklevel: int = 3) -> str:
    """The current name of a dotted field.

    Args:
        name: a field's name, old, current or unknown; only old ones are translated.
        warn: emit a `FutureWarning` for an old name.
        stacklevel: as in `warnings.warn`; 3 is the line that called the caller.
    """
    if name not in RENAMED:
        return name
    if warn:
        message = f"The config field `{name}` is now called `{RENAMED[name]}`. Use that name."
        warnings.warn(message, FutureWarning, stacklevel=stacklevel)
    return RENAMED[name]


def translated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored config, as nested dictionaries, under their current names."""
    data = {
        current(f"data.{name}", warn=False).removeprefix("data."): value
        for name, value in fields["data"].items()
    }
    renamed = {current(name, warn=False): value for name, value in fields.items()}
    return {**renamed, "data": data}


class _Fields(ConfigDict):
    """A config in which old names reach the renamed fields, with a warning."""

    _prefix: ClassVar[str]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._current(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._current(key), value)

    def _current(self, key: Any) -> Any:
        old = f"{type(self)._prefix}{key}"
        if old not in RENAMED:
            return key
        # Above this frame lie `__getitem__`, `__getattr__` (or their setters) and the config file.
        return current(old, stacklevel=5).removeprefix(type(self)._prefix)


class RunConfig(_Fields):
    """All fields of a run."""

    _prefix = ""


class DataConfig(_Fields):
    """The fields of `data`."""

    _prefix = "data."
