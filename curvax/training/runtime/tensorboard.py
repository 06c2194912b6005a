"""Scalars for TensorBoard, written in the calling thread, so that a full disk raises there."""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """An event file. TensorBoard discards what earlier files hold of steps after `since`."""

    def __init__(self, folder: Path, since: int):
        self._writer = EventsWriter(str(folder / "events"), f".{since}")
        self._write(since + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=scalar(name, value))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
