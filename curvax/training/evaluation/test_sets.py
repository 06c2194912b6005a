"""What a classifier is tested on: its own test set, records, or folders of pictures.

Published test sets come as they are: ImageNet-V2 with numbers as class folders, ImageNet-R with 200
of the classes, ImageNet-C with a folder for each corruption and strength around its class folders.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curvax.training.data import array_records, encoded_images, image_folders, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Examples, Split
from curvax.training.data.encoded_images import Form, Store
from curvax.training.data.image_folders import is_picture
from curvax.training.data.tf_example import Example
from curvax.training.evaluation import corruptions
from curvax.training.experiment import Experiment

TEST = "test"


class Benchmark(NamedTuple):
    """Examples to name the class of."""

    name: str
    examples: Examples
    among: np.ndarray  # bool [classes]: the classes to choose from
    right: Sequence[Sequence[int]] | None = None  # the right ones of each; its label by default


class _Relabelled(NamedTuple):
    """A store whose labels count other classes."""

    store: Store
    numbers: Sequence[int]  # of its classes, in the order of the run's

    @property
    def size(self) -> int:
        return self.store.size

    def read(self, number: int) -> Example:
        example = self.store.read(number)
        known = 0 <= example.label < len(self.numbers)
        return example._replace(label=self.numbers[example.label] if known else -1)

    def place(self, number: int) -> str:
        return self.store.place(number)


def of_run(experiment: Experiment) -> Benchmark:
    """The run's own test set, or what was held out of its training set."""
    return Benchmark(TEST, experiment.material.test, _all(experiment))


def corrupted(experiment: Experiment) -> Iterator[Benchmark]:
    """The run's own test images under each corruption and strength, one after the other.

    Raises:
        DataError: they are not in memory.
    """
    test = experiment.material.test
    if not isinstance(test, Split):
        raise DataError(
            "`--corruptions` are for test sets in memory, and this one is in records. Give the "
            "folder of ImageNet-C, or one like it, with `--data`."
        )
    for name in corruptions.CORRUPTIONS:
        for strength in corruptions.STRENGTHS:
            images = corruptions.corrupt(test.inputs, name, strength)
            yield Benchmark(f"{name}/{strength}", Split(images, test.labels), _all(experiment))


def of_path(path: Path, experiment: Experiment) -> Iterator[Benchmark]:
    """What there is in a folder of records, of class folders, or of folders of class folders.

    Raises:
        DataError: nothing of the kind, classes that the run was not trained on, or a run on images
            that no picture is made into.
    """
    options, classes = experiment.config.data, _classes(experiment)
    if not sources.find(options.name).records:
        raise DataError(
            f"`--data` gives pictures, and the run was trained on `{options.name}`, whose images "
            "are none. Leave it out for the run's own test set, or take `--corruptions`."
        )
    form = Form(options.image_size or sources.SIDE, classes, threads=options.threads)
    names = experiment.material.names
    if any(path.glob("*.array_record-*")):
        yield _of_records(path, names, form)
        return
    for name, listing in _sets(path):
        numbers = _numbers(listing.names, names, classes, path)
        files = listing.files(dict(zip(listing.names, numbers)))
        among = np.isin(np.arange(classes), numbers)
        yield Benchmark(name or path.resolve().name, encoded_images.whole(files, form), among)


def _of_records(path: Path, names: Sequence[str], form: Form) -> Benchmark:
    folder = array_records.read_folder(path)
    store: Store = folder.part(*sources.TEST, *sources.TRAIN)
    among = np.ones(form.classes, bool)
    if folder.names and list(names) != folder.names:
        numbers = _numbers(folder.names, names, form.classes, path)
        store, among = _Relabelled(store, numbers), np.isin(np.arange(form.classes), numbers)
    return Benchmark(path.resolve().name, encoded_images.whole(store, form), among)


def _sets(root: Path, name: str = "") -> Iterator[tuple[str, image_folders.ClassFolders]]:
    """The folders of class folders at or below a folder, by their path from it."""
    inside = [p for p in image_folders.visible(root) if p.is_dir()] if root.is_dir() else []
    if any(any(map(is_picture, folder.iterdir())) for folder in inside) or not inside:
        yield name, image_folders.listing(root)
        return
    for folder in inside:
        yield from _sets(folder, f"{name}/{folder.name}".lstrip("/"))


def _numbers(found: Sequence[str], names: Sequence[str], classes: int, path: Path) -> list[int]:
    """Which of the run's classes these are: all by name, or all by number as ImageNet-V2 has them.

    Where classes are called by numbers themselves, `1` is the one of that name, not the second.
    """
    by_name = {name: number for number, name in enumerate(names)}
    by_number = {str(number): number for number in range(classes)}
    place = by_name if by_name.keys() & {*found, *by_number} else by_number
    if unknown := [name for name in found if name not in place]:
        known = ", ".join(f"`{name}`" for name in names[:3]) or f"0 to {classes - 1}"
        raise DataError(
            f"{path} has the class `{unknown[0]}`, and the run was trained on {classes} others "
            f"({known}{' …' if len(names) > 3 else ''}). Name class folders as those it was "
            "trained on, or by their numbers."
        )
    return [place[name] for name in found]


def _all(experiment: Experiment) -> np.ndarray:
    return np.ones(_classes(experiment), bool)


def _classes(experiment: Experiment) -> int:
    classes = experiment.material.classes
    assert classes is not None
    return classes
