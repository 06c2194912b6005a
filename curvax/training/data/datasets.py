"""Examples in memory or in files: parts of them, and batches that can be resumed."""

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import grain
import numpy as np

from curvax.training.data.archives import DataError

Draw = tuple[int, int]
"""The seed of a run and the number of an epoch: what a split draws by chance follows from them."""


class Examples(Protocol):
    """What a model is shown, and what it should say, wherever it is kept."""

    @property
    def size(self) -> int:
        """The number of examples."""

    @property
    def ahead(self) -> int:
        """How many batches to gather before they are asked for."""

    def rows(self, which: np.ndarray | slice) -> Self:
        """Some of the examples: their numbers, a mask, or a slice."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order [N] each of whose beginnings is a fair part of the whole."""

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, np.ndarray]:
        """{"input": [B, ...], "label": [B, ...]} of some examples, the same at each call.

        Args:
            draw: from which an example's training crop follows; without it, as in a test.
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
        return 0  # they are there

    def rows(self, which: np.ndarray | slice) -> Self:
        return self._replace(inputs=self.inputs[which], labels=self.labels[which])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order each of whose beginnings has the classes in their shares.

        The i-th of the n members of a class stands at (i + ½) / n of the way, ties in random order.
        Labels with further axes make no classes.
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
        """The examples as `numbers`."""
        return {"input": numbers(self.inputs[rows]), "label": numbers(self.labels[rows])}


Kind = TypeVar("Kind", bound=Examples, covariant=True)


class Dataset(NamedTuple, Generic[Kind]):
    """What a model is trained on, and what it is tested on."""

    train: Kind
    test: Kind
    classes: int | None = None  # logits or targets of a model; None where its outputs are inputs
    names: Sequence[str] = ()  # of the classes, where they have any


def take(split: Some, amount: float, *, seed: int) -> Some:
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


def hold_out(split: Some, fraction: float = 0.1, *, seed: int) -> tuple[Some, Some]:
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


def divide(split: Some, last: int, *, seed: int, purpose: str) -> tuple[Some, Some]:
    """All but `last` examples, and those, each part with the shares of the classes and in the
    order of the split."""
    order = split.order(stream(seed, purpose))
    cut = len(order) - last
    return split.rows(np.sort(order[:cut])), split.rows(np.sort(order[cut:]))


def numbers(values: np.ndarray) -> np.ndarray:
    """Values as a model reads them: bytes, which are pixels, in [0, 1], other integers as int32,
    the rest as float32."""
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
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches {"input": [B, ...], "label": [B, ...]}, epoch after epoch.

    A batch follows from its number and the seed alone, so `get_state()` is that number and
    `set_state()` resumes exactly. Grain counts, and gathers ahead what takes time; whole batches
    are gathered at once, since its per-example mapping costs milliseconds a batch.

    Args:
        seed: of the order, which differs between epochs, and of what is drawn for each example.
        shuffle: whether for training, in random order and cropped at random where the examples are
            files; otherwise in their order, each as in a test.
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
    _check_batch(split.size, batch_size, drop_remainder, shard, shards)
    whole, rest = divmod(split.size, batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    part = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)

    @functools.lru_cache(maxsize=2)  # batches ahead may be of the next epoch
    def order(epoch: int) -> np.ndarray:
        rng = stream(seed, f"epoch {epoch}")
        return rng.permutation(split.size) if shuffle else np.arange(split.size)

    def gather(number: int, step: int) -> dict[str, np.ndarray]:
        epoch = number // steps
        rows = order(epoch)[step * batch_size : (step + 1) * batch_size]
        mask = np.arange(batch_size) < len(rows)
        rows = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])[part]
        batch = split.gather(rows, (seed, epoch) if shuffle else None)
        return batch if drop_remainder else batch | {"mask": mask[part]}

    places = grain.MapDataset.range(steps).repeat(epochs)
    ahead = grain.ReadOptions(num_threads=split.ahead, prefetch_buffer_size=split.ahead)
    return iter(places.map_with_index(gather).to_iter_dataset(ahead))


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
