"""Folders of pictures ↦ array_record files: what `curvax convert` does.

Training reads thousands of pictures a second at random places; a file each would cost a search on
disk each. Every picture is decoded once here, so that no training stops at a damaged one. The
folder appears under its name when it is whole.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.console import Console
from rich.progress import Progress

from curvax.training.data import array_records, decode, image_folders, tf_example
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import stream
from curvax.training.data.image_folders import ClassFolders, Files

_SHARD = 2**28  # bytes of pictures in a file, in memory at once
_SHOWN = 20  # damaged pictures by name
_ROOM = 2**26  # bytes on the disk beside the pictures

Report = Callable[[int], None]
"""Told how many more pictures are done."""


class Summary(NamedTuple):
    """What was converted."""

    folder: Path
    classes: int
    counts: dict[str, tuple[int, int]]  # of each part: pictures and files
    damaged: list[str]  # what could not be decoded, with its path
    aside: list[Path]  # files that were no pictures


def command(pictures: Path, out: Path, validation: Path | None, skip: bool) -> None:
    """`curvax convert`: converts with a progress bar, and says what came of it."""
    console = Console()
    parts = find_parts(pictures, validation)
    total = sum(len(part.pictures) for part in parts.values())
    with Progress(console=console) as progress:
        bar = progress.add_task(_counted(total, "picture"), total=total)
        summary = convert(parts, out, skip=skip, report=lambda n: progress.advance(bar, n))
    console.print(told(summary), markup=False, highlight=False, soft_wrap=True)


def told(summary: Summary) -> str:
    """The summary in words."""
    lines = [f"{summary.folder}: pictures of {_counted(summary.classes, 'class')}"]
    lines += [
        f"  {part}: {_counted(count, 'picture')} in {_counted(files, 'file')}"
        for part, (count, files) in summary.counts.items()
    ]
    if summary.damaged:
        lines += [f"{_counted(len(summary.damaged), 'picture')} left out:", *_few(summary.damaged)]
    if summary.aside:
        lines += ["No pictures by their names, left aside:", *_few(map(str, summary.aside))]
    return "\n".join(lines)


def find_parts(pictures: Path, validation: Path | None = None) -> dict[str, ClassFolders]:
    """The parts "train" and, where there is one, "validation".

    Args:
        pictures: a folder of class folders, or one around `train` and perhaps `val`.
        validation: the class folders of the second part.

    Raises:
        DataError: one of them is none.
    """
    inside = pictures / "train"
    if not inside.is_dir():
        inside = pictures
    elif validation is None:
        names = ("val", "validation")
        validation = next((pictures / n for n in names if (pictures / n).is_dir()), None)
    found = {"train": inside} | ({"validation": validation} if validation else {})
    return {part: image_folders.listing(path) for part, path in found.items()}


def convert(
    parts: dict[str, ClassFolders],
    out: Path,
    *,
    skip: bool = False,
    report: Report = lambda count: None,
) -> Summary:
    """Writes the parts to a new folder, in an order that a fixed seed shuffles.

    Args:
        skip: leave pictures out that cannot be decoded; otherwise nothing is kept.

    Raises:
        DataError: the folder is there already, a class of a later part is not among the first's,
            pictures cannot be decoded, or the disk is full.
    """
    names = parts["train"].names
    numbers = {name: number for number, name in enumerate(names)}
    files = {part: listing.files(numbers) for part, listing in parts.items()}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already. Give a new folder, or remove it.")
    with _draft(out, files) as draft:
        damaged: list[str] = []
        counts = {
            part: _write(draft, re.sub(r"\W", "_", out.name), part, some, damaged, report)
            for part, some in files.items()
        }
        if damaged and not skip:
            raise DataError(
                f"{_counted(len(damaged), 'picture')} cannot be decoded, and nothing was kept. "
                "Replace or remove what follows, or leave it out with `--skip`:\n"
                + "\n".join(_few(damaged))
            )
        if empty := [part for part, (count, _) in counts.items() if not count]:
            raise DataError(
                f"There is no picture of `{empty[0]}` that can be decoded, and nothing was kept:\n"
                + "\n".join(_few(damaged))
            )
        (draft / array_records.CLASSES).write_text("".join(f"{name}\n" for name in names))
    aside = [path for listing in parts.values() for path in listing.aside]
    return Summary(out, len(names), counts, damaged, aside)


@contextlib.contextmanager
def _draft(out: Path, files: dict[str, Files]) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is removed if it is not reached."""
    draft = out.with_name(out.name + ".part")
    try:
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        needed = _ROOM + sum(path.stat().st_size for some in files.values() for path in some.paths)
        if (free := shutil.disk_usage(draft).free) < needed:
            raise OSError(f"it needs {needed} bytes and {free} are free")
        yield draft
        draft.rename(out)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"The pictures could not be written to {out} ({error}), and nothing was kept. Make "
            "room, or give another folder."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(
    folder: Path, name: str, part: str, files: Files, damaged: list[str], report: Report
) -> tuple[int, int]:
    """Writes one part, and returns how many pictures in how many files."""
    order = stream(0, f"convert {part}").permutation(files.size)
    size = sum(path.stat().st_size for path in files.paths)
    shards = np.array_split(order, min(files.size, 1 + size // _SHARD))
    written = 0
    with ThreadPoolExecutor() as pool:
        for number, rows in enumerate(shards):
            path = folder / array_records.shard_name(name, part, number, len(shards))
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for record, fault in pool.map(lambda row: _record(files, row), rows.tolist()):
                if record is None:
                    damaged.append(fault)
                else:
                    writer.write(record)
                    written += 1
                report(1)
            writer.close()
    return written, len(shards)


def _record(files: Files, row: int) -> tuple[bytes | None, str]:
    """The record of a picture, or what is wrong with it."""
    try:
        example = files.read(row)
        decode.check(example.image)
    except DataError as error:
        return None, f"{files.paths[row]}: {error}"
    return tf_example.encode(example), ""


def _few(lines: Sequence[str] | Iterator[str]) -> list[str]:
    """The first lines, indented, and how many more there are."""
    every = list(lines)
    more = [f"  and {len(every) - _SHOWN} more"] if len(every) > _SHOWN else []
    return [f"  {line}" for line in every[:_SHOWN]] + more


def _counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`, `2 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
