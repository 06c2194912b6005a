"""Checksums of folders, stored next to them, so that damage is detected before reading."""

import hashlib
from pathlib import Path

from curvax.training.runtime.run_dir import write_text


def seal(folder: Path) -> None:
    """Stores the checksum of a folder, and removes those of deleted folders."""
    for other in folder.parent.glob("*.sha256"):
        if not other.with_suffix("").is_dir():
            other.unlink()
    write_text(_place(folder), _checksum(folder))


def check(folder: Path) -> None:
    """Compares a folder with its checksum, if it has one.

    Raises:
        OSError: they differ.
    """
    place = _place(folder)
    if place.exists() and place.read_text() != _checksum(folder):
        raise OSError("its files are not those that were written")


def _place(folder: Path) -> Path:
    return folder.with_name(folder.name + ".sha256")


def _checksum(folder: Path) -> str:
    """One SHA-256 over the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()
