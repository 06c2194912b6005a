"""Examples in memory or in files, their subsets, and batches that can be resumed."""

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import grain
import numpy as np

from curvax.training.data.archives import DataError

Draw = tuple[int, int]
"""(seed of the run, number of the epoch), from which random crops are derived."""


class Examples(Protocol):
    """Inputs and labels, in memory or in files."""

    @property
    def size(self) -> int:
        """The number of examples."""

    @property
    def ahead(self) -> int:
        """The number of batches to prefetch."""

    def rows(self, which: np.ndarray | slice) -> Self:
        """A subset, given by indices, a mask, or a slice."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order, int [N]; every prefix is class-balanced if the labels are in memory."""

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, np.ndarray]:
        """A batch {"input": [B, ...], "label": [B, ...]}; deterministic.

        Args:
            rows: indices [B].
            draw: determines the random training crops; None gives the crop of an evaluation.
        """


Some = TypeVar("Some", bound=Examples)


class Split(NamedTuple):
    """Examples in memory."""

    inputs: np.ndarray  # [N, ...]
    labels: np.ndarray  # [N, ...]

    @property
    def size(self) -> int:
        """The number of examples.

        Raises:
            DataError: inputs and labels differ in number.
        """
        if len(self.inputs) != len(self.labels):
            raise DataError(
                f"Every input has its label, and there are {len(self.inputs)} inputs and "
                f"{len(self.labels)} labels."
            )
        return len(self.labels)

    @property
    def ahead(self) -> int:
        return 0  # nothing to load

    def rows(self, which: np.ndarray | slice) -> Self:
        return self._replace(inputs=self.inputs[which], labels=self.labels[which])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order in which every prefix is class-balanced.

        Member i of the n members of a class is placed at (i + ½) / n of the order; ties are in
        random order. Labels with more than one axis are not classes.
        """
        shuffled = rng.permutation(self.size)
        if self.labels.ndim > 1:
            return shuffled
        place = np.empty(self.size)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels[shuffled] == label)
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        return shuffled[np.argsort(place, kind="stable")]

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, np.ndarray]:
        """A batch, converted by `numbers`."""
        return {"input": numbers(self.inputs[rows]), "label": numbers(self.labels[rows])}


Kind = TypeVar("Kind", bound=Examples, covariant=True)


class Dataset(NamedTuple, Generic[Kind]):
    """A training set and a test set."""

    train: Kind
    test: Kind
    classes: int | None = None  # number of model outputs; None for an autoencoder
    names: Sequence[str] = ()  # of the classes, if they have any


def take(split: Some, amount: float, *, seed: int) -> Some:
    """A class-balanced subset: the share of each class is kept to within one example.

    With the same seed, a smaller subset is contained in a larger one.

    Args:
        split: the examples to choose from.
        amount: a fraction in (0, 1], or a number of examples above 1.
        seed: of the choice.

    Raises:
        DataError: the subset would be empty, or larger than the split.
    """
    size = split.size
    count = round(amount * size) if amount <= 1 else round(amount)
    if not 0 < count <= size:
        raise DataError(
            f"`take` needs a fraction in (0, 1] or a number of examples up to {size}, the size of "
            f"the split, and got {amount}. Use 1 for all examples."
        )
    return divide(split, size - count, seed=seed, purpose="take")[0]


def hold_out(split: Some, fraction: float = 0.1, *, seed: int) -> tuple[Some, Some]:
    """Splits a training set into class-balanced parts (training, validation).

    The default of 10 % is that of Foret et al., arXiv:2010.01412, section 3.1, for choosing ρ.

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(fraction * split.size)
    if not 0 < count < split.size:
        raise DataError(
            f"`hold_out` keeps a fraction in (0, 1) for validation, and {fraction} of "
            f"{split.size} examples leaves one of the two parts empty. Use more examples, or "
            "another fraction."
        )
    return divide(split, count, seed=seed, purpose="hold_out")


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random generator per seed and purpose.

    Held-out examples and label noise, for instance, are independent.
    """
    return np.random.default_rng([seed, *purpose.encode()])


def divide(split: Some, last: int, *, seed: int, purpose: str) -> tuple[Some, Some]:
    """Splits into all but `last` examples and the rest, both class-balanced and in the original
    order."""
    order = split.order(stream(seed, purpose))
    cut = len(order) - last
    return split.rows(np.sort(order[:cut])), split.rows(np.sort(order[cut:]))


def numbers(values: np.ndarray) -> np.ndarray:
    """Values as a model reads them: bytes as pixels in [0, 1], other integers as int32, the rest as
    float32."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255)
    kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
    return values.astype(kind, copy=False)


def batches(
    split: Examples,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    numbered: bool = False,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An iterator over batches {"input": [B, ...], "label": [B, ...]}.

    A batch depends only on its number and the seed, so that `get_state()` is that number and
    `set_state()` resumes exactly. Grain counts and prefetches; whole batches are gathered at once,
    since its mapping of single examples costs milliseconds per batch.

    Args:
        split: the examples.
        batch_size: B, of the global batch.
        seed: of the order, which differs between epochs, and of the crops.
        shuffle: True for training, in random order with random crops of image files; False for
            evaluation, in the original order with central crops.
        epochs: number of passes; endless by default.
        drop_remainder: drop the last, incomplete batch of an epoch. Otherwise it is padded with
            copies of its first example, and every batch has a "mask", bool [B], False on padding.
        numbered: whether batches have an "index", int32 [B], the places of the examples in the
            split.
        shard, shards: yield the contiguous `shard`-th of `shards` equal parts of every batch; the
            global batches are the same for any number of processes.

    Raises:
        DataError: the batch is larger than the split or does not divide into the shards, or inputs
            and labels differ in number.
    """
    _check_batch(split.size, batch_size, drop_remainder, shard, shards)
    whole, rest = divmod(split.size, batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    part = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)

    @functools.lru_cache(maxsize=2)  # prefetched batches may belong to the next epoch
    def order(epoch: int) -> np.ndarray:
        rng = stream(seed, f"epoch {epoch}")
        return rng.permutation(split.size) if shuffle else np.arange(split.size)

    def gather(number: int, step: int) -> dict[str, np.ndarray]:
        epoch = number // steps
        rows = order(epoch)[step * batch_size : (step + 1) * batch_size]
        mask = np.arange(batch_size) < len(rows)
        rows = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])[part]
        batch = split.gather(rows, (seed, epoch) if shuffle else None)
        if numbered:
            batch["index"] = rows.astype(np.int32)
        return batch if drop_remainder else batch | {"mask": mask[part]}

    places = grain.MapDataset.range(steps).repeat(epochs)
    ahead = grain.ReadOptions(num_threads=split.ahead, prefetch_buffer_size=split.ahead)
    return iter(places.map_with_index(gather).to_iter_dataset(ahead))


def _check_batch(size: int, batch_size: int, drop_remainder: bool, shard: int, shards: int) -> None:
    if batch_size < 1 or (drop_remainder and batch_size > size):
        raise DataError(
            f"A batch holds at least one example and at most the {size} there are, and got "
            f"`batch_size` {batch_size}. Use a smaller batch, or `drop_remainder=False`."
        )
    if not 0 <= shard < shards or batch_size % shards:
        raise DataError(
            f"A batch is divided equally and `shard` counts from 0, and got `batch_size` "
            f"{batch_size}, `shard` {shard}, `shards` {shards}. Use a multiple of {shards}."
        )
