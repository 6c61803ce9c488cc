"""TensorBoard event files, by tensorboardX.

tensorboardX's `SummaryWriter` writes in a thread. A full disk ends that thread, and the run then waits for it forever.
So this module uses the class below it, `EventsWriter`, which writes at once and raises. `EventsWriter` also keeps an
`@` in tags, which `SummaryWriter` replaces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]


class EventFile:
    """One event file, in a directory that exists. Each call writes to the disk before it returns.

    Every call raises OSError when the file cannot be written.
    """

    def __init__(self, directory: Path):
        # Without the suffix, two runs that begin in the same second would write the same file.
        self._file = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._file.flush()

    def restarted(self, step: int) -> None:
        """Marks as void what other files of the directory hold of this step and later ones."""
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=found)))

    def image(self, step: int, tag: str, png: bytes, height: int, width: int) -> None:
        """Writes a picture. `png`: an RGB picture, encoded as PNG."""
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=picture)])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
