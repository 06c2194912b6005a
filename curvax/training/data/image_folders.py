"""A folder with one folder of pictures for each class ↦ its files and their labels."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curvax.training.data.archives import DataError, require_folder
from curvax.training.data.tf_example import Example

_SUFFIXES = {".jpeg", ".jpg", ".png"}


class Files(NamedTuple):
    """Pictures that lie in a file each."""

    paths: Sequence[Path]
    labels: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> Example:
        """One of them.

        Raises:
            DataError: the file cannot be read.
        """
        path = self.paths[number]
        try:
            return Example(path.read_bytes(), self.labels[number], path.name)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error

    def place(self, number: int) -> str:
        return f"the file {self.paths[number]}"


class ClassFolders(NamedTuple):
    """What there is in a folder of class folders."""

    root: Path
    names: list[str]  # of the classes, sorted
    pictures: list[tuple[str, Path]]  # the class and the file of each
    aside: list[Path]  # files that are no pictures by their names

    def files(self, number: Mapping[str, int]) -> Files:
        """The pictures, labelled by the number of their class.

        Raises:
            DataError: a class that has none.
        """
        if unknown := [name for name in self.names if name not in number]:
            raise DataError(
                f"{self.root} has the class folder `{unknown[0]}`, and none of the {len(number)} "
                f"classes, {_few(list(number))}, is called so. Rename the folder, or move it away."
            )
        labels = [number[name] for name, _ in self.pictures]
        return Files([path for _, path in self.pictures], labels)


def listing(root: Path) -> ClassFolders:
    """The pictures below a folder; what begins with a dot is passed over.

    Raises:
        DataError: it is no folder, there is no class folder in it, a class without pictures, or a
            picture outside of the class folders.
    """
    require_folder(root, "class folders")
    inside = list(visible(root))
    folders = [path for path in inside if path.is_dir()]
    if stray := [path for path in inside if is_image(path)]:
        raise DataError(
            f"{root} should hold a folder of pictures for each class, and outside of these it has "
            f"{_few([path.name for path in stray])}. Move such pictures into their classes' "
            "folders, or away."
        )
    if not folders:
        raise DataError(
            f"{root} holds no class folders. Put the pictures of each class into a folder of its "
            "own, as ROOT/CLASS/picture.jpg, and give ROOT."
        )
    content = {folder.name: list(visible(folder)) for folder in folders}
    pictures = [(name, path) for name, paths in content.items() for path in paths]
    kept = [(name, path) for name, path in pictures if is_image(path)]
    if empty := sorted(set(content) - {name for name, _ in kept}):
        raise DataError(
            f"The class folder {root / empty[0]} holds no pictures ({', '.join(sorted(_SUFFIXES))})"
            ". Fill it, or remove it."
        )
    aside = [path for path in inside if path.is_file()]
    aside += [path for _, path in pictures if not is_image(path)]
    return ClassFolders(root, list(content), kept, aside)


def is_image(path: Path) -> bool:
    """Whether it is a file that its name says is a picture."""
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def visible(folder: Path) -> Iterator[Path]:
    """What is in a folder, sorted, but what begins with a dot."""
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _few(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (" …" if len(names) > 3 else "")
