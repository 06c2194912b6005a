"""`curvax convert`: folders of images ↦ array_record files.

Training reads thousands of images per second at random; single files would cost a disk seek each.
Every image is decoded once here, so that no training stops at a damaged one. The new folder appears
under its name once it is complete.
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

_SHARD = 2**28  # bytes of images per file
_SHOWN = 20  # damaged images listed by name
_ROOM = 2**26  # free bytes required in addition to the images

Report = Callable[[int], None]
"""`report(count)`, called with the number of further images done."""


class Summary(NamedTuple):
    """The result of a conversion."""

    folder: Path
    classes: int
    counts: dict[str, tuple[int, int]]  # part ↦ (images, files)
    damaged: list[str]  # path and error of images that cannot be decoded
    aside: list[Path]  # files that are not images by their names


def command(images: Path, out: Path, validation: Path | None, skip: bool) -> None:
    """`curvax convert`: converts with a progress bar and prints a summary."""
    console = Console()
    parts = find_parts(images, validation)
    total = sum(len(part.images) for part in parts.values())
    with Progress(console=console) as progress:
        bar = progress.add_task(_counted(total, "image"), total=total)
        summary = convert(parts, out, skip=skip, report=lambda n: progress.advance(bar, n))
    console.print(as_text(summary), markup=False, highlight=False, soft_wrap=True)


def as_text(summary: Summary) -> str:
    """The summary as text."""
    lines = [f"{summary.folder}: images of {_counted(summary.classes, 'class')}"]
    lines += [
        f"  {part}: {_counted(count, 'image')} in {_counted(files, 'file')}"
        for part, (count, files) in summary.counts.items()
    ]
    if summary.damaged:
        lines += [f"{_counted(len(summary.damaged), 'image')} left out:", *_few(summary.damaged)]
    if summary.aside:
        lines += ["Not images by their names, ignored:", *_few(map(str, summary.aside))]
    return "\n".join(lines)


def find_parts(images: Path, validation: Path | None = None) -> dict[str, ClassFolders]:
    """Finds the parts "train" and, if there is one, "validation".

    Args:
        images: a folder of class folders, or a folder that holds `train` and perhaps `val`.
        validation: the class folders of the second part.

    Raises:
        DataError: a folder has no class folders.
    """
    inside = images / "train"
    if not inside.is_dir():
        inside = images
    elif validation is None:
        names = ("val", "validation")
        validation = next((images / n for n in names if (images / n).is_dir()), None)
    found = {"train": inside} | ({"validation": validation} if validation else {})
    return {part: image_folders.listing(path) for part, path in found.items()}


def convert(
    parts: dict[str, ClassFolders],
    out: Path,
    *,
    skip: bool = False,
    report: Report = lambda count: None,
) -> Summary:
    """Writes the parts to a new folder, in an order shuffled by a fixed seed.

    Args:
        parts: part ↦ its class folders.
        out: the new folder.
        skip: leave out images that cannot be decoded; otherwise they are an error.
        report: called after every image.

    Raises:
        DataError: the folder exists, a part has a class that "train" lacks, images cannot be
            decoded, or the disk is full. Nothing is kept then.
    """
    names = parts["train"].names
    numbers = {name: number for number, name in enumerate(names)}
    files = {part: listing.files(numbers) for part, listing in parts.items()}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists. Give a new folder, or remove it.")
    with _draft(out, files) as draft:
        damaged: list[str] = []
        counts = {
            part: _write(draft, re.sub(r"\W", "_", out.name), part, some, damaged, report)
            for part, some in files.items()
        }
        if damaged and not skip:
            raise DataError(
                f"{_counted(len(damaged), 'image')} cannot be decoded, and nothing was kept. "
                "Replace or remove the following, or leave them out with `--skip`:\n"
                + "\n".join(_few(damaged))
            )
        if empty := [part for part, (count, _) in counts.items() if not count]:
            raise DataError(
                f"No image of `{empty[0]}` can be decoded, and nothing was kept:\n"
                + "\n".join(_few(damaged))
            )
        (draft / array_records.CLASSES).write_text("".join(f"{name}\n" for name in names))
    aside = [path for listing in parts.values() for path in listing.aside]
    return Summary(out, len(names), counts, damaged, aside)


@contextlib.contextmanager
def _draft(out: Path, files: dict[str, Files]) -> Iterator[Path]:
    """A temporary folder next to `out`, renamed to it at the end, and removed after an error."""
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
            f"The images could not be written to {out} ({error}), and nothing was kept. Make room, "
            "or give another folder."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(
    folder: Path, name: str, part: str, files: Files, damaged: list[str], report: Report
) -> tuple[int, int]:
    """Writes one part, and returns its numbers of images and files."""
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
    """The record of an image, or None and the error."""
    try:
        example = files.read(row)
        decode.check(example.image)
    except DataError as error:
        return None, f"{files.paths[row]}: {error}"
    return tf_example.encode(example), ""


def _few(lines: Sequence[str] | Iterator[str]) -> list[str]:
    """The first lines, indented, and the number of those left out."""
    every = list(lines)
    more = [f"  and {len(every) - _SHOWN} more"] if len(every) > _SHOWN else []
    return [f"  {line}" for line in every[:_SHOWN]] + more


def _counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`, `2 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
