"""A run folder: config and spec, and for every run its metrics, checkpoints and results.

config.json, run.json       all fields, and the command with its methods: enough to resume
table.txt, curves.png ...   the results
.lock                       the process that trains it, or did last
0-adamw/seed0/              a run of the first method
    metrics.jsonl           one line of metrics per logged step
    events.out...           the same for TensorBoard
    checkpoints/            the newest few
    results.json            the final metrics; its presence marks the run as finished
"""

import contextlib
import errno
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from curvax.training.config import configs
from curvax.training.config.renamed import DataConfig, RunConfig, translated
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.tensorboard import Events

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

Record = dict[str, float]
"""The step, and metrics under names like `train/loss` and `test/accuracy`."""

_CONFIG, _METRICS, _RESULTS = "config.json", "metrics.jsonl", "results.json"
_SPEC, _OLD_SPEC = "run.json", "plan.json"
VARIANT, SEED = re.compile(r"(\d+)-.*"), re.compile(r"seed(\d+)")
"""Names of the folders inside, with the number of the method and of the seed."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Log:
    """The metrics of a run by step: in memory, and in a folder as JSON lines and for TensorBoard.

    Values that are not finite are left out of the lines. A log reopened `since` a step discards
    later records.
    """

    def __init__(self, folder: Path | None = None, since: int = 0):
        self.records: list[Record] = []
        self._lines = self._events = None
        if folder is not None:
            self.records = [record for record in records(folder) if record["step"] <= since]
            write_lines(folder / _METRICS, self.records)
            self._lines = (folder / _METRICS).open("a")
            self._events = Events(folder, since)

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        numbers = {f"{split}/{name}": float(value) for name, value in sorted(metrics.items())}
        record: Record = {"step": step, **{k: v for k, v in numbers.items() if math.isfinite(v)}}
        self.records.append(record)
        if self._lines and self._events:
            self._lines.write(json.dumps(record) + "\n")
            for name, value in numbers.items():
                self._events.scalar(name, value, step)

    def flush(self) -> None:
        if self._lines and self._events:
            self._lines.flush()
            self._events.flush()

    def close(self) -> None:
        """Writes pending records, ignoring write errors."""
        if self._lines and self._events:
            for file in (self._lines, self._events):
                with contextlib.suppress(OSError):
                    file.close()


class Outcome(NamedTuple):
    """The result of a run."""

    metrics: dict[str, float]  # final; {} if the run diverged
    records: list[Record]  # logged during training


def records(folder: Path) -> list[Record]:
    """The logged records; a last line truncated by a crash is dropped."""
    return list(read_lines(folder / _METRICS))


def outcome(folder: Path | None) -> Outcome | None:
    """The result of the run in a folder, or None if it is not finished."""
    if folder is None or not (folder / _RESULTS).exists():
        return None
    return Outcome(json.loads((folder / _RESULTS).read_text()), records(folder))


def finish(folder: Path | None, metrics: Mapping[str, float]) -> None:
    """Writes results.json, which marks the run in the folder as finished."""
    if folder is not None:
        write_json(folder / _RESULTS, dict(metrics))


def read_config(folder: Path) -> ConfigDict:
    """The config of a run.

    Renamed fields are read under their old names too, and fields that a later version of curvax
    added have their defaults.

    Raises:
        ConfigError: the folder holds no run, or the file is damaged.
    """
    path, known = folder / _CONFIG, configs.defaults().to_dict()
    stored = read_json(path)
    try:
        stored = translated(stored)
        data = DataConfig({**known["data"], **stored["data"]})
        return RunConfig({**known, **stored, "data": data}).lock()
    except (AttributeError, TypeError, KeyError) as error:
        raise damaged(path, "it holds no config") from error


def read_spec(folder: Path) -> Any:
    """The contents of run.json, or of plan.json, its name in older runs; errors as `read_config`.

    The file says which command and which methods the run belongs to.
    """
    return read_json(_spec_file(folder))


def write_spec(folder: Path, page: Any) -> None:
    """Keeps in run.json what `read_spec` reads."""
    write_json(folder / _SPEC, page)


def is_run(folder: Path) -> bool:
    """Whether `read_spec` finds a file in this folder."""
    return _spec_file(folder).exists()


def _spec_file(folder: Path) -> Path:
    current, old = folder / _SPEC, folder / _OLD_SPEC
    return old if old.exists() and not current.exists() else current


def bad_spec(folder: Path) -> ConfigError:
    """The error for a run.json that names no command and methods."""
    return damaged(_spec_file(folder), "it names no command and methods")


def read_json(path: Path) -> Any:
    """The contents of a JSON file of a run folder; errors as in `read_config`."""
    if not path.exists():
        raise ConfigError(f"{path.parent} holds no run: `{path.name}` is missing.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, reason: str) -> ConfigError:
    """The error for an unusable file of a run folder."""
    return ConfigError(
        f"{path} is damaged ({reason}). Restore the file, for instance from another run of the "
        "same command, or train anew."
    )


def read_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON-lines file, up to a truncated line."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def write_lines(path: Path, records: list[Any]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, page: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(page, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def check_root(root: Path) -> None:
    """Checks that run folders can be created in `root`, which may not exist yet.

    Raises:
        ConfigError: they cannot.
    """
    path = root.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError(
            f"Run folders are made in {root}, and no folder can be made in {there} "
            f"({error.strerror}). Give another folder as `--runs DIR`."
        ) from error


def create(root: Path, command: str, config: ConfigDict) -> Path:
    """Creates the folder `root/<config>-<command>-<date>-<time>` and writes config.json."""
    folder = root / f"{config.name}-{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    while folder.exists():
        folder = folder.with_name(folder.name + "b")
    folder.mkdir(parents=True)
    write_json(folder / _CONFIG, config.to_dict())
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run folder for this process; the system releases the lock when the process ends.

    On file systems without locks this does nothing.

    Raises:
        ConfigError: another process holds the lock.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"The run in {folder} is in progress: {file.read() or 'another process'} holds it. "
                "Wait until it ends, or stop it, and then resume."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
