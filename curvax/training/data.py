"""Examples in memory: parts of them, and batches that can be resumed."""

import functools
from typing import NamedTuple

import grain
import numpy as np

from curvax.training.archives import DataError


class Split(NamedTuple):
    """Examples: what a model is shown, and what it should say."""

    inputs: np.ndarray  # [N, ...]
    labels: np.ndarray  # [N, ...]

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.labels)

    def rows(self, which: np.ndarray | slice) -> "Split":
        """Some of the examples: their numbers, a mask, or a slice."""
        return Split(self.inputs[which], self.labels[which])


class Dataset(NamedTuple):
    """What a model is trained on, and what it is tested on."""

    train: Split
    test: Split
    classes: int | None = None  # logits or targets of a model; None where its outputs are inputs


def take(split: Split, amount: float, *, seed: int) -> Split:
    """A part of the split that keeps the shares of the classes, each to within an example.

    With one seed, a smaller part is contained in a larger one.

    Args:
        amount: a fraction in (0, 1], or above 1 a number of examples.

    Raises:
        DataError: nothing would be left, or more is asked for than there is.
    """
    size = split.size
    count = round(amount * size) if amount <= 1 else round(amount)
    if not 0 < count <= size:
        raise DataError(
            f"`take` gives a fraction in (0, 1] or a number of examples up to {size}, the size of "
            f"the split, and got {amount}. Leave it at 1 for all of them."
        )
    return divide(split, size - count, seed=seed, purpose="take")[0]


def hold_out(split: Split, fraction: float = 0.1, *, seed: int) -> tuple[Split, Split]:
    """Divides a training set into (training, validation), keeping the shares of the classes.

    The 10 % are Foret et al.'s, arXiv:2010.01412, section 3.1, who chose ρ on them.

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(fraction * split.size)
    if not 0 < count < split.size:
        raise DataError(
            f"`hold_out` keeps a fraction in (0, 1) for validation, and {fraction} of "
            f"{split.size} examples leaves one of the two parts empty."
        )
    return divide(split, count, seed=seed, purpose="hold_out")


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose: what is held out says nothing about what is noisy."""
    return np.random.default_rng([seed, *purpose.encode()])


def divide(split: Split, last: int, *, seed: int, purpose: str) -> tuple[Split, Split]:
    """All but `last` examples, and those, each part with the shares of the classes and in the
    order of the split."""
    order = _stratified(split.labels, stream(seed, purpose))
    cut = len(order) - last
    return split.rows(np.sort(order[:cut])), split.rows(np.sort(order[cut:]))


def _stratified(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order each of whose beginnings has the classes in their shares.

    The i-th of the n members of a class stands at (i + ½) / n of the way, ties in random order.
    Labels with further axes make no classes.
    """
    shuffled = rng.permutation(len(labels))
    if labels.ndim > 1:
        return shuffled
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place, kind="stable")]


def numbers(values: np.ndarray) -> np.ndarray:
    """Values as a model reads them: bytes, which are pixels, in [0, 1], other integers as int32,
    the rest as float32."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255)
    kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
    return values.astype(kind, copy=False)


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
    """Batches {"input": [B, ...], "label": [B, ...]} of `numbers`, epoch after epoch.

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
            inputs and labels that differ in number.
    """
    _check_lengths(split)
    _check_batch(split.size, batch_size, drop_remainder, shard, shards)
    whole, rest = divmod(split.size, batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    part = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        rng = stream(seed, f"epoch {epoch}")
        return rng.permutation(split.size) if shuffle else np.arange(split.size)

    def gather(number: int, step: int) -> dict[str, np.ndarray]:
        rows = order(number // steps)[step * batch_size : (step + 1) * batch_size]
        mask = np.arange(batch_size) < len(rows)
        rows = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])[part]
        batch = {"input": numbers(split.inputs[rows]), "label": numbers(split.labels[rows])}
        return batch if drop_remainder else batch | {"mask": mask[part]}

    places = grain.MapDataset.range(steps).repeat(epochs)
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(places.map_with_index(gather).to_iter_dataset(in_this_thread))


def _check_lengths(split: Split) -> None:
    if len(split.inputs) != len(split.labels):
        raise DataError(
            f"Every input has its label, and there are {len(split.inputs)} inputs and "
            f"{len(split.labels)} labels."
        )


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
