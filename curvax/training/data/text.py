"""Text as bytes: windows of a fixed length, each byte to be followed by its next."""

import math
from importlib import import_module
from pathlib import Path

import numpy as np

from curvax.training.data import datasets
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Split

BYTES = 256
TEST = 0.1  # of the windows


def load(
    name: str, *, path: str | Path | None = None, length: int = 64, seed: int = 0
) -> Dataset[Split]:
    """The text of that name, in windows of `length` bytes and the byte that follows each.

    `pydoc` is Python's own reference, 466 kB of English that come with it and differ between its
    versions; `text` is any file.

    Args:
        path: the file that is the `text`.
        length: bytes of a window, int32 [N, length].
        seed: divides the windows, which lie side by side: nine tenths to train on, one to test.

    Raises:
        DataError: an unknown name, a file that cannot be read, or a text too short to be divided.
    """
    windows = _windows(np.frombuffer(_read(name, path), np.uint8).astype(np.int32), length)
    last = math.ceil(TEST * windows.size)
    train, test = datasets.divide(windows, last, seed=seed, purpose="load")
    return Dataset(train, test, BYTES)


def _read(name: str, path: str | Path | None) -> bytes:
    if name == "pydoc" and path is None:
        return _reference().encode()
    if name != "text" or path is None:
        raise DataError(
            f"A text is `pydoc`, which comes with Python, or `text`, any file given as `path`, and "
            f"got the name `{name}` and the path {path}."
        )
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"The text {path} cannot be read: {error.strerror}.") from error


def _reference() -> str:
    """The pages of Python's `help()`, in the order of their names."""
    try:
        topics = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise DataError(
            "This Python comes without its reference, `pydoc_data`. Give any file as `path` with "
            "the name `text`."
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def _windows(text: np.ndarray, length: int) -> Split:
    """Windows side by side; what is left over at the end is dropped."""
    count = (len(text) - 1) // length if length > 0 else 0
    if count < 2:
        raise DataError(
            f"A text is divided into two windows at least, and the byte after each: `length` is "
            f"{length} where there are {len(text)} bytes. Take a longer text, or windows of one "
            "byte or more that fit."
        )
    rows = lambda start: text[start : start + count * length].reshape(count, length)
    return Split(rows(0), rows(1))
