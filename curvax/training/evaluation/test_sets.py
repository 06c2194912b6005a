"""The sets that a classifier is evaluated on: its own test set, records, or folders of images.

Published test sets are read in their own layout: ImageNet-V2 has numbers as class folders,
ImageNet-R 200 of the classes, ImageNet-C a folder per corruption and strength around its classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curvax.training.data import array_records, encoded_images, image_folders, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Examples, Split
from curvax.training.data.encoded_images import DecodeOptions, ImageStore
from curvax.training.data.image_folders import is_image
from curvax.training.data.tf_example import Example
from curvax.training.evaluation import corruptions
from curvax.training.experiment import Experiment

TEST = "test"


class EvalSet(NamedTuple):
    """Examples with their classes."""

    name: str
    examples: Examples
    among: np.ndarray  # bool [classes]: the classes that may be predicted
    right: Sequence[Sequence[int]] | None = None  # correct classes per example, or its label


class _Relabelled(NamedTuple):
    """A store with its labels mapped to the classes of a run."""

    store: ImageStore
    numbers: Sequence[int]  # store label ↦ label of the run

    @property
    def size(self) -> int:
        return self.store.size

    def read(self, number: int) -> Example:
        example = self.store.read(number)
        known = 0 <= example.label < len(self.numbers)
        return example._replace(label=self.numbers[example.label] if known else -1)

    def place(self, number: int) -> str:
        return self.store.place(number)


def of_run(experiment: Experiment) -> EvalSet:
    """The run's own test set, or its held-out examples."""
    return EvalSet(TEST, experiment.data.test, _all(experiment))


def corrupted(experiment: Experiment) -> Iterator[EvalSet]:
    """The run's own test images under each corruption and strength.

    Raises:
        DataError: they are not in memory.
    """
    test = experiment.data.test
    if not isinstance(test, Split):
        raise DataError(
            "`--corruptions` need a test set in memory, and this one is in records. Give the "
            "folder of ImageNet-C, or one like it, with `--data`."
        )
    for name in corruptions.CORRUPTIONS:
        for strength in corruptions.STRENGTHS:
            images = corruptions.corrupt(test.inputs, name, strength)
            yield EvalSet(f"{name}/{strength}", Split(images, test.labels), _all(experiment))


def of_path(path: Path, experiment: Experiment) -> Iterator[EvalSet]:
    """The evaluation sets in a folder of records, of class folders, or of folders of these.

    Raises:
        DataError: the folder holds none of these, it has classes that the run was not trained on,
            or the run was not trained on records.
    """
    options, classes = experiment.config.data, _classes(experiment)
    if not sources.find(options.name).records:
        raise DataError(
            f"`--data` gives encoded images, and the run was trained on `{options.name}`, which "
            "has none. Leave it out for the run's own test set, or use `--corruptions`."
        )
    decoding = DecodeOptions(options.image_size or sources.SIDE, classes, threads=options.threads)
    names = experiment.data.names
    if any(path.glob("*.array_record-*")):
        yield _of_records(path, names, decoding)
        return
    for name, listing in _sets(path):
        numbers = _numbers(listing.names, names, classes, path)
        files = listing.files(dict(zip(listing.names, numbers)))
        among = np.isin(np.arange(classes), numbers)
        yield EvalSet(name or path.resolve().name, encoded_images.whole(files, decoding), among)


def _of_records(path: Path, names: Sequence[str], decoding: DecodeOptions) -> EvalSet:
    folder = array_records.read_folder(path)
    store: ImageStore = folder.part(*sources.TEST, *sources.TRAIN)
    among = np.ones(decoding.classes, bool)
    if folder.names and list(names) != folder.names:
        numbers = _numbers(folder.names, names, decoding.classes, path)
        store, among = _Relabelled(store, numbers), np.isin(np.arange(decoding.classes), numbers)
    return EvalSet(path.resolve().name, encoded_images.whole(store, decoding), among)


def _sets(root: Path, name: str = "") -> Iterator[tuple[str, image_folders.ClassFolders]]:
    """The folders of class folders at or below a folder, with their relative paths."""
    inside = [p for p in image_folders.visible(root) if p.is_dir()] if root.is_dir() else []
    if any(any(map(is_image, folder.iterdir())) for folder in inside) or not inside:
        yield name, image_folders.listing(root)
        return
    for folder in inside:
        yield from _sets(folder, f"{name}/{folder.name}".lstrip("/"))


def _numbers(found: Sequence[str], names: Sequence[str], classes: int, path: Path) -> list[int]:
    """The run's labels of these classes, all given by name or all by number as in ImageNet-V2.

    If the run's own classes are named by numbers, `1` is the class of that name, not the second.
    """
    by_name = {name: number for number, name in enumerate(names)}
    by_number = {str(number): number for number in range(classes)}
    place = by_name if by_name.keys() & {*found, *by_number} else by_number
    if unknown := [name for name in found if name not in place]:
        known = ", ".join(f"`{name}`" for name in names[:3]) or f"0 to {classes - 1}"
        raise DataError(
            f"{path} has the class `{unknown[0]}`, and the run was trained on {classes} others "
            f"({known}{' …' if len(names) > 3 else ''}). Name the class folders as the classes of "
            "the run, or by their numbers."
        )
    return [place[name] for name in found]


def _all(experiment: Experiment) -> np.ndarray:
    return np.ones(_classes(experiment), bool)


def _classes(experiment: Experiment) -> int:
    classes = experiment.data.classes
    assert classes is not None
    return classes
