"""Examples that are encoded pictures in files: decoded by threads when a batch is gathered.

An example's training crop follows from the seed, the epoch and its own number alone, so a batch
depends neither on how many threads make it nor on how many processes share it.
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
"""Batches: while one is trained on, the next is whole and the one after it is being decoded."""


class ImageStore(Protocol):
    """Examples as they are kept, each by its number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read(self, number: int) -> Example:
        """One of them; threads may ask at once. DataError where that fails."""

    def place(self, number: int) -> str:
        """Where it is, in words."""


class DecodeOptions(NamedTuple):
    """What is made of a picture."""

    side: int  # pixels
    classes: int
    area: tuple[float, float] = (0.05, 1.0)  # of training crops, a share of the picture
    threads: int | None = None  # as many as there are cores by default


class EncodedImages(NamedTuple):
    """Some of the pictures of a store."""

    store: ImageStore
    options_: DecodeOptions
    chosen: np.ndarray  # [N] numbers in the store

    @property
    def size(self) -> int:
        return len(self.chosen)

    @property
    def ahead(self) -> int:
        return AHEAD

    def rows(self, which: np.ndarray | slice) -> Self:
        return self._replace(chosen=self.chosen[which])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order: the labels are in the files, so classes get their shares by chance."""
        return rng.permutation(self.size)

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, np.ndarray]:
        """EncodedImages uint8 [B, side, side, 3] and labels int32 [B].

        Raises:
            DataError: a picture that cannot be decoded, or a label that there is not.
        """
        numbers, places = np.unique(self.chosen[rows], return_inverse=True)
        decode = functools.partial(self._decode, draw=draw)
        pixels, labels = zip(*_pool(self.options_.threads).map(decode, numbers.tolist()))
        return {
            "input": np.stack([pixels[i] for i in places]),
            "label": np.array(labels, np.int32)[places],
        }

    def _decode(self, number: int, draw: Draw | None) -> tuple[np.ndarray, int]:
        side, classes, area, _ = self.options_
        image, label, name = self.store.read(number)
        try:
            if not 0 <= label < classes:
                raise DataError(f"its label is {label} where there are {classes} classes")
            if draw is None:
                return decode.central_crop(image, side), label
            rng = datasets.stream(draw[0], f"crop {draw[1]} {number}")
            return decode.random_crop(image, side, area, rng), label
        except DataError as error:
            raise DataError(
                f"`{name}`, {self.store.place(number)}, cannot be used: {error}. Replace or remove "
                "the picture; records are made anew by `curvax convert`."
            ) from error


def load(options: ConfigDict) -> Dataset[EncodedImages]:
    """The data set of a config's `data` whose examples are records.

    Raises:
        DataError: there are no such records, they have other classes than they should, or
            `data.crop_area` is no range of shares.
    """
    source, folder = sources.of(options), array_records.read_folder(sources.records_folder(options))
    if folder.classes not in (None, source.classes):
        raise DataError(
            f"`{options.name}` has {source.classes} classes, and {options.path} tells of "
            f'{folder.classes}. Take `data.name` = "records" for pictures of your own.'
        )
    side = source.shape[0]
    options_ = DecodeOptions(side, source.classes, _range(options.crop_area), options.threads)
    train, test = (whole(folder.part(*part), options_) for part in (sources.TRAIN, sources.TEST))
    return Dataset(train, test, source.classes, folder.names)


def whole(store: ImageStore, options_: DecodeOptions) -> EncodedImages:
    """All pictures of a store."""
    return EncodedImages(store, options_, np.arange(store.size))


def _range(area: Any) -> tuple[float, float]:
    """`data.crop_area` as it should be; errors as in `load`."""
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
