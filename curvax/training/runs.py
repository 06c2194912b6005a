"""A run's folder: its config, its figures, its checkpoints and what it came to.

    config.json     every field, enough to resume
    metrics.jsonl   one line of figures for each logged step
    events.out...   the same for TensorBoard
    checkpoints/    the newest few
    results.json    the figures at the end; its presence says that the run is done
    table.txt, curves.png
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from curvax.training import config as configs

Record = dict[str, float]


class RunError(ValueError):
    """A folder that is no run, or holds another one."""


class Log:
    """The figures of a run by step: in memory, and, in a folder, as JSON lines and TensorBoard events.

    A line holds the step and figures named `train/loss`, `test/accuracy`; a figure that is not a
    number is left out of it.
    """

    def __init__(self, folder: Path | None = None, since: int = 0):
        self.records: list[Record] = []
        self._lines = self._events = None
        if folder is not None:
            self.records = [r for r in read_lines(folder / "metrics.jsonl") if r["step"] <= since]
            write_lines(folder / "metrics.jsonl", self.records)
            self._lines = (folder / "metrics.jsonl").open("a")
            self._events = SummaryWriter(str(folder), purge_step=since + 1)

    def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
        numbers = {f"{split}/{name}": float(value) for name, value in sorted(figures.items())}
        record: Record = {"step": step, **{k: v for k, v in numbers.items() if math.isfinite(v)}}
        self.records.append(record)
        if self._lines is not None and self._events is not None:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._lines is not None and self._events is not None:
            self._lines.close()
            self._events.close()


def read_lines(path: Path) -> Iterator[Any]:
    """The well-formed lines of a JSON-lines file; a last line cut short by a crash is dropped."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def write_lines(path: Path, records: list[Any]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def create(root: Path, name: str) -> Path:
    """A new folder `root/name-<date>-<time>`."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = root / (stem + suffix)
        if not folder.exists():
            folder.mkdir(parents=True)
            return folder
    raise RunError(f"{root} already holds 99 runs named {stem}. Give another folder with `--runs`.")
