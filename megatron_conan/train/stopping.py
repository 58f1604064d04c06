"""Requests to stop: a file STOP in the run's folder, or a signal to any rank."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 3.0
"""Ctrl-C reaches a rank twice at once, from the terminal and from torchrun; one that comes later is meant as a second one."""


def stop_file(run_dir: Path) -> Path:
    """The file that asks a run to stop: `touch RUN/STOP`. The next start removes it."""
    return run_dir / "STOP"


class StopRequest:
    """Notes signals within its context, instead of dying of them. A second Ctrl-C ends the process at once."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Rank 0 alone looks for the file: on a shared file system that costs something."""
        self._file = stop_file(run_dir) if rank == 0 else None
        self._before: dict[signal.Signals, Any] = {}
        self.signalled_at: float | None = None
        """time.monotonic() of the first signal; None if there was none."""

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_made(self) -> bool:
        """Whether this rank knows of a request."""
        return self.signalled_at is not None or (self._file is not None and self._file.exists())

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
        elif number == signal.SIGINT and now - self.signalled_at > AGAIN_SECONDS:
            raise KeyboardInterrupt
