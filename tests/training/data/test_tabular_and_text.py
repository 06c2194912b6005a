"""Tables and texts as data sets."""

import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from sklearn.datasets import load_diabetes

from curvax.training.data import tabular, text
from curvax.training.data.archives import DataError

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
