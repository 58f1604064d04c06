"""What a rank is doing, and how long it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

ORDER = ("start", "hooks", "data", "forward_backward", "optimizer", "agree", "checkpoint", "ended")
"""A step's phases as they follow each other. "hooks" are all of any other name; "start" is what lies between phases."""


def place(phase: str) -> int:
    """How far a rank in this phase has come in its step."""
    return ORDER.index(phase if phase in ORDER else "hooks")


@dataclass
class Phases:
    """The phase of the step that this rank is in, for the watchdog, and the seconds of all phases, for the metrics.

    Phases may lie within each other; an outer one doesn't count the seconds of an inner one.
    """

    step: int = 0
    """The step that is being made, from 1; 0 before the first."""
    phase: str = "start"
    """One of ORDER, or a hook: mining, evaluation."""
    since: float = field(default_factory=time.monotonic)
    """time.monotonic() at which the phase was entered, or gone back to."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds since `take`."""
    progress: int = 0
    """Grows with every change of phase, and every `touch`."""

    def touch(self) -> None:
        """Something got done within the phase: long ones say so, or they would seem to hang."""
        self.progress += 1

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The body is this phase."""
        outer = self.phase
        self._go(phase)
        try:
            yield
        finally:
            self._go(outer)

    def take(self) -> dict[str, float]:
        """Seconds of all phases since this was asked last, up to now."""
        self._go(self.phase)
        taken, self.seconds = self.seconds, {}
        return taken

    def _go(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now
        self.progress += 1
