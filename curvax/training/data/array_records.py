"""A folder of array_record files, with random access to its records.

File names are those of tensorflow-datasets, `NAME-train.array_record-00000-of-00004`. Folders that
it prepared and folders that `curvax convert` wrote are read alike, with `label.labels.txt` (the
names of the classes) and `features.json`. Shuffling is by random access, without a buffer.
"""

import functools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from curvax.training.data import tf_example
from curvax.training.data.archives import DataError, require_folder
from curvax.training.data.tf_example import Example

CLASSES = "label.labels.txt"
_SHARD = re.compile(r"(.+)-(\w+)\.array_record-(\d{5})-of-(\d{5})")
_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
_KEPT_OPEN = 256  # files; opening one takes a tenth of the time of decoding an image


def shard_name(name: str, part: str, number: int, of: int) -> str:
    """The file name of one shard of a part, "train" for instance."""
    return f"{name}-{part}.array_record-{number:05}-of-{of:05}"


class Shards:
    """The records of one part of a data set, numbered across its files."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(_count, self.paths))
        self._ends = np.cumsum(counts)
        self._reader = functools.lru_cache(_KEPT_OPEN)(_opened)

    @property
    def size(self) -> int:
        """The number of records."""
        return int(self._ends[-1])

    def read(self, number: int) -> Example:
        """Reads one record; thread-safe.

        Raises:
            DataError: the file is damaged, or the record is not an image with a label.
        """
        path, place = self._find(number)
        try:
            return tf_example.decode(self._reader(path).read([place])[0])
        except RuntimeError as error:
            raise _damaged(path, error) from error
        except DataError as error:
            raise DataError(
                f"{self.place(number)} cannot be used: {error}. Convert the images again."
            ) from error

    def place(self, number: int) -> str:
        """The location of a record, for messages."""
        path, place = self._find(number)
        return f"record {place} of {path}"

    def _find(self, number: int) -> tuple[Path, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.paths[shard], int(number - (self._ends[shard - 1] if shard else 0))


class Folder(NamedTuple):
    """The content of a folder of array_record files."""

    parts: dict[str, list[Path]]  # the files of "train", "validation" and so on, in order
    names: list[str]  # of the classes; empty if unknown
    classes: int | None  # number of classes; None if unknown

    def part(self, *names: str) -> Shards:
        """The first of these parts that exists.

        Raises:
            DataError: none of them exists, or a file is damaged.
        """
        for name in names:
            if name in self.parts:
                return Shards(self.parts[name])
        folder = next(iter(self.parts.values()))[0].parent
        raise DataError(
            f"{folder} has the parts {', '.join(self.parts)}, and none called "
            f"{' or '.join(f'`{name}`' for name in names)}. Convert the images of that part too."
        )


def read_folder(folder: Path) -> Folder:
    """Lists a folder's files by part.

    Raises:
        DataError: it is not a folder, holds no records, or misses some of its files.
    """
    require_folder(folder, "array_record files")
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _SHARD.fullmatch(path.name):
            parts.setdefault(match[2], []).append(path)
    if not parts:
        raise DataError(
            f"{folder} holds no array_record files, named as NAME-train.array_record-00000-of-00004"
            ". `curvax convert IMAGES FOLDER` makes them from a folder of class folders."
        )
    for paths in parts.values():
        _require_all(paths)
    names = _names(folder)
    return Folder(parts, names, len(names) or _number_of_classes(folder))


def _require_all(paths: Sequence[Path]) -> None:
    """Refuses a part with files of several data sets, or with missing files."""
    match = _SHARD.fullmatch(paths[0].name)
    assert match is not None
    name, part, _, of = match.groups()
    expected = [shard_name(name, part, number, int(of)) for number in range(int(of))]
    if odd := sorted(set(expected) ^ {path.name for path in paths}):
        cause = "is missing" if odd[0] in expected else "belongs to another data set"
        raise DataError(
            f"{paths[0].parent} should hold the {int(of)} files of one data set's `{part}`, and "
            f"`{odd[0]}` {cause}. Copy or convert it again."
        )


def _names(folder: Path) -> list[str]:
    file = folder / CLASSES
    return file.read_text().splitlines() if file.exists() else []


def _number_of_classes(folder: Path) -> int | None:
    """The number of classes in the features.json of tensorflow-datasets.

    Raises:
        DataError: the file has no feature "label" with a number of classes.
    """
    file = folder / "features.json"
    if not file.exists():
        return None
    try:
        features = json.loads(file.read_text())["featuresDict"]["features"]
        return int(features["label"]["classLabel"]["numClasses"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Images in records have one class each, and {file} has no feature `label` with "
            "classes. Use a data set of that kind."
        ) from error


def _count(path: Path) -> int:
    """The number of records."""
    reader = _opened(path)
    count = reader.num_records()  # 0 if the file is damaged
    try:
        reader.close()  # raises the error
    except RuntimeError as error:
        raise _damaged(path, error) from error
    return count


def _opened(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), _AT_RANDOM)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({str(error).partition(';')[0]}): it may be truncated. Copy it "
        "again, or convert the images again."
    )
