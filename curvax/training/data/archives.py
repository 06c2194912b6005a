"""Readers of published image archives: path ↦ images uint8 [N, H, W, C] and labels int32 [N].

Nothing is downloaded or unpacked on disk. Each reader returns the authors' training and test parts.
"""

import gzip
import importlib.util
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = tuple[np.ndarray, np.ndarray]
"""Images [N, H, W, C] and labels [N]."""


class DataError(ValueError):
    """Data that cannot be found, read or used."""


def require_folder(path: Path, of: str) -> None:
    """Checks that a path is a folder.

    Args:
        path: the folder.
        of: its content, for the message.

    Raises:
        DataError: it is a file, or does not exist.
    """
    if not path.is_dir():
        cause = "it is a file" if path.exists() else "it does not exist"
        raise DataError(
            f"{path} is not a folder of {of}: {cause}. Give the folder that holds them."
        )


def packaged_file(package: str, name: str, requirement: str) -> Path:
    """The path of a file that an installed package ships. The package is not imported.

    Args:
        package: the package's name.
        name: the path of the file there.
        requirement: what pip installs it from, for the message.

    Raises:
        DataError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / name).is_file():
        raise DataError(
            f"`{name}` is read from the package `{package}`, which "
            f"{'is not installed' if folder is None else 'does not have it'}. Install it: "
            f"`pip install {requirement}`."
        )
    return folder / name


def packaged_table(
    package: str, name: str, delimiter: str | None, dtype: npt.DTypeLike = np.float64
) -> np.ndarray:
    """The numbers of a table that a package of `curvax[train]` ships; its own readers take seconds.

    Args:
        package, name: as in `packaged_file`, of plain or compressed text.
        delimiter: between the columns; white space by default.
        dtype: of the numbers.

    Raises:
        DataError: the package, or the table in it, is missing.
    """
    path = packaged_file(package, name, "'curvax[train]'")
    return np.loadtxt(path, dtype, delimiter=delimiter)


def idx(folder: Path) -> tuple[Arrays, Arrays]:
    """The four IDX .gz files of MNIST and Fashion-MNIST."""
    images = lambda part: _idx_array(folder / f"{part}-images-idx3-ubyte.gz")[..., None]
    labels = lambda part: _idx_array(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int32)
    return (images("train"), labels("train")), (images("t10k"), labels("t10k"))


def _idx_array(path: Path) -> np.ndarray:
    """One file: bytes 0, 0, 8 (unsigned byte), the rank, big-endian int32 sizes, the entries."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, error) from error
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * rank
    shape = np.frombuffer(content[4:start], ">i4").tolist()
    if not rank or len(content) != start + math.prod(shape):
        raise damaged(path, f"{len(content)} bytes do not make an IDX array of unsigned bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def cifar10(path: Path) -> tuple[Arrays, Arrays]:
    """`cifar-10-python.tar.gz`, or the folder `cifar-10-batches-py` extracted from it."""
    train = [f"data_batch_{i}" for i in range(1, 6)]
    content = _contents(path, "cifar-10-batches-py", [*train, "test_batch"])
    parts = {name: _cifar_arrays(path / name, content[name], "labels") for name in content}
    return _joined(parts[name] for name in train), parts["test_batch"]


def cifar100(path: Path) -> tuple[Arrays, Arrays]:
    """`cifar-100-python.tar.gz`, or the folder `cifar-100-python`; labels are the 100 fine ones."""
    content = _contents(path, "cifar-100-python", ["train", "test"])
    train, test = (
        _cifar_arrays(path / name, content[name], "fine_labels") for name in ("train", "test")
    )
    return train, test


def _cifar_arrays(path: Path, content: bytes, labels: str) -> Arrays:
    """One batch: a pickled dict whose rows are 3072 bytes, colour planes one after the other."""
    try:
        batch: dict[bytes, Any] = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.asarray(batch[labels.encode()], np.int32)
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, ValueError) as error:
        raise damaged(path, error) from error


class _Unpickler(pickle.Unpickler):
    """Reads arrays pickled by Python 2, and refuses all other objects, which could run code."""

    _ALLOWED: Mapping[str, Any] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": lambda name, align, copy: np.dtype(name, align=bool(align), copy=bool(copy)),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self._ALLOWED:
            return self._ALLOWED[name]
        raise pickle.UnpicklingError(f"it holds a `{module}.{name}`, which no CIFAR archive does")


def svhn(folder: Path, *, extra: bool = False) -> tuple[Arrays, Arrays]:
    """`train_32x32.mat` and `test_32x32.mat`; `extra` adds the 531 131 easier images to train."""
    train = [_svhn_arrays(folder / "train_32x32.mat")]
    if extra:
        train.append(_svhn_arrays(folder / "extra_32x32.mat"))
    return _joined(train), _svhn_arrays(folder / "test_32x32.mat")


def _svhn_arrays(path: Path) -> Arrays:
    """One file: `X` [32, 32, 3, N], and `y` [N, 1] in which the digit 0 is written 10."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        with path.open("rb") as file:
            content = loadmat(file)
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].ravel() % 10
    except (
        MatReadError,
        ValueError,
        TypeError,
        KeyError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise damaged(path, error) from error
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _contents(path: Path, folder: str, names: Collection[str]) -> dict[str, bytes]:
    """The named files of a .tar.gz, of the folder it extracts to, or of that folder's parent."""
    if path.is_dir():
        inside = path / folder if (path / folder).is_dir() else path
        return {name: (inside / name).read_bytes() for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in names and (file := tar.extractfile(member)):
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise damaged(path, error) from error
    if missing := sorted(set(names) - set(found)):
        raise damaged(path, f"it holds no `{missing[0]}`")
    return found


def _joined(parts: Iterable[Arrays]) -> Arrays:
    images, labels = zip(*parts)
    return np.concatenate(images), np.concatenate(labels)


def damaged(path: Path, cause: object) -> DataError:
    """The error for a file whose content does not match its name."""
    return DataError(
        f"{path} is not the archive its authors published ({cause}): it may be truncated or "
        "be another file. Download it again and give its path."
    )
