"""Text as bytes, in windows of a fixed length, for predicting the next byte."""

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
    """Loads a text as windows of `length` bytes, int32 [N, length]; labels are shifted by one.

    `pydoc` is Python's own reference, 466 kB of English, which differs between its versions; `text`
    is any file.

    Args:
        name: `pydoc` or `text`.
        path: the file of `text`.
        length: bytes per window.
        seed: splits the adjacent windows, nine tenths for training and one tenth for testing.

    Raises:
        DataError: the name is unknown, the file cannot be read, or the text is too short.
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
    """Adjacent windows; an incomplete one at the end is dropped."""
    count = (len(text) - 1) // length if length > 0 else 0
    if count < 2:
        raise DataError(
            "A text needs at least two windows and the byte after each, and got windows of "
            f"{length} bytes for {len(text)} bytes of text. Use a longer text, or shorter windows "
            "of at least one byte."
        )
    rows = lambda start: text[start : start + count * length].reshape(count, length)
    return Split(rows(0), rows(1))
