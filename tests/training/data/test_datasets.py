"""Parts of data sets, held-out examples, and resumable batches."""

import json

import numpy as np
import pytest
from image_archives import make_images

from curvax.training.data import datasets
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Split
from curvax.training.data.labelled_images import flip_labels


def make_split(size=200, classes=4, seed=0):
    """Images filled with their own number."""
    labels = np.random.default_rng(seed).integers(0, classes, size).astype(np.int32)
    images = np.broadcast_to(
        np.arange(size, dtype=np.float32)[:, None, None, None], (size, 2, 2, 1)
    )
    return Split(images, labels)


def identities(split):
    return split.inputs[:, 0, 0, 0].astype(int)


# Parts


@pytest.mark.parametrize(
    ("amount", "size"), [(1, 200), (1.0, 200), (0.5, 100), (0.25, 50), (0.1, 20), (37, 37)]
)
def test_take_keeps_the_size_and_the_shares_of_the_classes(amount, size):
    split = make_split()
    part = datasets.take(split, amount, seed=5)
    assert len(part.labels) == size
    expected = np.bincount(split.labels) * size / 200
    assert np.all(np.abs(np.bincount(part.labels, minlength=4) - expected) <= 1)
    np.testing.assert_array_equal(part.labels, split.labels[identities(part)])


def test_a_smaller_part_is_contained_in_a_larger_one():
    split = make_split()
    small, large = (set(identities(datasets.take(split, f, seed=5))) for f in (0.1, 0.25))
    assert small < large


def test_held_out_examples_and_the_rest_are_the_whole():
    split = make_split()
    train, validation = datasets.hold_out(split, seed=2)
    assert len(validation.labels) == 20
    both = np.concatenate([identities(train), identities(validation)])
    np.testing.assert_array_equal(np.sort(both), np.arange(200))
    expected = np.bincount(split.labels) / 10
    assert np.all(np.abs(np.bincount(validation.labels, minlength=4) - expected) <= 1)


def test_held_out_examples_are_independent_of_label_noise():
    split = make_split(2000)
    _, validation = datasets.hold_out(split, 0.5, seed=7)
    noisy = flip_labels(split.labels, 0.5, 4, seed=7) != split.labels
    shared = noisy[identities(validation)].sum()
    assert abs(shared - 500) < 5 * np.sqrt(2000) / 4  # hypergeometric


def test_take_splits_labels_with_axes_without_classes():
    split = make_split(40)
    part = datasets.take(Split(split.inputs, split.inputs), 0.5, seed=5)
    assert part.size == 20
    np.testing.assert_array_equal(part.labels, part.inputs)
    assert identities(part).tolist() != list(range(20))


@pytest.mark.parametrize("amount", [0, -0.5, 201, 0.001])
def test_parts_out_of_range_are_refused(amount):
    with pytest.raises(DataError, match=f"up to 200.*{amount}"):
        datasets.take(make_split(), amount, seed=0)
    with pytest.raises(DataError, match="empty"):
        datasets.hold_out(make_split(), max(amount, 1), seed=0)


# Numbers


def test_bytes_become_the_unit_interval_and_other_numbers_keep_their_value():
    scaled = datasets.numbers(np.array([0, 51, 255], np.uint8))
    np.testing.assert_array_equal(scaled, np.array([0, 0.2, 1], np.float32))
    assert scaled.dtype == np.float32
    floats = np.array([0.25, 1], np.float32)
    assert datasets.numbers(floats) is floats
    assert datasets.numbers(np.array([3, 300])).dtype == np.int32
    assert datasets.numbers(np.array([0.5])).dtype == np.float32


# Batches


def test_epoch_shows_each_example_once_in_its_own_order():
    split = make_split(60)
    epochs: list[list[int]] = [[], []]
    for number, batch in enumerate(datasets.batches(split, 20, seed=4, epochs=2)):
        rows = batch["input"][:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(batch["label"], split.labels[rows])
        epochs[number // 3].extend(rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60))
    assert epochs[0] != epochs[1]
    first = next(datasets.batches(split, 60, seed=5))["input"][:, 0, 0, 0].tolist()
    assert first != epochs[0]


def test_batches_have_float32_inputs_and_int32_labels():
    batch = next(datasets.batches(Split(make_images(8, 3, 3, 1), np.arange(8)), 4))
    assert batch["input"].dtype == np.float32
    assert batch["input"].max() <= 1
    assert batch["label"].dtype == np.int32
    assert batch.keys() == {"input", "label"}


def test_numbered_batches_have_the_places_of_their_examples():
    split = make_split(60)
    shards = [
        datasets.batches(split, 20, seed=4, numbered=True, shard=shard, shards=2)
        for shard in range(2)
    ]
    for _, *parts in zip(range(4), *shards):
        for batch in parts:
            assert batch["index"].dtype == np.int32
            np.testing.assert_array_equal(batch["index"], batch["input"][:, 0, 0, 0])
        assert len(set(parts[0]["index"]) | set(parts[1]["index"])) == 20


def test_iterator_state_resumes_exactly():
    fresh = lambda: datasets.batches(make_split(50), 8, seed=9)
    one, other = fresh(), fresh()
    for _ in range(15):  # into the third epoch
        next(one)
    other.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(10):
        np.testing.assert_array_equal(next(one)["input"], next(other)["input"])


def test_last_test_batch_is_padded_and_masked():
    split = make_split(10)
    batches = list(datasets.batches(split, 4, shuffle=False, epochs=1, drop_remainder=False))
    assert [batch["mask"].tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True] * 2 + [False] * 2,
    ]
    assert {batch["input"].shape for batch in batches} == {(4, 2, 2, 1)}
    kept = np.concatenate([batch["input"][batch["mask"], 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(kept, np.arange(10))


def test_shards_of_a_batch_join_to_the_batch():
    split = make_split(40)
    whole = next(datasets.batches(split, 12, seed=1))
    parts = [next(datasets.batches(split, 12, seed=1, shard=i, shards=3)) for i in range(3)]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 41}, "at most the 40"),
        ({"batch_size": 0}, "`batch_size` 0"),
        ({"batch_size": 10, "shards": 3}, "multiple of 3"),
        ({"batch_size": 9, "shard": 3, "shards": 3}, "counts from 0"),
    ],
)
def test_batch_options_out_of_range_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        datasets.batches(make_split(40), **options)


def test_different_numbers_of_inputs_and_labels_are_refused():
    with pytest.raises(DataError, match="6 inputs and 5 labels"):
        datasets.batches(Split(make_images(6, 2, 2, 1), np.zeros(5, np.int32)), 2)
