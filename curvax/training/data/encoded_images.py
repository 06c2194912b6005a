"""Examples that are encoded images in files, decoded by threads when a batch is gathered.

The training crop of an example depends only on the seed, the epoch and its own number, so that a
batch is the same for any number of threads and processes.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from ml_collections import ConfigDict

from curvax.training.data import array_records, datasets, decode, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Draw
from curvax.training.data.tf_example import Example

AHEAD = 2
"""Prefetched batches: during a step the next one is ready, and the one after it is decoded."""


class ImageStore(Protocol):
    """Encoded examples with random access."""

    @property
    def size(self) -> int:
        """The number of examples."""

    def read(self, number: int) -> Example:
        """Reads one example; thread-safe; raises DataError."""

    def place(self, number: int) -> str:
        """The location of an example, for messages."""


class DecodeOptions(NamedTuple):
    """How an image is decoded."""

    side: int  # pixels per side
    classes: int
    area: tuple[float, float] = (0.05, 1.0)  # range of the share of the image in training crops
    threads: int | None = None  # one per core by default


class EncodedImages(NamedTuple):
    """A subset of the images of a store."""

    store: ImageStore
    decoding: DecodeOptions
    chosen: np.ndarray  # int [N]: numbers in the store

    @property
    def size(self) -> int:
        return len(self.chosen)

    @property
    def ahead(self) -> int:
        return AHEAD

    def rows(self, which: np.ndarray | slice) -> Self:
        return self._replace(chosen=self.chosen[which])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order, not class-balanced, since the labels are in the files."""
        return rng.permutation(self.size)

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, np.ndarray]:
        """Images uint8 [B, side, side, 3] and labels int32 [B].

        Raises:
            DataError: an image cannot be decoded, or a label is out of range.
        """
        numbers, places = np.unique(self.chosen[rows], return_inverse=True)
        decode = functools.partial(self._decode, draw=draw)
        pixels, labels = zip(*_pool(self.decoding.threads).map(decode, numbers.tolist()))
        return {
            "input": np.stack([pixels[i] for i in places]),
            "label": np.array(labels, np.int32)[places],
        }

    def _decode(self, number: int, draw: Draw | None) -> tuple[np.ndarray, int]:
        side, classes, area, _ = self.decoding
        image, label, name = self.store.read(number)
        try:
            if not 0 <= label < classes:
                raise DataError(f"its label is {label}, and there are {classes} classes")
            if draw is None:
                return decode.central_crop(image, side), label
            rng = datasets.stream(draw[0], f"crop {draw[1]} {number}")
            return decode.random_crop(image, side, area, rng), label
        except DataError as error:
            raise DataError(
                f"`{name}`, {self.store.place(number)}, cannot be used: {error}. Replace or remove "
                "the image; `curvax convert` makes new records."
            ) from error


def load(options: ConfigDict) -> Dataset[EncodedImages]:
    """The data set of a config's `data`, if it consists of records.

    Raises:
        DataError: the records cannot be read, they have another number of classes than the data
            set of that name, or `data.crop_area` is not a range of shares.
    """
    source, folder = sources.of(options), array_records.read_folder(sources.records_folder(options))
    if folder.classes not in (None, source.classes):
        raise DataError(
            f"`{options.name}` has {source.classes} classes, and {options.path} has "
            f'{folder.classes}. Use `data.name` = "records" for your own images.'
        )
    side = source.shape[0]
    decoding = DecodeOptions(side, source.classes, _range(options.crop_area), options.threads)
    train, test = (whole(folder.part(*part), decoding) for part in (sources.TRAIN, sources.TEST))
    return Dataset(train, test, source.classes, folder.names)


def whole(store: ImageStore, decoding: DecodeOptions) -> EncodedImages:
    """All images of a store."""
    return EncodedImages(store, decoding, np.arange(store.size))


def _range(area: Any) -> tuple[float, float]:
    """`data.crop_area`, checked; errors as in `load`."""
    match area:
        case (float() | int() as least, float() | int() as greatest) if 0 < least <= greatest <= 1:
            return least, greatest
    raise DataError(
        "`data.crop_area` is the least and the greatest share of an image that a training crop "
        f"takes, above 0 and at most 1, and was {area}. Half of the image or more is `(0.5, 1.0)`."
    )


@functools.cache
def _pool(threads: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="decode")
