"""Text as bytes: windows of a fixed length, each byte to be followed by its next."""

from importlib import import_module
from pathlib import Path

import numpy as np

from curvax.training.archives import DataError
from curvax.training.data import Dataset, Split

BYTES = 256
TEST = 0.1  # of the text, its end


def load(name: str, *, path: str | Path | None = None, length: int = 64) -> Dataset:
    """The text of that name, in windows of `length` bytes and the byte that follows each.

    `pydoc` is Python's own reference, 466 kB of English that come with it and differ between its
    versions; `text` is any file. The last tenth is the test, so that no window of it is seen.

    Args:
        path: the file that is the `text`.
        length: bytes of a window, int32 [N, length].

    Raises:
        DataError: an unknown name, a file that cannot be read, or a text too short to be divided.
    """
    text = np.frombuffer(_read(name, path), np.uint8).astype(np.int32)
    cut = len(text) - round(TEST * len(text))
    return Dataset(_windows(text[:cut], length), _windows(text[cut:], length), BYTES)


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
    if count < 1:
        raise DataError(
            f"A window and the byte after it fit into each part of the text, and `length` is "
            f"{length} where a part has {len(text)} bytes. Take a longer text or a window of at "
            "least one byte."
        )
    rows = lambda start: text[start : start + count * length].reshape(count, length)
    return Split(rows(0), rows(1))
