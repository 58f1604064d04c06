"""Tells which rank the others wait for, and ends a run that hangs.

A thread in every rank notes in the process group's store where its rank is; that of rank 0 reads all notes. Nothing is asked
of the training itself but to say which phase it is in (`Phases`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType

import torch.distributed as dist

from megatron_conan.config.operation import WatchdogConfig
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.phases import Phases

BEAT_SECONDS = 1.0
"""Time between two notes of a rank."""
SILENT_SECONDS = 8.0
"""A rank that has not noted anything for this long is gone, or stopped."""
EXIT_STATUS = 1
WAITING = ("forward_backward", "optimizer")
"""Phases in which ranks wait for each other."""


@dataclass(frozen=True)
class Note:
    """Where a rank is."""

    rank: int
    host: str
    step: int
    phase: str
    progress: int
    """Grows with everything the rank gets done."""
    beat: int
    """Grows with every note."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"


@dataclass
class _Seen:
    """A rank's last note, and when by this process's clock it changed."""

    note: Note
    progress_at: float
    beat_at: float


class Watchdog:
    """Watches a run within its context."""

    def __init__(
        self,
        phases: Phases,
        settings: WatchdogConfig,
        context: ParallelContext,
        signalled_at: Callable[[], float | None] = lambda: None,
    ) -> None:
        """All ranks must make one.

        Args:
            phases: where this rank is.
            settings: when to tell, and when to end the run.
            context: this rank's place.
            signalled_at: time.monotonic() of the first signal that asked this rank to stop.
        """
        self._phases, self._settings, self._context = phases, settings, context
        self._signalled_at = signalled_at
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._end = threading.Event()
        self._main = threading.get_ident()
        self._store: dist.Store = dist.HashStore()
        if context.world_size > 1:  # a connection of its own: the main thread may be waiting in the other
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._seen: dict[int, _Seen] = {}
        self._beat = 0
        self._told_at = 0.0
        self._asked = 0

    def __enter__(self) -> Watchdog:
        self._note_own()  # so that every rank has been heard of
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        told = min(self._settings.report_seconds, self._settings.abort_seconds)
        pause = min(BEAT_SECONDS, told / 4)
        lost_at: float | None = None
        while not self._end.wait(pause):
            try:
                self._note_own()
                signalled = self._signalled_at()
                if self._context.rank == 0 or signalled is not None:
                    self._read_all()
                if signalled is not None and time.monotonic() - signalled > SILENT_SECONDS:
                    self._leave_if_others_are_gone()
                if self._context.rank == 0:
                    self._judge()
                self._obey()
                lost_at = None
            except (RuntimeError, OSError):  # the store is gone: with its host, or at the end of the run
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > self._settings.abort_seconds:
                    _leave(f"rank {self._context.rank} ends: the host of the process group's store is gone")

    def _note_own(self) -> None:
        self._beat += 1
        phases = self._phases
        note = Note(self._context.rank, socket.gethostname(), phases.step, phases.phase, phases.progress, self._beat)
        self._store.set(str(note.rank), json.dumps(asdict(note)))

    def _read_all(self) -> None:
        now = time.monotonic()
        for rank in range(self._context.world_size):
            if not self._store.check([str(rank)]):
                continue
            note = Note(**json.loads(self._store.get(str(rank))))
            seen = self._seen.setdefault(rank, _Seen(note, now, now))
            if note.progress != seen.note.progress:
                seen.progress_at = now
            if note.beat != seen.note.beat:
                seen.beat_at = now
            seen.note = note

    def _judge(self) -> None:
        """Rank 0: tell of a run that stands still, once, and end it in the end."""
        now = time.monotonic()
        stands_since = max(seen.progress_at for seen in self._seen.values())
        still = now - stands_since
        if still >= self._settings.abort_seconds:
            self._store.set("leave", f"no progress for {still:.0f} s (watchdog.abort_seconds)")
        elif still >= self._settings.report_seconds and self._told_at < stands_since:
            self._told_at = now
            text, behind = report([seen.note for seen in self._seen.values()], self._silent(now), still)
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self._store.set("stacks", json.dumps([self._beat, behind]))

    def _silent(self, now: float) -> list[int]:
        return [rank for rank, seen in self._seen.items() if now - seen.beat_at > SILENT_SECONDS]

    def _leave_if_others_are_gone(self) -> None:
        """After a signal: torchrun sends one to the ranks that are left when one has died, and they may wait for it forever."""
        if silent := self._silent(time.monotonic()):
            names = ", ".join(self._seen[rank].note.name for rank in silent)
            _leave(f"rank {self._context.rank} ends: {names} is gone")

    def _obey(self) -> None:
        """Do what rank 0 asks for."""
        if self._store.check(["stacks"]):
            number, ranks = json.loads(self._store.get("stacks"))
            if number != self._asked and self._context.rank in ranks:
                frame = sys._current_frames().get(self._main)
                where = "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)\n"
                print(f"rank {self._context.rank} is here:\n{where}", end="", file=sys.stderr, flush=True)
            self._asked = number
        if self._store.check(["leave"]):
            _leave(f"rank {self._context.rank} ends: {self._store.get('leave').decode()}")


def report(notes: Sequence[Note], silent: Sequence[int], still: float) -> tuple[str, list[int]]:
    """What to say of a run that stands still, and the ranks that the others wait for.

    Those are the ranks at the earliest step, and among these the ones in a phase in which ranks don't wait for each other, or
    else in the rarest; all, if all are at one place.

    Args:
        notes: of all ranks that have ever noted anything.
        silent: ranks that don't note anything any more.
        still: seconds without progress.
    """
    groups: dict[tuple[int, str], list[Note]] = {}
    for note in sorted(notes, key=lambda note: note.rank):
        if note.rank not in silent:
            groups.setdefault((note.step, note.phase), []).append(note)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] in WAITING, len(group[1])))
    parts = []
    if silent:
        gone = ", ".join(note.name for note in notes if note.rank in silent)
        parts.append(f"{gone} gives no sign of life (its process is gone, or stopped)")
    for (step, phase), members in ordered:
        some = ", ".join(note.name for note in members[:4])
        more = f" and {len(members) - 4} more" if len(members) > 4 else ""
        parts.append(f"in phase {phase} of step {step}: {some}{more}")
    behind = [note.rank for note in ordered[0][1]] if ordered else []
    return f"no progress for {still:.0f} s: {'; '.join(parts)}", behind


def _leave(message: str) -> None:
    """End this process, whatever its main thread is waiting in."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)
