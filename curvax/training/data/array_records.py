"""A folder of array_record files ↦ its records, each by its number.

Files are named as tensorflow-datasets names them, `NAME-train.array_record-00000-of-00004`; what it
prepared reads like what `curvax convert` wrote, `label.labels.txt` with the names of the classes
and `features.json` included. Records are read at random places: no buffer shuffles them.
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
_KEPT_OPEN = 256  # files; to open one again takes a tenth of what it takes to decode a picture


def shard_name(name: str, part: str, number: int, of: int) -> str:
    """The file of one shard of a part, "train" for instance."""
    return f"{name}-{part}.array_record-{number:05}-of-{of:05}"


class Shards:
    """The records of one part of a data set, numbered through its files."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(_count, self.paths))
        self._ends = np.cumsum(counts)
        self._reader = functools.lru_cache(_KEPT_OPEN)(_opened)

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self._ends[-1])

    def read(self, number: int) -> Example:
        """One record; threads may ask at once.

        Raises:
            DataError: its file is damaged there, or it is no picture with a label.
        """
        path, place = self._find(number)
        try:
            return tf_example.decode(self._reader(path).read([place])[0])
        except RuntimeError as error:
            raise _damaged(path, error) from error
        except DataError as error:
            raise DataError(
                f"{self.place(number)} cannot be used: {error}. Convert the pictures again."
            ) from error

    def place(self, number: int) -> str:
        """Where a record is, in words."""
        path, place = self._find(number)
        return f"record {place} of {path}"

    def _find(self, number: int) -> tuple[Path, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.paths[shard], int(number - (self._ends[shard - 1] if shard else 0))


class Folder(NamedTuple):
    """What there is in a folder of array_record files."""

    parts: dict[str, list[Path]]  # the files of "train", "validation" and so on, in order
    names: list[str]  # of the classes, where they are told
    classes: int | None  # how many there are, where that is told

    def part(self, *names: str) -> Shards:
        """The first of these parts that there is.

        Raises:
            DataError: there is none of them, or a file is damaged.
        """
        for name in names:
            if name in self.parts:
                return Shards(self.parts[name])
        folder = next(iter(self.parts.values()))[0].parent
        raise DataError(
            f"{folder} has the parts {', '.join(self.parts)}, and none called "
            f"{' or '.join(f'`{name}`' for name in names)}. Convert the pictures of that part too."
        )


def read_folder(folder: Path) -> Folder:
    """The folder's files, by part.

    Raises:
        DataError: it is no folder, it holds no records, or some of its files are missing.
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
    return Folder(parts, names, len(names) or _told_classes(folder))


def _require_all(paths: Sequence[Path]) -> None:
    """Refuses a part of several data sets, or with gaps."""
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


def _told_classes(folder: Path) -> int | None:
    """As tensorflow-datasets tells it of its feature "label".

    Raises:
        DataError: it has no such feature, or no classes in it.
    """
    file = folder / "features.json"
    if not file.exists():
        return None
    try:
        features = json.loads(file.read_text())["featuresDict"]["features"]
        return int(features["label"]["classLabel"]["numClasses"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Pictures in records have one class each, and {file} tells of no feature `label` with "
            "classes. Take a data set of that kind."
        ) from error


def _count(path: Path) -> int:
    """The number of records."""
    reader = _opened(path)
    count = reader.num_records()  # 0 where the file is damaged
    try:
        reader.close()  # only then it says so
    except RuntimeError as error:
        raise _damaged(path, error) from error
    return count


def _opened(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), _AT_RANDOM)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({str(error).partition(';')[0]}): it may be cut short. Copy it "
        "again from where it is whole, or convert the pictures again."
    )
