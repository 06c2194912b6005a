"""A folder with one folder of images per class ↦ files and labels."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curvax.training.data.archives import DataError, require_folder
from curvax.training.data.tf_example import Example

_SUFFIXES = {".jpeg", ".jpg", ".png"}


class Files(NamedTuple):
    """Images in a file each."""

    paths: Sequence[Path]
    labels: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> Example:
        """Reads one image.

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
    """The content of a folder of class folders."""

    root: Path
    names: list[str]  # of the classes, sorted
    images: list[tuple[str, Path]]  # (class, file)
    aside: list[Path]  # files that are not images by their names

    def files(self, number: Mapping[str, int]) -> Files:
        """The images, labelled with the number of their class.

        Raises:
            DataError: a class has no number.
        """
        if unknown := [name for name in self.names if name not in number]:
            raise DataError(
                f"{self.root} has the class folder `{unknown[0]}`, which is not one of the "
                f"{len(number)} classes, {_few(list(number))}. Rename the folder, or remove it."
            )
        labels = [number[name] for name, _ in self.images]
        return Files([path for _, path in self.images], labels)


def listing(root: Path) -> ClassFolders:
    """Lists the images below a folder; hidden files are ignored.

    Raises:
        DataError: the path is not a folder, it has no class folders, a class has no images, or an
            image lies outside of the class folders.
    """
    require_folder(root, "class folders")
    inside = list(visible(root))
    folders = [path for path in inside if path.is_dir()]
    if stray := [path for path in inside if is_image(path)]:
        raise DataError(
            f"{root} should hold a folder of images for each class, and outside of these it has "
            f"{_few([path.name for path in stray])}. Move such images into the folders of their "
            "classes, or remove them."
        )
    if not folders:
        raise DataError(
            f"{root} holds no class folders. Put the images of each class into a folder of its "
            "own, as ROOT/CLASS/image.jpg, and give ROOT."
        )
    content = {folder.name: list(visible(folder)) for folder in folders}
    images = [(name, path) for name, paths in content.items() for path in paths]
    kept = [(name, path) for name, path in images if is_image(path)]
    if empty := sorted(set(content) - {name for name, _ in kept}):
        raise DataError(
            f"The class folder {root / empty[0]} holds no images ({', '.join(sorted(_SUFFIXES))}). "
            "Fill it, or remove it."
        )
    aside = [path for path in inside if path.is_file()]
    aside += [path for _, path in images if not is_image(path)]
    return ClassFolders(root, list(content), kept, aside)


def is_image(path: Path) -> bool:
    """Whether a path is a file with the suffix of an image."""
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def visible(folder: Path) -> Iterator[Path]:
    """The content of a folder, sorted, without hidden files."""
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _few(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (" …" if len(names) > 3 else "")
